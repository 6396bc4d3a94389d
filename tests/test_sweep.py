"""experiments/sweep.py with real, short runs: skip, resume, failure."""

import json
import signal

import pytest
import torch
from runs import call, finish, start, wait_for

from experiments import sweep
from experiments.sweep import ALGORITHMS, STUDIES, grid, name_of, progress_of, state_of
from train import METHODS
from utils import UserError

SHORT = "--steps 6 --eval-every 3 --log-every 2 --episodes 1 --episode-limit 5 --batch 8"
LONG = "--log-every 2 --episodes 1 --episode-limit 5 --batch 8 --steps"
HOPPER = ["--env", "hopper", "--ratio", "0.01", "--seed", "0", "--threads", "1"]


def hopper(method):
    return grid(["hopper"], (method,), (0.01,), (0,))[0]


def test_a_grid_is_every_combination_with_seeds_outermost():
    runs = grid(["a", "b"], ("lamo", "dt"), (0.1,), seed=(0, 1))
    assert len(runs) == 8
    assert [run["seed"] for run in runs] == [0] * 4 + [1] * 4
    assert len({name_of(run) for run in runs}) == 8
    assert name_of(runs[0]) == "a-lamo-0.1-s0"
    other = grid(["a"], ("lamo",), seed=(2,), lm=("assets/mini-lm-early.safetensors",))
    assert name_of(other[0]) == "a-lamo-1-mini-lm-early-s2"
    assert name_of(grid(["a"], mode=("delayed",))[0]) == "a-lamo-1-delayed-s0"


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_is_made_of_runs_that_exist(study):
    names = [name_of(run) for run in STUDIES[study]]
    assert len(set(names)) == len(names)
    assert {run["method"] for run in STUDIES[study]} <= {*METHODS, *ALGORITHMS}
    assert {run["seed"] for run in STUDIES[study]} >= {0, 1, 2}


def test_a_language_model_is_of_methods_that_have_one():
    c = sweep.Config(env="hopper", ratio="1", seed="0", method="lamo,dt,bc", lm="mini,smollm2")
    names = [name_of(run).removeprefix("hopper-") for run in sweep.runs_of(c)]
    assert sorted(names) == ["bc-1-s0", "dt-1-s0", "lamo-1-mini-s0", "lamo-1-smollm2-s0"]
    with pytest.raises(UserError, match="--lm"):
        sweep.runs_of(sweep.Config(env="hopper", method="dt,bc", lm="mini"))


def test_a_step_is_timed_without_the_first_ones(tmp_path):
    (folder := tmp_path / name_of(hopper("dt"))).mkdir()
    (folder / "config.json").write_text('{"settings": {"steps": 100}}')
    rows = [(0, None), (10, 60.0), (15, None), (20, 61.0)]  # compiled by step 10
    rows = [{"step": step} | ({"seconds": x} if x else {}) for step, x in rows]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert progress_of(hopper("dt"), tmp_path) == (20, 100, 0.1)


def test_a_study_does_not_leave_out_in_silence_what_it_has_not(tmp_path):
    with pytest.raises(UserError, match="seed 3, 4"):
        call(sweep.main, "real", "--seed", "2,3,4", "--out", tmp_path, "--dry-run")


def test_a_stopped_sweep_goes_on_and_a_finished_one_is_left_alone(tmp_path):
    words = [*HOPPER, "--out", tmp_path, "--workers", 2, "--flags", f"{LONG} 300"]
    process = start("-m", "experiments.sweep", *words, "--method", "dt")
    folder, baseline = (tmp_path / name_of(hopper(method)) for method in ("dt", "bc"))
    wait_for(folder / "log.jsonl", process)
    process.terminate()
    finish(process, 128 + signal.SIGTERM)
    assert 0 < torch.load(folder / "ckpt.pt", weights_only=True)["step"] < 300
    assert state_of(hopper("dt"), tmp_path) == "interrupted"
    began = (folder / "config.json").stat().st_mtime_ns
    baseline.mkdir()  # a baseline cannot resume: what is there of it is removed
    (baseline / "ckpt.pt").touch()
    call(sweep.main, *words, "--method", "dt,bc")
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "seconds" in row] == [*range(2, 301, 2)]
    assert (folder / "config.json").stat().st_mtime_ns == began  # it was resumed
    assert {state_of(hopper(method), tmp_path) for method in ("dt", "bc")} == {"finished"}
    assert progress_of(hopper("dt"), tmp_path)[:2] == (300, 300)
    ended = [(f / "ckpt.pt").stat().st_mtime_ns for f in (folder, baseline)]
    call(sweep.main, *words, "--method", "dt,bc")
    assert [(f / "ckpt.pt").stat().st_mtime_ns for f in (folder, baseline)] == ended
    for other in ("", f"{words[-1]} --lr 1", "--deterministic"):  # not what these runs are of
        with pytest.raises(UserError, match="--out"):
            call(sweep.main, *words[:-1], other, "--method", "dt")


def test_a_failed_run_is_told_while_the_others_go_on(tmp_path, capsys):
    # baselines learn no text, so bc does not know this flag
    words = ["--method", "dt,bc", "--mode", "delayed", "--flags", f"{SHORT} --lm-length 32"]
    with pytest.raises(SystemExit) as ended:
        call(sweep.main, *HOPPER, "--out", tmp_path, *words)
    assert ended.value.code == 1
    out = capsys.readouterr().out.partition("failed: ")[2]
    dt, bc = (name_of(hopper(method) | {"mode": "delayed"}) for method in ("dt", "bc"))
    assert (tmp_path / dt / "result.json").exists()
    assert json.loads((tmp_path / dt / "config.json").read_text())["settings"]["mode"] == "delayed"
    assert bc in out
    assert "--lm-length" in out  # its output's last lines


def test_a_dry_run_measures_once_and_foretells_failure(tmp_path, capsys):
    words = [*HOPPER, "--seed", "0,1", "--out", tmp_path, "--method", "dt", "--dry-run"]
    for _ in range(2):
        call(sweep.main, *words, "--flags", SHORT)
        assert "hopper-dt-0.01-s1" in capsys.readouterr().out
        ((steps, seconds),) = json.loads((tmp_path / "probes.json").read_text()).values()
        assert steps == 6
        assert 0 < seconds < 10
    with pytest.raises(SystemExit) as ended:  # of the dataset there is 1 %
        call(sweep.main, *words, "--ratio", "0.01,0.5", "--flags", SHORT)
    assert ended.value.code == 1
    assert capsys.readouterr().out.count("measuring") == 1  # seeds are not measured apart
    with pytest.raises(UserError):  # where every run would fail, none is begun
        call(sweep.main, *words[:-1], "--flags", "--stepz 3")
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "--env"),
        (["tabel3"], "table3"),
        (["--env", "hoper"], "hopper"),
        (["--env", "hopper", "--method", "lammo"], "lamo"),
        (["--env", "hopper", "--seed", "x"], "--seed"),
        (["--env", "hopper", "--mode", "delay"], "delayed"),
        (["table3", "--env", "reacher2d"], "table3"),
        (["--env", "hopper", "--workers", "0"], "--workers"),
        (["--env", "hopper", "--lm", "a/x.safetensors,b/x"], "--lm"),
        (["--env", "hopper", "--flags", "--seed 3"], "--seed"),
        (["--env", "hopper", "--flags", "--corpus 'x"], "--flags"),
    ],
)
def test_mistakes_are_one_line(words, says, tmp_path):
    with pytest.raises(UserError, match=says) as error:
        call(sweep.main, *words, "--out", tmp_path)
    assert "\n" not in str(error.value)
