"""--tensorboard and --wandb: the numbers of log.jsonl, and nothing else changes."""

import json
import sys

import pytest

import train
from experiments import baselines
from plumbing import UserError
from trackers import Trackers, check_trackers

SHORT = "--env hopper --ratio 0.01 --steps 6 --eval-every 3 --log-every 2 --episodes 1"
SHORT += " --episode-limit 5 --batch 8 --seed 0"


def run(monkeypatch, main, out, name, flags):
    words = [*SHORT.split(), *flags.split(), "--out", str(out), "--name", name]
    monkeypatch.setattr(sys, "argv", ["x", *words])
    main()
    rows = [json.loads(line) for line in (out / name / "log.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("seconds", None)
    return rows


def expected(rows):
    """{(name, step): value}, from a log."""
    numbers = {}
    for row in rows:
        for result in row.get("evaluation", []):
            who = "policy" if result["target"] is None else f"target {result['target']:g}"
            for kind in ("return_mean", "return_std", "score", "length_mean"):
                numbers[f"evaluation {kind}/{who}", row["step"]] = result[kind]
        for name in {"action_loss", "lm_loss", "lr", "loss"} & row.keys():
            if row[name] is not None:
                numbers[f"train/{name}", row["step"]] = row[name]
    return numbers


def test_tensorboard_has_the_numbers_of_the_log(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for main, method in ((train.main, "--method lamo"), (baselines.main, "--algo bc")):
        name = method.split()[1]
        plain = run(monkeypatch, main, tmp_path, f"{name}-plain", method)
        rows = run(monkeypatch, main, tmp_path, name, f"{method} --tensorboard")
        assert rows == plain
        read = EventAccumulator(str(tmp_path / name))
        read.Reload()
        found = {
            (tag, event.step): event.value
            for tag in read.Tags()["scalars"]
            for event in read.Scalars(tag)
        }
        assert len(found) > 10
        wanted = expected(rows)
        assert wanted.keys() <= found.keys()
        for key, value in wanted.items():
            assert found[key] == pytest.approx(value, rel=1e-6)
        assert not list((tmp_path / f"{name}-plain").glob("events*"))


def test_wandb_keeps_an_offline_run_with_the_last_numbers(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    rows = run(monkeypatch, train.main, tmp_path, "one", "--method dt --wandb")
    (folder,) = (tmp_path / "one" / "wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb"))
    assert folder.name.endswith((tmp_path / "one" / "wandb-id.txt").read_text().strip())
    assert rows == run(monkeypatch, train.main, tmp_path, "two", "--method dt")


@pytest.mark.parametrize("main", [train.main, baselines.main])
def test_a_run_that_wandb_does_not_let_begin_leaves_no_folder(main, tmp_path, monkeypatch):
    """So that the same command can be given again."""
    pytest.importorskip("wandb")
    import wandb

    def refuse(**settings):
        raise wandb.errors.UsageError("no API key")

    monkeypatch.setattr(wandb, "init", refuse)
    how = "--method dt" if main is train.main else "--algo bc"
    for _ in range(2):
        with pytest.raises(UserError, match=r"W&B cannot begin \(no API key\); wandb login"):
            run(monkeypatch, main, tmp_path, "one", f"{how} --wandb")
        assert not (tmp_path / "one").exists()


def test_a_tracker_that_fails_is_left_out(tmp_path, monkeypatch, capsys):
    """A full disk under TensorBoard's files: the training goes on, and has all its numbers."""
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    def full(*arguments, **more):
        raise OSError(28, "No space left on device")

    plain = run(monkeypatch, train.main, tmp_path, "plain", "--method dt")
    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    rows = run(monkeypatch, train.main, tmp_path, "full", "--method dt --tensorboard")
    assert rows == plain
    assert "tracking ends at step 2: [Errno 28] No space left" in capsys.readouterr().err


def test_rows_that_a_kill_left_behind_are_hidden(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def rows(step, steps):
        tracker = Trackers({"tensorboard": True}, tmp_path, {}, step)
        for i in steps:
            tracker.add({"step": i, "lr": 1.0})
        tracker.close()

    rows(None, [1, 2, 3])  # killed before anything was saved
    rows(0, [1, 2, 3, 4])  # and again after step 2 was
    rows(2, [3, 4, 5])
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    assert [event.step for event in read.Scalars("train/lr")] == [1, 2, 3, 4, 5]


def test_what_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("tensorboard", "wandb"):
        with pytest.raises(UserError, match=f"--{name} needs a package: pip install {name}"):
            check_trackers({name: True})
    check_trackers({"tensorboard": False})
