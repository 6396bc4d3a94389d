"""Data: a Minari dataset -> flat tensors -> windows; a text -> tokens -> blocks.

All transitions of all episodes stand end to end in a few tensors on the training device, and each
transition knows where its episode ends. A batch of windows is then one tensor of indices: no Python
per sample. Drawing a window's first step uniformly over transitions is what the Decision
Transformer does in two draws, an episode in proportion to its length, then a place in it.

Observations that are pictures are kept once each, as bytes. A state is then STACK frames in a row,
and neighbouring states share all but one of them, so a window of K states is K + STACK - 1 frames.
"""

import hashlib
import io
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from tasks import STACK, encode_actions, flatten, is_picture, observation_shape, shrink
from utils import UserError, network_available, reading, reason, write_atomically

BUNDLED = Path(__file__).parent / "assets" / "minari"  # datasets that come with the project
COLLECT = "python -m experiments.collect"
OURS = ("lamo/", "d4rl/", "dqn-replay/")  # how ids of its sets begin: they are on no server
PICTURES = 256  # read and made small together
GPU_SHARE = 0.6  # of a GPU's free memory that frames may take; else they stay on the CPU
WIKITEXT = "Salesforce/wikitext"  # on the hub: WikiText-103 (Merity et al. 2017), raw, CC BY-SA
WIKITEXT_FILES = [f"wikitext-103-raw-v1/train-0000{i}-of-00002.parquet" for i in range(2)]
GPT2 = "openai-community/gpt2"  # on the hub: its byte-pair encoding
CHUNK = 1 << 20  # characters tokenised at a time


# --- which dataset -------------------------------------------------------------------------------


def find_dataset(env, task, ratio, name=None, quality="medium"):
    """The Minari dataset to train on: found, fetched, or the bundled one.

    env: the task's name; task: its row of tasks.TASKS; ratio: the share of the full dataset wanted,
    in (0, 1]; name: a Minari id or a folder, which is found, fetched or an error; None: the first
    to be had of the task's dataset, the set that experiments/collect.py records, and the bundled
    part of that; quality: which one of the task's datasets, where it has several.
    Returns (MinariDataset, share, note): share is how much of a full dataset it holds (its
    about.json may say so), note one line that says what was taken and why.
    Raises UserError, naming the command that would help, if there is none or it is too small.
    """
    local = Path(os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets")
    wanted = name or task.minari.format(quality=quality)
    places, why = [local / wanted, BUNDLED / wanted, Path(wanted)], ""
    if not any(is_dataset(place) for place in places):
        if Path(wanted).exists() or Path(wanted).is_absolute():
            raise UserError(f"{wanted} is no Minari dataset: it has no data/metadata.json in it")
        try:
            download_dataset(wanted, local)
        except Exception as error:  # the hub's, Minari's and the disk's errors alike
            why = f"{wanted} is not in {local} and cannot be downloaded ({reason(error)})"
    if name is None and quality == "medium" and task.recorded:
        places += [local / task.recorded, BUNDLED / task.bundled]
    shares = {place: share_of(place) for place in places if is_dataset(place)}
    if not shares:
        how = f"run `minari download {wanted}` where there is a network and copy it here"
        how = f"{COLLECT} --help" if wanted.startswith(OURS) else how
        raise UserError(f"no dataset: {why}; {how}, or give another: --dataset FOLDER")
    enough = [place for place, share in shares.items() if share >= ratio]
    if not enough:
        how = f"; or record a full set: {COLLECT} --env {env} --steps {task.full}"
        raise UserError(
            f"--ratio {ratio:g} asks for more than there is: {max(shares.values()):g} of a full "
            f"dataset in {', '.join(map(str, shares))}{how if task.recorded else ''}"
        )

    import minari

    with reading(enough[0], "a Minari dataset"):
        dataset = minari.MinariDataset(enough[0] / "data")
        dataset.spec, dataset.env_spec  # noqa: B018  (read when first asked for)
    note = f"{enough[0]}{', as asked' if name else ''}{', since ' if why else ''}{why}"
    return dataset, shares[enough[0]], note


def is_dataset(folder):
    """Whether a folder holds a Minari dataset."""
    return (folder / "data" / "metadata.json").is_file()


def share_of(folder):
    """The share of a full dataset that a folder holds, in (0, 1]."""
    about = folder / "about.json"
    with reading(about, "what experiments/collect.py writes"):
        return json.loads(about.read_text()).get("share", 1.0) if about.is_file() else 1.0


def download_dataset(name, local):
    """Download a Minari dataset into folder `local`, whole or not at all."""
    import minari

    if name.startswith(OURS) or not network_available():
        raise ConnectionError("it is on no server" if name.startswith(OURS) else "no network")
    print(f"downloading the dataset {name} to {local}", flush=True)
    local.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=local, prefix=".") as aside:
        os.environ["MINARI_DATASETS_PATH"] = aside  # Minari itself downloads in place
        try:
            minari.download_dataset(name)
        finally:
            os.environ["MINARI_DATASETS_PATH"] = str(local)
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(Path(aside) / name, local / name)


# --- from a dataset to tensors --------------------------------------------------------------------


@dataclass
class Trajectories:
    """N transitions of E episodes, end to end, on one device."""

    obs: torch.Tensor  # (N, O) float32, (observation - obs_mean) / obs_std; or (N, 84, 84) uint8
    act: torch.Tensor  # (N, A) float32, in [-1, 1] where the environment has bounds; or (N,) int64
    rtg: torch.Tensor  # (N, 1) float32, sum of rewards from here to the episode's end, / scale
    timestep: torch.Tensor  # (N,) int64, 0 at an episode's start
    end: torch.Tensor  # (N,) int64, index one past the last transition of the same episode
    obs_mean: torch.Tensor  # (O,) of the transitions in use; (0,) where obs are frames
    obs_std: torch.Tensor  # (O,) likewise, + 1e-6
    scale: float  # what returns-to-go were divided by
    returns: np.ndarray  # (E,) undiscounted, undivided
    lengths: np.ndarray  # (E,) transitions
    dataset_id: str = ""  # Minari's, of where they are from
    # what experiments/baselines.py reads besides, and windows do not
    reward: torch.Tensor | None = None  # (N,) float32, undivided
    terminated: torch.Tensor | None = None  # (N,) bool, an end that was no cut: nothing follows
    last_obs: torch.Tensor | None = None  # (E, O) or (E, 84, 84), after an episode's last action

    def __len__(self):
        return len(self.act)

    def digest(self):
        """SHA-256 that tells these transitions from others: of all numbers, and a few frames."""
        digest = hashlib.sha256()
        obs = self.obs[:: max(1, len(self) // 1000)] if self.obs.dim() == 3 else self.obs
        for tensor in (obs, self.act, self.rtg, self.end):
            digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()


def read_frames(shape, pictures):
    """Pictures of an episode -> frames (T + 1, 84, 84) uint8, a few pictures in memory at a time.

    shape: (H, W[, 1 or 3]) of a picture; pictures: (T + 1, *shape) bytes, or T + 1 rows of a JPEG's
    bytes; an array or an HDF5 dataset.
    """
    frames = []
    for i in range(0, len(pictures), PICTURES):
        part = pictures[i : i + PICTURES]
        if part.ndim < 3:  # JPEG
            part = np.stack([np.asarray(Image.open(io.BytesIO(row))) for row in part])
        frames.append(shrink(part.reshape(-1, *shape)))
    return np.concatenate(frames)


def read_episodes(dataset, indices, rewards=None):
    """Episodes of a Minari dataset, by index, one after another.

    rewards: a function of an episode's observations, as recorded, that replaces its rewards.
    Yields observations (T + 1, O) or (T + 1, 84, 84), actions, rewards (T,), and whether the last
    step ended the episode (True) or it was cut there.
    """
    space = dataset.observation_space
    if is_picture(space) and dataset.storage.FORMAT == "hdf5":
        # not through Minari, which would hold all of an episode's pictures: gigabytes
        with h5py.File(Path(dataset.spec.data_path) / "main_data.hdf5") as file:
            for episode in (file[f"episode_{i}"] for i in indices):
                ended = bool(episode["terminations"][-1:].any())
                frames = read_frames(space.shape, episode["observations"])
                yield frames, episode["actions"][()], episode["rewards"][()], ended
        return
    for episode in dataset.iterate_episodes(indices):
        seen = episode.observations
        obs = read_frames(space.shape, seen) if is_picture(space) else flatten(space, seen)
        earned = rewards(seen) if rewards else episode.rewards
        yield obs, episode.actions, earned, bool(episode.terminations[-1:].any())


def returns_to_go(rewards, delayed=False):
    """Sum of rewards from each step to the end: (T,) -> (T,). Delayed: all reward comes last."""
    if delayed:
        return np.full_like(rewards, rewards.sum())
    return rewards[::-1].cumsum()[::-1].copy()


def load_trajectories(
    dataset, action_space, scale=None, ratio=1.0, mode="normal", seed=0, device="cpu", rewards=None
):
    """Read episodes of a Minari dataset into flat tensors on the device.

    dataset: minari.MinariDataset; action_space: the environment's, whose bounds are where actions
    become -1 and 1; scale: what returns-to-go are divided by, None for the power of ten by which
    the largest return becomes 1 to 10; ratio: share of this dataset's episodes to keep,
    int(ratio * E) and at least one, drawn without replacement by the seed; mode "normal" or
    "delayed", where an episode's whole reward comes at its last step, the paper's sparse variant;
    rewards: as in read_episodes. Raises UserError for damaged files, and what cannot be learnt.
    """
    what, space = f"dataset {dataset.spec.dataset_id}", dataset.observation_space
    E = dataset.total_episodes
    if E == 0:
        raise UserError(f"{what} holds no episode")
    keep = max(1, int(ratio * E + 1e-9))  # 1e-9: 0.29 * 100 is 28.999999999999996
    chosen = dataset.episode_indices[np.random.default_rng(seed).choice(E, keep, replace=False)]
    chosen = np.sort(chosen)
    with reading(dataset.spec.data_path, "a Minari dataset"):
        lengths = [int(m["total_steps"]) for m in dataset.storage.get_episode_metadata(chosen)]
    N, frames = sum(lengths), is_picture(space)
    shape = observation_shape(space)[-2:]  # of a frame, or (O,)
    # all memory at once: a million frames are 7 GB, and there must be no second copy of them
    obs = np.empty((N, *shape), np.uint8 if frames else np.float32)
    last_obs = np.empty((keep, *shape), obs.dtype)
    act, rtg, reward, timestep, end, terminated, returns = [], [], [], [], [], [], []
    n = 0
    with reading(dataset.spec.data_path, "a Minari dataset"):
        episodes = zip(chosen, lengths, read_episodes(dataset, chosen, rewards), strict=True)
        for i, T, (o, a, r, ended) in tqdm(episodes, "reading", keep, delay=2, leave=False):
            if T == 0 or not (len(o) == T + 1 and len(a) == len(r) == T):
                raise UserError(f"{what}: episode {i} is empty or not whole")
            a, r = encode_actions(action_space, a), np.asarray(r, np.float64)
            for kind, values in (("observation", o), ("action", a), ("reward", r)):
                if not np.isfinite(values).all():
                    raise UserError(f"{what}: episode {i} has a NaN or infinite {kind}")
            obs[n : n + T], last_obs[len(returns)] = o[:T], o[T]  # the last one has no action
            n += T
            last = np.arange(T) == T - 1
            act.append(a)
            rtg.append(returns_to_go(r, mode == "delayed"))
            reward.append(r if mode == "normal" else last * r.sum())
            terminated.append(last & ended)
            timestep.append(np.arange(T))
            end.append(np.full(T, n))
            returns.append(r.sum())

    returns = np.array(returns)
    mean = std = np.zeros(0)
    if not frames:
        mean, std = obs.mean(0, np.float64), obs.std(0, np.float64) + 1e-6
        obs, last_obs = ((x - mean) / std for x in (obs, last_obs))
    if not scale:
        largest = np.abs(returns).max()
        scale = float(10.0 ** np.floor(np.log10(largest))) if largest > 0 else 1.0
    home = torch.device(device)
    if home.type == "cuda" and frames and obs.nbytes > GPU_SHARE * torch.cuda.mem_get_info(home)[0]:
        home = "cpu"
    float32 = torch.float32
    return Trajectories(
        obs=torch.as_tensor(obs).to(home, None if frames else float32),
        act=torch.as_tensor(np.concatenate(act)).to(home),
        rtg=torch.as_tensor(np.concatenate(rtg) / scale).to(home, float32)[:, None],
        timestep=torch.as_tensor(np.concatenate(timestep)).to(home),
        end=torch.as_tensor(np.concatenate(end)).to(home),
        obs_mean=torch.as_tensor(mean).to(device, float32),
        obs_std=torch.as_tensor(std).to(device, float32),
        scale=scale,
        returns=returns,
        lengths=np.array(lengths),
        dataset_id=dataset.spec.dataset_id,
        reward=torch.as_tensor(np.concatenate(reward)).to(home, float32),
        terminated=torch.as_tensor(np.concatenate(terminated)).to(home),
        last_obs=torch.as_tensor(last_obs).to(home, None if frames else float32),
    )


def sample_windows(data, batch, context, generator):
    """A batch of windows of up to `context` consecutive steps, each within one episode.

    The first step is uniform over all transitions. A window that meets its episode's end is padded
    on the right with repeats of the last step. generator: a torch.Generator on the data's device.
    Returns rtg (B, K, 1), obs (B, K, O), act (B, K, A) or (B, K), timestep (B, K) and valid (B, K)
    bool. Where obs are frames they are (B, K + STACK - 1, 84, 84), the state of step k being frames
    k to k + STACK - 1, black where they would be from before the episode.
    """
    device = data.obs.device
    start = torch.randint(len(data), (batch,), generator=generator, device=device)
    index = start[:, None] + torch.arange(context, device=device)  # (B, K)
    end = data.end[start][:, None]  # (B, 1)
    valid = index < end
    index = torch.minimum(index, end - 1)
    if data.obs.dim() == 2:
        obs = data.obs[index]
    else:
        before = start[:, None] - torch.arange(STACK - 1, 0, -1, device=device)  # (B, 3)
        first = (start - data.timestep[start])[:, None]  # (B, 1), where the episode begins
        obs = data.obs[torch.cat([before.clamp(min=first), index], dim=1)]  # (B, K + 3, 84, 84)
        obs[:, : STACK - 1][before < first] = 0
    return data.rtg[index], obs, data.act[index], data.timestep[index], valid


# --- text ----------------------------------------------------------------------------------------


def cache_folder():
    """Where texts and tokens are kept."""
    return Path(os.environ.get("LAMO_CACHE") or Path.home() / ".cache" / "lamo")


def get_encoding(vocab_size):
    """The tiktoken.Encoding of a model with this many tokens: GPT-2's BPE (50257) or bytes (257).

    Raises UserError for another vocabulary, or when GPT-2's BPE can be neither found nor fetched.
    """
    import tiktoken

    if vocab_size == 257:
        return tiktoken.Encoding(
            "bytes",
            pat_str=r"[\s\S]{1,64}",  # a piece only bounds the work at a time: no bytes merge
            mergeable_ranks={bytes([i]): i for i in range(256)},
            special_tokens={"<|endoftext|>": 256},
        )
    if vocab_size != 50257:
        why = "known: 50257 (GPT-2), 257 (bytes); train without text, --lm-coef 0"
        raise UserError(f"no tokeniser for a vocabulary of {vocab_size}, {why}")
    if os.environ.get("TIKTOKEN_CACHE_DIR"):
        with reading(os.environ["TIKTOKEN_CACHE_DIR"], "tiktoken's cache of GPT-2's BPE"):
            return tiktoken.get_encoding("gpt2")
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

    files = fetch("GPT-2's byte-pair encoding", GPT2, ["merges.txt", "vocab.json"])
    ranks, end = data_gym_to_mergeable_bpe_ranks(*files), {"<|endoftext|>": 50256}
    return tiktoken.Encoding(
        "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=end
    )


def fetch(what, repository, names, repo_type="model"):
    """Files of a repository on the hub, from its cache if they are there. Returns their paths.

    Raises UserError, naming what to type where there is a network.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    hub = {"repo_id": repository, "repo_type": repo_type}
    cached = all(isinstance(try_to_load_from_cache(filename=n, **hub), str) for n in names)
    try:  # what is cached is not asked for again: the client would wait for the network
        if not cached and not network_available():
            raise ConnectionError("it is not cached, and there is no network")
        return [hf_hub_download(filename=n, local_files_only=cached, **hub) for n in names]
    except Exception as error:  # the hub client's and its transport's many kinds
        how = f"hf download {repository} {' '.join(names)} --repo-type {repo_type}"
        how = f"run `{how}` where there is a network and copy the cache here"
        raise UserError(f"cannot get {what} ({reason(error)}); {how}") from error


def find_text(corpus=None, byte_level=True):
    """The text to learn language from.

    corpus: a file, "wikitext" (WikiText-103), "english" (the manual pages every Python has), or
    None: WikiText-103 if it can be had, else, for the mini LM, "english"; byte_level: whether the
    language model is the mini LM. Returns (Path, note), note as in find_dataset. Raises UserError,
    naming what to do, for what cannot be had.
    """
    if corpus not in (None, "wikitext", "english"):
        return Path(corpus), f"{corpus}, as asked"
    path, why = cache_folder() / "wikitext-103-train.txt", "as asked"
    if corpus != "english":
        try:
            if not path.is_file():
                files = fetch("WikiText-103", WIKITEXT, WIKITEXT_FILES, "dataset")
                write_atomically(path, lambda file: parquet_to_text(files, file))
            return path, f"WikiText-103 from {path}"
        except UserError as error:
            if corpus == "wikitext" or not byte_level:
                how = "or give any text, --corpus FILE, or do without, --lm-coef 0"
                raise UserError(f"{error}; {how}") from error
            why = "since WikiText-103 is neither cached nor to be fetched"
    from pydoc_data import topics

    text = "\n\n".join(topics.topics[key] for key in sorted(topics.topics)).encode()
    path = cache_folder() / f"python-manual-{hashlib.sha256(text).hexdigest()[:16]}.txt"
    if not path.is_file():
        write_atomically(path, lambda file: file.write(text))
    return path, f"the Python manual ({len(text) / 1e6:.1f} MB of pydoc_data.topics), {why}"


def parquet_to_text(files, out):
    """The column `text` of parquet files, in order, as UTF-8 into an open binary file."""
    import pyarrow.parquet as pq

    for file in files:
        for rows in pq.ParquetFile(file).iter_batches(columns=["text"]):
            out.writelines(text.encode() for text in rows["text"].to_pylist())


def tokenise(path, encoding, length=1):
    """The tokens of a UTF-8 text file, memory-mapped: (N,) uint16. Made once, kept in the cache.

    The cache's key is the text's SHA-256 and the encoding's name. Raises UserError for a file that
    cannot be read, is not UTF-8, or is shorter than a block of `length` tokens and its targets.
    """
    path = Path(path)
    with reading(path, "a UTF-8 text"), open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    cached = cache_folder() / "tokens" / f"{digest[:32]}-{encoding.name}.bin"

    def write(file):
        bar = tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc="tokenising", delay=1)
        with bar, open(path, encoding="utf-8", newline="") as text:
            while chunk := text.read(CHUNK):
                chunk += text.readline(CHUNK)  # cut at a line's end, so that no word is cut
                file.write(np.array(encoding.encode_ordinary(chunk), np.uint16).tobytes())
                bar.update(len(chunk.encode()))

    with reading(path, "a UTF-8 text"):
        if not cached.is_file():
            write_atomically(cached, write)
    with reading(cached, "a file of tokens (delete it, and it is made again)"):
        tokens = np.memmap(cached, np.uint16, mode="r") if cached.stat().st_size else np.zeros(0)
    if len(tokens) < length + 1:
        raise UserError(
            f"the text {path} has {len(tokens)} tokens, but a block needs {length + 1}; give a "
            "longer text (--corpus FILE) or shorter blocks (--lm-length N)"
        )
    return tokens


def sample_text(tokens, batch, length, generator):
    """Random blocks of a text: inputs and, one token further on, targets, both (b, L) int64.

    tokens (N,) with N > length; generator: a torch.Generator on the CPU.
    """
    starts = torch.randint(len(tokens) - length, (batch,), generator=generator)
    blocks = np.stack([tokens[i : i + length + 1] for i in starts.tolist()])
    blocks = torch.from_numpy(blocks.astype(np.int64))  # (b, L + 1)
    return blocks[:, :-1], blocks[:, 1:]
