"""Text: a file -> tokens, made once and memory-mapped -> random blocks.

WikiText-103 is what the paper's language loss learns from. Any UTF-8 file will do.
"""

import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from files import check_regular, locked, write_atomically
from plumbing import UserError, first_line, network_available

WIKITEXT = "Salesforce/wikitext"  # on the hub: WikiText-103 (Merity et al. 2017), raw, CC BY-SA
WIKITEXT_FILES = [f"wikitext-103-raw-v1/train-0000{i}-of-00002.parquet" for i in range(2)]
GPT2 = "openai-community/gpt2"  # on the hub: its byte-pair encoding
TIKTOKEN_FILES = (  # ... which tiktoken keeps under the SHA-1 of OpenAI's addresses of it
    "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",  # vocab.bpe
    "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",  # encoder.json
)
CHUNK = 1 << 20  # characters tokenised at a time


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
            f"no tokeniser for a vocabulary of {vocab_size}; known: 50257 (GPT-2), 257 (bytes). "
            "Such a model can only be trained without text: train.py --lm-coef 0"
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
    "auto": WikiText-103 if cached or reachable, else, for the mini LM, "english"; byte_level:
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
                with locked(wikitext):
                    if not wikitext.is_file():
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
        check_regular(path)
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"cannot read the text {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"cannot read the text {path}: {error}") from error
    if size == 0:
        raise UserError(f"the text {path} is empty")
    cached = cache_folder() / "tokens" / f"{digest[:32]}-{encoding.name}.bin"

    def write(file):
        name = f"tokenising {path.name}"
        bar = tqdm(total=size, unit="B", unit_scale=True, desc=name, delay=1)
        with bar, open(path, encoding="utf-8", newline="") as text:
            while chunk := text.read(CHUNK):
                chunk += text.readline(CHUNK)  # cut at a line's end, so that no word is cut
                try:
                    tokens = encoding.encode_ordinary(chunk)
                except BaseException as error:  # tiktoken's pattern gives up on a million spaces
                    if type(error).__name__ != "PanicException":
                        raise
                    raise UserError(f"{path} has too long a run of one kind of letter") from None
                file.write(np.array(tokens, np.uint16).tobytes())
                bar.update(len(chunk.encode()))

    def whole():
        """Whether the tokens are there, and could be this encoding's."""
        if not cached.is_file() or cached.stat().st_size in (0, 1) or cached.stat().st_size % 2:
            return False
        tokens = np.memmap(cached, np.uint16, mode="r")
        return max(int(tokens[i : i + CHUNK].max()) for i in range(0, len(tokens), CHUNK)) < n_vocab

    n_vocab = encoding.n_vocab
    if not whole():
        with locked(cached):
            if not whole():  # another process was not faster
                if cached.exists():
                    print(f"{cached} is damaged, so {path.name} is tokenised again", flush=True)
                try:
                    write_atomically(cached, write)
                except UnicodeDecodeError as error:
                    raise UserError(f"{path} is not UTF-8 text: {error.reason}") from error
    return np.memmap(cached, np.uint16, mode="r")


def check_text(tokens, length, flags=("--corpus", "--lm-length")):
    """Raises UserError if a text is shorter than a block of `length` tokens and its targets.

    flags: those that say the text and the length.
    """
    if len(tokens) < length + 1:
        raise UserError(
            f"the text has {len(tokens)} tokens, but a block needs {length + 1}; give a longer "
            f"text ({flags[0]} FILE) or shorter blocks ({flags[1]} N)"
        )


def sample_text(tokens, batch, length, generator):
    """Random blocks of a text: inputs and, one token further on, targets, both (b, L) int64.

    tokens (N,) with N > length (see check_text); generator: a torch.Generator on the CPU.
    """
    starts = torch.randint(len(tokens) - length, (batch,), generator=generator)
    blocks = np.stack([tokens[i : i + length + 1] for i in starts.tolist()])
    blocks = torch.from_numpy(blocks.astype(np.int64))  # (b, L + 1)
    return blocks[:, :-1], blocks[:, 1:]
