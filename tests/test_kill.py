"""A training is killed at random moments; each time it is resumed and ends as if it had not been.

    LAMO_KILLS=30 python -m pytest -s tests/test_kill.py     # prints a line for each kill

The disk is made slow (a wait before each flush and each rename), so that many kills fall into the
writing of a file. SIGKILL leaves a process no time for anything.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import assert_same, outcome

from files import load_tensors

ROOT = Path(__file__).resolve().parent.parent
KILLS = int(os.environ.get("LAMO_KILLS", "3"))
STEPS, EVERY = 60, 15
FLAGS = f"--env hopper --ratio 0.01 --steps {STEPS} --eval-every {EVERY} --log-every 5 --seed 0"
FLAGS += " --batch 8 --context 5 --lm-length 64 --dropout 0.1 --episodes 1 --episode-limit 10"
SLOW_DISK = """
import os, runpy, sys, time
for name in ("fsync", "replace"):
    def slow(*arguments, really=getattr(os, name)):
        time.sleep(0.1)
        return really(*arguments)
    setattr(os, name, slow)
runpy.run_path("train.py", run_name="__main__")
"""


def start(*arguments):
    command = [sys.executable, "-c", SLOW_DISK, *map(str, arguments)]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    return subprocess.Popen(command, cwd=ROOT, **quiet)


def finish(process):
    errors = process.communicate()[1]
    assert process.returncode == 0, errors


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run's outcome, and how long it takes from its first file to its last."""
    out = tmp_path_factory.mktemp("whole")
    process = start(*FLAGS.split(), "--out", out, "--name", "run")
    while not (out / "run").exists() and process.poll() is None:
        time.sleep(0.001)
    since = time.time()
    finish(process)
    return outcome(out / "run"), time.time() - since


def test_a_killed_run_ends_as_a_whole_one(whole, tmp_path):
    expected, seconds = whole
    draw, killed, while_writing = random.Random(int(os.environ.get("LAMO_SEED", "0"))), 0, 0
    while killed < KILLS:
        out, moment = tmp_path / str(killed), draw.uniform(0, 0.9 * seconds)
        folder = out / "run"
        process = start(*FLAGS.split(), "--out", out, "--name", "run")
        while not folder.exists() and process.poll() is None:
            time.sleep(0.001)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode != -signal.SIGKILL:  # it was faster
            continue
        killed += 1
        aside = [path.name for path in folder.iterdir() if path.name.startswith(".")]
        while_writing += bool(aside)
        step = 0
        for name in ("ckpt.pt", "best.pt", "resume.pt"):
            if (folder / name).exists():
                step = load_tensors(folder / name)["step"]  # readable at any moment
        if (folder / "result.json").exists():  # it had ended, and was about to say so
            rows = -1
            process = start("--resume", folder)
            assert b"is finished; its score is in" in process.communicate()[1]
            assert process.returncode == 2
        elif (folder / "config.json").exists():
            rows = (folder / "log.jsonl").read_text().count("\n") if step else 0
            finish(start("--resume", folder))
        else:  # it had not begun
            rows = 0
            folder.rename(out / "empty")
            finish(start(*FLAGS.split(), "--out", out, "--name", "run"))
        assert_same(folder, expected)
        what = f"while writing {aside[0].split('.')[1]}" if aside else "between writes"
        print(
            f"kill {killed}: after {moment:.2f} s, {what}, {rows} rows; resumed from {step}: same"
        )
    print(f"{killed} kills, {while_writing} of them during a write: all ended with the same bits")
