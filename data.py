"""Data: a Minari dataset -> flat tensors -> windows; a text -> tokens -> blocks.

Trajectories. All transitions of all episodes stand end to end in a few tensors on the training
device, and each transition knows where its episode ends. A batch of windows is then one tensor of
indices: no Python per sample. Drawing a window's first step uniformly over transitions is what the
Decision Transformer does in two draws, an episode in proportion to its length, then a place in it.

Text. A file is tokenised once into a file of 16-bit tokens, kept in a cache and memory-mapped.
"""

import hashlib
import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from plumbing import UserError, first_line, network_available, write_atomically

BUNDLED = Path(__file__).parent / "assets" / "minari"  # datasets that come with the project
WIKITEXT = "Salesforce/wikitext"  # on the hub: WikiText-103 (Merity et al. 2017), raw, CC BY-SA
WIKITEXT_FILES = [f"wikitext-103-raw-v1/train-0000{i}-of-00002.parquet" for i in range(2)]
GPT2 = "openai-community/gpt2"  # on the hub: its byte-pair encoding
TIKTOKEN_FILES = (  # ... which tiktoken keeps under the SHA-1 of OpenAI's addresses of it
    "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",  # vocab.bpe
    "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",  # encoder.json
)
CHUNK = 1 << 20  # characters tokenised at a time


# --- trajectories --------------------------------------------------------------------------------


@dataclass
class Trajectories:
    """N transitions of E episodes, end to end, on one device."""

    obs: torch.Tensor  # (N, O) float32, normalised: (observation - obs_mean) / obs_std
    act: torch.Tensor  # (N, A) float32
    rtg: torch.Tensor  # (N, 1) float32, sum of rewards from here to the episode's end, / scale
    timestep: torch.Tensor  # (N,) int64, 0 at an episode's start
    end: torch.Tensor  # (N,) int64, index one past the last transition of the same episode
    obs_mean: torch.Tensor  # (O,) of the transitions in use
    obs_std: torch.Tensor  # (O,) likewise, + 1e-6
    returns: np.ndarray  # (E,) undiscounted, undivided
    lengths: np.ndarray  # (E,) transitions

    def __len__(self):
        return len(self.obs)


def find_dataset(task, ratio, name="auto"):
    """The Minari dataset to train on: found, fetched, or the bundled one.

    task: a row of tasks.TASKS; ratio: the share of the full dataset wanted, in (0, 1]; name: a
    Minari id or a folder, which is found, fetched or an error, or "auto": in this order the task's
    dataset in Minari's folder, its download, the set that experiments/collect.py records, and the
    bundled part of that. Returns (MinariDataset, share, note): share is how much of a full dataset
    it holds (its about.json may say so), note one line that says what was taken and why.
    Raises UserError, naming the command that would help, if there is none or it is too small.
    """
    local = Path(os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets")
    wanted = task.dataset if name == "auto" else name

    def taken(folder, note):
        share = 1.0
        if (folder / "about.json").is_file():
            try:
                share = min(1.0, float(json.loads((folder / "about.json").read_text())["share"]))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{folder / 'about.json'} does not tell a share") from error
        if ratio > share:
            raise UserError(
                f"{note}: it is {share:g} of a full dataset and serves ratios up to {share:g}, not "
                f"{ratio:g}; use --ratio {share:g}, or record a full one: {task.collect_command}"
            )
        return read_dataset(folder), share, note

    if name != "auto":
        for folder in (Path(name), local / name, BUNDLED / name):
            if is_dataset(folder):
                return taken(folder, f"{name} in {folder}, as asked")
    elif is_dataset(local / wanted):
        return taken(local / wanted, f"{wanted} in {local}")
    if network_available():
        try:
            folder = download_dataset(wanted, local)
        except Exception as error:  # the hub's, Minari's and the disk's errors alike
            why = f"{wanted} could not be downloaded ({first_line(error)})"
        else:
            return taken(folder, f"{wanted}, downloaded to {local}")
    else:
        why = f"{wanted} is not in {local} and there is no network"
    if name != "auto":
        raise UserError(
            f"{why}; give a dataset's folder, or run `minari download {name}` where there is a "
            f"network and copy it to {local / name}"
        )
    if is_dataset(local / task.collected):
        return taken(local / task.collected, f"{task.collected} in {local}, since {why}")
    return taken(BUNDLED / task.bundled, f"the bundled {task.bundled}, since {why}")


def is_dataset(folder):
    """Whether a folder holds a Minari dataset whole: its metadata and something it describes."""
    data = folder / "data"
    return (data / "metadata.json").is_file() and len(list(data.iterdir())) > 1


def read_dataset(folder):
    """The MinariDataset in a folder. Raises UserError for one that is damaged."""
    import minari

    try:
        return minari.MinariDataset(folder / "data")
    except Exception as error:  # Minari raises many kinds
        raise UserError(f"{folder} is no readable Minari dataset: {first_line(error)}") from error


@contextmanager
def minari_folder(folder):
    """Within this, Minari reads and writes in `folder`; afterwards where it did before."""
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    try:
        yield
    finally:
        del os.environ["MINARI_DATASETS_PATH"]
        if before is not None:
            os.environ["MINARI_DATASETS_PATH"] = before


def download_dataset(name, local):
    """Download a Minari dataset into folder `local`, whole or not at all. Returns where it is."""
    import minari

    local.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=local, prefix=".download-") as aside:
        with minari_folder(aside):  # Minari itself downloads in place
            minari.download_dataset(name)
        if not is_dataset(local / name):  # else another process was faster
            shutil.rmtree(local / name, ignore_errors=True)  # what an interrupted one left
            (local / name).parent.mkdir(parents=True, exist_ok=True)
            os.rename(Path(aside) / name, local / name)
    return local / name


def read_episodes(dataset, indices):
    """Episodes of a Minari dataset, by index. Raises UserError where its file is damaged."""
    episodes = dataset.iterate_episodes(indices)
    while True:
        try:
            episode = next(episodes, None)
        except Exception as error:  # h5py raises many kinds
            what = f"{dataset.spec.data_path} is no readable Minari dataset"
            raise UserError(f"{what}: {first_line(error)}") from error
        if episode is None:
            return
        yield episode


def returns_to_go(rewards, delayed=False):
    """Sum of rewards from each step to the end: (T,) -> (T,). Delayed: all reward comes last."""
    if delayed:
        return np.full_like(rewards, rewards.sum())
    return rewards[::-1].cumsum()[::-1].copy()


def load_trajectories(
    dataset, observation_space, action_space, scale, ratio=1.0, mode="normal", seed=0, device="cpu"
):
    """Read episodes of a Minari dataset into flat tensors.

    dataset: minari.MinariDataset; the spaces are the environment's, to check against; scale: what
    returns-to-go are divided by; ratio: share of this dataset's episodes to keep, int(ratio * E)
    and at least one, drawn without replacement by the seed; mode "normal" or "delayed", where an
    episode's whole reward comes at its last step, the paper's sparse variant.
    Raises UserError if shapes or spaces differ, if values are not finite, or an episode is empty.
    """
    what = f"dataset {dataset.spec.dataset_id}"
    for kind, ours, theirs in (
        ("observation", observation_space, dataset.observation_space),
        ("action", action_space, dataset.action_space),
    ):
        if type(ours) is not type(theirs) or ours.shape != theirs.shape:
            raise UserError(f"{what} does not fit: its {kind}s are {theirs}, the env's are {ours}")
    E = dataset.total_episodes
    if E == 0:
        raise UserError(f"{what} holds no episode")
    keep = max(1, int(ratio * E + 1e-9))  # 1e-9: 0.29 * 100 is 28.999999999999996
    chosen = np.sort(np.random.default_rng(seed).choice(E, keep, replace=False))
    obs, act, rtg, timestep, end, returns, lengths = [], [], [], [], [], [], []
    n = 0
    for i, episode in zip(chosen.tolist(), read_episodes(dataset, chosen), strict=True):
        T = len(episode.rewards)
        if T == 0:
            raise UserError(f"{what}: episode {i} is empty")
        o, a, r = (np.asarray(x) for x in (episode.observations, episode.actions, episode.rewards))
        if o.shape != (T + 1, *observation_space.shape) or a.shape != (T, *action_space.shape):
            raise UserError(
                f"{what}: episode {i} has {T} rewards, but observations {o.shape} and actions "
                f"{a.shape}; expected {(T + 1, *observation_space.shape)} and "
                f"{(T, *action_space.shape)}"
            )
        for kind, values in (("observation", o), ("action", a), ("reward", r)):
            if not np.isfinite(values).all():
                raise UserError(f"{what}: episode {i} has a NaN or infinite {kind}")
        n += T
        obs.append(o[:T])  # the last observation has no action
        act.append(a)
        rtg.append(returns_to_go(r.astype(np.float64), mode == "delayed"))
        timestep.append(np.arange(T))
        end.append(np.full(T, n))
        returns.append(r.sum())
        lengths.append(T)

    observations = np.concatenate(obs).astype(np.float64)  # (N, O)
    mean, std = observations.mean(0), observations.std(0) + 1e-6

    def tensor(x, dtype=torch.float32):
        return torch.as_tensor(x).to(device, dtype)

    return Trajectories(
        obs=tensor((observations - mean) / std),
        act=tensor(np.concatenate(act)),
        rtg=tensor(np.concatenate(rtg) / scale)[:, None],
        timestep=tensor(np.concatenate(timestep), torch.int64),
        end=tensor(np.concatenate(end), torch.int64),
        obs_mean=tensor(mean),
        obs_std=tensor(std),
        returns=np.array(returns),
        lengths=np.array(lengths),
    )


def sample_windows(data, batch, context, generator):
    """A batch of windows of up to `context` consecutive steps, each within one episode.

    The first step is uniform over all transitions. A window that meets its episode's end is padded
    on the right with repeats of the last step. generator: a torch.Generator on the data's device.
    Returns rtg (B, K, 1), obs (B, K, O), act (B, K, A), timestep (B, K) and valid (B, K) bool.
    """
    device = data.obs.device
    start = torch.randint(len(data), (batch,), generator=generator, device=device)
    index = start[:, None] + torch.arange(context, device=device)  # (B, K)
    end = data.end[start][:, None]  # (B, 1)
    valid = index < end
    index = torch.minimum(index, end - 1)
    return data.rtg[index], data.obs[index], data.act[index], data.timestep[index], valid


# --- text ----------------------------------------------------------------------------------------


def cache_folder():
    """Where texts and tokens are kept: LAMO_CACHE, else XDG's cache folder, else ~/.cache/lamo."""
    if os.environ.get("LAMO_CACHE"):
        return Path(os.environ["LAMO_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lamo"


def get_encoding(vocab_size):
    """The tiktoken.Encoding of a model with this many tokens: GPT-2's BPE (50257) or bytes (257).

    Raises UserError for another vocabulary, or when GPT-2's BPE files can be neither found nor
    fetched.
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
        raise UserError(
            f"no tokeniser for a vocabulary of {vocab_size}; known: 50257 (GPT-2), 257 (bytes)"
        )
    folder = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    folder = Path(folder or Path(tempfile.gettempdir()) / "data-gym-cache")  # tiktoken's own rule
    if all((folder / name).is_file() for name in TIKTOKEN_FILES):
        return tiktoken.get_encoding("gpt2")
    # The hub has the same two files, and its client mirrors, proxies and a cache for them.
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

    names = ("merges.txt", "vocab.json")
    cached = all(isinstance(try_to_load_from_cache(GPT2, name), str) for name in names)
    why = (
        f"GPT-2's BPE is neither in {folder} nor in the Hugging Face cache, and there is no network"
    )
    if cached or network_available():
        try:
            merges, vocabulary = (
                hf_hub_download(GPT2, name, local_files_only=cached) for name in names
            )
            ranks = data_gym_to_mergeable_bpe_ranks(merges, vocabulary)
            special = {"<|endoftext|>": 50256}
            return tiktoken.Encoding(
                "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special
            )
        except Exception as error:  # the hub client's and its transport's many kinds
            why = f"GPT-2's BPE could not be fetched ({first_line(error)})"
    raise UserError(
        f"{why}; run `hf download {GPT2} {' '.join(names)}` where there is one, or put tiktoken's "
        f"files {' and '.join(TIKTOKEN_FILES)} in a folder and set TIKTOKEN_CACHE_DIR to it"
    )


def find_text(corpus, byte_level):
    """The text to learn language from.

    corpus: a file, "wikitext" (WikiText-103), "english" (the manual pages every Python has), or
    "auto": WikiText-103 if cached or reachable, else, for the mini LM, "english". mini:
    whether the language model is the mini LM. Returns (Path, note), note as in find_dataset.
    Raises UserError, naming what to do, for what cannot be had.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    if corpus not in ("auto", "wikitext", "english"):
        if not Path(corpus).is_file():
            raise UserError(f"there is no text {corpus}; give --corpus FILE, wikitext or english")
        return Path(corpus), f"{corpus}, as asked"
    wikitext = cache_folder() / "wikitext-103-train.txt"
    if corpus != "english":
        if wikitext.is_file():
            return wikitext, f"WikiText-103 from {wikitext}"
        hub = {"repo_id": WIKITEXT, "repo_type": "dataset"}
        found = [try_to_load_from_cache(filename=f, **hub) for f in WIKITEXT_FILES]
        cached = all(isinstance(file, str) for file in found)
        if cached or network_available():
            hub["local_files_only"] = cached  # or the client would wait for the network
            try:
                files = [hf_hub_download(filename=f, **hub) for f in WIKITEXT_FILES]
            except Exception as error:  # the hub client's and its transport's errors alike
                why = f"WikiText-103 could not be downloaded ({first_line(error)})"
            else:
                write_atomically(wikitext, lambda file: parquet_to_text(files, file))
                return wikitext, f"WikiText-103 from the hub, kept as {wikitext}"
        else:
            why = "WikiText-103 is not cached and there is no network"
        if corpus == "wikitext" or not byte_level:
            raise UserError(f"{why}; give any text: --corpus FILE, or do without: --lm-coef 0")
    from pydoc_data import topics

    text = "\n\n".join(topics.topics[key] for key in sorted(topics.topics)).encode()
    path = cache_folder() / f"python-manual-{hashlib.sha256(text).hexdigest()[:16]}.txt"
    if not path.is_file():
        write_atomically(path, lambda file: file.write(text))
    note = "as asked" if corpus == "english" else f"since {why}"
    return path, f"the Python manual ({len(text) / 1e6:.1f} MB of pydoc_data.topics), {note}"


def parquet_to_text(files, out):
    """The column `text` of parquet files, in order, as UTF-8 into an open binary file."""
    import pyarrow.parquet as pq

    for file in files:
        for rows in pq.ParquetFile(file).iter_batches(columns=["text"]):
            out.writelines(text.encode() for text in rows["text"].to_pylist())


def tokenise(path, encoding):
    """The tokens of a UTF-8 text file, memory-mapped: (N,) uint16. Made once, kept in the cache.

    The cache's key is the text's SHA-256 and the encoding's name. Raises UserError for a file that
    cannot be read, is empty, or is not UTF-8.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"cannot read the text {path}: {error.strerror}") from error
    if size == 0:
        raise UserError(f"the text {path} is empty")
    cached = cache_folder() / "tokens" / f"{digest[:32]}-{encoding.name}.bin"

    def write(file):
        name = f"tokenising {path.name}"
        bar = tqdm(total=size, unit="B", unit_scale=True, desc=name, delay=1)
        with bar, open(path, encoding="utf-8", newline="") as text:
            while chunk := text.read(CHUNK):
                chunk += text.readline()  # cut at line ends, so that no word is cut
                file.write(np.array(encoding.encode_ordinary(chunk), np.uint16).tobytes())
                bar.update(len(chunk.encode()))

    if not cached.exists():
        try:
            write_atomically(cached, write)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text: {error.reason}") from error
    return np.memmap(cached, np.uint16, mode="r")


def check_text(tokens, length):
    """Raises UserError if a text is shorter than a block of `length` tokens and its targets."""
    if len(tokens) < length + 1:
        raise UserError(
            f"the text has {len(tokens)} tokens, but a block needs {length + 1}; give a longer "
            "text (--corpus FILE) or shorter blocks (--lm-length N)"
        )


def sample_text(tokens, batch, length, generator):
    """Random blocks of a text: inputs and, one token further on, targets, both (b, L) int64.

    tokens (N,) with N > length (see check_text); generator: a torch.Generator on the CPU.
    """
    starts = torch.randint(len(tokens) - length, (batch,), generator=generator)
    blocks = np.stack([tokens[i : i + length + 1] for i in starts.tolist()])
    blocks = torch.from_numpy(blocks.astype(np.int64))  # (b, L + 1)
    return blocks[:, :-1], blocks[:, 1:]
