"""experiments/sweep.py with real, short runs: skip, resume, failure, submitit's local executor."""

import json
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from runs import wait_for_rows

from experiments import sweep
from experiments.one_run import ALGORITHMS, ROOT, name_of, progress_of, state_of
from experiments.sweep import STUDIES, grid
from plumbing import UserError

SHORT = "--steps 6 --eval-every 3 --log-every 2 --episodes 1 --episode-limit 5 --batch 8"
HOPPER = ["--env", "hopper", "--ratio", "0.01", "--seed", "0"]


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["sweep", *map(str, arguments)])
    sweep.main()


def test_a_grid_is_every_combination_with_seeds_outermost():
    runs = grid(["a", "b"], ("lamo", "dt"), (0.1,), seed=(0, 1))
    assert len(runs) == 8
    assert [run["seed"] for run in runs] == [0] * 4 + [1] * 4
    assert len({name_of(run) for run in runs}) == 8
    assert name_of(runs[0]) == "a-lamo-0.1-s0"
    other = grid(["a"], ("lamo",), seed=(2,), lm=("assets/mini-lm-early.safetensors",))
    assert name_of(other[0]) == "a-lamo-1-mini-lm-early-s2"


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_is_made_of_runs_that_exist(study, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sweep", study])
    names = [name_of(run) for run in STUDIES[study]]
    assert len(set(names)) == len(names)
    methods = {run["method"] for run in STUDIES[study]}
    assert methods <= {*sweep.settings.METHODS, *ALGORITHMS}
    assert {run["seed"] for run in STUDIES[study]} == {0, 1, 2}


def test_finished_runs_are_skipped_interrupted_ones_resumed_failed_ones_told(
    tmp_path, monkeypatch, capsys
):
    flags = ["--flags", SHORT, "--out", tmp_path, "--threads", 1, *HOPPER]
    command(monkeypatch, *flags, "--method", "dt")
    first = tmp_path / "hopper-dt-0.01-s0"
    assert state_of(first) == "finished"
    assert progress_of(grid(["hopper"], ("dt",), (0.01,), (0,))[0], tmp_path)[:2] == (6, 6)
    other = ["--flags", SHORT.replace("--steps 6", "--steps 8"), *flags[2:], "--method", "dt"]
    with pytest.raises(
        UserError, match="was begun with steps 6, not --steps 8; give another --out"
    ):
        command(monkeypatch, *other)
    for words, was in (
        ("--steps=8", "steps 6, not --steps 8"),
        ("--targets 5 6", "targets 3600 1800, not --targets 5 6"),
        ("--targets 3600", "targets 3600 1800, not --targets 3600"),
        ("--deterministic", "deterministic False, not --deterministic"),
        ("--targets=-1e3", "targets 3600 1800, not --targets -1e3"),
        ("--dtype fp64", "dtype "),
    ):
        with pytest.raises(UserError, match=f"was begun with {was}"):
            command(monkeypatch, "--flags", words, *flags[2:], "--method", "dt")
    same = SHORT.replace("--steps 6", "--steps=6.0")
    same += " --targets 3600 1800 --no-deterministic --corpus auto --skip-bad-steps"
    command(monkeypatch, "--flags", same, *flags[2:], "--method", "dt")
    assert "1 run finished already" in capsys.readouterr().out
    began = (first / "config.json").stat().st_mtime_ns
    # an interrupted run: what a killed one leaves, its config and nothing it can go on from
    cut = tmp_path / "hopper-lamo-freeze-0.01-s0"
    command(monkeypatch, *flags, "--method", "lamo-freeze")
    expected = json.loads((cut / "result.json").read_text())
    (cut / "result.json").unlink()
    assert state_of(cut) == "interrupted"
    capsys.readouterr()
    # baselines learn no text, so the flag below is one that bc does not have
    bad = ["--method", "dt,lamo-freeze,bc", "--flags", SHORT + " --lm-length 256"]
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, "--out", tmp_path, "--threads", 1, *HOPPER, *bad)
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    assert "1 run finished already" in printed
    assert "failed: hopper-bc-0.01-s0" in printed
    assert "unrecognized arguments: --lm-length" in printed  # its output's last lines
    assert "1 of 2 runs finished" in printed
    assert (first / "config.json").stat().st_mtime_ns == began
    again = json.loads((cut / "result.json").read_text())
    assert again["score"] == expected["score"]
    assert "going on with" in (tmp_path / "logs" / "hopper-lamo-freeze-0.01-s0.txt").read_text()


def test_a_stopped_sweep_lets_its_runs_save_and_goes_on(tmp_path, monkeypatch, capsys):
    flags = ["--out", tmp_path, "--threads", 1, *HOPPER, "--method", "dt,bc", "--workers", 2]
    flags += ["--flags", SHORT.replace("--steps 6 --eval-every 3", "--steps 1500")]
    words = [sys.executable, "-m", "experiments.sweep", *map(str, flags)]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    log = tmp_path / "hopper-dt-0.01-s0" / "log.jsonl"
    wait_for_rows(log, process)
    process.terminate()
    out, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert b"stopped; the same command goes on" in out
    said = (tmp_path / "logs" / "hopper-dt-0.01-s0.txt").read_text()
    assert "stopped after step" in said
    saved = torch.load(log.parent / "resume.pt", weights_only=True)["step"]
    assert 0 < saved < 1500
    command(monkeypatch, *flags)
    said = (tmp_path / "logs" / "hopper-dt-0.01-s0.txt").read_text()
    assert f"after step {saved}" in said
    assert "2 of 2 runs finished" in capsys.readouterr().out


def test_a_second_signal_leaves_no_run_behind(tmp_path):
    flags = ["--out", tmp_path, "--threads", 1, *HOPPER, "--method", "dt"]
    flags += ["--flags", SHORT.replace("--steps 6 --eval-every 3", "--steps 1000000")]
    words = [sys.executable, "-m", "experiments.sweep", *map(str, flags)]
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL)
    log = tmp_path / "hopper-dt-0.01-s0" / "log.jsonl"
    wait_for_rows(log, process)
    runs = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    code = process.wait()
    _, alive = psutil.wait_procs(runs, timeout=30)
    for left in alive:  # not to stay behind ourselves
        left.kill()
    assert runs
    assert not alive
    assert code == 130
    assert torch.load(log.parent / "resume.pt", weights_only=True)["step"] > 0  # it has saved


def test_submitits_local_executor_does_the_same(tmp_path, monkeypatch, capsys):
    pytest.importorskip("submitit")
    flags = ["--flags", SHORT, "--out", tmp_path, "--threads", 1, *HOPPER]
    command(monkeypatch, *flags, "--method", "dt,bc", "--cluster", "local")
    assert "2 of 2 runs finished" in capsys.readouterr().out
    for name in ("hopper-dt-0.01-s0", "hopper-bc-0.01-s0"):
        assert state_of(tmp_path / name) == "finished"


def test_a_dry_run_lists_and_measures_and_runs_nothing(tmp_path, monkeypatch, capsys):
    flags = ["--flags", SHORT, "--out", tmp_path, "--threads", 1, *HOPPER, "--dry-run"]
    command(monkeypatch, *flags, "--method", "dt")
    printed = capsys.readouterr().out
    assert "new          hopper-dt-0.01-s0" in printed
    assert "6 steps" in printed
    (seconds,) = json.loads((tmp_path / "probes.json").read_text()).values()
    assert 0 < seconds < 10
    for damaged in ('{"a": "b"}', "[1]", "{"):
        (tmp_path / "probes.json").write_text(damaged)
        command(monkeypatch, *flags, "--method", "dt")
        assert "measuring 20 steps" in capsys.readouterr().out
    assert state_of(tmp_path / "hopper-dt-0.01-s0") == "new"


def test_a_dry_run_foretells_what_a_dataset_does_not_hold(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "none"))
    flags = ["--flags", SHORT, "--out", tmp_path, "--dry-run"]
    what = ["--env", "hopper", "--method", "dt", "--ratio", "0.01,0.5", "--seed", "0,1"]
    started = []
    really = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: started.append(a) or really(*a, **k))
    with pytest.raises(SystemExit):
        command(monkeypatch, *flags, *what)
    printed = capsys.readouterr().out
    assert "hopper-dt-0.5-s0 will fail: --ratio 0.5 asks for more" in printed
    assert printed.count("will fail: ") == 1
    assert printed.count("  fails") == 2
    assert "; 2 of them will fail" in printed
    assert len(started) == 2  # seeds are not measured apart


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "nothing to do: name a study"),
        (["tabel3"], "Did you mean table3?"),
        (["--env", "hoper"], "Did you mean hopper?"),
        (["--env", "hopper", "--method", "lammo"], "Did you mean lamo?"),
        (["--env", "hopper", "--ratio", "2"], "--ratio has 2"),
        (["table3", "--env", "reacher2d"], "no run of table3 is left"),
        (["--env", "hopper", "--workers", "0"], "--workers is 0"),
        (["--env", "hopper", "--cluster", "moon"], "unknown cluster 'moon'"),
        (["--env", "hopper", "--threads", "-1"], "--threads is -1"),
        (["--env", ","], "no run of that grid is left"),
        (
            ["--env", "hopper", "--lm", "a/x.safetensors,b/x"],
            "would both be called hopper-lamo-1-x-",
        ),
        (["--env", "hopper", "--ratio", "0.1234567,0.1234568"], "would both be called hopper-lamo"),
        (["--env", "hopper", "--flags", "--seed 3"], "--flags has --seed, which names the runs"),
        (["--env", "hopper", "--flags", "--algo=bc"], "give the sweep --method"),
        (["--env", "hopper", "--flags", "--corpus 'x"], "--flags --corpus 'x: No closing"),
        (["--env", "hopper", "--flags", "steps 3"], "--flags begins with steps"),
    ],
)
def test_mistakes_are_one_line(arguments, says, monkeypatch, tmp_path):
    with pytest.raises(UserError) as error:
        command(monkeypatch, *arguments, "--out", tmp_path)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_the_same_run_written_twice_is_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "estimate", lambda runs, *others: print(runs))
    flags = ["--env", "hopper,Hopper", "--method", "dt,dt", "--seed", "0", "--out", tmp_path]
    command(monkeypatch, *flags, "--dry-run")
    assert capsys.readouterr().out.count("'hopper'") == 1


def test_a_run_that_could_not_begin_is_no_success(tmp_path, monkeypatch, capsys):
    (tmp_path / "logs").write_text("no folder")
    flags = ["--flags", SHORT, "--out", tmp_path, "--threads", 1, *HOPPER]
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, *flags, "--method", "dt,bc")
    printed = capsys.readouterr()
    assert stop.value.code == 1
    assert "0 of 2 runs finished" in printed.out
    assert "failed: hopper-dt-0.01-s0" in printed.out
    assert "File exists" in printed.err + printed.out


def test_a_typed_number_of_threads_is_the_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    command(
        monkeypatch, "--flags", SHORT, "--out", tmp_path, "--threads", 1, *HOPPER, "--method", "dt"
    )
    config = json.loads((tmp_path / "hopper-dt-0.01-s0" / "config.json").read_text())
    assert config["machine"]["threads"] == 1


def test_flags_that_a_run_was_begun_with_are_asked_for_again(tmp_path, monkeypatch):
    """Else short trials would be taken for the runs themselves."""
    grid = ["--out", tmp_path, "--threads", 1, *HOPPER, "--method", "dt"]
    command(monkeypatch, "--flags", SHORT, *grid)
    with pytest.raises(UserError, match="was begun with --batch, which --flags lacks now"):
        command(monkeypatch, *grid)
    with pytest.raises(UserError, match="knows no --stepz"):
        command(monkeypatch, "--flags", f"{SHORT} --stepz 3", *grid)
    command(monkeypatch, "--flags", f"{SHORT} --skip-bad-steps", *grid)


def test_where_every_run_would_fail_none_is_begun(tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="every run would fail"):
        command(monkeypatch, *HOPPER, "--out", tmp_path, "--flags", "--stepz 3")
    assert "did you mean --steps" in capsys.readouterr().out
    assert not (tmp_path / "logs").exists()


def test_slurm_is_asked_for_before_anything_is_measured(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match="there is no srun here"):
        command(monkeypatch, *HOPPER, "--out", tmp_path, "--cluster", "slurm")


def test_two_sweeps_do_not_share_a_folder(tmp_path, monkeypatch):
    with sweep.held(tmp_path), pytest.raises(UserError, match="another sweep is at work"):
        command(monkeypatch, *HOPPER, "--method", "dt", "--out", tmp_path, "--dry-run")
