"""Files: written whole or not at all, and read without trusting who made them.

A run may be killed at any moment, a disk may be full, and a checkpoint, a dataset or weights may
come from a stranger. So every file is written aside, flushed and renamed; and what a file says of
its own size is held against the file, and against this machine's memory, before it is believed.
Nothing that is read here can run code: torch's zip files are read by weights_only alone.
"""

import glob
import io
import json
import math
import os
import pickletools
import re
import resource
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import psutil
import torch
from filelock import FileLock, Timeout

from plumbing import UserError, printable

MOST_SHRUNK = 1100  # gzip makes a file 1032 times smaller at most: one that claims more is forged
LARGEST_ATTRIBUTE = 1 << 16  # bytes of what HDF5 keeps beside a group or an array
LEAST_OF_A_ROW = 16  # bytes that HDF5 writes for a row of no fixed length
LARGEST_CHUNK = 1 << 26  # bytes of a piece that HDF5 reads at once
LEAST_OF_A_PIECE = 8  # bytes of a file that a piece takes: where it is
PIECE_IN_MEMORY = 4096  # bytes that HDF5 takes for a piece while it reads one's array, measured
NAMED = {"torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"}  # by torch.save
NAMED |= {"collections OrderedDict"}
MADE_ASIDE = r"\.[a-z0-9_]{8}"  # what tempfile puts behind a name
LARGEST_NUMBER = 1 << 63  # whole numbers of files are smaller
LONGEST_JSON = 1 << 28  # bytes of a JSON file that are read


# --- writing -------------------------------------------------------------------------------------


def write_atomically(path, write):
    """Call write(file) on a new binary file, flush it to disk, then rename it to `path`.

    A reader sees the old file or the whole new one, never a part; on failure the old one stays.
    Raises UserError when the folder cannot be written to or the disk is full.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w+b") as file:
            write(file)
            file.flush()
            os.fsync(handle)
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


def save_tensors(path, content):
    """torch.save of a dictionary, whole or not at all (see write_atomically)."""
    buffer = io.BytesIO()  # written directly, torch.save reports a full disk as no error of it
    torch.save(content, buffer)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def write_json(path, content):
    """Write a dictionary as indented JSON, whole or not at all (see write_atomically)."""
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def check_writable(folder, flag):
    """Raises UserError, naming the flag, if nothing could be written in `folder` (made or not)."""
    parents = (Path(folder) / "file").absolute().parents
    existing = next(p for p in parents if os.path.exists(p))  # Path.exists may raise, for EACCES
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {folder}: {existing} is not a folder that can be written to")


def clear_unfinished(path):
    """Remove what a kill left of writing `path`. Nobody else may be writing it."""
    for unfinished in Path(path).parent.glob(f".{glob.escape(Path(path).name)}.*"):
        if not re.fullmatch(MADE_ASIDE, unfinished.suffix):  # its lock, or nothing of ours
            continue
        if unfinished.is_dir() and not unfinished.is_symlink():
            shutil.rmtree(unfinished, ignore_errors=True)
        else:
            unfinished.unlink(missing_ok=True)


def folder_aside(path):
    """A new temporary folder beside `path`, to be renamed to it when whole; within locked(path)."""
    path = Path(path)
    return tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.")


@contextmanager
def locked(path):
    """Within this no other process is within the same for `path`: what it makes is made once.

    Waits for the other one, and says so. What a killed one left of it is removed. Raises UserError
    where nothing can be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.parent / f".{path.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"waiting for another process, which is making {path}", flush=True)
            lock.acquire()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        clear_unfinished(path)
        yield
    finally:
        lock.release()


def try_lock(path):
    """A lock on a file of that name until its `release`; None if another process has it.

    Raises UserError where no file can be locked.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    except (OSError, NotImplementedError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"cannot lock {path}: {why}; use a disk that can") from error
    return lock


# --- reading -------------------------------------------------------------------------------------


def check_memory(needed, what):
    """Raises UserError if so many bytes cannot be had on this machine now."""
    free = psutil.virtual_memory().available
    if needed > free:
        gib = f"{needed / 2**30:,.1f} GiB, and {free / 2**30:,.1f} are free"
        raise UserError(f"{what} would take {gib}; use a part of it, or a larger machine")


def check_regular(path):
    """Raises ValueError for a pipe or a device, from which one could read for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("it is no ordinary file")


def check_size(path):
    """Raises OSError, or ValueError for what is no file of a size that is read."""
    check_regular(path)
    if os.path.getsize(path) > LONGEST_JSON:
        raise ValueError(f"larger than {LONGEST_JSON} bytes")


def parse_json(text):
    """What a JSON text says. Raises ValueError, also for whole numbers beyond LARGEST_NUMBER."""

    def bounded(digits):
        if len(digits) > 20 or abs(number := int(digits)) >= LARGEST_NUMBER:
            raise ValueError("a number in it is too large")
        return number

    try:
        return json.loads(text, parse_int=bounded)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path):
    """The dictionary in a JSON file. Raises OSError, or ValueError for all that is none."""
    check_size(path)
    content = parse_json(Path(path).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    return content


def check_directory(path):
    """Raises ValueError unless a zip file has one list of its parts, however it is looked for.

    zipfile looks for the list just before the end, PyTorch's reader where the end says it is: a
    file could show each of them another one.
    """
    check_regular(path)
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        file.seek(max(0, size - 98))
        end = file.read(98)  # zip64's end (56 bytes), its locator (20), the end (22), nothing after
    if end[-22:-18] != b"PK\5\6" or end[-2:] != b"\0\0":
        raise ValueError("not a zip file of torch's")
    length, start = struct.unpack("<II", end[-10:-2])
    behind = size - 22
    if end[-42:-38] == b"PK\6\7":  # then both take zip64's numbers
        behind = size - 98
        if struct.unpack("<Q", end[-34:-26])[0] != behind or end[:4] != b"PK\6\6":
            raise ValueError("its list of parts is not where it says")
        length, start = struct.unpack("<QQ", end[40:56])
    if start + length != behind:
        raise ValueError("its list of parts is not where it says")


def check_pickle(content):
    """Raises ValueError for a pickle that names anything but tensors of numbers.

    weights_only refuses code, but knows more names than torch.save writes for a dictionary of
    tensors, some of which can be made to fill the memory.
    """
    for opcode, name, _ in pickletools.genops(content):
        if opcode.name == "GLOBAL":
            if name not in NAMED and not re.fullmatch(r"torch \w+Storage", name):
                raise ValueError(f"it names {name}")
        elif opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX"):
            raise ValueError(f"its pickle has a {opcode.name}, which torch.save's have not")


def load_tensors(path):
    """What torch.save wrote, on the CPU: dictionaries and lists of tensors, numbers and text.

    Nothing else is let through, no tensor is larger than what the file holds of it, and every byte
    has its checksum. Raises OSError, ValueError, or one of torch.load's many kinds.
    """
    check_directory(path)
    size = os.path.getsize(path)
    check_memory(2 * size, path)
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed, which torch.save's are not")
        if sum(entry.file_size for entry in entries) > size:
            raise ValueError("its parts are larger than the whole")
        if len({entry.filename for entry in entries}) < len(entries):
            raise ValueError("two of its parts have one name")
        if damaged := archive.testzip():  # torch.load looks at no checksum
            raise ValueError(f"{damaged} is damaged")
        for entry in entries:
            if entry.filename.endswith(".pkl"):
                check_pickle(archive.read(entry))
    # Mapped, a tensor cannot reach beyond the file, whatever size it is said to have.
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    left = {"bytes": 2 * size, "parts": size}  # tied weights are one storage, read twice

    def owned(part):
        left["parts"] -= 1
        if left["parts"] < 0:
            raise ValueError("it holds more than its size allows")
        if isinstance(part, dict):
            return {owned(key): owned(value) for key, value in part.items()}
        if type(part) in (list, tuple):
            return type(part)(map(owned, part))
        if torch.is_tensor(part):
            if part.is_quantized or not part.is_contiguous():
                raise ValueError("a tensor in it is not plain numbers in order")
            left["bytes"] -= part.numel() * part.element_size()
            if left["bytes"] < 0:
                raise ValueError("its tensors are larger than the file")
            return part.detach().clone()  # out of the file, which may be replaced
        if type(part) is int and abs(part) >= LARGEST_NUMBER:
            raise ValueError("a number in it is too large")
        if part is None or type(part) in (bool, int, float, str):
            return part
        raise ValueError(f"it holds a {type(part).__name__}")

    return owned(content)


def check_hdf5(path):
    """Raises UserError for an HDF5 file that points out of itself, or claims more than it can hold.

    HDF5 fills what was never written when it is read, and many rows may be one place of the file:
    a file of a few bytes may claim terabytes.
    """
    check_regular(path)
    claimed, pieces, of_group, size = 0, 0, {}, os.path.getsize(path)

    def count(name, item):
        """Bytes of an array. Raises ValueError for one that Minari and D4RL have not."""
        if item.shape is None:
            return 0
        text, rows = h5py.check_string_dtype(item.dtype), h5py.check_vlen_dtype(item.dtype)
        if text is None and rows is None and item.dtype.kind not in "biufc":
            raise ValueError(f"{name} is of {item.dtype}, which is not read")
        if rows is None or (text is not None and text.length):
            return item.size * item.dtype.itemsize
        if item.size * LEAST_OF_A_ROW > size:
            raise ValueError(f"{name} has {item.size:,} rows, more than its size allows")
        if text is None and np.dtype(rows).kind not in "biuf":
            raise ValueError(f"{name} is of rows of {rows}, which are not read")
        n_bytes, each = 0, 1 if text is not None else np.dtype(rows).itemsize
        for i in np.ndindex(item.shape):
            n_bytes += len(item[i]) * each
            if n_bytes > MOST_SHRUNK * size:
                break
        return n_bytes

    def look(name, link):
        nonlocal claimed, pieces
        if not isinstance(link, h5py.HardLink):
            return f"{name} is a link to elsewhere, which is not followed"
        item = file[name]
        for key in item.attrs:
            told = item.attrs.get_id(key)
            plain = told.dtype.kind in "biufS" or (told.dtype.kind == "O" and told.shape == ())
            if not plain or math.prod(told.shape) * told.dtype.itemsize > LARGEST_ATTRIBUTE:
                return f"{name} has an attribute {key} that is too large, or of no plain kind"
        if isinstance(item, h5py.Dataset):
            if item.is_virtual or item.external:
                return f"{name} is kept in other files, which are not read"
            if item.chunks and math.prod(item.chunks) * item.dtype.itemsize > LARGEST_CHUNK:
                return f"{name} is in pieces of {item.chunks}, too large to be read"
            try:
                n_bytes = count(name, item)
            except ValueError as error:
                return str(error)
            lengths = zip(item.shape or (), item.chunks or (), strict=False)
            n_pieces = math.prod(-(-n // each) for n, each in lengths) if item.chunks else 0
            claimed, pieces = claimed + n_bytes, pieces + n_pieces
            group = name.partition("/")[0]  # an episode, which is read at once
            of_group[group] = of_group.get(group, 0) + n_bytes + n_pieces * PIECE_IN_MEMORY
        return None

    with h5py.File(path, "r") as file:
        wrong = file.visititems_links(look)  # ends with the first answer
    if wrong:
        raise UserError(f"{path}: {wrong}")
    if claimed > MOST_SHRUNK * size:
        raise UserError(f"{path} claims to hold {claimed:,} bytes, more than its size allows")
    if pieces * LEAST_OF_A_PIECE > size:
        raise UserError(f"{path} claims to be in {pieces:,} pieces, more than its size allows")
    check_memory(max(of_group.values(), default=0), f"an episode in {path}")


def check_arrow(folder, kind, shapes):
    """Raises UserError for Arrow or Parquet files that could harm who reads them.

    They are read by check_arrow.py first, in a process that may have half of the free memory.
    folder: with an episode in each of its folders; kind: "arrow" or "parquet"; shapes: of
    observations and actions, by these names, as spaces.shapes_of tells them.
    """
    asked = {"folder": str(folder), "format": kind, "shapes": shapes}
    limit, hard = psutil.virtual_memory().available // 2, resource.getrlimit(resource.RLIMIT_AS)[1]
    asked["limit"] = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    program = Path(__file__).with_name("check_arrow.py")
    command = [sys.executable, str(program), json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] if done.returncode == 1 else []
        why = said[0] if said else f"a process that read it ended with {done.returncode}"
        raise UserError(f"{folder} is no readable Minari dataset: {printable(why)}")
