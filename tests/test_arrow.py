"""Datasets in Minari's Arrow and Parquet formats: sound ones are read, forged ones refused."""

import io
import random
import shutil
from types import SimpleNamespace

import gymnasium as gym
import minari
import numpy as np
import psutil
import pyarrow as pa
import pytest
from fuzz import spoil_bytes
from minari.data_collector import EpisodeBuffer
from PIL import Image

from check_arrow import check_episode
from data import load_trajectories, read_dataset
from plumbing import UserError

STEPS = 5
PICTURES = gym.spaces.Box(0, 255, (40, 50, 3), np.uint8)
NUMBERS = gym.spaces.Box(-np.inf, np.inf, (4,), np.float64)
ACTIONS = gym.spaces.Discrete(3)


def record(folder, space, data_format):
    """Two episodes in Minari's layout. Returns the dataset's folder."""
    draw = np.random.default_rng(0)
    episodes = [
        EpisodeBuffer(
            observations=np.stack([draw.integers(0, 255, space.shape)] * (STEPS + 1)).astype(
                space.dtype
            ),
            actions=draw.integers(0, 3, STEPS),
            rewards=np.ones(STEPS),
            terminations=np.arange(STEPS) == STEPS - 1,
            truncations=np.zeros(STEPS, bool),
        )
        for _ in range(2)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder))
        minari.create_dataset_from_buffers(
            "test/set-v0",
            episodes,
            observation_space=space,
            action_space=ACTIONS,
            data_format=data_format,
            ref_min_score=0.0,
        )
    return folder / "test" / "set-v0"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return record(tmp_path_factory.mktemp("pictures"), PICTURES, "arrow")


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    return record(tmp_path_factory.mktemp("numbers"), NUMBERS, "arrow")


def copy(folder, to):
    """A copy of a dataset's folder, and the Arrow file of its first episode."""
    shutil.copytree(folder, to / "set")
    (part,) = (to / "set" / "data" / "0").glob("*.arrow")
    return to / "set", part


def load(folder):
    return load_trajectories(read_dataset(folder), ACTIONS)


def refusal(folder):
    """What is said of a dataset that is not read."""
    with pytest.raises(UserError) as error:
        load(folder)
    assert str(error.value).isprintable()
    return str(error.value)


def columns(part):
    """The columns of an Arrow file, by name."""
    with pa.OSFile(str(part)) as file:
        table = pa.ipc.open_file(file).read_all().combine_chunks()
    return {name: table[name].chunk(0) for name in table.column_names}


def write(part, arrays, compression=None):
    batch = pa.RecordBatch.from_arrays(list(arrays.values()), list(arrays))
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_file(str(part), batch.schema, options=options) as file:
        file.write_batch(batch)


@pytest.mark.parametrize("data_format", ["arrow", "parquet"])
@pytest.mark.parametrize("space", [NUMBERS, PICTURES], ids=["numbers", "pictures"])
def test_what_minari_writes_is_read(space, data_format, tmp_path):
    flat = load(record(tmp_path, space, data_format))
    assert flat.lengths.tolist() == [STEPS, STEPS]
    assert flat.reward.tolist() == [1.0] * 2 * STEPS


def test_more_rows_than_steps_take_no_memory(numbers, tmp_path):
    """A column of nothing may have any number of rows, in a file of a few hundred bytes."""
    folder, part = copy(numbers, tmp_path)
    nothing = pa.Array.from_buffers(pa.null(), 2**31 - 1, [None])
    write(part, {name: nothing for name in columns(part)})
    assert f"rows of an episode of {STEPS} steps" in refusal(folder)


def test_offsets_beyond_the_file_are_not_followed(pictures, tmp_path):
    folder, part = copy(pictures, tmp_path)
    offsets = np.frombuffer(columns(part)["observations"].buffers()[1], np.int32)[: STEPS + 2]
    content = part.read_bytes()
    assert content.count(offsets.tobytes()) == 1
    forged = offsets.copy()
    forged[-1] = 2**31 - 1
    part.write_bytes(content.replace(offsets.tobytes(), forged.tobytes()))
    assert "0: ArrowInvalid" in refusal(folder)


def test_a_few_bytes_that_stand_for_gigabytes_are_not_unpacked(numbers, tmp_path, monkeypatch):
    folder, part = copy(numbers, tmp_path)
    arrays = columns(part)
    many = pa.array(np.zeros(1 << 28))  # 2 GiB, none of which is touched
    nothing = pa.Array.from_buffers(pa.null(), len(many), [None])
    rows = {name: nothing for name in arrays} | {"rewards": many}
    write(part, rows, compression="zstd")
    assert part.stat().st_size < 200_000
    free = SimpleNamespace(available=2 * (2 << 30))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    assert "ArrowMemoryError" in refusal(folder)


def test_a_picture_of_another_size_is_not_made(pictures, tmp_path):
    folder, part = copy(pictures, tmp_path)
    arrays = columns(part)
    large = io.BytesIO()
    Image.new("RGB", (9000, 9000)).save(large, "JPEG")
    arrays["observations"] = pa.array([large.getvalue()] * (STEPS + 1), pa.binary())
    write(part, arrays)
    assert "a picture is 9000 wide and 9000 high, not [40, 50, 3]" in refusal(folder)
    numbers_said = (folder / "data" / "metadata.json").read_text().replace("uint8", "float64")
    (folder / "data" / "metadata.json").write_text(numbers_said)
    assert "no readable Minari dataset" in refusal(folder)


def test_an_episodes_pictures_are_held_against_the_memory(pictures):
    """Nearly nothing in a file may stand for large pictures, many times."""
    episode, shapes = pictures / "data" / "0", {"observations": list(PICTURES.shape)}
    size = (STEPS + 1) * 40 * 50 * 3
    check_episode(episode, "arrow", shapes, limit=size)
    with pytest.raises(ValueError, match=r"6 rows of \[40, 50, 3\] are too many"):
        check_episode(episode, "arrow", shapes, limit=size - 1)


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["a"] * (STEPS + 1)).dictionary_encode(),
        pa.FixedSizeListArray.from_arrays(pa.nulls((STEPS + 1) * 8), 8),
        pa.ListArray.from_arrays(pa.array([0] * (STEPS + 2), pa.int32()), pa.nulls(8)),
    ],
    ids=["dictionary", "lists of nothing", "a list of nothing"],
)
def test_columns_that_minari_does_not_write_are_refused(column, numbers, tmp_path):
    folder, part = copy(numbers, tmp_path)
    write(part, columns(part) | {"observations": column})
    assert "a column is of" in refusal(folder)


def test_spoilt_files_are_refused_in_one_line_or_read(numbers, pictures, tmp_path):
    draw, read = random.Random(0), 0
    for i in range(16):
        folder, part = copy((numbers, pictures)[i % 2], tmp_path / str(i))
        part.write_bytes(spoil_bytes(draw, part.read_bytes()))
        try:
            flat = load(folder)
        except UserError:
            continue
        assert len(flat) == 2 * STEPS
        read += 1
    assert read < 16
