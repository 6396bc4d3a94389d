"""Commands as a user runs them, here or in a process of their own, and what a run leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from train import read_checkpoint

ROOT = Path(__file__).resolve().parent.parent
SHORT = "--env hopper --ratio 0.01 --steps 12 --eval-every 4 --log-every 3 --episodes 1"
SHORT += " --episode-limit 10 --batch 4 --context 4 --lm-length 32 --warmup 2 --dropout 0.1"
SHORT = SHORT.split()
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
TIMES = ("seconds", "seconds_evaluating", "evaluating", "log_bytes")


def call(main, *words):
    """Run a command's main() in this process, on a command line."""
    argv, numbers = sys.argv, (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in numbers]
    sys.argv = ["command", *map(str, words)]
    try:
        main()
    finally:
        sys.argv = argv
        torch.use_deterministic_algorithms(False)
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)


def start(*words, launcher=(sys.executable,), **more):
    """A process of the project: a script or -c CODE, and its command line."""
    command = [*launcher, *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes, **more)


def finish(process, code=0):
    """Wait for a process to end with this exit code. Returns what it has printed, and its errors"""
    out, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors[-3000:]
    return out, errors


def wait_for(path, process):
    """Wait until a process has written to a file."""
    while not (path.exists() and path.stat().st_size):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def log_of(folder):
    """Rows of a run's log, without times."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: x for key, x in row.items() if key not in TIMES} for row in rows]


def outcome(folder):
    """All that a finished run leaves behind, but for times and its place."""
    left = {path.name: None for path in folder.iterdir() if path.name[0] != "."}
    left["log.jsonl"] = log_of(folder)
    left["result.json"] = json.loads((folder / "result.json").read_text())
    for name in ("ckpt.pt", "best.pt"):
        left[name] = read_checkpoint(folder / name)
        left[name]["settings"].pop("out")
    for numbers in (left["result.json"], left["ckpt.pt"], left["best.pt"]):
        for key in TIMES:
            numbers.pop(key, None)
    return left


def assert_same(a, b, where=""):
    """Two outcomes, or parts of them, are the same to the bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict | list | tuple):
        assert len(a) == len(b), where
        for key in a if isinstance(a, dict) else range(len(a)):
            assert_same(a[key], b[key], f"{where}/{key}")
    else:
        assert a == b, where
