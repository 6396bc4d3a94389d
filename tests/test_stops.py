"""Signals that stop a training, and steps that go wrong: nothing is lost, nothing is spoilt."""

import json
import math
import os
import signal
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
from runs import assert_same, outcome, wait_for_rows
from safetensors.torch import load_file

import train
from checkpoint import check_finite, read_checkpoint
from data import load_trajectories
from plumbing import UserError
from windows import describe_window

ROOT = Path(__file__).resolve().parent.parent
SHORT = ["--env", "hopper", "--ratio", 0.01, "--eval-every", 40, "--log-every", 10, "--seed", 0]
SHORT += ["--episodes", 1, "--batch", 8, "--context", 5, "--lm-length", 64, "--dropout", 0.1]
SHORT += ["--episode-limit", 10, "--steps", 120]


def run(*arguments):
    command = [sys.executable, str(ROOT / "train.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    code, _, errors = run(*SHORT, "--out", out, "--name", "run")
    assert code == 0, errors
    return outcome(out / "run")


def begin(out, *more):
    """A training that has made some steps. Returns its process."""
    command = [sys.executable, "-u", str(ROOT / "train.py"), *map(str, [*SHORT, *more])]
    command += ["--out", str(out), "--name", "run"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    log = out / "run" / "log.jsonl"
    wait_for_rows(log, process)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_leaves(number, whole, tmp_path):
    process = begin(tmp_path)
    process.send_signal(number)
    out, errors = process.communicate()
    assert process.returncode == 128 + number, errors
    assert b"stopping after this step" in errors
    folder = tmp_path / "run"
    assert f"go on with: python train.py --resume {folder}".encode() in out
    step = read_checkpoint(folder / "ckpt.pt")["step"]
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] <= step < 120
    assert torch.load(folder / "resume.pt", weights_only=True)["step"] == step
    code, out, errors = run("--resume", folder)
    assert code == 0, errors
    assert f"after step {step}" in out  # not a step is lost
    chosen = json.loads((folder / "config.json").read_text())["chosen"]
    assert read_checkpoint(folder / "ckpt.pt")["chosen"] == chosen
    assert "(the task's)" in chosen["targets"]
    assert_same(folder, whole)


def stop_in_evaluation(*arguments):
    """Send SIGTERM when an evaluation has begun. Returns what the training has printed."""
    command = [sys.executable, str(ROOT / "train.py"), *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    errors = b""
    while b"evaluating" not in errors:  # its bar
        read = os.read(process.stderr.fileno(), 10_000)
        assert read, errors
        errors += read
    process.send_signal(signal.SIGTERM)
    out, more = process.communicate()
    assert process.returncode == 143, errors + more
    assert b"stopping after this step" in errors + more
    return out.decode()


@pytest.mark.parametrize("last", [False, True])
def test_a_signal_does_not_wait_for_an_evaluation(last, tmp_path):
    """It is given up, again and again if need be, and done by the run that goes on."""
    many = [*SHORT, "--episodes", 40, "--episode-limit", 0, "--out", tmp_path]
    many += ["--steps", 4, "--eval-every", 4 if last else 2, "--log-every", 2]
    code, _, errors = run(*many, "--name", "whole")
    assert code == 0, errors
    folder, step = tmp_path / "run", 4 if last else 2
    for begun in ([*many, "--name", "run"], ["--resume", folder]):
        assert f"stopped after step {step}; go on with" in stop_in_evaluation(*begun)
        assert "evaluation" not in (folder / "log.jsonl").read_text()
        saved = torch.load(folder / "resume.pt", weights_only=True)
        assert (saved["step"], saved["evaluations"]) == (step, [])
        assert not (folder / "result.json").exists()
    code, out, errors = run("--resume", folder)
    assert code == 0, errors
    assert f"after step {step}" in out
    assert_same(folder, outcome(tmp_path / "whole"))


SLOW_DISK = """
import os, runpy, sys, time
really = os.fsync
def slow(handle):
    print("writing", file=sys.stderr, flush=True)
    time.sleep(20)
    return really(handle)
os.fsync = slow
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("number", "code", "says"),
    [(signal.SIGINT, 130, b"interrupted"), (signal.SIGTERM, -signal.SIGTERM, b"")],
)
def test_a_second_signal_leaves_at_once_and_harms_nothing(number, code, says, whole, tmp_path):
    """It comes while the first one's checkpoint is being written, on a disk that takes minutes."""
    run(*SHORT, "--out", tmp_path, "--name", "other", "--steps", 1)  # the text's tokens are made
    folder = tmp_path / "run"
    command = [sys.executable, "-c", SLOW_DISK.replace("print", "os.path.exists(LOG) and print")]
    command[-1] = f"LOG = {str(folder / 'log.jsonl')!r}" + command[-1]
    command[-1] = command[-1].replace("time.sleep(20)", "os.path.exists(LOG) and time.sleep(20)")
    command += [*map(str, SHORT), "--out", str(tmp_path), "--name", "run"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (folder / "log.jsonl").exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(number)
    errors = b""
    while b"writing" not in errors:  # its checkpoint
        read = os.read(process.stderr.fileno(), 10_000)
        assert read, errors
        errors += read
    assert b"stopping after this step" in errors
    sent = time.time()
    process.send_signal(number)
    out, more = process.communicate()
    assert time.time() - sent < 10
    assert process.returncode == code
    assert says in more
    assert b"Traceback" not in errors + more
    assert b"stopped after step" not in out
    assert not (folder / "resume.pt").exists()  # it had not saved yet
    code, _, errors = run("--resume", folder)
    assert code == 0, errors
    assert_same(folder, whole)
    assert not list(folder.glob(".ckpt.pt.*"))


def test_a_reader_that_has_gone_stops_no_stop(tmp_path):
    """As by Ctrl-C in `train.py | tee log`: the reader dies of the same signal."""
    read, write = os.pipe()
    command = [sys.executable, "-u", str(ROOT / "train.py"), *map(str, SHORT)]
    command += ["--out", str(tmp_path), "--name", "run"]
    process = subprocess.Popen(command, stdout=write, stderr=write)
    os.close(write)
    log = tmp_path / "run" / "log.jsonl"
    wait_for_rows(log, process)
    os.close(read)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    saved = torch.load(tmp_path / "run" / "resume.pt", weights_only=True)
    assert 0 < saved["step"] < 120


def test_two_processes_are_not_at_work_in_one_run(tmp_path):
    process = begin(tmp_path, "--steps", 10**6)
    code, _, errors = run("--resume", tmp_path / "run")
    process.terminate()
    process.communicate()
    assert (code, process.returncode) == (2, 143), errors
    assert f"another process is at work in {tmp_path / 'run'}" in errors
    process = subprocess.Popen(
        [sys.executable, "-u", str(ROOT / "train.py"), "--resume", str(tmp_path / "run")],
        stdout=subprocess.PIPE,
    )
    while not process.stdout.readline().startswith(b"going on with"):
        assert process.poll() is None
    process.terminate()
    process.communicate()
    assert process.returncode in (143, -signal.SIGTERM)  # the first let go when it ended


def test_a_stopped_baseline_keeps_its_policy(tmp_path):
    pytest.importorskip("torchrl")
    words = "-m experiments.baselines --algo bc --env hopper --ratio 0.01 --steps 100000 --name run"
    command = [sys.executable, "-u", *words.split(), "--out", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    log = tmp_path / "run" / "log.jsonl"
    wait_for_rows(log, process)
    process.terminate()
    out, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, errors
    step = read_checkpoint(tmp_path / "run/ckpt.pt", "lamo-baseline-1")["step"]
    assert 100 <= step < 100_000
    assert f"stopped after step {step}".encode() in out


def test_a_stopped_pretraining_goes_on(tmp_path):
    text = " ".join(str(i) for i in range(2000))
    (tmp_path / "text.txt").write_text(text)
    words = f"-m experiments.pretrain --text {tmp_path}/text.txt --heldout {tmp_path}/text.txt"
    words += " --steps 300 --eval-every 130 --batch 2 --block-size 32 --n-layer 1 --n-embd 12"
    words += " --dropout 0.1 --device cpu --out "
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(words):
        command = [sys.executable, "-u", *words.split()]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)

    whole = start(words + f"{tmp_path}/whole.safetensors")
    assert whole.wait() == 0
    process = start(words + f"{tmp_path}/cut.safetensors")
    while not (tmp_path / "cut.state.pt").exists() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGINT, errors
    assert f"--resume {tmp_path}/cut.state.pt".encode() in out
    (tmp_path / ".cut.state.pt.abcd1234").write_bytes(b"a part")  # as a kill leaves it
    again = start(f"-m experiments.pretrain --resume {tmp_path}/cut.state.pt")
    out, errors = again.communicate()
    assert again.returncode == 0, errors
    assert (tmp_path / "cut.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    assert not (tmp_path / ".cut.state.pt.abcd1234").exists()
    cut, expected = (load_file(tmp_path / f"{name}.safetensors") for name in ("cut", "whole"))
    assert all(torch.equal(cut[name], tensor) for name, tensor in expected.items())


# --- steps that go wrong -------------------------------------------------------------------------

LENGTH, EPISODES, WRONG = 10, 6, 2  # episode WRONG earns what overflows in the model
BAD = ["--env", "hopper", "--steps", 24, "--eval-every", 12, "--log-every", 4, "--batch", 2]
BAD += ["--episodes", 1, "--episode-limit", 5, "--method", "dt", "--context", 3, "--seed", 1]
BAD += ["--dtype", "fp32"]


@pytest.fixture
def flawed(tmp_path, monkeypatch):
    """A hopper dataset in which an episode's returns are finite but too much for a LayerNorm."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    draw, episodes = np.random.default_rng(0), []
    for i in range(EPISODES):
        rewards = np.ones(LENGTH)
        rewards[-1] = 1e30 if i == WRONG else 1.0
        episodes.append(
            EpisodeBuffer(
                observations=draw.normal(size=(LENGTH + 1, 11)),
                actions=draw.uniform(-1, 1, (LENGTH, 3)).astype(np.float32),
                rewards=rewards,
                terminations=np.arange(LENGTH) == LENGTH - 1,
                truncations=np.zeros(LENGTH, bool),
            )
        )
    minari.create_dataset_from_buffers("test/flawed-v0", episodes, env=gym.make("Hopper-v5"))
    return "test/flawed-v0"


def bad_steps():
    """Which of the 24 steps draw a window from that episode: train.py's draws, drawn again."""
    rng = torch.Generator().manual_seed(1)
    starts = [torch.randint(LENGTH * EPISODES, (2,), generator=rng) for _ in range(24)]
    return [i + 1 for i, s in enumerate(starts) if (s // LENGTH == WRONG).any()]


def test_a_bad_step_is_named_and_stops_the_run(flawed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, BAD), "--dataset", flawed])
    sys.argv += ["--out", str(tmp_path), "--name", "run"]
    first = bad_steps()[0]
    with pytest.raises(UserError) as error:
        train.main()
    assert f"of the steps {first} to " in str(error.value)
    assert "--skip-bad-steps" in str(error.value)
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == first
    assert rows[-1]["windows"]["rtg"]["max"] == pytest.approx(1e30 / 1000, rel=1e-3)
    assert all(math.isfinite(row["action_loss"]) for row in rows[:-1])
    for path in (tmp_path / "run").glob("*.pt"):  # none, unless an evaluation came first
        assert read_checkpoint(path)["step"] < first


def test_bad_steps_are_skipped_and_counted_if_told_to(flawed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, BAD), "--dataset", flawed])
    sys.argv += ["--out", str(tmp_path), "--name", "run", "--skip-bad-steps"]
    train.main()
    expected = bad_steps()
    assert len(expected) > 2
    assert json.loads((tmp_path / "run/result.json").read_text())["bad_steps"] == len(expected)
    assert f"{len(expected)} steps skipped" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    told = {row["step"]: row["bad_steps"] for row in rows if "bad_steps" in row}
    spans = [[s for s in expected if end - 4 < s <= end] for end in range(4, 25, 4)]
    assert told == {span[0]: len(span) for span in spans if span}
    check_finite(read_checkpoint(tmp_path / "run/ckpt.pt")["model"], 24)


def test_a_bad_step_changes_nothing_at_all():
    """AdamW's fused step with found_inf 1, which train.py relies on, in this version of PyTorch."""
    weights = [torch.nn.Parameter(torch.randn(7)) for _ in range(2)]
    optimiser = torch.optim.AdamW(weights, lr=0.1, weight_decay=0.1, fused=True)

    def step(value, bad):
        for w in weights:
            w.grad = torch.full_like(w, value)
        optimiser.found_inf = torch.tensor(float(bad))
        optimiser.step()
        return [w.detach().clone() for w in weights], [
            {k: v.clone() for k, v in optimiser.state[w].items()} for w in weights
        ]

    before = step(1.0, False)
    after = step(float("nan"), True)
    for w, v in zip(before[0], after[0], strict=True):
        assert torch.equal(w, v)
    for w, v in zip(before[1], after[1], strict=True):
        assert all(torch.equal(w[name], v[name]) for name in w)
    assert not torch.equal(step(1.0, False)[0][0], before[0][0])


def test_weights_that_are_not_finite_never_replace_good_ones(tmp_path, monkeypatch):
    """With an absurd learning rate the first update itself overflows, from a sound gradient."""
    flags = [*SHORT[:-2], "--steps", 4, "--eval-every", 2, "--log-every", 4, "--lr", 1e39]
    flags += ["--warmup", 1, "--method", "dt", "--out", str(tmp_path), "--name", "run"]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    with pytest.raises(UserError, match=r"not finite any more by step 2; the checkpoint before"):
        train.main()
    assert not list((tmp_path / "run").glob("*.pt"))


def test_windows_are_described_by_their_numbers():
    rtg = torch.tensor([[[1.0], [math.nan]], [[3.0], [-math.inf]]])
    obs, act = torch.zeros(2, 2, 3), torch.tensor([[0, 1], [2, 3]])
    valid = torch.tensor([[True, True], [True, False]])
    told = describe_window((rtg, obs, act, torch.zeros(2, 2), valid))
    assert (told["windows"], told["steps"]) == (2, 3)
    assert told["rtg"] == {"not_finite": 2, "min": 1.0, "max": 3.0, "mean": 2.0}
    assert told["act"] == {"not_finite": 0, "min": 0.0, "max": 3.0, "mean": 1.5}
    assert json.loads(json.dumps(told)) == told


def test_numbers_beyond_32_bits_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))

    def dataset(name, observation, reward):
        episode = EpisodeBuffer(
            observations=np.full((3, 2), observation),
            actions=np.zeros((2, 1), np.float32),
            rewards=np.full(2, reward),
            terminations=np.array([False, True]),
            truncations=np.zeros(2, bool),
        )
        spaces = gym.spaces.Box(-np.inf, np.inf, (2,), float), gym.spaces.Box(-1, 1, (1,))
        return minari.create_dataset_from_buffers(
            name, [episode], observation_space=spaces[0], action_space=spaces[1]
        )

    for name, numbers, says in (
        ("test/sight-v0", (1e39, 1.0), "NaN or infinite observation"),
        ("test/reward-v0", (1.0, 1e39), "NaN or infinite reward"),
        ("test/return-v0", (1.0, 2e38), "too much for 32 bits"),
    ):
        made = dataset(name, *numbers)
        with pytest.raises(UserError, match=says):
            load_trajectories(made, gym.spaces.Box(-1, 1, (1,)), scale=1.0)


@pytest.mark.parametrize("every", [1, 4])
def test_bad_steps_are_skipped_however_seldom_the_log_is_written(
    every, flawed, tmp_path, monkeypatch
):
    flags = [*BAD, "--log-every", every, "--dataset", flawed, "--out", tmp_path, "--name", "run"]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags), "--skip-bad-steps"])
    train.main()
    assert json.loads((tmp_path / "run/result.json").read_text())["bad_steps"] == len(bad_steps())
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["action_loss"] for row in rows if "action_loss" in row}
    if every == 1:
        assert [step for step, loss in losses.items() if loss is None] == bad_steps()


def test_a_run_that_a_bad_step_ended_goes_on_past_it(flawed, tmp_path, monkeypatch):
    flags = [*BAD, "--dataset", flawed, "--out", tmp_path, "--name", "run"]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    with pytest.raises(UserError, match=rf"go on: --resume {tmp_path / 'run'} --skip-bad-steps"):
        train.main()
    resume = ["train.py", "--resume", str(tmp_path / "run"), "--skip-bad-steps"]
    monkeypatch.setattr(sys, "argv", resume)
    train.main()
    assert json.loads((tmp_path / "run/result.json").read_text())["bad_steps"] == len(bad_steps())
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["settings"]["skip_bad_steps"] is True


def test_nothing_but_bad_steps_ends_the_run_all_the_same(flawed, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "MOST_BARREN", 5)
    flags = [*BAD, "--dataset", flawed, "--out", tmp_path, "--name", "run", "--batch", 64]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags), "--skip-bad-steps"])
    with pytest.raises(UserError, match="as all of the 8 last ones"):
        train.main()


def test_a_link_in_a_runs_folder_is_not_followed(tmp_path, monkeypatch):
    """A stranger's run, whose log is a file of ours."""
    code, _, errors = run(*SHORT, "--steps", 2, "--out", tmp_path, "--name", "run")
    assert code == 0, errors
    (tmp_path / "run" / "result.json").unlink()
    (tmp_path / "run" / "log.jsonl").unlink()
    (tmp_path / "ours").write_text("ours")
    (tmp_path / "run" / "log.jsonl").symlink_to(tmp_path / "ours")
    code, _, errors = run("--resume", tmp_path / "run")
    assert (code, (tmp_path / "ours").read_text()) == (2, "ours")
    assert "has a link in it, log.jsonl" in errors
