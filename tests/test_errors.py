"""A user's mistakes: each one line on stderr, exit code 2, no traceback, nothing left behind."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from minari.data_collector import EpisodeBuffer

import evaluate
import load_gpt2
import train
from data import BUNDLED
from evaluate import build_model, trained_state
from experiments import collect, pretrain
from plumbing import UserError, run_command, write_atomically

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def error_of(monkeypatch, capsys):
    """Run a command's main() on a command line that must fail: the one line it prints."""

    def call(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            run_command(main)
        captured = capsys.readouterr()
        lines = captured.err.strip().splitlines()
        assert stop.value.code == 2
        assert len(lines) == 1, captured.err
        assert lines[0].startswith("error: ")
        assert captured.out == ""
        return lines[0]

    return call


@pytest.fixture(autouse=True)
def _no_run_is_begun(tmp_path, monkeypatch):
    """Each test runs in an empty folder; no error may leave a runs/ folder in it."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "runs").exists()


BAD_TRAIN_FLAGS = {
    "--env hoper": "unknown env 'hoper'; valid: hopper. Did you mean hopper?",
    "--method lamo-nlm": "Did you mean lamo-nolm?",
    "--method x": "valid: lamo, lamo-nolm, lamo-linear, lamo-freeze, lamo-full, lamo-random, dt",
    "--lm gpt2-smal": "unknown lm 'gpt2-smal'",
    "--lm nowhere/model.safetensors": "there is no weights file nowhere/model.safetensors",
    "--ratio 0": "--ratio is 0, but must be above 0 and at most 1",
    "--ratio -0.1": "--ratio is -0.1",
    "--ratio 1.01": "--ratio is 1.01",
    "--ratio nan": "--ratio is nan",
    "--ratio 0.5": "--steps 1000000",
    "--mode sparse": "unknown mode 'sparse'; valid: normal, delayed",
    "--embed cnn": "valid: linear, mlp",
    "--steps 0": "--steps is 0, but must be above 0",
    "--steps many": "invalid int value: 'many'",
    "--lr -1": "--lr is -1.0, but must be above 0",
    "--lr inf": "--lr is inf",
    "--dropout 1": "--dropout is 1.0, but must be below 1",
    "--lm dt": "--lm dt is a shape without weights",
    "--lm-length 4096": "--lm-length is 4096; the model knows 1024",
    "--stepz 3": "unrecognized arguments: --stepz 3",
    "--device tpu": "valid: cuda, cpu",
    "--dataset nowhere/set-v0": "minari download nowhere/set-v0",
    "--corpus nowhere.txt": "there is no text nowhere.txt",
    "--corpus short.txt": "has 5 tokens, but a block needs",
    "--corpus wikitext": "give any text: --corpus FILE, or do without: --lm-coef 0",
    "--out short.txt/runs": "short.txt is not a folder that can be written to",
    "--out short.txt": "short.txt is not a folder that can be written to",
}


@pytest.mark.parametrize("flags", BAD_TRAIN_FLAGS)
def test_train_refuses(error_of, flags):
    Path("short.txt").write_text("12345")
    arguments = [] if "--ratio" in flags else ["--ratio", "0.01"]
    assert BAD_TRAIN_FLAGS[flags] in error_of(train.main, *flags.split(), *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_asked_for_and_absent(error_of):
    assert "use --device cpu" in error_of(train.main, "--device", "cuda")


def test_gpt2_asked_for_and_absent_says_how_to_get_it(error_of, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", "nowhere")
    if load_gpt2.is_cached("gpt2"):
        pytest.skip("OpenAI's gpt2 weights are in the Hugging Face cache")
    line = error_of(train.main, "--lm", "gpt2", "--ratio", "0.01")
    assert "hf download openai-community/gpt2 model.safetensors" in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(error_of):
    Path("locked").mkdir(mode=0o500)
    assert "cannot be written" in error_of(train.main, "--ratio", "0.01", "--out", "locked")


def hopper_like(folder, observation_dim=11, action_space=None, **spoilt):
    """A dataset folder with two short episodes of hopper's shapes, some values replaced."""
    action_space = action_space or gym.spaces.Box(-1, 1, (3,))
    episodes = []
    for _ in range(2):
        values = dict(
            observations=np.zeros((6, observation_dim), np.float32),
            actions=np.stack([action_space.sample() for _ in range(5)]),
            rewards=np.ones(5),
            terminations=np.arange(5) == 4,
            truncations=np.zeros(5, bool),
        )
        episodes.append(EpisodeBuffer(**values | spoilt))
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    minari.create_dataset_from_buffers(
        "spoilt-v0",
        episodes,
        observation_space=gym.spaces.Box(-np.inf, np.inf, (observation_dim,)),
        action_space=action_space,
        ref_min_score=0.0,
    )
    return folder / "spoilt-v0"


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        (dict(observation_dim=17), "does not fit: its observations are"),
        (dict(action_space=gym.spaces.Box(-1, 1, (6,))), "does not fit: its actions are"),
        (dict(action_space=gym.spaces.Discrete(3)), "does not fit: its actions are Discrete(3)"),
        (dict(rewards=np.full(5, np.nan)), "episode 0 has a NaN or infinite reward"),
        (dict(observations=np.full((6, 11), np.inf, np.float32)), "NaN or infinite observation"),
    ],
    ids=["observation shape", "action shape", "action type", "nan", "infinite"],
)
def test_a_dataset_that_does_not_fit(error_of, tmp_path, spoilt, message):
    folder = hopper_like(tmp_path / "sets", **spoilt)
    assert message in error_of(train.main, "--dataset", folder)


def test_a_damaged_dataset(error_of, tmp_path):
    folder = hopper_like(tmp_path / "sets")
    file = folder / "data" / "main_data.hdf5"
    file.write_bytes(file.read_bytes()[:1000])
    assert "no readable Minari dataset" in error_of(train.main, "--dataset", folder)
    (folder / "data" / "metadata.json").write_text("{")
    assert "no readable Minari dataset" in error_of(train.main, "--dataset", folder)


# --- checkpoints ---------------------------------------------------------------------------------


@pytest.fixture
def checkpoint():
    """A checkpoint as train.py writes it, of an untrained model, as a dictionary."""
    settings, _, notes = train.resolve({"ratio": 0.01, "method": "dt"})
    model, base = build_model(settings, 11, 3)
    return {
        "format": evaluate.FORMAT,
        "settings": settings,
        "base": base,
        "chosen": notes | {"dataset": "none"},
        "step": 0,
        "model": trained_state(model),
        "obs_mean": torch.zeros(11),
        "obs_std": torch.ones(11),
        "act_dim": 3,
    }


def not_ours(c):
    c["format"] = "other"


def lacks_a_key(c):
    del c["obs_mean"]


def lacks_a_tensor(c):
    del c["model"]["embed_ln.bias"]


def has_another_tensor(c):
    c["model"]["embed_ln.scale"] = torch.ones(1)


def has_another_shape(c):
    c["model"]["embed_ln.bias"] = torch.ones(1)


def other_environment(c):
    c["settings"]["env"] = "walkr"


def other_spaces(c):
    c["obs_mean"] = torch.zeros(17)


def other_base(c):
    c["base"]["sha256"] = "0" * 64


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (not_ours, "is not a checkpoint of this project's"),
        (lacks_a_key, "lacks obs_mean"),
        (lacks_a_tensor, "lacks embed_ln.bias"),
        (has_another_tensor, "does not know: embed_ln.scale"),
        (has_another_shape, "embed_ln.bias is (1,), expected (128,)"),
        (other_environment, "unknown env 'walkr'"),
        (other_spaces, "embed_state.weight is (128, 11), expected (128, 17)"),
        (other_base, "other weights of random weights in the shape of dt: SHA-256 000000000000"),
    ],
)
def test_evaluate_refuses_a_checkpoint(error_of, checkpoint, spoil, message):
    spoil(checkpoint)
    torch.save(checkpoint, "ckpt.pt")
    assert message in error_of(evaluate.main, "ckpt.pt")


def test_evaluate_refuses_what_is_no_checkpoint(error_of, checkpoint):
    torch.save(checkpoint, "ckpt.pt")
    whole = Path("ckpt.pt").read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        Path("cut.pt").write_bytes(whole[:size])
        assert "no readable checkpoint" in error_of(evaluate.main, "cut.pt")
    assert "there is no checkpoint absent.pt" in error_of(evaluate.main, "absent.pt")
    assert "was trained on hopper, not ant" in error_of(evaluate.main, "ckpt.pt", "--env", "ant")
    assert "--episodes is 0" in error_of(evaluate.main, "ckpt.pt", "--episodes", "0")
    assert "required: checkpoint" in error_of(evaluate.main)


class Payload:
    """Unpickling this makes a file: what a stranger's checkpoint might do."""

    def __reduce__(self):
        return (os.system, ("touch executed",))


def test_code_in_a_checkpoint_does_not_run(error_of, checkpoint):
    checkpoint["chosen"] = Payload()
    torch.save(checkpoint, "ckpt.pt")
    assert "no readable checkpoint" in error_of(evaluate.main, "ckpt.pt")
    torch.save({"wte.weight": Payload()}, "model.bin")
    assert "refused" in error_of(load_gpt2.main, "model.bin")
    assert not Path("executed").exists()


# --- the other commands --------------------------------------------------------------------------


def test_experiments_refuse(error_of, monkeypatch):
    assert "unknown env 'hoper'" in error_of(collect.main, "--env", "hoper", "--steps", "1")
    assert "nothing to do" in error_of(collect.main, "--env", "hopper")
    assert "--steps is 0" in error_of(collect.main, "--env", "hopper", "--steps", "0")
    bundle = ["--env", "hopper", "--steps", "10", "--bundle"]
    assert "exists already" in error_of(collect.main, *bundle)
    assert "--text is missing" in error_of(pretrain.main)
    text = ["--text", "a.txt", "--heldout", "b.txt", "--out", "x.safetensors"]
    assert "cannot read the text a.txt" in error_of(pretrain.main, *text)


def test_one_line_and_exit_code_2_from_a_real_process(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), "--env", "hopper"]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "the bundled part serves ratios up to 0.01, not 1" in done.stderr
    assert time.monotonic() - started < 60  # a hub client's retries would add up to more


# --- files are whole or absent -------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "file.json"
    write_atomically(path, lambda p: Path(p).write_text("old"))

    def fail(temporary):
        Path(temporary).write_text("half of the n")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"cannot write .*: No space left on device"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_assets_are_small_and_plain():
    about = json.loads((BUNDLED / "lamo/hopper/medium-1pct-v0/about.json").read_text())
    assert about["command"].startswith("python -m experiments.collect --env hopper")
    sizes = {p.name: p.stat().st_size for p in (ROOT / "assets").rglob("*") if p.is_file()}
    assert sizes["main_data.hdf5"] < 1_000_000
    assert sizes["hopper-medium.safetensors"] < 500_000
    assert sizes["mini-lm.safetensors"] < 8_000_000
    assert {Path(name).suffix for name in sizes} <= {".json", ".hdf5", ".safetensors"}
