"""train.py and evaluate.py as a user runs them, and the losses of one process against two."""

import hashlib
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import run_folder
from checkpoint import build_model, load_model, read_checkpoint, trained_state
from data import BUNDLED, find_dataset, read_dataset
from evaluate import rollout
from model import GPT, GPTConfig, LaMo, Objective
from plumbing import UserError, join_processes, leave_processes
from run_folder import final_result
from settings import METHODS, resolve
from tasks import TASKS, normalised_score
from text import cache_folder
from train import Config, ahead, valid_steps

ROOT = Path(__file__).resolve().parent.parent
HOPPER = TASKS["hopper"]


def run(script, *arguments, launcher=(sys.executable,)):
    """A command of the project in a process of its own: its standard output."""
    command = [*launcher, str(ROOT / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


SHORT_RUN = ["--env", "hopper", "--ratio", "0.01", "--steps", "120", "--warmup", "10"]
SHORT_RUN += ["--batch", "32", "--lm-length", "128", "--lr", "1e-3", "--log-every", "20"]
SHORT_RUN += ["--eval-every", "60", "--episodes", "3"]


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """The folder of one short, real training on the bundled data, and what it printed."""
    out = tmp_path_factory.mktemp("runs")
    printed = run("train.py", *SHORT_RUN, "--out", out / "runs")
    (folder,) = (out / "runs").iterdir()
    return folder, printed


def rows_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_training_lowers_both_losses(short_run):
    losses = [row for row in rows_of(short_run[0]) if "action_loss" in row]
    assert [row["step"] for row in losses] == [20, 40, 60, 80, 100, 120]
    assert losses[-1]["action_loss"] < 0.5 * losses[0]["action_loss"]
    assert losses[-1]["lm_loss"] < losses[0]["lm_loss"]


def test_evaluate_reproduces_the_logged_evaluation_to_the_digit(short_run):
    folder, _ = short_run
    logged = [row["evaluation"] for row in rows_of(folder) if "evaluation" in row]
    assert len(logged) == 2
    again = json.loads(run("evaluate.py", folder / "ckpt.pt", "--json"))
    assert again["step"] == 120
    assert again["results"] == logged[-1]
    best = max(logged, key=lambda results: max(r["score"] for r in results))
    assert json.loads(run("evaluate.py", folder / "best.pt", "--json"))["results"] == best


def test_evaluate_prints_a_table_for_the_targets_asked_for(short_run):
    folder, _ = short_run
    arguments = (folder / "ckpt.pt", "--target", 3000, 100, "--episodes", 2, "--seed", 5)
    lines = run("evaluate.py", *arguments).splitlines()
    assert lines[2].split() == ["target", "return", "score", "length", "episodes"]
    assert [line.split()[0] for line in lines[3:5]] == ["3000", "100"]
    assert lines[5].startswith("best: target")


def test_a_checkpoint_talks(short_run):
    folder, _ = short_run
    out = run("evaluate.py", folder / "ckpt.pt", "--prompt", "Hello, my name is", "--tokens", 20)
    assert out.count("Hello, my name is") == 2
    assert "the Python manual" in out.splitlines()[0]
    assert out.splitlines()[0].endswith("which this run learnt from")
    assert "before training: perplexity" in out
    assert "after 120 steps: perplexity" in out


def test_what_was_chosen_is_printed_and_recorded(short_run):
    folder, printed = short_run
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["ratio"] == 0.01
    assert "auto" not in [
        v for k, v in config["settings"].items() if k not in ("dataset", "corpus", "name")
    ]
    for note in config["chosen"].values():
        assert note in printed
    assert "the bundled lamo/hopper/medium-1pct-v0" in config["chosen"]["dataset"]
    assert read_checkpoint(folder / "ckpt.pt")["chosen"] == config["chosen"]
    result = json.loads((folder / "result.json").read_text())
    assert result["score"] == max(t["score"] for t in result["targets"])
    assert result["dataset"] == config["chosen"]["dataset"]
    assert str(folder / "ckpt.pt") in printed


def test_what_a_run_depends_on_is_recorded(short_run):
    folder, _ = short_run
    config = json.loads((folder / "config.json").read_text())
    assert config["versions"]["torch"] == torch.__version__
    assert config["versions"]["python"] == sys.version.split()[0]
    for package in ("numpy", "gymnasium", "mujoco", "minari", "tiktoken"):
        assert config["versions"][package] == version(package)
    assert config["machine"]["device"] == "cpu"
    assert config["machine"]["threads"] >= 1
    assert config["data"]["dataset"] == "lamo/hopper/medium-1pct-v0"
    assert len(config["data"]["sha256"]) == len(config["base"]["sha256"]) == 64
    (text,) = (cache_folder()).glob("python-manual-*.txt")
    digest = hashlib.sha256(text.read_bytes()).hexdigest()
    assert config["base"]["text"] == f"{digest[:32]}-bytes"


def test_the_codes_commit_is_recorded_and_whether_it_was_changed(tmp_path, monkeypatch):
    def git(*words):
        identity = ["-c", "user.name=x", "-c", "user.email=x@x", "-c", "commit.gpgsign=false"]
        command = ["git", *identity, *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    monkeypatch.setattr(run_folder, "__file__", str(tmp_path / "run_folder.py"))
    assert run_folder.code_version() == {"commit": None, "dirty": None}
    (tmp_path / "run_folder.py").write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "x")
    commit = git("rev-parse", "HEAD")
    assert len(commit) == 40
    assert run_folder.code_version() == {"commit": commit, "dirty": False}
    (tmp_path / "new.txt").write_text("not looked at")
    assert run_folder.code_version() == {"commit": commit, "dirty": False}
    (tmp_path / "run_folder.py").write_text("2")
    assert run_folder.code_version() == {"commit": commit, "dirty": True}
    (tmp_path / "inner").mkdir()  # another project's repository is around ours
    monkeypatch.setattr(run_folder, "__file__", str(tmp_path / "inner" / "run_folder.py"))
    assert run_folder.code_version() == {"commit": None, "dirty": None}


def test_the_same_command_gives_the_same_bits(tmp_path):
    """Also under --deterministic, which changes nothing on a CPU."""
    flags = "--env hopper --ratio 0.01 --steps 6 --eval-every 3 --episodes 1 --episode-limit 9"
    flags += " --batch 4 --lm-length 32 --dropout 0.1 --log-every 2 --seed 3"
    for name, more in (("one", []), ("two", []), ("three", ["--deterministic"])):
        run("train.py", *flags.split(), "--out", tmp_path, "--name", name, *more)
    logs, weights = [], []
    for name in ("one", "two", "three"):
        rows = [json.loads(row) for row in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        logs.append([{k: v for k, v in row.items() if k != "seconds"} for row in rows])
        weights.append(read_checkpoint(tmp_path / name / "ckpt.pt")["model"])
    assert logs[0] == logs[1] == logs[2]
    for other in weights[1:]:
        assert all(torch.equal(other[name], tensor) for name, tensor in weights[0].items())
    settings = json.loads((tmp_path / "three" / "config.json").read_text())["settings"]
    assert settings["deterministic"] is True


def test_a_checkpoint_is_small_and_holds_no_frozen_tensor(short_run):
    folder, _ = short_run
    checkpoint = read_checkpoint(folder / "ckpt.pt")
    model = load_model(folder / "ckpt.pt", checkpoint)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(checkpoint["model"]) == trained
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (folder / "ckpt.pt").stat().st_size < 4 * n_trained + 50_000
    assert len(checkpoint["base"]["sha256"]) == 64


def test_same_seed_same_bits(tmp_path):
    states = []
    for name in ("one", "two"):
        short = ["--steps", 6, "--eval-every", 6, "--episodes", 1, "--batch", 8, "--lm-length", 64]
        run("train.py", "--ratio", 0.005, *short, "--out", tmp_path / name)
        (folder,) = (tmp_path / name).iterdir()
        states.append(read_checkpoint(folder / "ckpt.pt")["model"])
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


# --- two processes -------------------------------------------------------------------------------


def tiny_lamo():
    torch.manual_seed(1)
    return LaMo(GPT(GPTConfig(2, 2, 32, 50, 32, dropout=0.0)), (4,), 2, max_ep_len=10)


def joined_batch():
    """8 windows of unequal length and 4 blocks of text."""
    rng = torch.Generator().manual_seed(2)
    rtg, obs, act = (torch.randn(8, 6, n, generator=rng) for n in (1, 4, 2))
    timestep = torch.arange(6).expand(8, 6)
    valid = timestep < torch.tensor([1, 2, 1, 2, 6, 6, 5, 6])[:, None]  # rank 1 has far more
    tokens = torch.randint(50, (4, 17), generator=rng)
    return (rtg, obs, act, timestep, valid), (tokens[:, :-1], tokens[:, 1:])


def gradients_of_one_of_two(rank, folder, port):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    os.environ["MASTER_PORT"] = str(port)
    assert join_processes(torch.device("cpu")) == (rank, 2, torch.device("cpu"))
    model = tiny_lamo()
    objective = torch.nn.parallel.DistributedDataParallel(Objective(model))
    window, text = joined_batch()
    window = [x[4 * rank : 4 * rank + 4] for x in window]
    text = [x[2 * rank : 2 * rank + 2] for x in text]
    action_loss, lm_loss, _ = objective(window, valid_steps(window[-1], 2), text)
    (action_loss + 0.1 * lm_loss).backward()
    torch.save({n: p.grad for n, p in model.named_parameters()}, f"{folder}/{rank}.pt")
    del objective
    leave_processes()
    for thread in Path("/proc/self/task").glob("*/comm"):  # (there are none but on Linux)
        assert "gloo" not in thread.read_text()  # else it may abort the process at its end


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def test_two_processes_have_the_gradients_of_the_joined_batch(tmp_path):
    model = tiny_lamo()
    window, text = joined_batch()
    action_loss, lm_loss, _ = Objective(model)(window, valid_steps(window[-1], 1), text)
    (action_loss + 0.1 * lm_loss).backward()
    mp.spawn(gradients_of_one_of_two, (str(tmp_path), free_port()), nprocs=2)
    for rank in range(2):
        gradients = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, parameter in model.named_parameters():
            assert torch.allclose(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6), name


def test_torchrun_trains_one_model_in_two_processes(tmp_path):
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    arguments = ["--ratio", 0.01, "--steps", 8, "--batch", 8, "--lm-length", 64, "--lm-batch", 2]
    arguments += ["--eval-every", 8, "--episodes", 1, "--out", tmp_path / "runs"]
    printed = run("train.py", *arguments, launcher=launcher)
    (folder,) = (tmp_path / "runs").iterdir()  # one run, not two
    assert read_checkpoint(folder / "ckpt.pt")["step"] == 8
    assert "2 processes" in printed


# --- pieces --------------------------------------------------------------------------------------


def test_action_loss_is_the_mean_over_valid_entries():
    window, _ = joined_batch()
    model = tiny_lamo()
    action_loss, lm_loss, _ = Objective(model)(window, valid_steps(window[-1], 1), None)
    predicted = model(*window[:4]).detach()
    errors = [
        float((predicted[b, k, a] - window[2][b, k, a]) ** 2)
        for b in range(8)
        for k in range(6)
        for a in range(2)
        if window[4][b, k]
    ]
    assert action_loss.item() == pytest.approx(np.mean(errors), rel=1e-5)
    assert lm_loss.item() == 0


class Steady:
    """A policy in closed form for `rollout`, which writes down what it was shown."""

    training = False

    def __init__(self):
        self.shown = []

    def eval(self):
        return self

    def train(self, mode):
        return self

    def modules(self):
        return []

    def observe(self, rtg, obs, timestep):  # tokens are what they stand for: values, then the time
        values = [F.pad(x[:, 0], (0, 11 - x.shape[-1])) for x in (rtg, obs)]
        return torch.stack([torch.cat([v, timestep], dim=1) for v in values], 1)[:, None]

    def remember(self, act, timestep):
        return torch.cat([F.pad(act[:, 0], (0, 8)), timestep], dim=1)[:, None, None]

    def act(self, tokens):
        self.shown.append(tokens.clone())
        return torch.tanh(tokens[:, -1, :3] * 3) + 0.5  # beyond the bounds at times


@pytest.mark.parametrize("mode", ["normal", "delayed"])
def test_rollout_equals_one_episode_at_a_time(hopper, mode):
    settings = {"context": 4, "scale": 1000.0, "mode": mode, "dtype": "fp32", "episode_limit": 0}
    mean, std = torch.linspace(-0.1, 0.1, 11), torch.linspace(0.5, 2, 11)
    model = Steady()
    results = rollout(model, hopper, settings, (mean, std), [2000.0, 500.0], 3, seed=7)
    assert [r["target"] for r in results] == [2000.0, 500.0]

    env = gym.make("Hopper-v5")
    for result in results:
        for episode in range(3):
            observation, _ = env.reset(seed=7 + episode)
            total, length, done, rtg = 0.0, 0, False, result["target"] / 1000
            before = None  # the action of the step before
            while not done:
                obs = (torch.tensor(observation, dtype=torch.float32) - mean) / std
                action = (torch.tanh(obs[:3] * 3) + 0.5).clamp(-1, 1).numpy()
                if episode == 0 and result is results[0]:  # row 0 is there as long as it lives
                    shown = model.shown[length][0]  # (3n - 1, 12), R and s of now at the end
                    n = min(length + 1, 4)
                    assert len(shown) == 3 * n - 1
                    assert shown[-2, 0].item() == pytest.approx(rtg, rel=1e-4)
                    assert torch.allclose(shown[-1, :11], obs)
                    assert shown[::3, 11].tolist() == list(range(length + 1 - n, length + 1))
                    assert shown[1::3, 11].tolist() == list(range(length + 1 - n, length + 1))
                    if length:
                        np.testing.assert_allclose(shown[-3, :3], before, rtol=1e-5)
                        assert shown[-3, 11] == length - 1
                before = action
                observation, reward, terminated, truncated, _ = env.step(action)
                total, length, done = total + reward, length + 1, terminated or truncated
                rtg -= 0 if mode == "delayed" else reward / 1000
            assert result["returns"][episode] == pytest.approx(total, rel=1e-6)
            assert result["lengths"][episode] == length
        assert result["return_mean"] == pytest.approx(np.mean(result["returns"]))
        assert result["score"] == pytest.approx(normalised_score(hopper, result["return_mean"]))


def test_normalised_score_is_0_for_random_and_100_for_expert(hopper):
    assert normalised_score(hopper, -20.3) == 0
    assert normalised_score(hopper, 3234.3) == 100
    assert normalised_score(hopper, 1607.0) == pytest.approx(50)


@given(
    st.lists(st.tuples(st.floats(-50, 150), st.floats(-50, 150)), min_size=1, max_size=12),
    st.integers(1, 50),
)
def test_the_final_score_follows_the_protocol(scores, every):
    evaluations = [
        {
            "step": (i + 1) * every,
            "results": [
                {"target": t, "score": s, "return_mean": 10 * s, "cut": 0}
                for t, s in zip((2, 1), pair, strict=True)
            ],
        }
        for i, pair in enumerate(scores)
    ]
    n = len(scores)
    result = final_result(evaluations, n * every)
    late = [pair for i, pair in enumerate(scores) if 5 * (i + 1) > 4 * n]
    means = [sum(column) / len(late) for column in zip(*late, strict=True)]
    assert result["score"] == pytest.approx(max(means))
    assert result["evaluations_averaged"] == len(late)
    assert result["best_single_evaluation"] == max(max(pair) for pair in scores)
    assert result["return_mean"] == pytest.approx(10 * max(means))


def test_typed_flags_win_over_the_method_it_over_preset_and_task():
    settings, task, notes = resolve(Config(), {})
    assert task is HOPPER
    assert (settings["lm"], settings["method"], settings["embed"]) == ("mini", "lamo", "linear")
    assert settings["context"] == 20
    assert settings["scale"] == 1000
    assert settings["targets"] == [3600, 1800]
    if not torch.cuda.is_available():
        assert settings["device"] == "cpu"
        assert "without CUDA" in notes["lm"]
    settings, _, _ = resolve(Config(), {"method": "dt"})
    assert (settings["lm"], settings["pretrained"], settings["train"]) == ("dt", False, "all")
    settings, _, _ = resolve(
        Config(), {"method": "dt", "embed": "mlp", "steps": 7, "targets": [5.0]}
    )
    assert (settings["embed"], settings["steps"], settings["targets"]) == ("mlp", 7, [5.0])


def test_the_quality_of_a_dataset_is_part_of_its_name(tmp_path, monkeypatch):
    """An expert set in the folder is found; the bundled medium one does not stand in for it."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    bundled = read_dataset(BUNDLED / HOPPER.bundled).spec.data_path
    shutil.copytree(Path(bundled).parent / "data", tmp_path / "mujoco/hopper/expert-v0/data")
    found, share, note = find_dataset("hopper", HOPPER, 1.0, quality="expert")
    assert (share, note) == (1.0, f"mujoco/hopper/expert-v0 in {tmp_path}")
    assert found.total_episodes == 26
    with pytest.raises(UserError, match="mujoco/hopper/simple-v0 is not in"):
        find_dataset("hopper", HOPPER, 0.01, quality="simple")


def test_the_learning_rate_rises_stays_and_falls(short_run):
    """120 steps, 10 of warm-up, the short preset's cooldown over the second half."""
    rates = {row["step"]: row["lr"] for row in rows_of(short_run[0]) if "lr" in row}
    assert rates[20] == rates[60] == 1e-3
    assert rates[80] == pytest.approx(1e-3 * (120 - 79) / 60)
    assert rates[120] == pytest.approx(1e-3 / 60)


def test_windows_made_ahead_come_in_the_same_order():
    made = []

    def make():
        made.append(len(made))
        if len(made) == 20:
            raise RuntimeError("twenty")
        return made[-1]

    seen = list(itertools.islice(ahead(make), 10))
    assert seen == list(range(10))
    assert len(made) == 11  # one ahead, never more
    with pytest.raises(RuntimeError, match="twenty"):
        list(itertools.islice(ahead(make), 20))


def test_auto_may_be_typed_and_a_random_base_needs_no_weights():
    assert resolve(Config(), {"method": "lamo-random", "lm": "gpt2"})[0]["lm"] == "gpt2"
    settings, _, _ = resolve(Config(), {})
    assert "auto" not in [v for k, v in settings.items() if k not in ("dataset", "corpus", "name")]


@pytest.mark.parametrize("method", ["dt", "lamo-full"])
def test_a_checkpoint_of_all_weights_needs_no_base(hopper, method):
    """Another seed stands for another machine, whose random numbers may differ in the last bit."""
    settings, _, notes = resolve(Config(), {"method": method})
    model, base = build_model(settings, hopper)
    checkpoint = {"settings": settings | {"seed": 1, "lm": "mini" if method != "dt" else "dt"}}
    checkpoint |= {"chosen": notes, "base": base, "environment": hopper}
    checkpoint["model"] = trained_state(model, "all", 0)
    again = load_model("ckpt.pt", checkpoint)
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("method", METHODS)
def test_every_method_builds_and_steps(hopper, method):
    settings, _, _ = resolve(Config(), {"method": method})
    model, base = build_model(settings, hopper)
    assert ("random" in base["lm"]) == (method in ("lamo-random", "dt"))
    assert model.gpt.config.n_embd == (128 if method == "dt" else 192)
    window = [torch.randn(2, 3, n) for n in (1, 11, 3)]
    window += [torch.arange(3).expand(2, 3), torch.ones(2, 3, dtype=torch.bool)]
    text = [torch.randint(257, (1, 8))] * 2 if settings["lm_coef"] else None
    losses = Objective(model)(window, valid_steps(window[-1], 1), text)
    (losses[0] + settings["lm_coef"] * losses[1]).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
