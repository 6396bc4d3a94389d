"""Data: a Minari dataset -> flat tensors -> windows; a text -> tokens -> blocks.

All transitions of all episodes stand end to end in a few tensors on the training device, and each
transition knows where its episode ends. A batch of windows is then one tensor of indices: no Python
per sample. Drawing a window's first step uniformly over transitions is what the Decision
Transformer does in two draws, an episode in proportion to its length, then a place in it.

Pictures are kept once each, as bytes. A state is then STACK frames in a row, and neighbouring
states share all but one of them, so a window of K states is K + STACK - 1 frames.
"""

import hashlib
import io
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import h5py
import minari
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from tasks import STACK, encode_actions, flatten, is_picture, observation_shape, shrink
from utils import UserError, fetch, is_cached, no_network, reading, write_atomically

BUNDLED = Path(__file__).parent / "assets" / "minari"  # datasets that come with the project
COLLECT = "python -m experiments.collect"
OURS = ("lamo/", "d4rl/", "dqn-replay/")  # what collect.py makes begins so; no server has it
WIKITEXT = [f"wikitext-103-raw-v1/train-0000{i}-of-00002.parquet" for i in range(2)]  # CC BY-SA


# --- which dataset -------------------------------------------------------------------------------


def find_dataset(env, task, ratio, name=None, quality="medium"):
    """The Minari dataset to train on: found, fetched, or the bundled one.

    name: a Minari id or a folder; None: the first to be had of the task's dataset (of this
    quality), the set that experiments/collect.py records, and the bundled part of that. ratio: the
    share of a full dataset that it must hold. Returns (MinariDataset, share that it holds, a line
    that says what was taken and why). Raises UserError, naming the command that would help.
    """
    local = Path(os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets")
    wanted = name or task.minari.format(quality=quality)
    places, others, why = [local / wanted, BUNDLED / wanted, Path(wanted)], [], ""
    if name is None and quality == "medium" and task.recorded:
        others = [local / task.recorded, BUNDLED / task.bundled]
    if not any(map(is_dataset, places)):
        if Path(wanted).exists() or Path(wanted).is_absolute():
            raise UserError(f"{wanted} is no Minari dataset: it has no data/metadata.json in it")
        if wanted.startswith(OURS):
            why = f"it is on no server, see {COLLECT} --help"
        elif not any(map(is_dataset, others)) or not (why := no_network()):
            download_dataset(wanted, local)
        why = why and f"{wanted} is not in {local}, and {why}"
    places += others
    shares = {place: share_of(place) for place in places if is_dataset(place)}
    if not shares:
        raise UserError(f"no dataset: {why}; give another: --dataset FOLDER")
    place = next((p for p in shares if shares[p] >= ratio), max(shares, key=shares.get))
    if (share := shares[place]) < ratio:
        how, old = f"use --ratio {share:g}", local / (task.recorded or "")
        if task.recorded:
            how += f", or record it all: {COLLECT} --env {env} --steps {task.full}"
            how += f" (delete {old} first)" if is_dataset(old) else ""
        full = f"--ratio {ratio:g} is more than the {share:g} of all data in {place}"
        raise UserError(f"{full}{why and f', and {why}'}; {how}")

    with reading(place, "a Minari dataset"):
        dataset = minari.MinariDataset(place / "data")
        dataset.spec, dataset.env_spec  # noqa: B018  (read when first asked for)
    bundled = BUNDLED in place.parents
    note = f"the bundled {place.relative_to(BUNDLED)}" if bundled else str(place)
    note += ", as asked" if name else f", since {why}" if why else ""
    return dataset, share, note


def is_dataset(folder):
    """Whether a folder holds a Minari dataset."""
    return (folder / "data" / "metadata.json").is_file()


def share_of(folder):
    """The share of a full dataset that a folder holds, in (0, 1]."""
    with reading(about := folder / "about.json", "what experiments/collect.py writes"):
        return json.loads(about.read_text()).get("share", 1.0) if about.is_file() else 1.0


def download_dataset(name, local):
    """Download a Minari dataset into folder `local`, whole or not at all. Raises UserError."""
    from huggingface_hub.utils import WeakFileLock

    remote = os.environ.get("MINARI_REMOTE", "hf://farama-minari").partition("://")[2]
    (group, _, rest), what = name.partition("/"), f"the dataset {name}"
    aside = local / f".{name.replace('/', '-')}-download"  # what is whole in it is used again
    lock = aside.with_suffix(".lock")
    how = f"run `minari download {name}` elsewhere and copy it to {local}, or give --dataset FOLDER"
    try:
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if not is_dataset(local / name):  # by another process, just now
                fetch(what, f"{remote}/{group}", [f"{rest}/*".lstrip("/")], "dataset", aside, how)
                os.replace(aside / rest, local / name)
                shutil.rmtree(aside, ignore_errors=True)  # moved already if its name has no /
        lock.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {local / name}: {error.strerror}") from error


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
    """Pictures of an episode, (T + 1, *shape) bytes or T + 1 rows of a JPEG's bytes, in an array or
    an HDF5 dataset -> frames (T + 1, 84, 84) uint8."""
    frames = []
    for i in range(0, len(pictures), 256):
        part = pictures[i : i + 256]  # few in memory at a time
        if part.ndim < 3:  # JPEG
            part = np.stack([np.asarray(Image.open(io.BytesIO(row))) for row in part])
        frames.append(shrink(part.reshape(-1, *shape)))
    return np.concatenate(frames)


def read_episodes(dataset, indices, rewards=None):
    """Episodes of a Minari dataset, by index: yields observations (T + 1, O) or (T + 1, 84, 84),
    actions, rewards (T,), and whether the last step ended the episode or it was cut there.

    rewards: a function of an episode's observations, as recorded, that replaces its rewards.
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


def load_trajectories(
    dataset, action_space, scale=None, ratio=1.0, mode="normal", seed=0, device="cpu", rewards=None
):
    """Read episodes of a minari.MinariDataset into flat tensors on the device.

    action_space: the environment's, whose bounds are where actions become -1 and 1; scale: what
    returns-to-go are divided by, None for the power of ten by which the largest return becomes 1
    to 10; ratio: int(ratio * E) episodes, and at least one, are drawn without replacement by the
    seed; mode "delayed": an episode's whole reward comes at its last step, the paper's sparse
    variant; rewards: as in read_episodes. Raises UserError for what cannot be learnt from.
    """
    what, space = f"dataset {dataset.spec.dataset_id}", dataset.observation_space
    if (E := dataset.total_episodes) == 0:
        raise UserError(f"{what} holds no episode")
    keep = max(1, int(ratio * E + 1e-9))  # 1e-9: 0.29 * 100 is 28.999999999999996
    chosen = dataset.episode_indices[np.random.default_rng(seed).choice(E, keep, replace=False)]
    chosen, frames = np.sort(chosen), is_picture(space)
    rows, returns, lengths, n = [], [], [], 0
    with reading(dataset.spec.data_path, "a Minari dataset"):
        N = sum(int(m["total_steps"]) for m in dataset.storage.get_episode_metadata(chosen))
        # all memory at once: a million frames are 7 GB, and there must be no second copy of them
        shape, dtype = observation_shape(space)[-2:], np.uint8 if frames else np.float32
        obs, last_obs = np.empty((N, *shape), dtype), np.empty((keep, *shape), dtype)
        episodes = zip(chosen, read_episodes(dataset, chosen, rewards), strict=True)
        for i, (o, a, r, ended) in tqdm(episodes, "reading", keep, delay=2, leave=False):
            T = len(r)
            if T == 0 or len(o) != T + 1 or len(a) != T:
                raise UserError(f"{what}: episode {i} is empty or not whole")
            a, r = encode_actions(action_space, a), np.asarray(r, np.float64)
            for kind, values in (("observation", o), ("action", a), ("reward", r)):
                if not np.isfinite(values).all():
                    raise UserError(f"{what}: episode {i} has a NaN or infinite {kind}")
            obs[n : n + T], last_obs[len(returns)] = o[:T], o[T]  # the last one has no action
            n += T
            returns.append(r.sum())
            last = np.arange(T) == T - 1
            r = last * r.sum() if mode == "delayed" else r
            rtg = r[::-1].cumsum()[::-1]  # sum of rewards from each step to the end
            rows.append((a, rtg, r, last & ended, np.arange(T), np.full(T, n)))
            lengths.append(T)

    act, rtg, reward, terminated, timestep, end = map(np.concatenate, zip(*rows, strict=True))
    returns, mean, std = np.array(returns), np.zeros(0), np.zeros(0)
    if not frames:
        mean, std = obs.mean(0, np.float64), obs.std(0, np.float64)
        std = np.where(std < 1e-6, 1.0, std + 1e-6)  # what never varies is not scaled
        obs, last_obs = (((x - mean) / std).astype(np.float32) for x in (obs, last_obs))
    if not scale:
        largest = np.abs(returns).max()
        scale = float(10.0 ** np.floor(np.log10(largest))) if largest > 0 else 1.0
    home = torch.device(device)
    if home.type == "cuda" and frames and obs.nbytes > 0.6 * torch.cuda.mem_get_info(home)[0]:
        home = "cpu"  # they would fill the GPU
    rtg, reward = (rtg / scale).astype(np.float32)[:, None], reward.astype(np.float32)
    found = {"obs": obs, "act": act, "rtg": rtg, "timestep": timestep, "end": end}
    found |= {"reward": reward, "terminated": terminated, "last_obs": last_obs}
    found = {name: torch.as_tensor(x).to(home) for name, x in found.items()}
    mean, std = (torch.as_tensor(x).to(device, torch.float32) for x in (mean, std))
    about = {"obs_mean": mean, "obs_std": std, "scale": scale, "returns": returns}
    about |= {"lengths": np.array(lengths), "dataset_id": dataset.spec.dataset_id}
    return Trajectories(**found, **about)


def sample_windows(data, batch, context, generator):
    """A batch of windows of up to `context` consecutive steps, each within one episode.

    The first step is uniform over all transitions. A window that meets its episode's end is padded
    on the right with repeats of the last step. generator: a torch.Generator on the data's device.
    Returns rtg (B, K, 1), obs (B, K, O), act (B, K, A) or (B, K), timestep (B, K) and valid (B, K)
    bool. Where obs are frames they are (B, K + 3, 84, 84), the state of step k being frames k to
    k + 3, black where they would be from before the episode.
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
        obs[:, : STACK - 1].masked_fill_((before < first)[..., None, None], 0)
    return data.rtg[index], obs, data.act[index], data.timestep[index], valid


# --- text ----------------------------------------------------------------------------------------


def cache_folder():
    """Where texts and tokens are kept."""
    return Path(os.environ.get("LAMO_CACHE") or Path.home() / ".cache" / "lamo")


def get_encoding(vocab_size):
    """The tiktoken.Encoding of a vocabulary: GPT-2's BPE (50257) or bytes (257)."""
    import tiktoken

    end = {"<|endoftext|>": vocab_size - 1}
    if vocab_size == 257:
        ranks, pieces = {bytes([i]): i for i in range(256)}, r"[\s\S]{1,64}"  # no bytes merge
        return tiktoken.Encoding("bytes", pat_str=pieces, mergeable_ranks=ranks, special_tokens=end)
    if vocab_size != 50257:
        why = "known: 50257 (GPT-2), 257 (bytes); train without text, --lm-coef 0"
        raise UserError(f"no tokeniser for a vocabulary of {vocab_size}, {why}")
    if os.environ.get("TIKTOKEN_CACHE_DIR"):
        with reading(os.environ["TIKTOKEN_CACHE_DIR"], "tiktoken's cache of GPT-2's BPE"):
            return tiktoken.get_encoding("gpt2")
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str as pieces

    files = fetch("GPT-2's BPE", "openai-community/gpt2", ["merges.txt", "vocab.json"])
    with reading(" or ".join(files), "GPT-2's BPE (rm both, and they are downloaded again)"):
        ranks = data_gym_to_mergeable_bpe_ranks(*files)
    return tiktoken.Encoding("gpt2", pat_str=pieces, mergeable_ranks=ranks, special_tokens=end)


def find_text(corpus=None, fallback=True):
    """The text to learn language from: (Path, a line that says what was taken and why). corpus: a
    file, "wikitext" (WikiText-103), "english" (the manual pages every Python has), or None:
    wikitext if cached or downloadable, else, with fallback (not for GPT-2), english."""
    if corpus not in (None, "wikitext", "english"):
        return Path(corpus), f"{corpus}, as asked"
    path, why = cache_folder() / "wikitext-103-train.txt", None
    source = "Salesforce/wikitext", WIKITEXT, "dataset"
    if corpus is None and fallback and not (path.is_file() or is_cached(*source)):
        why = no_network()
    if corpus != "english" and not why:
        try:
            if not path.is_file():
                files = fetch("WikiText-103", *source)
                write_atomically(path, lambda file: parquet_to_text(files, file))
            return path, f"WikiText-103 from {path}"
        except UserError as error:
            raise UserError(f"{error}; or any text, --corpus FILE, or none, --lm-coef 0") from error
    why = f"since WikiText-103 is not cached, and {why}" if why else "as asked"
    from pydoc_data import topics

    text = "\n\n".join(topics.topics[key] for key in sorted(topics.topics)).encode()
    path = cache_folder() / "python-manual.txt"
    write_atomically(path, lambda file: file.write(text))
    return path, f"the Python manual ({len(text) / 1e6:.1f} MB of pydoc_data.topics), {why}"


def parquet_to_text(files, out):
    """The column `text` of parquet files, in order, as UTF-8 into an open binary file."""
    import pyarrow.parquet as pq

    for file in files:
        with reading(file, "a parquet file (rm it, and it is downloaded again)"):
            for rows in pq.ParquetFile(file).iter_batches(columns=["text"]):
                out.writelines(text.encode() for text in rows["text"].to_pylist())


def tokenise(path, encoding, length=1):
    """The tokens (N,) of a UTF-8 text file, memory-mapped, and kept in the cache by its hash.
    Raises UserError for what is no text, or shorter than a block of `length` and its targets."""
    with reading(path, "a UTF-8 text"), open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    cached = cache_folder() / "tokens" / f"{digest[:32]}-{encoding.name}.bin"
    dtype = np.uint16 if encoding.n_vocab <= 2**16 else np.uint32

    def write(file):
        with open(path, encoding="utf-8", newline="") as text:
            for chunk in tqdm(iter(lambda: text.read(1 << 20), ""), "tokenising, MB", delay=1):
                whole = chunk + text.readline(1 << 20)  # so that no word is cut
                file.write(np.array(encoding.encode_ordinary(whole), dtype).tobytes())

    with reading(path, "a UTF-8 text"):
        if not cached.is_file():
            write_atomically(cached, write)
    with reading(cached, "a file of tokens (delete it, and it is made again)"):
        tokens = np.memmap(cached, dtype, mode="c") if cached.stat().st_size else np.zeros(0)
    if len(tokens) < length + 1:
        how = f"a block needs {length + 1}; give a longer --corpus or a shorter --lm-length"
        raise UserError(f"the text {path} has {len(tokens)} tokens, but {how}")
    return tokens


def load_text(corpus, config, length):
    """The tokens of a text for a GPT of this config, and a line on where they are from: see
    find_text and tokenise. Raises UserError for blocks longer than the model's positions."""
    if length > config.block_size:
        raise UserError(f"--lm-length is {length}, but the model knows {config.block_size}")
    encoding = config.encoding or get_encoding(config.vocab_size)
    path, note = find_text(corpus, encoding.name != "gpt2")
    return tokenise(path, encoding, length), note


def sample_text(tokens, batch, length, generator):
    """Random blocks of a text (N,): inputs and, one token further on, targets, both (b, L) int64.
    tokens: a tensor; generator: a torch.Generator on its device."""
    device = tokens.device
    start = torch.randint(len(tokens) - length, (batch, 1), generator=generator, device=device)
    blocks = tokens[start + torch.arange(length + 1, device=device)].long()  # (b, L + 1)
    return blocks[:, :-1], blocks[:, 1:]
