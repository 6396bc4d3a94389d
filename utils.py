"""What no paper describes: one-line errors, whole files, signals, is there a network."""

import ctypes
import difflib
import json
import os
import signal
import sys
from contextlib import contextmanager
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
    """Call write(file) on a new binary file, flush it to disk, then rename it to `path`.

    A reader sees the old file or the whole new one. Raises UserError if it cannot be written.
    """
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
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used: {reason(error)}; use cpu") from error


@cache
def network_available():
    """Whether the Hugging Face hub answers; its own clients try for 20 s where there is none."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
    except Exception:  # HF_HUB_OFFLINE, refused, timed out, a bad name, proxy or certificate
        return False
    return True


def is_cached(repository, names, kind="model"):
    """Whether these files of a repository on the hub are in its client's cache."""
    from huggingface_hub import try_to_load_from_cache as find

    return all(isinstance(find(repository, name, repo_type=kind), str) for name in names)


def fetch(what, repository, names, kind="model"):
    """Paths of files of a repository on the hub, fetched if need be. Raises UserError."""
    from huggingface_hub import hf_hub_download

    cached = is_cached(repository, names, kind)  # then the client is not to ask for newer ones
    try:
        if not cached and not network_available():
            raise ConnectionError("it is not cached, and there is no network")
        known = {"repo_type": kind, "local_files_only": cached}
        return [hf_hub_download(repository, name, **known) for name in names]
    except Exception as error:  # the client's and its transport's many kinds
        how = f"hf download {repository} {' '.join(names)} --repo-type {kind}"
        how = f"run `{how}` where there is a network and copy the cache (HF_HOME) here"
        raise UserError(f"cannot get {what} ({reason(error)}); {how}") from error
