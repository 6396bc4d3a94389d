"""Files of strangers: nothing in them runs, and nothing is allocated because they say so."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import text as text_module
from data import BUNDLED, load_trajectories, read_dataset, read_frames
from files import check_hdf5, check_memory, load_tensors, locked, read_json, save_tensors
from load_gpt2 import MINI, load_gpt2
from plumbing import UserError
from spaces import read_space
from text import get_encoding, tokenise

ROOT = Path(__file__).resolve().parent.parent
CONTENT = {"a": torch.arange(10.0), "b": {"c": [1, 2.5, None, "text", True], 3: (4, 5)}}

leaves = st.none() | st.booleans() | st.integers(1 - 2**63, 2**63 - 1) | st.text(max_size=5)
leaves |= st.floats(allow_nan=False)
trees = st.recursive(
    leaves, lambda t: st.lists(t, max_size=3) | st.dictionaries(st.text(max_size=3), t, max_size=3)
)


@settings(deadline=None, max_examples=50)
@given(tree=trees, shape=st.lists(st.integers(0, 4), max_size=3))
def test_what_is_saved_is_read_back(tmp_path_factory, tree, shape):
    path = tmp_path_factory.mktemp("saved") / "x.pt"
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool):
        tensor = torch.arange(int(np.prod(shape)), dtype=torch.float32).reshape(shape).to(dtype)
        save_tensors(path, {"tree": tree, "tensor": tensor, "scalar": tensor.sum()})
        back = load_tensors(path)
        assert back["tree"] == tree
        assert back["tensor"].dtype == dtype
        assert torch.equal(back["tensor"], tensor)


def rezip(source, target, edit, compression=zipfile.ZIP_STORED):
    """A zip file with each of its parts edited, checksums made anew."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for entry in old.infolist():
            if (content := edit(entry.filename, old.read(entry.filename))) is not None:
                new.writestr(zipfile.ZipInfo(entry.filename), content, compression)


@pytest.fixture
def saved(tmp_path):
    save_tensors(tmp_path / "sound.pt", CONTENT)
    return tmp_path / "sound.pt"


def other_pickle(path, content):
    """The file with another pickle in it."""

    def edit(name, old):
        return content if name.endswith("data.pkl") else old

    rezip(path, path.with_name("forged.pt"), edit)
    return path.with_name("forged.pt")


class Runs:
    """What runs a command when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_with_code_is_refused_and_not_run(saved, tmp_path):
    marker = tmp_path / "executed"
    for content in ({"a": Runs(marker)}, Runs(marker), [1, OrderedDict(a=Runs(marker))]):
        with pytest.raises(ValueError, match="it names posix system"):
            load_tensors(other_pickle(saved, pickle.dumps(content, 2)))
        with pytest.raises(ValueError, match="STACK_GLOBAL"):
            load_tensors(other_pickle(saved, pickle.dumps(content, 4)))
        (tmp_path / "plain.pt").write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match="not a zip file of torch's"):
            load_tensors(tmp_path / "plain.pt")
        for name in ("pytorch_model.bin", "model.safetensors"):
            shutil.copy(tmp_path / "plain.pt", tmp_path / name)
            with pytest.raises(UserError, match=r"not a \.safetensors file|no readable"):
                load_gpt2(str(tmp_path / name))
    assert not marker.exists()


def test_a_tensor_is_no_larger_than_its_file(saved, tmp_path):
    with zipfile.ZipFile(saved) as archive:
        sound = next(archive.read(n) for n in archive.namelist() if n.endswith("data.pkl"))
    sizes = sound.replace(b"K\nt", b"M\xff\xfft").replace(b"K\n\x85", b"M\xff\xff\x85")
    assert sizes != sound
    with pytest.raises(RuntimeError):  # the storage ends before
        load_tensors(other_pickle(saved, sizes))
    torch.save({"a": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "wide.pt")
    with pytest.raises(ValueError, match="not plain numbers in order"):
        load_tensors(tmp_path / "wide.pt")
    one = torch.zeros(10_000)
    torch.save({i: one[0:10_000] for i in range(100)}, tmp_path / "many.pt")  # of one storage
    with pytest.raises(ValueError, match="larger than the file"):
        load_tensors(tmp_path / "many.pt")
    torch.save({"a": torch.zeros(10**9, device="meta")}, tmp_path / "meta.pt")
    with pytest.raises(ValueError, match="it names torch"):
        load_tensors(tmp_path / "meta.pt")
    torch.save({"a": torch.zeros(3).to_sparse()}, tmp_path / "sparse.pt")
    with pytest.raises(ValueError, match="it names"):
        load_tensors(tmp_path / "sparse.pt")


def test_a_pickle_that_grows_is_refused_before_it_does(saved):
    """Each step of it doubles a text, by functions that weights_only lets through."""

    def word(text):
        return b"X" + len(text).to_bytes(4, "little") + text

    doublings = 40
    content = b"\x80\x02" + b"c_codecs\nencode\n" * (doublings + 1)
    content += (
        word(b"A" * 1024) + word(b"latin1") + b"\x86R" + (word(b"hex") + b"\x86R") * doublings
    )
    with pytest.raises(ValueError, match="it names _codecs encode"):
        load_tensors(other_pickle(saved, content + b"."))
    with pytest.raises(ValueError, match="it names builtins bytearray"):
        load_tensors(other_pickle(saved, b"\x80\x02cbuiltins\nbytearray\nK\x05\x85R."))


def test_a_second_list_of_parts_is_refused(saved, tmp_path):
    """The end names one list of parts, another one stands before it: readers would differ."""
    whole = saved.read_bytes()
    start = int.from_bytes(whole[-6:-2], "little")
    length = int.from_bytes(whole[-10:-6], "little")
    parts, end = whole[start : start + length], whole[start + length :]
    assert whole == whole[:start] + parts + end
    (tmp_path / "two.pt").write_bytes(whole[:start] + parts + parts + end)
    with pytest.raises(ValueError, match="its list of parts is not where it says"):
        load_tensors(tmp_path / "two.pt")
    plain = tmp_path / "plain.pt"  # without zip64's end, as zipfile writes it
    rezip(saved, plain, lambda name, content: content)
    assert torch.equal(load_tensors(plain)["a"], CONTENT["a"])
    whole = plain.read_bytes()
    plain.write_bytes(whole[:-22] + b"another list" + whole[-22:])
    with pytest.raises(ValueError, match="its list of parts is not where it says"):
        load_tensors(plain)


def test_nested_repetition_is_not_unfolded(tmp_path):
    laughs = ["ha"]
    for _ in range(30):
        laughs = [laughs, laughs]  # two of each: 2**30 at the end
    torch.save({"a": laughs}, tmp_path / "laughs.pt")
    with pytest.raises(ValueError, match="more than its size allows"):
        load_tensors(tmp_path / "laughs.pt")
    endless = []
    endless.append(endless)
    torch.save({"a": endless}, tmp_path / "endless.pt")
    with pytest.raises((ValueError, RecursionError)):
        load_tensors(tmp_path / "endless.pt")


def test_compressed_overlapping_and_damaged_files_are_refused(saved, tmp_path):
    rezip(saved, tmp_path / "bomb.pt", lambda name, content: content, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="it is compressed"):
        load_tensors(tmp_path / "bomb.pt")
    whole = bytearray(saved.read_bytes())
    place = whole.index(torch.arange(10.0).numpy().tobytes())
    whole[place + 5] ^= 1  # of a weight: torch.load would take it
    (tmp_path / "damaged.pt").write_bytes(whole)
    assert torch.load(tmp_path / "damaged.pt", weights_only=True)
    with pytest.raises(ValueError, match=r"data/0 is damaged"):
        load_tensors(tmp_path / "damaged.pt")
    (tmp_path / "tail.pt").write_bytes(saved.read_bytes() + b"more")
    with pytest.raises(ValueError, match="not a zip file of torch's"):
        load_tensors(tmp_path / "tail.pt")
    # two names for one part: as large as the file each
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x", b"0" * 1000)
        (entry,) = archive.filelist
        archive.filelist += [entry] * 50
    (tmp_path / "overlap.pt").write_bytes(buffer.getvalue())
    with pytest.raises((ValueError, zipfile.BadZipFile)):
        load_tensors(tmp_path / "overlap.pt")


def test_weights_with_a_forged_header_are_refused(tmp_path):
    whole = MINI.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    for spoil in (
        lambda h: h["wte.weight"].update(shape=[2**40, 2**20]),
        lambda h: h["wte.weight"].update(data_offsets=[0, 2**60]),
        lambda h: h["wte.weight"].update(data_offsets=[-1, 5]),
        lambda h: h.update({"h.9.x": h["wte.weight"]}),
    ):
        forged = json.loads(json.dumps(header))
        spoil(forged)
        text = json.dumps(forged).encode()
        path = tmp_path / "forged.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + size :])
        with pytest.raises(UserError, match="no readable"):
            load_gpt2(str(path))
    path.write_bytes((2**62).to_bytes(8, "little") + whole[8:])
    with pytest.raises(UserError, match="no readable"):
        load_gpt2(str(path))


# --- datasets ------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path):
    """A copy of a bundled dataset's folder, to be spoilt."""
    folder = tmp_path / "set-v0"
    shutil.copytree(BUNDLED / "lamo/reacher2d/medium-v0", folder)
    return folder


def spoil_hdf5(folder, spoil):
    with h5py.File(folder / "data" / "main_data.hdf5", "a") as file:
        spoil(file)
    return folder


def claims_terabytes(file):
    del file["episode_0/rewards"]
    file.create_dataset("episode_0/rewards", (10**12,), "f8", chunks=(1000,))  # nothing is written


def lies_elsewhere(file):
    del file["episode_0"]
    file["episode_0"] = h5py.ExternalLink("/etc/passwd", "/")


def is_a_soft_link(file):
    del file["episode_0/rewards"]
    file["episode_0/rewards"] = h5py.SoftLink("/episode_1/rewards")


def is_raw_bytes_of_another_file(file):
    del file["episode_0/rewards"]
    file.create_dataset("episode_0/rewards", (100,), "f8", external=[("/etc/passwd", 0, 800)])


def is_virtual(file):
    del file["episode_0/rewards"]
    layout = h5py.VirtualLayout((100,), "f8")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", (100,))
    file.create_virtual_dataset("episode_0/rewards", layout)


def is_in_one_large_piece(file):
    rewards = file["episode_0/rewards"][()]
    del file["episode_0/rewards"]
    large = dict(maxshape=(None,), chunks=(2**26,), compression="gzip")
    file.create_dataset("episode_0/rewards", rewards.shape, "f8", **large)


def is_in_many_pieces(file):
    """None of them written: HDF5 would take gigabytes to find that out."""
    del file["episode_0/terminations"]
    file.create_dataset("episode_0/terminations", (10**6,), "?", chunks=(1,))


def is_one_place_many_times(folder):
    """Elements of variable length that all point at the same megabyte."""
    path, n = folder / "data" / "main_data.hdf5", 100_000
    with h5py.File(path, "a") as file:
        del file["episode_0/rewards"]
        many = file.create_dataset("episode_0/rewards", (n,), h5py.vlen_dtype(np.uint8))
        many[0] = np.full(1 << 20, 7, np.uint8)
        place = many.id.get_offset()
    content = bytearray(path.read_bytes())
    content[place : place + 16 * n] = content[place : place + 16] * n
    path.write_bytes(content)


def test_elements_of_variable_length_are_counted(dataset):
    is_one_place_many_times(dataset)
    with pytest.raises(UserError, match="more than its size allows"):
        read_dataset(dataset)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (is_in_one_large_piece, "too large to be read"),
        (claims_terabytes, "more than its size allows"),
        (is_in_many_pieces, "in 1,000,\\d+ pieces, more than its size allows"),
        (lies_elsewhere, "is a link to elsewhere"),
        (is_a_soft_link, "is a link to elsewhere"),
        (is_raw_bytes_of_another_file, "is kept in other files"),
        (is_virtual, "is kept in other files"),
    ],
)
def test_a_datasets_file_is_all_there_is_of_it(dataset, spoil, says):
    check_hdf5(dataset / "data" / "main_data.hdf5")
    with pytest.raises(UserError, match=says):
        read_dataset(spoil_hdf5(dataset, spoil))


@pytest.mark.parametrize("piece", [1, 7, 5000])
@pytest.mark.parametrize("compression", [None, "gzip"])
@pytest.mark.parametrize("largest", [None, 5000])
def test_what_was_written_in_pieces_however_small_is_read(tmp_path, piece, compression, largest):
    how = dict(chunks=(piece,), compression=compression, maxshape=(largest,), dtype="?")
    for libver in ("earliest", "latest"):
        path = tmp_path / f"{libver}.hdf5"
        with h5py.File(path, "w", libver=libver) as file:
            file.create_dataset("episode_0/terminations", data=np.zeros(5000, bool), **how)
        check_hdf5(path)


def test_steps_and_episodes_that_are_not_there_are_not_made_room_for(dataset):
    read = read_dataset(dataset)
    assert len(load_trajectories(read, read.action_space)) == 5000
    spoil_hdf5(dataset, lambda file: file["episode_3"].attrs.update(total_steps=10**13))
    with pytest.raises(UserError, match=r"would take [\d,.]+ GiB, and [\d,.]+ are free"):
        load_trajectories(read_dataset(dataset), read.action_space)
    spoil_hdf5(dataset, lambda file: file["episode_3"].attrs.update(total_steps=-5))
    with pytest.raises(UserError, match="says it has -5 steps"):
        load_trajectories(read_dataset(dataset), read.action_space)
    metadata = json.loads((dataset / "data" / "metadata.json").read_text())
    told = json.dumps(metadata | {"total_episodes": 10**11})
    (dataset / "data" / "metadata.json").write_text(told)
    with pytest.raises(UserError, match="holds 50 episodes, not 100000000000"):
        read_dataset(dataset)


def test_spaces_of_absurd_size_are_refused_before_they_are_made():
    box = {"type": "Box", "dtype": "float32", "low": [0.0], "high": [1.0]}
    for told in (
        box | {"shape": [10**6, 10**6]},
        {"type": "Discrete", "dtype": "int64", "n": 10**12, "start": 0},
        {"type": "MultiBinary", "n": [5, 10**12]},
        {
            "type": "Dict",
            "subspaces": {"a": {"type": "Tuple", "subspaces": [box | {"shape": [10**9]}]}},
        },
    ):
        with pytest.raises(UserError, match="is not supported"):
            read_space(json.dumps(told))


def test_a_picture_is_not_decoded_if_it_is_another_size():
    def jpeg(width, height):
        buffer = io.BytesIO()
        Image.new("RGB", (width, height), "red").save(buffer, "JPEG")
        return np.frombuffer(buffer.getvalue(), np.uint8)

    pictures = np.empty(3, object)
    pictures[:] = [jpeg(40, 50)] * 3
    assert read_frames((50, 40, 3), pictures).shape == (3, 84, 84)
    pictures[2] = jpeg(41, 50)
    with pytest.raises(UserError, match=r"a picture is \(41, 50\) wide and high"):
        read_frames((50, 40, 3), pictures)


def test_json_is_read_within_bounds(tmp_path):
    for content, says in (
        ("[" * 100_000, "nested too deeply"),
        ("[1]", "no JSON object"),
        ("{", "Expecting"),
    ):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(ValueError, match=says):
            read_json(tmp_path / "x.json")


def test_memory_is_asked_for_before_it_is_taken():
    check_memory(1000, "a little")
    with pytest.raises(UserError, match=r"^much would take 1,024.0 GiB, and [\d.]+ are free"):
        check_memory(2**40, "much")


# --- text ----------------------------------------------------------------------------------------


def test_a_damaged_token_file_is_made_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LAMO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("what was said " * 20)
    whole = np.array(tokenise(tmp_path / "text.txt", get_encoding(257)))
    (cached,) = [p for p in (tmp_path / "cache" / "tokens").iterdir() if p.suffix == ".bin"]
    strange = whole.copy()
    strange[7] = 300  # a model of 257 words would look it up outside of its table
    for content in (b"", b"1", cached.read_bytes()[:-1], strange.tobytes()):
        cached.write_bytes(content)
        assert np.array_equal(tokenise(tmp_path / "text.txt", get_encoding(257)), whole)
        assert "is damaged, so text.txt is tokenised again" in capsys.readouterr().out


def test_a_text_in_one_line_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "CHUNK", 100)
    (tmp_path / "text.txt").write_text("x" * 1234)
    longest = 0
    encoding = get_encoding(257)

    class Watched:
        name, n_vocab = encoding.name, encoding.n_vocab

        def encode_ordinary(self, chunk):
            nonlocal longest
            longest = max(longest, len(chunk))
            return encoding.encode_ordinary(chunk)

    assert len(tokenise(tmp_path / "text.txt", Watched())) == 1234
    assert longest == 200


def test_two_processes_make_one_token_file(tmp_path):
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 400_000)
    code = (
        "import text; t = text.tokenise('text.txt', text.get_encoding(257)); print(len(t), t[-1])"
    )
    environment = os.environ | {"LAMO_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    both = [
        subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert {text.splitlines()[-1] for text in said} == {"7600000 10"}
    files = [p for p in (tmp_path / "cache" / "tokens").iterdir() if p.suffix != ".lock"]
    assert len(files) == 1


def test_two_recordings_leave_one_dataset(tmp_path):
    words = ["-m", "experiments.collect", "--env", "reacher2d", "--random", "--steps", "300"]
    environment = os.environ | {"MINARI_DATASETS_PATH": str(tmp_path)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    left = tmp_path / "lamo" / "reacher2d" / ".random-v0.abcd1234"  # by one that was killed
    left.mkdir(parents=True)
    (left / "main_data.hdf5").write_bytes(b"a part")
    both = [
        subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment, **pipes)
        for _ in range(2)
    ]
    said = [process.communicate()[1] for process in both]
    assert 0 in [process.returncode for process in both], said
    for process, text in zip(both, said, strict=True):
        assert process.returncode in (0, 2)
        if process.returncode:
            assert "exists already" in text
    read = read_dataset(tmp_path / "lamo/reacher2d/random-v0")
    assert read.total_steps >= 300
    assert [path.name for path in left.parent.iterdir() if path.is_dir()] == ["random-v0"]


def test_a_lock_is_waited_for(tmp_path):
    code = f"""
from files import locked
with locked({str(tmp_path / "x")!r}):
    print("mine", flush=True)
"""
    with locked(tmp_path / "x"):
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline().startswith("waiting for another process")
        assert process.poll() is None
    assert process.communicate()[0] == "mine\n"
