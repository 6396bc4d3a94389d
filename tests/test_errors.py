"""A user's mistakes and damaged files: one line and exit code 2, no traceback, nothing begun.

LAMO_DAMAGE=1000 python -m pytest tests/test_errors.py damages as many files of each kind.
"""

import contextlib
import io
import os
import shutil
import signal
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from huggingface_hub import try_to_load_from_cache
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from minari.data_collector import EpisodeBuffer
from runs import SHORT, TORCHRUN, call, finish, start

import evaluate
import load_gpt2
import train
from data import BUNDLED, find_dataset, get_encoding, load_trajectories, tokenise
from tasks import TASKS
from utils import UserError, run_command, write_atomically

DAMAGES = int(os.environ.get("LAMO_DAMAGE", "40"))  # shared by the five kinds of files
SECONDS = 60  # more is a hang


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
    "--lm gpt2-smal": "gpt2",
    "--embed mpl": "mlp",
    "--mode sparse": "delayed",
    "--quality best": "expert",
    "--train lorra": "lora",
    "--dtype fp16": "bf16",
    "--ratio 0": "--ratio",
    "--ratio -0.1": "--ratio",
    "--ratio 1.01": "--ratio",
    "--ratio nan": "--ratio",
    "--ratio 0.5": "experiments.collect",  # more than comes with the project
    "--steps many": "--steps",
    "--stepz 3": "--steps",
    "--lm nowhere/model.safetensors": "nowhere/model.safetensors",
    "--lm dt": "--pretrained",
    "--quality expert": "minari download mujoco/hopper/expert-v0",
    "--env kitchen-mixed": "minari download D4RL/kitchen/mixed-v2",
    "--env CartPole-v1": "--dataset",
    "--dataset lamo/hopper/random-v0": "experiments.collect",
    "--dataset nowhere/set-v0": "minari download nowhere/set-v0",
    "--dataset /nowhere/set-v0": "/nowhere/set-v0",
    "--dataset text.txt": "text.txt",
    "--dataset .": "metadata.json",
    "--corpus nowhere.txt": "nowhere.txt",
    "--corpus text.txt": "--corpus",  # shorter than a block
    "--corpus latin.txt": "latin.txt",
    "--corpus wikitext": "--corpus",
    "--lm-length 4096": "--lm-length",
    "--out text.txt": "text.txt",
    "--out text.txt/runs": "text.txt",
    "--name taken": "taken",
    "--device cuda": "--device",
    "--device tpu": "--device",
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


def test_gpt2_that_cannot_be_had(error_of):
    if isinstance(try_to_load_from_cache("openai-community/gpt2", "model.safetensors"), str):
        pytest.skip("OpenAI's gpt2 weights are in the Hugging Face cache")
    line = error_of(train.main, "--lm", "gpt2", "--ratio", "0.01")
    assert "hf download openai-community/gpt2 model.safetensors" in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to(error_of, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "locked" in error_of(train.main, "--ratio", "0.01", "--out", "locked")


def test_a_batch_that_the_processes_cannot_share(tmp_path):
    """Nothing is trained on a batch of another size than was asked for."""
    words = [*SHORT, "--batch", 3, "--out", tmp_path, "--name", "run"]
    process = start("train.py", *words, launcher=TORCHRUN)
    _, errors = process.communicate()
    assert process.returncode
    assert any(line.startswith("error: ") and "--batch" in line for line in errors.splitlines())
    assert not (tmp_path / "run").exists()


def test_one_line_from_a_real_process(tmp_path):
    _, errors = finish(start("train.py", "--env", "hopper", "--out", tmp_path), 2)
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    _, errors = finish(start("evaluate.py", tmp_path), 2)
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1


# --- datasets ------------------------------------------------------------------------------------


def hopper_like(folder, observation_dim=11, action_space=None, **spoilt):
    """A dataset folder with two short episodes of hopper's shapes, some values replaced."""
    action_space = action_space or gym.spaces.Box(-1, 1, (3,))
    episodes = []
    for seed in range(2):
        action_space.seed(seed)
        values = {
            "observations": np.zeros((6, observation_dim), np.float32),
            "actions": np.stack([action_space.sample() for _ in range(5)]),
            "rewards": np.ones(5),
            "terminations": np.arange(5) == 4,
            "truncations": np.zeros(5, bool),
        }
        episodes.append(EpisodeBuffer(**values | spoilt))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder))
        minari.create_dataset_from_buffers(
            "spoilt-v0",
            episodes,
            observation_space=gym.spaces.Box(-np.inf, np.inf, (observation_dim,)),
            action_space=action_space,
            ref_min_score=0.0,
        )
    return folder / "spoilt-v0"


@pytest.mark.parametrize(
    ("spoilt", "match"),
    [
        ({"observation_dim": 17}, "observation"),
        ({"action_space": gym.spaces.Box(-1, 1, (6,))}, "action"),
        ({"action_space": gym.spaces.Discrete(3)}, "action"),
        ({"rewards": np.full(5, np.nan)}, "reward"),
        ({"observations": np.full((6, 11), np.inf, np.float32)}, "observation"),
    ],
)
def test_a_dataset_that_does_not_fit(error_of, tmp_path, spoilt, match):
    folder = hopper_like(tmp_path / "sets", **spoilt)
    assert match in error_of(train.main, "--env", "hopper", "--dataset", folder)


def test_a_dataset_of_another_environment(error_of):
    other = BUNDLED / "lamo/walker2d/medium-1pct-v0"
    line = error_of(train.main, "--env", "hopper", "--dataset", other, "--ratio", 0.01)
    assert "Walker2d" in line


# --- checkpoints ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a sound file of each kind: a run, weights, a text and its tokens, a dataset."""
    folder = tmp_path_factory.mktemp("files")
    call(train.main, *SHORT, "--steps", 1, "--eval-every", 1, "--out", folder, "--name", "run")
    (folder / "weights").mkdir()
    gpt = load_gpt2.GPT(load_gpt2.GPTConfig(1, 2, 8, 11, 8))
    load_gpt2.save_gpt2(gpt, folder / "weights/model.safetensors", {})
    _, metadata = load_gpt2.read_tensors(folder / "weights/model.safetensors")
    (folder / "weights/config.json").write_text(metadata["config"])
    # the file as others write it, which says its number of heads in config.json only
    from safetensors.torch import load_file, save_file

    save_file(load_file(folder / "weights/model.safetensors"), folder / "weights/model.safetensors")
    (folder / "text.txt").write_text("A text of some words. " * 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAMO_CACHE", str(folder / "cache"))
        tokenise(folder / "text.txt", get_encoding(257))
    hopper_like(folder)
    return folder


def test_evaluate_refuses(error_of, files):
    ckpt = files / "run/ckpt.pt"
    assert str(files / "run") in error_of(evaluate.main, files / "run")
    assert "absent.pt" in error_of(evaluate.main, "absent.pt")
    assert "ant" in error_of(evaluate.main, ckpt, "--env", "ant")
    assert "--device" in error_of(evaluate.main, ckpt, "--device", "cuda")
    assert "absent.txt" in error_of(evaluate.main, ckpt, "--prompt", "x", "--corpus", "absent.txt")
    assert "--episode" in error_of(evaluate.main, ckpt, "--episodes", "many")
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
    ):
        torch.save(sound | change, "odd.pt")
        assert "odd.pt" in error_of(evaluate.main, "odd.pt")


class Payload:
    """Unpickling this makes a file: what a stranger's checkpoint might do."""

    def __reduce__(self):
        return (os.system, ("touch executed",))


def test_code_in_a_file_of_weights_does_not_run(error_of):
    torch.save({"format": train.FORMAT, "notes": Payload()}, "ckpt.pt")
    assert "ckpt.pt" in error_of(evaluate.main, "ckpt.pt")
    torch.save({"wte.weight": Payload()}, "model.bin")
    assert "model.bin" in error_of(train.main, "--lm", "model.bin", "--ratio", "0.01")
    assert not Path("executed").exists()


# --- damage --------------------------------------------------------------------------------------


class Hang(BaseException):
    """It took too long: not an Exception, so that nothing takes it for a damaged file's."""


def use_checkpoint(folder):
    words = ["--episodes", 1, "--episode-limit", 2, "--targets", 1, "--json"]
    with contextlib.redirect_stdout(io.StringIO()):
        call(evaluate.main, folder / "run/ckpt.pt", *words)


def use_weights(folder):
    load_gpt2.load_gpt2(str(folder / "weights"))


def use_tokens(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAMO_CACHE", str(folder / "cache"))
        np.asarray(tokenise(folder / "text.txt", get_encoding(257))).sum()


def use_dataset(folder):
    name = str(folder / "spoilt-v0")
    dataset, _, _ = find_dataset("hopper", TASKS["hopper"], 1.0, name)
    load_trajectories(dataset, dataset.action_space)


USES = {
    "run/ckpt.pt": use_checkpoint,
    "weights/model.safetensors": use_weights,
    "weights/config.json": use_weights,
    "cache/tokens/*.bin": use_tokens,
    "spoilt-v0/data/main_data.hdf5": use_dataset,
    "spoilt-v0/data/metadata.json": use_dataset,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", USES)
@settings(
    max_examples=max(1, DAMAGES // len(USES)) if DAMAGES < 100 else DAMAGES,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_damaged_file_is_refused_in_one_line_or_read(name, files, tmp_path, data):
    (path,) = files.glob(name)
    sound = path.read_bytes()
    place, n = st.integers(0, len(sound) - 1), len(sound)
    kind = data.draw(st.sampled_from(["flip", "cut", "empty", "swap", "head"]))
    damaged = bytearray(b"" if kind == "empty" else sound)
    if kind == "cut":
        del damaged[data.draw(place) :]
    elif kind in ("flip", "head"):  # the head says what the rest is
        at = data.draw(place if kind == "flip" else st.integers(0, min(n, 500) - 1))
        damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "swap":
        a, b, length = data.draw(place), data.draw(place), data.draw(st.integers(1, 64))
        damaged[a : a + length], damaged[b : b + length] = (
            sound[b : b + length],
            sound[a : a + length],
        )
    aside, said = tmp_path / "sound", ""
    shutil.copy(path, aside)

    def hang(number, frame):
        raise Hang(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    try:
        path.write_bytes(damaged)
        USES[name](files)
    except (UserError, ModuleNotFoundError) as error:  # each is one line, by run_command
        said = str(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        shutil.copy(aside, path)
    assert "\n" not in said


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "file.json"
    write_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half of the n")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"file\.json"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]
