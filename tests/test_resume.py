"""A run that is stopped, killed or out of disk goes on and ends as an undisturbed one, to the bit.

LAMO_KILLS=30 python -m pytest -s tests/test_resume.py kills more often, a line for each kill;
LAMO_SOAK=20000 also trains this many steps and watches what the process holds.
"""

import os
import random
import re
import resource
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import h5py
import minari
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import SHORT, TORCHRUN, assert_same, call, finish, log_of, outcome, start, wait_for

import train
from data import BUNDLED, load_text, load_trajectories, sample_text, sample_windows
from tasks import find_environment, find_task
from train import build_model, read_checkpoint
from utils import UserError

KILLS = int(os.environ.get("LAMO_KILLS", "2"))
SOAK = int(os.environ.get("LAMO_SOAK", "0"))
LONG = [*SHORT, "--steps", 80, "--eval-every", 30, "--log-every", 5]  # some seconds
SLOW_DISK = """
import os, runpy, time
fsync, os.fsync = os.fsync, lambda file: (time.sleep(0.3), fsync(file))
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an undisturbed run leaves behind."""
    out = tmp_path_factory.mktemp("whole")
    call(train.main, *LONG, "--out", out, "--name", "run")
    return outcome(out / "run")


def stop(out, number, *words):
    """A run that gets a signal after its first steps. Returns its folder."""
    process = start("train.py", *LONG, "--out", out, "--name", "run", *words)
    wait_for(out / "run/log.jsonl", process)
    process.send_signal(number)
    printed, _ = finish(process, 128 + number)
    assert f"--resume {out / 'run'}" in printed
    return out / "run"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    return stop(tmp_path_factory.mktemp("stopped"), signal.SIGTERM)


@pytest.fixture
def copy(stopped, tmp_path):
    """The folder of a stopped run, of one's own."""
    return shutil.copytree(stopped, tmp_path / "run")


# --- signals and kills ---------------------------------------------------------------------------


def test_sigterm_ends_the_step_and_nothing_is_lost(copy, whole):
    step = read_checkpoint(copy / "ckpt.pt")["step"]
    assert log_of(copy)[-1]["step"] <= step < 80
    assert not (copy / "result.json").exists()
    (copy / ".ckpt.pt.123.tmp").write_bytes(b"half a checkpoint")  # as a kill leaves it
    with open(copy / "log.jsonl", "a") as log:
        log.write('{"step": 5')  # likewise
    for _ in range(2):  # a run that is finished does its last evaluation once more
        call(train.main, "--resume", copy)
        assert_same(outcome(copy), whole)


def test_sigint_likewise_and_wiki_rl_keeps_its_words(tmp_path):
    """Also where a language loss moves the words that tokens are pulled to."""
    words = ["--method", "wiki-rl", "--lm-coef", 1, "--similarity", 1]
    call(train.main, *LONG, "--out", tmp_path / "whole", "--name", "run", *words)
    folder = stop(tmp_path, signal.SIGINT, *words)
    call(train.main, "--resume", folder)
    assert_same(outcome(folder), outcome(tmp_path / "whole" / "run"))
    near = [row["similarity"] for row in log_of(folder) if "similarity" in row]
    assert near[-1] > near[0] + 0.02  # of the tokens to the words, which pull them


def test_a_signal_does_not_wait_for_an_evaluation(tmp_path):
    """It leaves at once, and the run that goes on begins with that evaluation."""
    words = ["--steps", 3, "--eval-every", 3, "--episodes", 100, "--episode-limit", 0]
    call(train.main, *SHORT, *words, "--out", tmp_path / "whole", "--name", "run")
    process = start("train.py", *SHORT, *words, "--out", tmp_path, "--name", "run")
    while "evaluating" not in process.stderr.readline():  # its bar; universal newlines end it
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    finish(process, 143)
    folder = tmp_path / "run"
    assert read_checkpoint(folder / "ckpt.pt")["step"] == 3
    assert [row["step"] for row in log_of(folder)] == [3]
    assert not (folder / "result.json").exists()
    call(train.main, "--resume", folder)
    assert_same(outcome(folder), outcome(tmp_path / "whole" / "run"))


def test_a_killed_run_ends_as_a_whole_one(whole, tmp_path):
    draw = random.Random(int(os.environ.get("LAMO_SEED", "0")))
    for kill in range(KILLS):
        folder = tmp_path / f"out{kill}" / "run"
        words = [*LONG, "--out", folder.parent, "--name", "run"]
        process, moment = start("-c", SLOW_DISK, *words), draw.uniform(0, 3)
        wait_for(folder / "config.json", process)
        time.sleep(moment)
        process.kill()
        process.communicate()
        left, step = {path.name for path in folder.iterdir()}, None
        for name in {"ckpt.pt", "best.pt"} & left:
            step = read_checkpoint(folder / name)["step"]  # whole at any moment
        print(f"kill {kill} after {moment:.2f} s, at step {step}, files {sorted(left)}")
        if step is None:  # nothing to go on from: begin anew
            shutil.rmtree(folder)
            call(train.main, *words)
        elif "result.json" not in left:
            call(train.main, "--resume", folder)
        assert_same(outcome(folder), whole)


@pytest.mark.skipif(not SOAK, reason="LAMO_SOAK says how many steps")
def test_memory_open_files_and_threads_stay_flat(tmp_path):
    """The second half of a run with 20 evaluations holds no more than what is before it."""
    words = ["--steps", SOAK, "--eval-every", SOAK // 20, "--episode-limit", 100]
    process = start("train.py", *SHORT, *words, "--out", tmp_path, "--name", "run")
    system, held = Path("/proc", str(process.pid)), []
    while process.stderr.readline():  # a line a second: its bar
        memory = int((system / "statm").read_text().split()[1]) * resource.getpagesize()
        held.append([memory / 2**20, *(len(os.listdir(system / x)) for x in ("fd", "task"))])
    finish(process)
    before, after = (np.array(part) for part in np.array_split(held[len(held) // 10 :], 2))
    print(f"{SOAK} steps, MiB, files, threads: {before.min(0)} to {before.max(0)}, then the same")
    print(f"{after.min(0)} to {after.max(0)}")
    assert (after.max(0) <= before.max(0) * [1.05, 1, 1]).all()


# --- what goes wrong -----------------------------------------------------------------------------


def refuses(match, *words):
    with pytest.raises(UserError, match=match) as error:
        call(train.main, *words)
    assert "\n" not in str(error.value)


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path):
    """A limit on the size of files: AdamW's moments make the second checkpoint three times the
    first one's size."""
    words, folder = [*SHORT, "--method", "dt", "--name", "run", "--out"], tmp_path / "run"
    call(train.main, *words, tmp_path / "whole")
    size = (tmp_path / "whole/run/ckpt.pt").stat().st_size // 2
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    _, errors = finish(start("train.py", *words, tmp_path, preexec_fn=limit), 2)
    assert re.match(r"error: .*ckpt\.pt", errors.splitlines()[-1])
    assert "Traceback" not in errors
    assert read_checkpoint(folder / "ckpt.pt")["step"] == 0
    assert not [path for path in folder.iterdir() if path.name[0] == "."]
    call(train.main, "--resume", folder)
    assert_same(outcome(folder), outcome(tmp_path / "whole" / "run"))


@pytest.mark.parametrize("log_every", [1, 100])
def test_numbers_that_are_not_finite_end_the_run_unsaved(log_every, tmp_path):
    """The first update overflows: the loss of step 2 is NaN, and so are the weights of step 1."""
    words = ["--lr", 1e39, "--warmup", 1, "--eval-every", 3, "--log-every", log_every]
    refuses("--lr", *SHORT, *words, "--out", tmp_path, "--name", "run")
    checkpoint = read_checkpoint(tmp_path / "run" / "ckpt.pt")
    assert checkpoint["step"] == 0
    assert all(tensor.isfinite().all() for tensor in checkpoint["model"].values())


def test_what_cannot_be_resumed(copy, tmp_path):
    refuses("--resume", "--resume", copy, "--lr", 1)
    refuses("nowhere", "--resume", tmp_path / "nowhere")
    refuses("ckpt.pt", "--resume", tmp_path)
    sound = read_checkpoint(copy / "ckpt.pt")
    for change in (
        {"states": 2 * sound["states"]},
        {"optimiser": {}},
    ):
        torch.save(sound | change, copy / "ckpt.pt")
        refuses("run", "--resume", copy)
    lasting = {key: x for key, x in sound.items() if key not in ("optimiser", "states")}
    torch.save(lasting, copy / "ckpt.pt")  # best.pt under another name
    refuses("ckpt.pt", "--resume", copy)


def test_a_run_goes_on_with_its_own_dataset(copy, whole, tmp_path, monkeypatch):
    """Another was recorded since, which a run that begins now would take."""
    recorded = tmp_path / "minari/lamo/hopper/medium-v0"
    shutil.copytree(BUNDLED / "lamo/hopper/medium-1pct-v0", recorded)
    (recorded / "about.json").write_text('{"share": 0.5}')  # other episodes for the same ratio
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    call(train.main, "--resume", copy)
    assert_same(outcome(copy), whole)


def test_data_that_have_changed_are_refused(tmp_path):
    mine = shutil.copytree(BUNDLED / "lamo/hopper/medium-1pct-v0", tmp_path / "mine")
    words = ["--env", "hopper", "--dataset", mine, "--out", tmp_path, "--name", "run"]
    call(train.main, *SHORT, *words)
    (tmp_path / "run/result.json").unlink()
    with h5py.File(mine / "data/main_data.hdf5", "a") as file:
        file["episode_3/rewards"][5] += 0.001
    refuses("data", "--resume", tmp_path / "run")


# --- the loop, in one process and in two ---------------------------------------------------------


def slow_losses(settings, world):
    """The losses of each step, from a plain loop over the windows and blocks of all processes."""
    c = SimpleNamespace(**settings)
    _, task = find_task("hopper")
    dataset = minari.MinariDataset(BUNDLED / task.bundled / "data")
    environment, _ = find_environment(task, dataset)
    data = load_trajectories(dataset, environment.action_space, c.scale)
    model, _ = build_model(c, environment)
    text = torch.from_numpy(load_text(c.corpus, model.gpt.config, c.lm_length)[0])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, eps=1e-6, weight_decay=c.weight_decay)
    seeds = [c.seed + 1_000_003 * rank for rank in range(world)]
    rngs = [[torch.Generator().manual_seed(seed) for seed in seeds] for _ in range(2)]
    losses = []
    for step in range(1, c.steps + 1):
        parts = [sample_windows(data, c.batch // world, c.context, rng) for rng in rngs[0]]
        *window, act, time_step, valid = [torch.cat(x) for x in zip(*parts, strict=True)]
        parts = [sample_text(text, c.lm_batch // world, c.lm_length, rng) for rng in rngs[1]]
        x, y = [torch.cat(part) for part in zip(*parts, strict=True)]
        action_loss = ((model(*window, act, time_step) - act) ** 2)[valid].mean()
        lm_loss = F.cross_entropy(model.gpt(x).flatten(0, 1), y.flatten())
        for group in optimiser.param_groups:
            rising, falling = step / c.warmup, (c.steps + 1 - step) / (c.steps * c.cooldown)
            group["lr"] = c.lr * min(rising, 1, falling)
        optimiser.zero_grad()
        (action_loss + c.lm_coef * lm_loss).backward()
        norm = torch.cat([p.grad.flatten() for p in trained]).norm()
        for p in trained:
            p.grad *= min(1.0, c.clip / norm)
        optimiser.step()
        losses.append((action_loss.item(), lm_loss.item()))
    return np.array(losses)


@pytest.mark.parametrize("world", [1, 2])
def test_the_loop_is_a_plain_one_over_all_windows_and_texts(world, tmp_path):
    """Two processes are stopped and resumed on the way."""
    words = [*SHORT, "--steps", 40, "--eval-every", 40, "--log-every", 1, "--dropout", 0]
    words += ["--lora-dropout", 0, "--dtype", "fp32", "--lr", 1e-3, "--batch", 8]
    words, folder = [*words, "--out", tmp_path, "--name", "run"], tmp_path / "run"
    if world == 1:
        call(train.main, *words)
    else:
        process = start("train.py", *words, launcher=TORCHRUN)
        wait_for(folder / "log.jsonl", process)
        process.terminate()  # torchrun tells its processes
        process.communicate()
        assert 0 < read_checkpoint(folder / "ckpt.pt")["step"] < 40
        refuses("processes", "--resume", folder)
        finish(start("train.py", "--resume", folder, launcher=TORCHRUN))
    rows = [row for row in log_of(folder) if "lr" in row]
    assert [row["step"] for row in rows] == list(range(1, 41))
    found = np.array([(row["action_loss"], row["lm_loss"]) for row in rows])
    settings = read_checkpoint(folder / "ckpt.pt")["settings"]
    np.testing.assert_allclose(found, slow_losses(settings, world), rtol=1e-3)
