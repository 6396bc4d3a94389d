"""Every write of a run fails, one after another, in every way: what was good before stays good.

The disk is full, it has an error, it takes a part only, or the machine goes down between a file's
writing and its renaming. Each time the run says so in one line, leaves nothing half-done that a
reader would take, and goes on from there to the very end an undisturbed run has.
"""

import builtins
import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from runs import assert_same, outcome

import resume
import run_folder
import train
from experiments.write_dataset import write_dataset
from files import load_tensors, write_atomically, write_json
from plumbing import UserError

ROOT = Path(__file__).resolve().parent.parent
SHORT = ["--env", "hopper", "--ratio", 0.01, "--method", "dt", "--context", 3, "--batch", 4]
SHORT += ["--steps", 4, "--eval-every", 2, "--log-every", 1, "--episodes", 1]
SHORT += ["--episode-limit", 5, "--dropout", 0.1, "--dtype", "fp32"]


class Crash(BaseException):
    """The machine goes down: nothing in the program may catch it."""


class Faults:
    """Counts what is done to files, and lets the `at`-th of it fail in the way `kind`."""

    def __init__(self, monkeypatch):
        self.kind, self.at, self.count, self.crashed = None, None, 0, False
        really = {name: getattr(os, name) for name in ("fsync", "replace", "fdopen")}
        unlink, open_file = Path.unlink, builtins.open

        def fdopen(*arguments, **more):
            return Failing(really["fdopen"](*arguments, **more), self)

        def open_log(*arguments, **more):
            return Failing(open_file(*arguments, **more), self)

        def fsync(handle):
            if self.due("EIO at fsync"):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return really["fsync"](handle)

        def replace(source, target):
            if self.due("crash before the rename"):
                self.crashed = True
                raise Crash
            return really["replace"](source, target)

        def remove(path, missing_ok=False):
            if not self.crashed:  # a machine that is down removes nothing
                unlink(path, missing_ok=missing_ok)

        monkeypatch.setattr(os, "fdopen", fdopen)
        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(os, "replace", replace)
        monkeypatch.setattr(Path, "unlink", remove)
        for module in (run_folder, resume):
            monkeypatch.setattr(module, "open", open_log, raising=False)

    def due(self, kind):
        """Whether the thing of this kind that is done now is the one to fail."""
        if kind != self.kind:
            return False
        self.count += 1
        return self.count == self.at

    def set(self, kind, at):
        self.kind, self.at, self.count, self.crashed = kind, at, 0, False


class Failing:
    """An open file whose writes may fail."""

    def __init__(self, file, faults):
        self.file, self.faults = file, faults

    def write(self, content):
        if self.faults.due("ENOSPC"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.faults.due("a part, then ENOSPC"):
            self.file.write(content[: len(content) // 2])
            self.file.flush()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(content)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


KINDS = ["ENOSPC", "a part, then ENOSPC", "EIO at fsync", "crash before the rename"]


@pytest.fixture
def faults(monkeypatch):
    return Faults(monkeypatch)


@pytest.fixture
def command(monkeypatch):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        train.main()

    return call


def check_what_is_there(folder):
    """Every file that has its name is whole."""
    for path in folder.iterdir():
        if not path.name.startswith("."):
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".pt":
                load_tensors(path)


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_write_fails_the_run_goes_on_from_there(kind, tmp_path, faults, command, capsys):
    faults.set(kind, None)
    command(*SHORT, "--out", tmp_path, "--name", "whole")
    writes, whole = faults.count, outcome(tmp_path / "whole")
    assert writes >= {"EIO at fsync": 9, "crash before the rename": 7}.get(kind, 13)
    for at in range(1, writes + 1):
        faults.set(kind, at)
        folder = tmp_path / f"run{at}"
        with pytest.raises((UserError, Crash)) as error:
            command(*SHORT, "--out", tmp_path, "--name", folder.name)
        crashed = error.type is Crash
        if not crashed:
            assert re.match(
                rf"cannot write {folder}/[a-z.]+: (No space|Input/output)", str(error.value)
            )
        if at == 1 and not crashed:  # config.json: the same command can be given again
            assert not folder.exists()
            continue
        left = [path for path in folder.iterdir() if path.name.startswith(".")]
        assert len(left) == crashed  # what a crash leaves aside, no reader takes for the file
        check_what_is_there(folder)
        faults.set(None, None)
        if (folder / "result.json").exists():
            pytest.fail("the run had ended before its last write")
        if (folder / "config.json").exists():
            command("--resume", folder)
            assert "going on with" in capsys.readouterr().out
            assert_same(folder, whole)
            assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    print(f"{kind}: {writes} places, each failed once")


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_before_it_stays(kind, tmp_path, faults):
    """Of whatever else is written by write_atomically: token files, texts, pictures, statistics."""
    write_json(tmp_path / "x.json", {"a": 1})
    faults.set(kind, 1)
    with pytest.raises((UserError, Crash)):
        write_json(tmp_path / "x.json", {"a": 2})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
    faults.set(None, None)
    write_json(tmp_path / "x.json", {"a": 3})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 3}


def test_what_writing_raises_itself_leaves_the_file_and_nothing_aside(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})

    def write(file):
        file.write(b"half of it")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "x.json", write)
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


def test_a_dataset_is_whole_or_absent(tmp_path, faults, hopper, monkeypatch):
    """Its folder appears at once; a failure of any write leaves none, and a place to try again."""
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    episode = EpisodeBuffer(
        observations=np.zeros((4, 11)),
        actions=np.zeros((3, 3), np.float32),
        rewards=np.ones(3),
        terminations=np.array([False, False, True]),
        truncations=np.zeros(3, bool),
    )
    folder = tmp_path / "test" / "set-v0"

    def record():
        spaces = hopper.observation_space, hopper.action_space
        write_dataset(folder, "test/set-v0", [episode], hopper.spec, spaces, (0.0, 1.0), {})

    for kind in KINDS[2:]:  # HDF5 writes its own file, but not its last name
        for at in (1, 2):
            faults.set(kind, at)
            with pytest.raises((UserError, Crash)):
                record()
            assert not folder.exists()
    faults.set(None, None)
    record()
    assert (folder / "about.json").is_file()


def test_the_kernels_own_refusal_is_one_line(tmp_path):
    """A limit on the size of files: the system writes a part of a checkpoint, then fails."""
    code = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000,) * 2);"
    code += " runpy.run_path('train.py', run_name='__main__')"
    command = [sys.executable, "-c", code, *map(str, SHORT), "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, "--name", "run"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    line = done.stderr.replace("\r", "\n").strip().splitlines()[-1]
    assert line == f"error: cannot write {tmp_path / 'run' / 'best.pt'}: File too large"
    there = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert there == ["config.json", "log.jsonl", "run.lock"]
