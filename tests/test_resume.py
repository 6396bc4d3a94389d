"""train.py --resume: a run that was stopped ends as one that was not, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import assert_same, outcome

import train
from data import BUNDLED
from plumbing import UserError

ROOT = Path(__file__).resolve().parent.parent
SHORT = ["--ratio", 0.01, "--steps", 11, "--eval-every", 4, "--log-every", 3, "--episodes", 1]
SHORT += ["--batch", 8, "--context", 5, "--lm-length", 64, "--warmup", 2, "--episode-limit", 20]
SHORT += ["--dropout", 0.1]  # the short preset has none: its masks must go on, too


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    train.main()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an uninterrupted run leaves behind."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        command(patch, *SHORT, "--out", out, "--name", "run")
    return outcome(out / "run")


STOPS = {  # where a run is stopped: a function of train.py's, and at which of its calls
    "before anything is saved": ("rollout", 1),
    "before an evaluation is recorded": ("record_evaluation", 2),
    "after an evaluation": ("append_to_log", 2),
    "while the checkpoint is written": ("save_checkpoint", 2),
    "before what resuming needs is written": ("save_run", 2),
    "between evaluations": ("append_to_log", 4),
    "before the score": ("end_run", 1),
}


def stop_a_run(monkeypatch, out, name, at):
    """Begin a run, and interrupt it at call number `at` of the function `name` of train.py."""
    original, calls = getattr(train, name), []

    def stop(*arguments, **named):
        calls.append(name)
        if len(calls) == at:
            raise KeyboardInterrupt
        return original(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(train, name, stop)
        with pytest.raises(KeyboardInterrupt):
            command(patch, *SHORT, "--out", out, "--name", "run")


@pytest.mark.parametrize("where", STOPS)
def test_a_stopped_run_ends_as_a_whole_one(where, whole, tmp_path, monkeypatch):
    stop_a_run(monkeypatch, tmp_path, *STOPS[where])
    assert not (tmp_path / "run" / "result.json").exists()
    (tmp_path / "run" / ".ckpt.pt.a1b2c3d4").write_bytes(b"half a checkpoint")  # by a kill
    command(monkeypatch, "--resume", tmp_path / "run")
    assert_same(tmp_path / "run", whole)
    with pytest.raises(UserError, match="is finished; its score is in"):
        command(monkeypatch, "--resume", tmp_path / "run")


def test_a_dataset_recorded_since_does_not_stand_in_for_the_one_it_began_on(
    whole, tmp_path, monkeypatch
):
    """As README recommends to record it: a run that begins now would take it."""
    stop_a_run(monkeypatch, tmp_path, *STOPS["between evaluations"])
    recorded = tmp_path / "minari" / "lamo/hopper/medium-v0"
    shutil.copytree(BUNDLED / "lamo/hopper/medium-1pct-v0", recorded)
    (recorded / "about.json").write_text('{"share": 0.5}')  # other episodes for the same ratio
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    command(monkeypatch, "--resume", tmp_path / "run")
    assert_same(tmp_path / "run", whole)


def test_a_killed_process_is_resumed_by_another(whole, tmp_path):
    begin = [sys.executable, str(ROOT / "train.py"), *map(str, SHORT)]
    begin += ["--out", str(tmp_path), "--name", "run"]
    folder = tmp_path / "run"
    process = subprocess.Popen(begin, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (folder / "resume.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    again = [sys.executable, str(ROOT / "train.py"), "--resume", str(folder)]
    if process.returncode:  # else it was faster than the signal
        done = subprocess.run(again, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "going on with" in done.stdout
    assert_same(folder, whole)


def test_two_processes_are_resumed_by_two_and_refused_by_one(tmp_path, monkeypatch):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = [*map(str, SHORT), "--out", str(tmp_path)]
    subprocess.run([*launcher, "train.py", *flags, "--name", "whole"], cwd=ROOT, check=True)
    expected = outcome(tmp_path / "whole")
    # one that is stopped after its first save, as if the machine had gone
    stopped = tmp_path / "run"
    process = subprocess.Popen([*launcher, "train.py", *flags, "--name", "run"], cwd=ROOT)
    while not (stopped / "resume.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)  # torchrun ends its processes
    process.wait()
    if not (stopped / "result.json").exists():
        with pytest.raises(UserError, match="begun by 2 processes, not 1"):
            command(monkeypatch, "--resume", stopped)
        subprocess.run([*launcher, "train.py", "--resume", str(stopped)], cwd=ROOT, check=True)
    rows, result, weights, names = outcome(stopped)
    assert (rows, names) == (expected[0], expected[3])
    assert result["score"] == expected[1]["score"]
    for key, tensor in weights["ckpt.pt"].items():
        assert torch.equal(tensor, expected[2]["ckpt.pt"][key]), key


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A run that was stopped after its first save."""
    stop_a_run(monkeypatch, tmp_path, "save_run", 2)
    return tmp_path / "run"


def test_what_cannot_be_resumed_is_said_in_one_line(stopped, monkeypatch, tmp_path):
    def says(*arguments):
        with pytest.raises(UserError) as error:
            command(monkeypatch, "--resume", *arguments)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "--lr is as it was when the run began" in says(stopped, "--lr", 1)
    assert "it has no config.json" in says(tmp_path / "nowhere")
    assert "it has no config.json" in says(tmp_path)
    config = json.loads((stopped / "config.json").read_text())

    def rewritten(**parts):
        (stopped / "config.json").write_text(json.dumps(config | parts))

    rewritten(data=config["data"] | {"sha256": "0" * 64})
    assert "with other numbers in it: put the former back, or begin anew" in says(stopped)
    rewritten(base=config["base"] | {"sha256": "0" * 64})
    assert "was begun on other weights" in says(stopped)
    (stopped / "config.json").write_text("{")
    assert "config.json is damaged" in says(stopped)
    rewritten()
    whole = (stopped / "resume.pt").read_bytes()
    (stopped / "resume.pt").write_bytes(whole[: len(whole) // 2])
    assert "resume.pt is damaged" in says(stopped)
    torch.save({"format": "other"}, stopped / "resume.pt")
    assert "is another version's" in says(stopped)
    (stopped / "resume.pt").write_bytes(whole)
    sound = torch.load(stopped / "resume.pt", weights_only=True)
    for name, odd in {
        "totals": torch.zeros(()),
        "bad": torch.tensor(3),
        "windows": torch.zeros(3),
    }.items():
        torch.save(
            sound | {"processes": [sound["processes"][0] | {name: odd}]}, stopped / "resume.pt"
        )
        assert "does not fit this run; delete resume.pt there" in says(stopped)
    model = {name: tensor[:1] for name, tensor in sound["model"].items()}
    torch.save(sound | {"model": model}, stopped / "resume.pt")
    assert "does not fit this run; delete resume.pt there" in says(stopped)
    (stopped / "resume.pt").write_bytes(whole)
    (stopped / "log.jsonl").write_text("")
    assert "is shorter than it was" in says(stopped)


def test_what_has_changed_since_a_run_began_is_said(stopped, monkeypatch, capsys):
    config = json.loads((stopped / "config.json").read_text())
    config["versions"]["numpy"] = "1.0"
    config["git"] = {"commit": "0" * 40, "dirty": False}
    (stopped / "config.json").write_text(json.dumps(config))
    command(monkeypatch, "--resume", stopped)
    said = capsys.readouterr().out
    assert f"numpy 1.0 when it was begun, {np.__version__} now: it may not end with" in said
    assert f"commit {'0' * 40} when it was begun" in said
    assert "torch" not in [line.split()[1] for line in said.splitlines() if " now: " in line]


def test_another_text_is_refused(stopped, monkeypatch):
    config = json.loads((stopped / "config.json").read_text())
    config["base"]["text"] = "0" * 32 + "-bytes"
    (stopped / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="was begun on another text: the Python manual"):
        command(monkeypatch, "--resume", stopped)


def test_a_name_is_a_folder_of_its_own(stopped, monkeypatch):
    for name, says in (("run", "exists already; give another --name"), ("a/b", "--name is a/b")):
        with pytest.raises(UserError, match=says):
            command(monkeypatch, *SHORT, "--out", stopped.parent, "--name", name)
