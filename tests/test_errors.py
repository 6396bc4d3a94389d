"""A user's mistakes and damaged files: one line and exit code 2, no traceback, nothing begun.

LAMO_DAMAGE=1000 python -m pytest tests/test_errors.py damages as many files of each kind.
"""

import contextlib
import io
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import SHORT, call
from safetensors.torch import load_file, save_file

import evaluate
import train
from data import BUNDLED, find_dataset, get_encoding, load_trajectories, tokenise
from experiments.pretrain import save_gpt2
from load_gpt2 import load_gpt2
from model import GPT, GPTConfig
from tasks import TASKS
from utils import UserError, run_command

DAMAGES = int(os.environ.get("LAMO_DAMAGE", "8"))  # of each kind of file


@pytest.fixture
def error_of(capsys, tmp_path, monkeypatch):
    """Run a command's main() on a command line that must fail: what it prints on stderr."""
    monkeypatch.chdir(tmp_path)

    def call_it(main, *words):
        with pytest.raises(SystemExit) as stop:
            call(lambda: run_command(main), *words)
        line = capsys.readouterr().err
        assert stop.value.code == 2
        if line.startswith("error: "):
            assert line.count("\n") == 1
        else:  # tyro's box
            assert "--help" in line
            assert "Traceback" not in line
        assert not (tmp_path / "runs").exists()
        return line

    return call_it


BAD_FLAGS = {
    "--env hoper": "hopper?",
    "--method lamo-nlm": "lamo-nolm?",
    "--lm gpt2-mediun": "gpt2-medium?",
    "--embed mpl": "mlp",
    "--train lorra": "lora",
    "--ratio 0": "--ratio",
    "--ratio 1.01": "--ratio",
    "--ratio 0.5": "experiments.collect",  # more than comes with the project
    "--steps many": "--steps",
    "--eval-every 0": "--eval-every",
    "--dropout 1.5": "--dropout",
    "--lm-coef -1": "--lm-coef",
    "--targets": "--targets",
    "--stepz 3": "--steps",
    "--lm nowhere/model.safetensors": "nowhere/model.safetensors",
    "--lm dt": "--pretrained",
    "--lm .": "no weights",
    "--quality expert": "minari download mujoco/hopper/expert-v0",
    "--env CartPole-v1": "--dataset",
    "--dataset /nowhere/set-v0": "/nowhere/set-v0",
    "--dataset text.txt": "text.txt",
    "--dataset .": "metadata.json",
    f"--env hopper --dataset {BUNDLED}/lamo/walker2d/medium-1pct-v0": "Walker2d",
    "--corpus text.txt": "--corpus",  # shorter than a block
    "--corpus latin.txt": "latin.txt",
    "--corpus wikitext": "--corpus",
    "--lm-length 4096": "--lm-length",
    "--out text.txt": "text.txt",
    "--name taken": "taken",
    "--device cuda": "--device",
    "--lora-targets c_atn": "c_atn",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_train_refuses(error_of, flags):
    Path("text.txt").write_text("12345")
    Path("latin.txt").write_bytes("naïve ".encode("latin-1") * 1000)
    Path("taken").mkdir()
    words = [] if "--ratio" in flags else ["--ratio", "0.01"]
    words += ["--out", "."] if flags == "--name taken" else []
    assert BAD_FLAGS[flags] in error_of(train.main, *flags.split(), *words)


@pytest.mark.parametrize("flag", ["--batch", "--lm-batch"])
def test_a_batch_that_the_processes_cannot_share(error_of, monkeypatch, flag):
    """Nothing is trained on a batch of another size than was asked for."""
    monkeypatch.setenv("WORLD_SIZE", "2")  # torchrun's
    assert "2 processes" in error_of(train.main, *SHORT, flag, 3)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a sound file of each kind: a run, weights, a text and its tokens, a dataset."""
    folder = tmp_path_factory.mktemp("files")
    call(train.main, *SHORT, "--steps", 1, "--eval-every", 1, "--out", folder, "--name", "run")
    (folder / "weights").mkdir()
    path, gpt = folder / "weights/model.safetensors", GPT(GPTConfig(1, 2, 8, 11, 8))
    save_gpt2(gpt, path, {})
    save_file(load_file(path), path)  # as others write it: without the number of heads, which is in
    (folder / "bin").mkdir()
    torch.save(load_file(path), folder / "bin/pytorch_model.bin")
    for name in ("weights", "bin"):
        (folder / name / "config.json").write_text('{"n_head": 2}')
    (folder / "text.txt").write_text("A text of some words. " * 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAMO_CACHE", str(folder / "cache"))
        tokenise(folder / "text.txt", get_encoding(257))
    shutil.copytree(BUNDLED / "lamo/hopper/medium-1pct-v0", folder / "set")
    return folder


def test_evaluate_refuses(error_of, files):
    ckpt = files / "run/ckpt.pt"
    assert "absent.pt" in error_of(evaluate.main, "absent.pt")
    assert "--device" in error_of(evaluate.main, ckpt, "--device", "cuda")
    assert "absent.txt" in error_of(evaluate.main, ckpt, "--prompt", "x", "--corpus", "absent.txt")
    assert "--episode" in error_of(evaluate.main, ckpt, "--episodes", "many")
    assert "--episodes is -1" in error_of(evaluate.main, ckpt, "--episodes", -1)
    assert "--episode-limit is -5" in error_of(evaluate.main, ckpt, "--episode-limit", -5)
    assert "required" in error_of(evaluate.main)
    Path("one.pt").write_text("1")
    assert "one.pt" in error_of(evaluate.main, "one.pt")
    sound = train.read_checkpoint(ckpt)
    missing = dict(list(sound["model"].items())[1:])
    misshapen = sound["model"] | {"embed_ln.bias": torch.ones(1)}
    for change in (
        {"format": "other"},
        {"model": missing},
        {"model": misshapen},
        {"model": sound["model"] | {"odd": torch.ones(1)}},
        {"base": {"lm": "mini", "sha256": "0" * 64}},
        {"environment": {}},
        {"notes": Path("a class, whose code may not run")},
    ):
        torch.save(sound | change, "odd.pt")
        assert "odd.pt" in error_of(evaluate.main, "odd.pt")


# --- damage --------------------------------------------------------------------------------------


def use_checkpoint(folder):
    words = ["--episodes", 1, "--episode-limit", 2, "--targets", 1, "--json"]
    with contextlib.redirect_stdout(io.StringIO()):
        call(evaluate.main, folder / "run/ckpt.pt", *words)


def use_weights(folder, name="weights"):
    load_gpt2(str(folder / name))


def use_tokens(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAMO_CACHE", str(folder / "cache"))
        np.asarray(tokenise(folder / "text.txt", get_encoding(257))).sum()


def use_dataset(folder):
    dataset, _, _ = find_dataset("hopper", TASKS["hopper"], 0.01, str(folder / "set"))
    load_trajectories(dataset, dataset.action_space)


USES = {
    "run/ckpt.pt": use_checkpoint,
    "weights/model.safetensors": use_weights,
    "weights/config.json": use_weights,
    "bin/pytorch_model.bin": partial(use_weights, name="bin"),
    "cache/tokens/*.bin": use_tokens,
    "set/data/main_data.hdf5": use_dataset,
    "set/data/metadata.json": use_dataset,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", USES)
@settings(max_examples=DAMAGES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_refused_in_one_line_or_read(name, files, data):
    (path,) = files.glob(name)
    sound = path.read_bytes()
    place, kind = st.integers(0, len(sound) - 1), st.sampled_from(["flip", "cut", "empty", "swap"])
    damaged, kind = bytearray(sound), data.draw(kind)
    a, b, n = data.draw(place), data.draw(place), data.draw(st.integers(1, 64))
    if kind in ("cut", "empty"):
        del damaged[a if kind == "cut" else 0 :]
    elif kind == "flip":
        damaged[a] ^= 1 << n % 8
    else:
        damaged[a : a + n], damaged[b : b + n] = sound[b : b + n], sound[a : a + n]
    said, before = "", signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(60)  # more is a hang; a KeyboardInterrupt is taken for no damaged file's error
    try:
        path.write_bytes(damaged)
        USES[name](files)
    except (UserError, ModuleNotFoundError) as error:  # each is one line, by run_command
        said = str(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        path.write_bytes(sound)
    assert "\n" not in said
    # what is shorter is refused; but a cut file of tokens is just a shorter text
    assert said or kind in ("flip", "swap") or "tokens" in name
