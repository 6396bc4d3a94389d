"""What several tests ask of a run: all that it leaves behind, and when it has made some steps."""

import json
import time

import torch

from checkpoint import read_checkpoint


def outcome(folder):
    """All that a finished run leaves behind, but for times: (rows, result, weights, names)."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    result = json.loads((folder / "result.json").read_text())
    for numbers in (*rows, result):
        numbers.pop("seconds", None)
        numbers.pop("seconds_evaluating", None)
    names = ("ckpt.pt", "best.pt")
    weights = {name: read_checkpoint(folder / name)["model"] for name in names}
    return rows, result, weights, {path.name for path in folder.iterdir()}


def assert_same(folder, expected):
    """A run has left what another did, bit for bit. expected: the other's `outcome`."""
    rows, result, weights, names = outcome(folder)
    assert (rows, result, names) == (expected[0], expected[1], expected[3])
    for name, tensors in expected[2].items():
        assert tensors.keys() == weights[name].keys()
        for key, tensor in tensors.items():
            assert torch.equal(tensor, weights[name][key]), (name, key)


def wait_for_rows(log, process):
    """Wait until a process has written to its log, or has ended."""
    while not (log.exists() and log.stat().st_size) and process.poll() is None:
        time.sleep(0.005)
