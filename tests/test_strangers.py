"""Files that a stranger could have made, to run code, write, wait or fill the memory: all refused.

Each was tried against this code and did harm once. What spoils sound files at random is fuzz.py.
"""

import csv
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import h5py
import numpy as np
import psutil
import pytest
import torch
from filelock import FileLock
from gymnasium.envs.registration import EnvSpec, WrapperSpec
from safetensors.torch import load_file, save_file

import train
from checkpoint import read_checkpoint
from data import find_dataset, read_dataset, read_frames
from environments import make_vector_env
from experiments import pretrain, report
from experiments.one_run import carry_out, last_lines, name_of, progress_of
from files import check_hdf5, clear_unfinished, load_tensors, parse_json, read_json
from load_gpt2 import find_weights, load_gpt2
from plumbing import UserError, run_command
from resume import continue_run, read_run
from run_folder import let_go
from spaces import read_space
from tasks import Task, make_env, unpack
from text import get_encoding, tokenise

ROOT = Path(__file__).resolve().parent.parent


# --- code, and files elsewhere -------------------------------------------------------------------


def test_nothing_is_cleared_but_what_tempfile_made(tmp_path):
    for name in (".x.json.abcd1234", ".x.json.conf", ".x.json.lock", ".x.json.d"):
        (tmp_path / name).write_text("")
    clear_unfinished(tmp_path / "x.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".x.json.conf",
        ".x.json.d",
        ".x.json.lock",
    ]


@pytest.mark.parametrize("name", ["/home/me/x", "../x/y-v0", "a/../b-v0", "x y", "a/.b-v0"])
def test_what_is_no_id_is_not_downloaded(name, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setattr("data.network_available", lambda: True)
    with pytest.raises(
        UserError, match=r"is no folder of a dataset, and no id of one|there is no folder /home"
    ):
        find_dataset("hopper", Task(), 1.0, name)
    assert not list(tmp_path.rglob("*.lock"))


def test_a_folder_named_as_a_package_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "minigrid" / "rooms").mkdir(parents=True)
    (tmp_path / "minigrid" / "rooms" / "envs.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="which is not installed, but found elsewhere"):
        make_env(EnvSpec("Room-v0", "minigrid.rooms.envs:Env"))
    assert not (tmp_path / "ran").exists()


def state_of_pretrain(folder):
    """A .state.pt just before its end, with what it says."""
    (folder / "text.txt").write_text("A text of a few words. " * 200)
    words = f"--text {folder}/text.txt --heldout {folder}/text.txt --steps 4 --eval-every 2"
    words += " --batch 2 --block-size 16 --n-layer 1 --n-head 1 --n-embd 4 --device cpu"
    code = "import sys; from experiments import pretrain as p;"
    code += " p.plot = lambda *a: sys.exit(); p.main()"  # before it removes the state
    command = [sys.executable, "-c", code, *words.split(), "--out", f"{folder}/x.safetensors"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return load_tensors(folder / "x.state.pt")


def test_pretraining_goes_on_beside_its_state_and_nowhere_else(tmp_path, monkeypatch):
    state = state_of_pretrain(tmp_path)
    state["settings"]["out"] = str(tmp_path / "home" / ".bashrc")
    torch.save(state, tmp_path / "x.state.pt")
    settings = pretrain.read_state(tmp_path / "x.state.pt")["settings"]
    assert settings["out"] == str(tmp_path / "x.safetensors")
    others = dict(batch="x", text=None, n_embd=5.5, n_head=3, steps=0, eval_every=0, micro_batch=0)
    others |= dict(heldout=[5], n_layer=10**9, block_size=99, vocab_size=9, text=["a"] * 2000)
    for name, value in others.items():
        wrong = state | {"settings": state["settings"] | {name: value}}
        torch.save(wrong, tmp_path / "x.state.pt")
        with pytest.raises(UserError):
            pretrain.read_state(tmp_path / "x.state.pt")
    torch.save(state | {"settings": state["settings"] | {"batch": 10**10}}, tmp_path / "x.state.pt")
    with pytest.raises(UserError, match="--batch 10000000000 would take"):
        pretrain.read_state(tmp_path / "x.state.pt")
    with pytest.raises(UserError, match="no ordinary file"):
        tokenise("/dev/zero", get_encoding(257))
    large = [row | {"loss": 1e300} for row in state["log"]]
    parts = [{"step": "x"}, {"log": 5}, {"log": [{"step": 1}]}, {"log": large}, {"step": 99}]
    parts += [{"log": []}, {"summed": torch.zeros(5)}, {"summed": torch.zeros((), dtype=int)}]
    parts += [{"model": state["model"] | {"wte.weight": 5}}, {"model": {}}]
    for part in parts:
        torch.save(state | part, tmp_path / "x.state.pt")
        with pytest.raises(UserError):
            pretrain.read_state(tmp_path / "x.state.pt")
    torch.save(state | {"optimiser": state["optimiser"] | {"state": "x"}}, tmp_path / "x.state.pt")
    monkeypatch.setattr(sys, "argv", ["pretrain", "--resume", str(tmp_path / "x.state.pt")])
    with pytest.raises(SystemExit) as ended:
        run_command(pretrain.main)
    assert ended.value.code == 2


# --- numbers, and what they ask for --------------------------------------------------------------


@pytest.mark.parametrize("text", ["1" + "0" * 400, str(2**63), f"[{-(2**63)}]", "[" * 10**5])
def test_numbers_beyond_any_use_are_refused(text):
    with pytest.raises(ValueError, match=r"too large|too deeply"):
        parse_json(text)


@pytest.mark.parametrize("value", [0, -5, 2**63 - 1, -(2**63) + 1, 1.5, -1e300, [1, {"a": -7}]])
def test_other_numbers_are_read_as_json_reads_them(value):
    assert parse_json(json.dumps(value)) == value


def test_a_number_of_a_pickle_is_bounded_too(tmp_path):
    torch.save({"a": 10**600}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="a number in it is too large"):
        load_tensors(tmp_path / "x.pt")
    assert pickle.dumps(2**63 - 1)
    torch.save({"a": 1 - 2**63}, tmp_path / "x.pt")
    assert load_tensors(tmp_path / "x.pt") == {"a": 1 - 2**63}


@pytest.mark.parametrize("shape", [["a", 10**11], [[0], 10**11], [-1], [True], [1.5]])
def test_a_space_of_sizes_that_are_no_numbers_is_not_made(shape):
    told = {"type": "Box", "dtype": "float32", "shape": shape, "low": [0], "high": [1]}
    with pytest.raises(UserError, match="sizes are no whole numbers"):
        read_space(json.dumps(told))


@pytest.mark.parametrize("dtype", ["(3000000,)f8", "S30000000", "object", "U9999999"])
def test_a_space_of_odd_numbers_is_not_made(dtype):
    told = {"type": "Box", "dtype": dtype, "shape": [1], "low": [0], "high": [1]}
    with pytest.raises(UserError, match="is not supported"):
        read_space(json.dumps(told))


def test_pictures_of_four_colours_are_not_read():
    told = {"type": "Box", "dtype": "uint8", "shape": [84, 84, 4], "low": 0, "high": 255}
    with pytest.raises(UserError, match="pictures of 4 colours are not supported"):
        read_space(json.dumps(told))


def stacked(*sizes):
    entry = "gymnasium.wrappers:FrameStackObservation"
    wrappers = [WrapperSpec("x", entry, {"stack_size": n}) for n in sizes]
    return dict(additional_wrappers=tuple(wrappers))


def skipping(*sizes):
    entry = "gymnasium.wrappers:MaxAndSkipObservation"
    wrappers = [WrapperSpec("x", entry, {"skip": n}) for n in sizes]
    return dict(additional_wrappers=tuple(wrappers))


@pytest.mark.parametrize(
    "more",
    [
        stacked(1000, 4000),
        stacked(*[2] * 30),
        {"kwargs": {"frame_skip": 10**6}},
        {"kwargs": {"frame_skip": 500}, **skipping(400, 2)},
        {"kwargs": {"desc": ["S" * 1000] * 1000}},
    ],
    ids=[
        "stacks of stacks",
        "many wrappers",
        "a step of a million",
        "steps in steps",
        "a large map",
    ],
)
def test_an_environment_that_asks_for_much_is_not_made(more):
    with pytest.raises(UserError, match="is recorded with"):
        make_env(EnvSpec("Hopper-v5", "gymnasium.envs.mujoco.hopper_v5:HopperEnv", **more))


def test_environments_are_counted_before_they_are_made(sound, monkeypatch):
    environment = read_checkpoint(sound / "run" / "ckpt.pt")["environment"]
    monkeypatch.setattr("environments.make_env", Large)
    little = psutil.virtual_memory()._replace(available=1 << 30)
    monkeypatch.setattr("psutil.virtual_memory", lambda: little)
    # what it would be if no memory were left from other tests, and one lay in such all the same
    taken = [0, 0, 64, 128, 192, 256]
    rss = lambda _: SimpleNamespace(rss=taken[Large.made] << 20)  # noqa: E731
    monkeypatch.setattr("psutil.Process.memory_info", rss)
    Large.made = 0
    with pytest.raises(
        UserError, match=r"40 times Hopper-v5 would take 2\.4 GiB, and 1\.0 are free"
    ):
        make_vector_env(environment, 40)
    assert Large.made == 2
    taken[:] = [0, 0, 0, 64, 128, 192]
    Large.made = 0
    with pytest.raises(
        UserError, match=r"40 times Hopper-v5 would take 1\.2 GiB, and 1\.0 are free"
    ):
        make_vector_env(environment, 40)
    assert Large.made == 3
    Large.made = 0
    assert make_vector_env(environment, 3).num_envs == 3


class Large(gym.Env):
    """One that is counted."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (11,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (3,), np.float32)

    made = 0

    def __init__(self, spec, render_mode=None):
        Large.made += 1


# --- HDF5, pictures, weights ---------------------------------------------------------------------


def attribute_of_many(file):
    file["a"].attrs.create("x", np.array(["b"] * 9, object), dtype=h5py.string_dtype())


def attribute_that_is_large(file):
    file["a"].attrs["x"] = np.zeros(7900)
    file["a"].attrs["y"] = np.zeros(1)
    file.create_group("g", track_order=True).attrs.create("x", np.zeros(8193))


def compound_rows(file):
    kind = np.dtype([("x", h5py.vlen_dtype(np.uint8)), ("y", np.int8)])
    file.create_dataset("b", (3,), kind)


def rows_of_objects(file):
    file.create_dataset("b", (3,), h5py.vlen_dtype(np.dtype([("x", "i4")])))


def rows_never_written(file):
    file.create_dataset("b", (10**7,), h5py.string_dtype(), chunks=(10**5,))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (attribute_of_many, "an attribute x that is too large, or of no plain kind"),
        (attribute_that_is_large, "an attribute x that is too large, or of no plain kind"),
        (compound_rows, "which is not read"),
        (rows_of_objects, "which are not read"),
        (rows_never_written, "10,000,000 rows, more than its size allows"),
    ],
)
def test_hdf5_that_would_take_the_memory_or_for_ever_is_refused(spoil, says, tmp_path):
    with h5py.File(tmp_path / "x.hdf5", "w", libver="latest") as file:
        file["a"] = np.zeros(3)
        spoil(file)
    with pytest.raises(UserError, match=says):
        check_hdf5(tmp_path / "x.hdf5")


def test_an_episodes_arrays_are_counted_together(tmp_path, monkeypatch):
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        for name in ("a/one", "a/two", "b/one"):
            file[name] = np.zeros(1000)
    asked = []
    monkeypatch.setattr("files.check_memory", lambda needed, what: asked.append(needed))
    check_hdf5(tmp_path / "x.hdf5")
    assert asked == [16_000]


def test_raw_pictures_are_of_the_spaces_size():
    with pytest.raises(UserError, match="pictures are of"):
        read_frames((210, 160, 3), np.zeros((2, 300, 200, 3), np.uint8))


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="no ordinary file"):
        read_json(tmp_path / "pipe")
    with pytest.raises(ValueError, match="no ordinary file"):
        load_tensors(tmp_path / "pipe")
    with pytest.raises(ValueError, match="no ordinary file"):
        check_hdf5(tmp_path / "pipe")
    with pytest.raises(UserError, match="no readable checkpoint"):
        read_checkpoint(tmp_path / "pipe")


def test_a_pipe_in_a_dataset_is_not_waited_for(sound, tmp_path):
    shutil.copytree(sound / "minari/fuzz/set-v0", tmp_path / "set")
    (tmp_path / "set/data/main_data.hdf5").unlink()
    os.mkfifo(tmp_path / "set/data/main_data.hdf5")
    with pytest.raises(UserError, match="no ordinary file"):
        read_dataset(tmp_path / "set")


def test_weights_of_too_long_a_name_are_not_looked_for():
    with pytest.raises(UserError, match=r"cannot look for the weights x{60}: File name too long"):
        find_weights("x" * 5000)


def test_layers_that_only_have_a_name_are_not_made(sound, tmp_path):
    tensors = load_file(sound / "tiny.safetensors")
    tensors |= {f"h.{i}.x": torch.zeros(0) for i in range(1, 20_000)}
    save_file(tensors, tmp_path / "x.safetensors")
    shutil.copy(sound / "tiny.safetensors", tmp_path / "y.safetensors")
    config = json.dumps({"n_head": 1, "n_positions": 32, "vocab_size": 257})
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(
        UserError, match=r"h\.1\.attn.c_attn.weight is missing, or not of 432 numbers"
    ):
        load_gpt2(str(tmp_path / "x.safetensors"))


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"obs_mean": torch.zeros(11, dtype=torch.float64)}, "obs_mean is not of"),
        ({"obs_std": torch.zeros(11)}, "obs_std is not of"),
        ({"model": {1: torch.zeros(2)}}, "lacks 1 as it should be"),
        ({"settings": {"targets": [1e300]}}, "the setting targets"),
        ({"environment": {"random": 1.0, "expert": 1.0}}, "nearly the same"),
        ({"environment": {"random": 1.0, "expert": float("nan")}}, "nearly the same"),
    ],
)
def test_what_a_policy_could_not_act_with_is_refused(part, says, sound, tmp_path):
    content = load_tensors(sound / "run" / "ckpt.pt")
    for name, value in part.items():
        content[name] = content[name] | value if isinstance(value, dict) else value
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=says):
        read_checkpoint(tmp_path / "ckpt.pt")


# --- runs' folders -------------------------------------------------------------------------------


def told(path, **parts):
    """Change a config.json: parts of "settings", or whole parts by name."""
    config = json.loads(path.read_text())
    config["settings"] |= parts.pop("settings", {})
    path.write_text(json.dumps(config | parts))


@pytest.fixture
def finished(tmp_path):
    """A finished run's folder, of the study's."""
    shutil.copytree(ROOT / "results/bundled/hopper-dt-0.01-s0", tmp_path / "runs" / "one")
    return tmp_path / "runs" / "one"


@pytest.mark.parametrize(
    "parts",
    [
        {"settings": {"ratio": "x"}},
        {"settings": {"ratio": -1e299}},
        {"settings": {"method": "x" * 20_000}},
        {"settings": {"env": ["x"]}},
        {"settings": {"seed": [1]}},
        {"settings": {"mode": []}},
        {"settings": {"steps": 10**12, "eval_every": 1}},
        {"settings": {"eval_every": 0}},
        {"data": {"score": "x"}},
        {"base": {"lm": 5, "sha256": "x"}},
        {"chosen": {"dataset": 3, "environment": "x"}},
    ],
    ids=lambda parts: str(parts)[:60],
)
def test_a_report_leaves_out_what_is_no_run(parts, finished, monkeypatch, capsys):
    told(finished / "config.json", **parts)
    monkeypatch.setattr(sys, "argv", ["report", str(finished.parent), "--out", "none"])
    with pytest.raises(SystemExit) as ended:
        run_command(report.main)
    assert ended.value.code == 2
    assert "config.json is not of this project, or damaged" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line", ['{"step": Infinity}', "[" * 10**5, f'{{"step": 1{"0" * 400}}}', '{"step": [1]}']
)
def test_a_report_goes_on_behind_a_line_that_is_none(line, finished, tmp_path, monkeypatch, capsys):
    with open(finished / "log.jsonl", "a") as log:
        log.write(line + "\n")
    words = ["report", str(finished.parent), "--no-figures", "--out", str(tmp_path / "report")]
    monkeypatch.setattr(sys, "argv", words)
    report.main()
    out = capsys.readouterr().out
    assert "cannot be read" in out
    assert "1 run in 1 cell" in out


def test_a_report_leaves_out_scores_that_cannot_be(finished, monkeypatch, capsys):
    log = (finished / "log.jsonl").read_text()
    (finished / "log.jsonl").write_text(re.sub(r'"score": [\d.]+', '"score": 1e299', log))
    monkeypatch.setattr(sys, "argv", ["report", str(finished.parent), "--out", "none"])
    with pytest.raises(UserError, match="no finished run"):
        report.main()
    assert "its log or result is damaged" in capsys.readouterr().out


def test_a_log_without_an_end_is_left_out(finished, monkeypatch, capsys):
    with open(finished / "log.jsonl", "r+b") as log:
        log.truncate(1 << 40)  # of nothing: it takes no disk
    monkeypatch.setattr(sys, "argv", ["report", str(finished.parent), "--out", "none"])
    with pytest.raises(UserError, match="no finished run"):
        report.main()
    assert "its log.jsonl cannot be read: larger than" in capsys.readouterr().out


def test_a_report_shows_names_as_names(finished, tmp_path, monkeypatch, capsys):
    """Not as a formula of a spreadsheet, Markdown, a terminal's commands, or TeX."""
    name = "=HYPERLINK(1)|<script>$\\bad$\x1b[31m\0"
    told(finished / "config.json", settings={"env": name, "method": "-x\n"})
    monkeypatch.setattr(
        sys, "argv", ["report", str(finished.parent), "--out", str(tmp_path / "report")]
    )
    report.main()
    with open(tmp_path / "report" / "report.csv") as file:
        (row,) = csv.DictReader(file)
    assert row["task"] == "?HYPERLINK(1)??script???bad???31m?"
    assert row["method"] == "?x?"
    text = (tmp_path / "report" / "report.md").read_text()
    assert "<script>" not in text
    assert (capsys.readouterr().out + text).replace("\n", "").isprintable()


@pytest.mark.parametrize(
    ("file", "content", "steps"),
    [
        ("config.json", '{"settings": []}', 0),
        ("config.json", '{"settings": {"steps": "x"}}', 0),
        (
            "log.jsonl",
            '{"seconds": 1, "step": 0}\n[1, "seconds"]\n{"seconds": "x", "step": 1}',
            2000,
        ),
    ],
)
def test_a_sweep_reads_what_it_finds_with_care(file, content, steps, finished):
    run = dict(env="hopper", method="dt", ratio=0.01, seed=0, lm="auto")
    folder = finished.rename(finished.parent / name_of(run))
    assert progress_of(run, folder.parent)[:2] == (2000, 2000)
    (folder / file).write_text(content)
    assert progress_of(run, folder.parent) == (0, steps, 0.0)


def test_a_log_that_is_gone_is_missed(sound, tmp_path):
    """Else the run would end with a log that lacks its first steps."""
    shutil.copytree(sound / "run", tmp_path / "run")
    begun, saved = read_run(tmp_path / "run", {}, train.Config)
    (tmp_path / "run" / "log.jsonl").unlink()
    with pytest.raises(UserError, match=r"log.jsonl is shorter than it was"):
        go_on(tmp_path / "run", begun, saved)


class Data:
    def __init__(self, digest):
        self.digest = lambda: digest


def go_on(folder, begun, saved):
    data = Data(begun["data"]["sha256"])
    return continue_run(folder, begun, saved, data, begun["base"], begun["processes"])


def test_a_run_that_another_process_ended_meanwhile_is_left_alone(sound, tmp_path):
    """Between its reading and its holding: its log must not be cut."""
    shutil.copytree(sound / "run", tmp_path / "run")
    log = (tmp_path / "run" / "log.jsonl").read_bytes()
    begun, saved = read_run(tmp_path / "run", {}, train.Config)
    (tmp_path / "run" / "log.jsonl").write_bytes(log + b'{"step": 9}\n')
    os.utime(tmp_path / "run" / "resume.pt", ns=(1, 1))
    with pytest.raises(UserError, match="gone on with by another process meanwhile"):
        go_on(tmp_path / "run", begun, saved)
    let_go(tmp_path / "run")
    begun, saved = read_run(tmp_path / "run", {}, train.Config)
    (tmp_path / "run" / "result.json").write_text("{}")
    with pytest.raises(UserError, match="gone on with by another process meanwhile"):
        go_on(tmp_path / "run", begun, saved)
    let_go(tmp_path / "run")
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == log + b'{"step": 9}\n'


def test_a_runs_pipe_is_not_waited_for(sound, tmp_path):
    shutil.copytree(sound / "run", tmp_path / "run")
    (tmp_path / "run" / "log.jsonl").unlink()
    os.mkfifo(tmp_path / "run" / "log.jsonl")
    with pytest.raises(UserError, match=r"log.jsonl is no ordinary file"):
        read_run(tmp_path / "run", {}, train.Config)
    run = dict(env="hopper", method="dt", ratio=1.0, seed=0, lm="auto")
    (tmp_path / "run").rename(tmp_path / name_of(run))
    assert progress_of(run, tmp_path)[0] == 0


def test_a_sweep_leaves_a_run_alone_that_is_still_at_work(sound, tmp_path):
    run = dict(env="hopper", method="bc", ratio=1.0, seed=0, lm="auto")
    folder = tmp_path / name_of(run)
    shutil.copytree(sound / "baseline", folder)
    (folder / "result.json").unlink()
    with FileLock(folder / "run.lock"):  # as a run of another process has it
        assert carry_out(run, tmp_path, [], 1) == 2
    assert "another process is at work" in last_lines(run, tmp_path)[-1]
    assert (folder / "ckpt.pt").is_file()


def test_returns_that_are_nearly_alike_are_no_scale(sound):
    packed = load_tensors(sound / "run" / "ckpt.pt")["environment"]
    with pytest.raises(ValueError, match="nearly the same"):
        unpack(packed | {"random": 0.0, "expert": 5e-324})
    assert unpack(packed | {"random": 0.0, "expert": 1e-3}).expert == 1e-3
