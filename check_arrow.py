"""Run by files.py as a process of its own: are a dataset's Arrow or Parquet files what they say?

    python check_arrow.py '{"folder": .., "format": "arrow", "shapes": {..}, "limit": 1000000000}'

pyarrow believes what a file says of itself: an offset beyond its end is followed all the same, and
a few bytes may stand for gigabytes. Here that ends this process, which may have `limit` bytes of
memory, and not a training. Prints what is wrong as its last line, and then exits with 1. shapes are
those of spaces: {"observations": [84, 84, 3], "actions": []}, with a dictionary for each of parts.
"""

import io
import json
import math
import resource
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset
from PIL import Image

IGNORED = ["_", ".", "metadata.json"]  # as Minari reads an episode's folder
PLAIN = ("boolean", "integer", "floating", "binary", "string")


def check_type(kind, inside_list=False):
    """Raises ValueError for a type that Minari does not write. Empty ones take no bytes at all."""
    if pa.types.is_struct(kind):
        for field in kind:
            check_type(field.type, inside_list)
    elif pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind):
        if pa.types.is_fixed_size_list(kind) and kind.list_size < 1:
            raise ValueError(f"a column is of {kind}")
        check_type(kind.value_type, inside_list=True)
    elif pa.types.is_null(kind) and not inside_list:
        pass  # a row of it is nothing, but there are as many rows as steps
    elif not any(getattr(pa.types, f"is_{name}")(kind) for name in PLAIN):
        raise ValueError(f"a column is of {kind}")


def check_pictures(column, shape):
    """Raises ValueError for JPEG's bytes that are no picture of that shape, before one is made."""
    if pa.types.is_struct(column.type):
        for i, field in enumerate(column.type):
            check_pictures(column.field(i), shape[field.name] if isinstance(shape, dict) else None)
    elif pa.types.is_binary(column.type):
        for picture in column:
            width, height = Image.open(io.BytesIO(picture.as_py()), formats=["JPEG"]).size
            if not isinstance(shape, list) or [height, width] != shape[:2]:
                raise ValueError(f"a picture is {width} wide and {height} high, not {shape}")


def check_episode(folder, kind, shapes, limit):
    """Raises what pyarrow or Pillow does, or ValueError, for an episode that cannot be read."""
    steps = json.loads((folder / "metadata.json").read_text())["total_steps"]
    parts = pa.dataset.dataset(str(folder), format=kind, ignore_prefixes=IGNORED)
    for field in parts.schema:
        check_type(field.type)
    one_at_a_time = dict(batch_readahead=0, fragment_readahead=0, use_threads=False)
    for batch in parts.to_batches(**one_at_a_time):
        batch.validate(full=True)  # offsets, and the sizes that follow from them
        if batch.num_rows != steps + 1:
            raise ValueError(f"{batch.num_rows} rows of an episode of {steps} steps")
        for name, shape in shapes.items():
            check_pictures(batch[name], shape)
            if isinstance(shape, list) and math.prod(shape) * batch.num_rows > limit:
                raise ValueError(f"{batch.num_rows} rows of {shape} are too many for the memory")


def main():
    asked = json.loads(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (asked["limit"], asked["limit"]))
    pa.set_cpu_count(1)
    for folder in sorted(Path(asked["folder"]).iterdir()):
        if folder.is_dir():
            if odd := [p.name for p in folder.rglob("*") if not (p.is_file() or p.is_dir())]:
                sys.exit(f"{folder.name}: {odd[0]} is no ordinary file")
            try:
                check_episode(folder, asked["format"], asked["shapes"], asked["limit"])
            except Exception as error:  # of pyarrow, Pillow, JSON and the file system
                sys.exit(f"{folder.name}: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
