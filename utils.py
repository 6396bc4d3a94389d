"""What no paper describes: one-line errors, whole files, signals, is there a network."""

import ctypes
import difflib
import json
import os
import signal
import sys
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import torch

PROBE_SECONDS = 1.5  # how long a missing network may hold up a first run


class UserError(Exception):
    """Something the user can put right: one line that says what is wrong and what to type."""


def run_command(main):
    """Call main(). What the user can put right ends in one line and exit code 2."""
    if sys.platform == "linux":  # keep freed memory: GPT-2 small's step takes 1.4 times without
        ctypes.CDLL(None).mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a log in ASCII gets "?" for "±"
    signal.signal(signal.SIGINT, leave)
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (UserError, ModuleNotFoundError) as error:
        text = " ".join(str(error).split())
        if isinstance(error, ModuleNotFoundError):  # gymnasium raises it anew, without the name
            name = error.name or getattr(error.__cause__, "name", None)
            package = {"sklearn": "scikit-learn"}.get(name, name)
            text += f"; pip install {package}, or put its folder on PYTHONPATH"
        print(f"error: {text}", file=sys.stderr)
        raise SystemExit(2) from None


def leave(number, frame):
    """Ctrl-C before training: a KeyboardInterrupt would be lost in h5py, or come out as another."""
    print("\ninterrupted", file=sys.stderr, flush=True)
    os._exit(128 + number)


def reason(error):
    """What an exception says, in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def choose(kind, name, valid, more=""):
    """Check that `name` is one of `valid`, and return it. Raises UserError, with the nearest."""
    if name in valid:
        return name
    near = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"unknown {kind} '{name}', valid: {', '.join(valid)}{more}{hint}")


@contextmanager
def reading(path, what):
    """The wall around reading a file: whatever goes wrong within becomes a UserError."""
    try:
        yield
    except (UserError, ModuleNotFoundError):
        raise
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}; give the path of {what}") from error
    except Exception as error:
        raise UserError(f"{path} is damaged or not {what}: {reason(error)}") from error


def write_atomically(path, write):
    """Call write(file) on a new binary file, flush it to disk, then rename it to `path`: a reader
    sees the old file or the whole new one. Raises UserError if it cannot be written."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        aside.unlink(missing_ok=True)


def write_json(path, content):
    """Write a dictionary as indented JSON, see write_atomically."""
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


class StopSignals:
    """Notes SIGINT and SIGTERM in `number`; a second one, or one while `at_once` is set, exits."""

    def __init__(self):
        self.number, self.at_once = 0, False
        signal.signal(signal.SIGINT, self.note)
        signal.signal(signal.SIGTERM, self.note)

    def note(self, number, frame):
        if self.at_once or self.number:
            raise SystemExit(128 + number)
        self.number = number
        print("\nstopping after this step; once more to leave at once", file=sys.stderr, flush=True)


def choose_device(name=None):
    """The torch.device of a name; None: CUDA if there is one. Raises UserError if it is absent."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # for as_graph, whose streams are the current device's
        return device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used: {reason(error)}; use cpu") from error


@cache
def side_stream():
    """A stream for calls before a capture: only one, since cuBLAS keeps memory for each stream."""
    return torch.cuda.Stream()


def as_graph(work, rngs=()):
    """work as a CUDA graph, so that the GPU need not wait for Python to launch kernel by kernel.

    work: a function of CUDA tensors, of the same shapes each time, that never waits for the host;
    rngs: CUDA generators that it draws from, besides the default one. Returns a function that calls
    work the first three times, then captures it, and replays it from there on. What it returns is
    overwritten by the next call.
    """
    graph, stream, places, result, calls = torch.cuda.CUDAGraph(), side_stream(), [], None, 0
    for rng in rngs:
        graph.register_generator_state(rng)

    def call(*inputs):
        nonlocal places, result, calls
        calls += 1
        places = places or [x.clone() for x in inputs]  # a graph reads from the same places
        for place, x in zip(places, inputs, strict=True):
            place.copy_(x)
        if calls <= 3:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # not on the default one, as capturing demands
                made = work(*places)
            torch.cuda.current_stream().wait_stream(stream)
            return made
        if calls == 4:
            with torch.cuda.graph(graph):  # not on `stream`: see PyTorch's issue 193402
                result = work(*places)
        graph.replay()
        return result

    return call


def hub_address():
    """Where the hub is, and the variables that say so: not what is in them, a proxy's password."""
    names = [name for name in os.environ if name.upper().endswith(("HF_ENDPOINT", "_PROXY"))]
    return " by ".join([os.environ.get("HF_ENDPOINT", "https://huggingface.co"), *names])


@cache
def no_network():
    """None where the hub answers, else why it does not, in words. Asked only where something else
    can stand in. A sweep decides it once for all its runs: LAMO_NETWORK is "1" or these words."""
    if decided := os.environ.get("LAMO_NETWORK"):
        return None if decided == "1" else decided
    try:
        from huggingface_hub import constants, get_session

        if constants.HF_HUB_OFFLINE:
            return "HF_HUB_OFFLINE is set"
        get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)  # any status will do
    except Exception as error:  # refused, timed out, a bad name, proxy or certificate
        return f"{hub_address()} does not answer: {reason(error)}"
    return None


def is_cached(repository, names, kind="model"):
    """Whether these files of a repository on the hub are in its client's cache."""
    from huggingface_hub import try_to_load_from_cache as find

    return all(isinstance(find(repository, name, repo_type=kind), str) for name in names)


def look_up(repository, names, kind):
    """Files of a repository on the hub, by name or pattern: {name: (bytes, hash)}. The hash is
    SHA-256, or git's SHA-1 of a small file."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

    url = f"{constants.ENDPOINT}/api/{kind}s/{repository}?blobs=true"
    more = {"timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT, "max_retries": 2}
    answer = http_backoff("GET", url, headers=build_hf_headers(), **more)
    hf_raise_for_status(answer)
    found = {}
    for file in answer.json()["siblings"]:
        if any(fnmatch(file["rfilename"], name) for name in names):
            known = (file.get("lfs") or {"sha256": file.get("blobId")})["sha256"]
            found[file["rfilename"]] = file.get("size") or 0, known
    if len(found) < len(names):
        raise UserError(f"{constants.ENDPOINT}/{repository} has no {' or '.join(names)}")
    return found


def is_intact(path, known):
    """Whether a file has the hash that look_up says; a mirror may have hashes of another kind."""
    from huggingface_hub.utils.sha import git_hash, sha_fileobj

    with open(path, "rb") as file:
        if len(known or "") == 64:
            return sha_fileobj(file).hex() == known
        return len(known or "") != 40 or git_hash(file.read()) == known


def fetch(what, repository, names, kind="model", folder=None, elsewhere=None):
    """Paths of files of a repository on the hub, by name or pattern: in its client's cache, else
    downloaded, there or into a folder. elsewhere: what to do without a network. Raises UserError,
    also for a file that arrives damaged, which is removed."""
    os.environ.setdefault("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "2")  # it says nothing of them
    os.environ.setdefault("HF_XET_CLIENT_READ_TIMEOUT", "10s")
    try:
        from huggingface_hub import constants, hf_hub_download

        if not folder and is_cached(repository, names, kind):  # without a look for newer ones
            more = {"repo_type": kind, "local_files_only": True}
            return [hf_hub_download(repository, name, **more) for name in names]
        files = look_up(repository, names, kind)
        size = sum(size for size, _ in files.values()) / 1e6
        where = folder.parent if folder else constants.HF_HUB_CACHE
        where = f"from {constants.ENDPOINT}/{repository} to {where}"
        print(f"downloading {what}, {size:.1f} MB, {where}", file=sys.stderr, flush=True)
        paths = []
        for name, (_, known) in files.items():
            paths.append(hf_hub_download(repository, name, repo_type=kind, local_dir=folder))
            if not is_intact(paths[-1], known):
                Path(paths[-1]).resolve().unlink()
                raise UserError(f"{what}: {name} arrived damaged and is removed; run this again")
        return paths
    except UserError:
        raise
    except Exception as error:  # the client's and its transport's many kinds
        if isinstance(error, FileNotFoundError):  # the client's, which does not say why
            error = error.__cause__ or error
        why = reason(error).partition(" For more information")[0]
        if not hasattr(error, "response"):  # else the hub has answered, and the reason says what
            how = f"hf download {repository} {' '.join(names)} --repo-type {kind}"
            how = elsewhere or f"run `{how}` elsewhere and copy the cache (HF_HOME) here"
            why += f"; HF_ENDPOINT, HTTPS_PROXY or HF_HUB_DISABLE_XET=1 may help; or {how}"
        raise UserError(f"cannot download {what} from {hub_address()}: {why}") from error
