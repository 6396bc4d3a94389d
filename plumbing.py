"""What every command here needs and no paper describes: one-line errors, whole files, the device.

Nothing of LaMo is in this file. Read it last, when you want to know what `UserError`,
`write_atomically` or `network_available` do exactly.
"""

import argparse
import difflib
import functools
import inspect
import json
import os
import re
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from dataclasses import fields
from pathlib import Path

import torch

PROBE_SECONDS = 1.5  # how long a missing network may hold up a first run, name lookup included


class UserError(Exception):
    """Something the user can put right. The message is one line: what was wrong, what to type."""


def run_command(main):
    """Run a command's `main()`: a `UserError` becomes one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def first_line(error):
    """What an exception of some library says, cut to the one line that errors have here."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, like every other error here."""

    def __init__(self, **kwargs):
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs
        )

    def error(self, message):
        raise UserError(f"{message}; see {self.prog} --help")


def parse_flags(config, prog, description):
    """The flags that were typed, as a dictionary, for a dataclass of settings.

    Every field is a flag; its help is the comment beside it in the source, its group the comment
    line above. So the class is all there is to read. `name: list[float]` takes several values.
    """
    parser = Parser(prog=prog, description=description)
    kinds = {field.name: field.type for field in fields(config)}
    group = parser
    for line in inspect.getsource(config).splitlines():
        if title := re.fullmatch(r"    # (.*)", line):
            group = parser.add_argument_group(title[1])
        elif field := re.fullmatch(r"    (\w+): .* = (.*?)  # (.*)", line):
            name, default, comment = field.groups()
            kind = kinds[name]
            if kind is bool:
                options = {"action": argparse.BooleanOptionalAction}
            elif kind in (list[float], list[str]):
                inner = kind.__args__[0]
                options = {"type": inner, "nargs": "+", "metavar": inner.__name__.upper()}
            else:
                options = {"type": kind, "metavar": kind.__name__.upper()}
            default = default.strip('"') or "none"
            help_text = f"{comment} (default {default})".replace("%", "%%")
            flag = "--" + name.replace("_", "-")
            group.add_argument(flag, default=argparse.SUPPRESS, help=help_text, **options)
    return vars(parser.parse_args())


def choose_device(name=None):
    """The torch.device to work on: "cuda" or "cpu" as asked, by default cuda if there is one.

    Raises UserError for CUDA where there is none, and for other names.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = choose("device", name.split(":")[0], ["cuda", "cpu"])
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device is available to PyTorch here; use --device cpu")
    return torch.device(name)


def choose_dtype(device):
    """Autocast's type for a device: "bf16" on CUDA and on CPUs that multiply it natively.

    Elsewhere "fp32": an emulated bf16 is slower.
    """
    if device.type == "cuda":
        return "bf16"
    features = torch.cpu.get_capabilities()
    native = ("avx512_bf16", "amx_bf16", "sve_bf16", "bf16")
    return "bf16" if any(features.get(name) for name in native) else "fp32"


def choose(kind, name, valid):
    """Check that `name` is one of `valid`. Returns `name`.

    Raises UserError naming the valid ones and the nearest to what was typed.
    """
    valid = list(valid)
    if name in valid:
        return name
    near = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UserError(f"unknown {kind} '{name}'; valid: {', '.join(valid)}.{hint}")


def write_atomically(path, write):
    """Call `write(temporary_path)`, flush it to disk, then rename it to `path`.

    A reader sees the old file or the whole new one, never a part; on failure the old one stays.
    Raises UserError when the folder cannot be written to or the disk is full.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def write_json(path, content):
    """Write a dictionary as indented JSON, whole or not at all (see write_atomically)."""
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(path, lambda temporary: Path(temporary).write_text(text))


@functools.cache
def network_available():
    """Whether the Hugging Face hub (HF_ENDPOINT if set) answers at all; asked once a process.

    Hub clients retry for about 20 s without a network; this gives up after PROBE_SECONDS, however
    long a name lookup hangs. Proxies are honoured. HF_HUB_OFFLINE=1 answers no without asking.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    answers = []

    def ask():
        url = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
            answers.append(True)
        except urllib.error.HTTPError:  # it answered, if only to complain
            answers.append(True)
        except (OSError, ValueError):  # nothing there, or HF_ENDPOINT is no address
            answers.append(False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answers == [True]
