"""What commands need and no paper describes: one-line errors, flags, signals, the device.

Nothing of LaMo is in this file. Read it last, when you want to know what `UserError`,
`parse_flags` or `network_available` do exactly.
"""

import argparse
import ctypes
import difflib
import functools
import gc
import importlib.util
import inspect
import math
import os
import re
import shlex
import signal
import sys
import threading
from dataclasses import fields
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm

PROBE_SECONDS = 1.5  # how long a missing network may hold up a first run, name lookup included


class UserError(Exception):
    """Something the user can put right. The message is one line: what was wrong, what to type."""

    def __str__(self):
        return printable(super().__str__())


def counted(n, what):
    """A number of things in words: 1 run, 2 runs."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def printable(text):
    """A text in which what a terminal would not print as it is, such as a line's end, is escaped.

    For what may come from a stranger's file.
    """
    text = str(text)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def keep_freed_memory():
    """Let freed memory be used again, where the C library would give it back to the system.

    glibc hands blocks above some 32 MB, and the heap's end, back at once, and every step then pays
    for having its pages made anew: a tenth of a CPU step. Does nothing with other C libraries.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: blocks the system is asked for
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: free memory kept at the end


def give_back_memory():
    """Return to the system what is free between what is in use.

    An evaluation's environments leave such pieces, which add up where freed memory is kept.
    """
    gc.collect()  # environments refer to themselves
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


def close_bars():
    """End the lines of progress bars, so that what is said next begins one of its own."""
    for bar in list(getattr(tqdm, "_instances", ())):  # tqdm has no public name for them
        bar.close()


class Lasting:
    """A stream to which writing does not fail when its reader has gone, as tee has by a Ctrl-C.

    A training that is told to stop would otherwise end at its first word, before it has saved.
    """

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        try:
            return self.stream.write(text)
        except BrokenPipeError:
            self.forget()

    def flush(self):
        try:
            self.stream.flush()
        except BrokenPipeError:
            self.forget()

    def forget(self):
        """From now on what is written goes nowhere."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def run_command(main):
    """Run a command's `main()`: a `UserError` becomes one line on stderr and exit code 2."""
    keep_freed_memory()
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(Lasting, streams)
    try:
        end_in_one_line(main)
    finally:
        close_bars()
        sys.stdout.flush()
        sys.stdout, sys.stderr = streams


def end_in_one_line(main):
    """Call main(). What a user can put right ends in one line on stderr and SystemExit(2)."""
    try:
        main()
    except KeyboardInterrupt:
        close_bars()
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except UserError as error:
        close_bars()
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        if error.filename is None:  # no file of the user's
            raise
        close_bars()
        print(f"error: {printable(error.filename)}: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
    except (MemoryError, RuntimeError) as error:  # what PyTorch raises on CUDA is one of the latter
        text = " ".join(first_line(error).split())
        if not (isinstance(error, MemoryError) or re.search("out of memory|allocate memory", text)):
            raise
        close_bars()
        how = "use a smaller --batch or --context, a smaller model or part of the data"
        print(f"error: not enough memory ({text[-120:]}); {how}", file=sys.stderr)
        raise SystemExit(2) from None


class StopSignals:
    """Holds SIGINT and SIGTERM back until a step is done; a second one acts at once.

    From its making to `restore`, `number` is 0, or the signal's that came; `what` is said then.
    Whoever has written what is to be kept ends with exit code 128 + number, as shells expect.
    """

    def __init__(self, what="stopping after this step"):
        self.number, self.before, self.what = 0, {}, what
        if threading.current_thread() is threading.main_thread():  # others cannot have handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.note)

    def note(self, number, frame):
        self.number = number
        self.restore()
        print(f"\n{self.what}; once more to leave at once", file=sys.stderr, flush=True)

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


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

    def parse_args(self, *arguments):
        """As argparse's. Raises UserError for a value that is empty, as an unset variable's is."""
        parsed = super().parse_args(*arguments)
        for action in self._actions:
            value = getattr(parsed, action.dest, None)
            if value != action.default and "" in (value if isinstance(value, list) else [value]):
                name = action.option_strings[0] if action.option_strings else action.dest
                raise UserError(f"{name} is empty; give it a value, or leave it out")
        return parsed

    def error(self, message):
        if typed := re.match(r"unrecognized arguments: (--[\w-]+)", message):
            near = difflib.get_close_matches(typed[1], self._option_string_actions, 1)
            message += f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{message}; see {self.prog} --help")


def parse_flags(config, prog, description):
    """The flags that were typed, as a dictionary, for a dataclass of settings.

    Every field is a flag; its help is the comment beside it in the source, its group the comment
    line above. So the class is all there is to read. `name: list[float]` takes several values, and
    the word auto, where it is the default, counts as not typed.
    """
    parser = Parser(prog=prog, description=description)
    kinds = {field.name: field.type for field in fields(config)}
    auto = [field.name for field in fields(config) if field.default == "auto"]
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
                options = {"nargs": "+", "metavar": inner.__name__.upper()}
                options["type"] = or_auto(inner) if name in auto else inner
            else:
                options = {"type": kind, "metavar": kind.__name__.upper()}
                options["type"] = or_auto(kind) if name in auto else kind
            default = default.strip('"')
            shown = f" (default {default})" if default not in ("", "None") else ""
            help_text = f"{comment}{shown}".replace("%", "%%")
            flag = "--" + name.replace("_", "-")
            group.add_argument(flag, default=argparse.SUPPRESS, help=help_text, **options)
    typed = vars(parser.parse_args())
    left = [name for name in auto if typed.get(name) in ("auto", ["auto"])]
    return {name: value for name, value in typed.items() if name not in left}


def or_auto(kind):
    """What makes a flag's value of its text, which may be the word auto instead."""

    def parse(text):
        return text if text == "auto" else kind(text)

    parse.__name__ = kind.__name__  # how argparse names it in errors
    return parse


def split_flags(text):
    """The words of --flags. Raises UserError for quotes that do not close."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"--flags {text}: {error}") from error


def check_package(package, what):
    """Raises UserError unless a package is installed: better now than when the work is done."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{what} needs a package: pip install {package}")


def is_number(x):
    """Whether it is a finite number that a float can hold, and no bool."""
    return type(x) in (int, float) and -1e300 < x < 1e300


def choose_device(name="auto"):
    """The torch.device to work on: "cuda", "cuda:1", "cpu"; "auto" is CUDA if there is one.

    Raises UserError for CUDA where there is none, and for other names.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"unknown device '{name}'; valid: cuda, cuda:0 (and so on), cpu")
    if name != "cpu" and int(name[5:] or 0) >= torch.cuda.device_count():  # torch wraps at 256
        n = torch.cuda.device_count()
        raise UserError(f"--device {name}: PyTorch sees {n} CUDA devices here; use --device cpu")
    return torch.device(name)


def choose_dtype(device):
    """Autocast's type for a device: "bf16" where it is multiplied natively, else "fp32".

    An emulated bf16 (older GPUs, most CPUs) is slower than fp32.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        features = torch.cpu.get_capabilities()
        native = any(features.get(x) for x in ("avx512_bf16", "amx_bf16", "sve_bf16", "bf16"))
    return "bf16" if native else "fp32"


def be_deterministic():
    """Let PyTorch use only what gives the same bits each time; what cannot is an error of its."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads such memory


def n_processes():
    """How many processes torchrun has begun; 1 without it. Raises UserError for no number."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"WORLD_SIZE is {text[:20]!r}, but torchrun sets it to a number; unset it")
    return int(text)


def join_processes(device):
    """(rank, number of processes, device) of this process under torchrun; (0, 1, device) without.

    On CUDA each process has its own device, whatever was asked for. End with leave_processes.
    """
    world = n_processes()
    if world == 1:
        return 0, 1, device
    if not os.environ.keys() >= {"RANK", "MASTER_ADDR", "MASTER_PORT"}:
        raise UserError("WORLD_SIZE is set, but no launcher is at work; use torchrun, or unset it")
    if device.type == "cuda" and int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
        raise UserError(f"more processes than the {torch.cuda.device_count()} CUDA devices here")
    # Not for its use: imported later, by DDP, it would hold the group as its functions' default.
    importlib.import_module("torch.distributed.nn")
    cuda = device.type == "cuda"
    if cuda:
        device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    # The others wait for the first one's downloads and evaluations: give it time.
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=6))
    return dist.get_rank(), world, device


def agree(number, device):
    """The largest of all processes' numbers, in each of them."""
    if not dist.is_initialized():
        return number
    number = torch.tensor(number, device=device)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def check_same(numbers, device):
    """Raises UserError unless these integers, that tell what was found, are all processes' own."""
    mine = torch.tensor(numbers, device=device)
    first = mine.clone()
    dist.broadcast(first, 0)
    if not torch.equal(mine, first):
        raise UserError("the processes found different models, data or text; start them again")


def leave_processes():
    """Take leave of the other processes, once every DistributedDataParallel has been deleted.

    Such a module holds the group, and with it threads, which abort the process if they outlive it.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def check_numbers(settings, may_be_zero):
    """Raises UserError, naming the flag, for a number that is not finite, negative, or zero.

    settings: a dictionary, of which only numbers and lists of numbers are looked at; may_be_zero:
    the names for which zero makes sense.
    """
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if type(value) in (int, float):
            if type(value) is int and value >= 2**63:
                raise UserError(f"{flag} is {str(value)[:20]}.., but must be below 2 ** 63")
            if not math.isfinite(value):
                raise UserError(f"{flag} is {value}, but must be finite")
            if value < 0 or (value == 0 and name not in may_be_zero):
                least = "0 or more" if name in may_be_zero else "above 0"
                raise UserError(f"{flag} is {value}, but must be {least}")
            if name == "seed" and value >= 2**31:
                raise UserError(f"{flag} is {value}, but must be below 2147483648")
        if name.endswith("dropout") and value >= 1:
            raise UserError(f"{flag} is {value}, but must be below 1")
        if isinstance(value, list):
            for x in value:
                if type(x) in (int, float) and not is_number(x):
                    raise UserError(f"{flag} has {str(x)[:20]} in it, but must be finite")


def choose(kind, name, valid, more=""):
    """Check that `name` is one of `valid`. Returns `name`.

    Raises UserError naming the valid ones, the nearest to what was typed, and `more`.
    """
    valid = list(valid)
    if name in valid:
        return name
    near = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UserError(f"unknown {kind} '{name}'; valid: {', '.join(valid)}.{more}{hint}")


@functools.cache
def network_available():
    """Whether the Hugging Face hub (HF_ENDPOINT if set) answers at all; asked once a process.

    Hub clients retry for about 20 s without a network; this gives up after PROBE_SECONDS, however
    long a name lookup hangs. It asks through the hub's own client, so proxies and certificates are
    the same. HF_HUB_OFFLINE=1 answers no without asking.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    answers = []

    def ask():
        try:
            get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
            answers.append(True)
        except Exception:  # a refused or timed-out connection, a bad name, proxy or certificate
            answers.append(False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answers == [True]
