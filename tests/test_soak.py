"""experiments/soak.py: its medians by hand, and a short real run that is watched."""

import json
import sys

import pytest

from experiments import soak
from plumbing import UserError


def test_parts_are_medians_and_evaluations_are_left_out():
    """100 steps, a row every 5, an evaluation every 50; a step takes 0.1 s, an evaluation 60 s."""
    looks = []
    for step in range(0, 101, 5):
        cpu = 0.1 * step + 60 * (step > 50)  # the evaluation at 50 is paid for before the next row
        many = {"memory": 1000 + step, "files": 4, "threads": 2, "seconds": 60 * cpu}
        looks += [many | {"step": step, "cpu": cpu}, many | {"step": step, "cpu": cpu + 0.01}]
    parts = soak.summarise(looks, steps=100, every=5, evaluated=50)
    assert len(parts) == soak.PARTS
    assert [part["until"] for part in parts] == [5 * i for i in range(1, 21)]
    assert parts[3]["memory"] == parts[3]["memory_peak"] == 1020
    assert {part["files"] for part in parts} == {4}
    timed = {part["until"]: part["cpu_ms_a_step"] for part in parts}
    assert timed.pop(5) is None  # the row before it is the run's beginning
    assert timed.pop(55) is None  # the evaluation was in between
    assert all(value == pytest.approx(100) for value in timed.values())


def test_a_short_run_is_watched(tmp_path, monkeypatch, capsys):
    flags = "--env reacher2d --batch 4 --lm-length 32 --episodes 1 --episode-limit 3"
    words = ["soak", "--steps", "200", "--out", str(tmp_path), "--flags", flags]
    monkeypatch.setattr(sys, "argv", words)
    soak.main()
    parts = json.loads((tmp_path / "soak.json").read_text())["parts"]
    seen = [part for part in parts if part["memory"]]
    assert seen
    assert all(part["cpu_ms_a_step"] is None for part in parts)  # rows come faster than looks
    assert all(2**27 < part["memory"] <= part["memory_peak"] < 2**33 for part in seen)
    assert (tmp_path / "soak.png").read_bytes()[1:4] == b"PNG"
    assert "MiB" in capsys.readouterr().out
    with pytest.raises(UserError, match="exists already; give another --out"):
        soak.main()


def test_a_run_that_fails_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["soak", "--out", str(tmp_path), "--flags", "--env hoper"])
    with pytest.raises(UserError, match="the run failed with exit code 2"):
        soak.main()
