"""experiments/report.py on run folders written here: its tables against ones computed by hand."""

import csv
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from experiments import report
from experiments.read_runs import make_cells, read_runs
from experiments.report import aggregate, iqm, read_paper
from plumbing import UserError

ROOT = Path(__file__).resolve().parent.parent
STEPS, EVERY = 10, 2  # so that the evaluations at steps 10 alone are in the last 20 %
NAN = float("nan")


def write_run(top, name, scores, method="lamo", seed=0, finished=True, **other):
    """A run's folder. scores: at each evaluation, the score of targets 3600 and 1800."""
    folder = top / name
    folder.mkdir(parents=True)
    steps = other.pop("steps", STEPS)
    place = {"env": "hopper", "ratio": 0.01, "mode": "normal"} | other.pop("place", {})
    config = {
        "settings": {
            **place,
            ("algo" if method in ("bc", "cql") else "method"): method,
            "seed": seed,
            "lm": "mini",
            "steps": steps,
            "eval_every": EVERY,
            "targets": [3600, 1800],
            "out": str(top),
            "name": name,
            **other,
        },
        "chosen": {"dataset": "lamo/hopper/medium-v0 in a folder", "environment": "Hopper-v5"},
        "base": {"lm": "mini", "sha256": "0" * 64},
        "data": {"score": 38.0},
    }
    (folder / "config.json").write_text(json.dumps(config))
    rows = []
    for i, pair in enumerate(scores):
        step = min((i + 1) * EVERY, steps)
        rows.append({"step": step, "action_loss": 0.1, "lm_loss": 2.0 - 0.1 * i, "seconds": 1.0})
        targets = zip((3600, 1800), pair, strict=True)
        results = [{"target": t, "score": s, "return_mean": s, "cut": 0} for t, s in targets]
        rows.append({"step": step, "evaluation": results})
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        (folder / "result.json").write_text(json.dumps({"score": max(scores[-1])}))
    return folder


def rising(last, other=0.0):
    """Five evaluations, of which the last alone counts: `last` for one target, `other` below."""
    return [(1.0, 1.0), (2.0, 2.0), (99.0, 3.0), (4.0, 4.0), (other, last)]


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    report.main()


def test_a_table_is_what_one_computes_by_hand(tmp_path, monkeypatch, capsys):
    for seed, score in enumerate((50.0, 60.0, 40.0)):
        write_run(tmp_path / "runs", f"lamo-{seed}", rising(score), seed=seed)
    for seed, score in enumerate((70.0, 30.0, 20.0)):
        write_run(tmp_path / "runs", f"bc-{seed}", rising(score), "bc", seed)
    out = tmp_path / "report"
    command(monkeypatch, tmp_path / "runs", "--out", out)
    assert "6 runs in 2 cells" in capsys.readouterr().out
    text = (out / "report.md").read_text()
    # sqrt(200 / 3) and sqrt(1400 / 3)
    line = "| hopper 1 % | lamo/hopper/medium-v0 | **50.0 ± 8.2**<br>*paper 52.0 ± 4.6* "
    assert line + "| 40.0 ± 21.6<br>*paper 50.0 ± 12.6* | 38.0 |" in text
    seeds = "| hopper 1 % | LaMo | 0, 1, 2 | 50.0, 60.0, 40.0 | 50.0 ± 8.2 | 99.0 | mini |"
    assert seeds in text
    assert "Missing or odd" not in text
    (lamo, bc) = csv.DictReader((out / "report.csv").open())
    assert (lamo["method"], lamo["mean"], lamo["n"]) == ("lamo", "50.0000", "3")
    assert float(bc["std"]) == pytest.approx(math.sqrt(1400 / 3), abs=1e-3)
    for name in ("curves-hopper-0.01", "language-hopper-0.01"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (out / f"{name}.svg").read_text()


def test_the_score_is_the_best_targets_mean_over_late_evaluations(tmp_path):
    # of 20 steps those at 18 and 20 are late: means 40 and 45, though 90 was seen once
    scores = [(0.0, 0.0)] * 7 + [(90.0, 0.0), (60.0, 30.0), (20.0, 60.0)]
    write_run(tmp_path, "one", scores, steps=20)
    (run,), remarks = read_runs([tmp_path])
    assert run.score == pytest.approx(45.0)
    assert run.best_single == 90.0
    assert [score for _, score in run.curve[-2:]] == [30.0, 60.0]  # of the target that scored
    assert remarks == [f"{tmp_path / 'one'}: result.json says 60.00, its log 45.00, which counts"]


def test_one_seed_and_missing_seeds_are_said(tmp_path):
    for seed in (0, 1, 2):
        write_run(tmp_path, f"dt-{seed}", rising(10.0 * seed), "dt", seed)
    for seed in (0, 2):
        write_run(tmp_path, f"lamo-{seed}", rising(50.0), "lamo", seed)
    write_run(tmp_path, "bc-1", rising(30.0), "bc", seed=1)
    runs, remarks = read_runs([tmp_path])
    cells = make_cells(runs, remarks)
    where = "hopper 1 % (lamo/hopper/medium-v0)"
    assert sorted(remarks) == [
        f"{where}, bc: no seed 0, 2, so its mean is over 1",
        f"{where}, lamo: no seed 1, so its mean is over 2",
    ]
    text = "\n".join(report.table(cells, ["lamo", "dt", "bc"], {}))
    assert "| **50.0 ± 0.0 (2 seeds)** | 10.0 ± 8.2 | 30.0 (1 seed) |" in text


def test_runs_of_other_settings_have_a_column_of_their_own(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path, f"a-{seed}", rising(50.0), seed=seed)
        write_run(tmp_path, f"dt-{seed}", rising(20.0), "dt", seed)
        short = [(70.0, 0.0)] * 2
        write_run(tmp_path, f"b-{seed}", short, seed=seed, steps=4)
        early = "assets/mini-lm-early.safetensors"
        write_run(tmp_path, f"c-{seed}", rising(40.0), seed=seed, lm=early)
    cells = make_cells(*read_runs([tmp_path]))
    means = {name: cell.scores.mean() for (_, name), cell in cells.items()}
    assert means == {"lamo": 50, "dt": 20, "lamo, steps 4": 70, "lamo, mini-lm-early": 40}


def test_language_models_of_one_file_name_are_not_averaged(tmp_path):
    for i, (place, weights) in enumerate(
        (("a/x", "1"), ("b/x", "2"), ("mini", "0"), ("mini", "0"))
    ):
        folder = write_run(tmp_path, str(i), rising(10.0 * i), seed=i, lm=place, pretrained=True)
        config = json.loads((folder / "config.json").read_text())
        config["base"]["sha256"] = weights * 64
        (folder / "config.json").write_text(json.dumps(config))
    cells = make_cells(*read_runs([tmp_path]))
    names = {name: cell.scores.tolist() for (_, name), cell in cells.items()}
    assert names == {
        "lamo": [20.0, 30.0],
        "lamo, x, weights 11111111": [0.0],
        "lamo, x, weights 22222222": [10.0],
    }


def test_a_ratio_is_a_row_and_so_is_a_dataset(tmp_path, monkeypatch):
    for ratio, score in ((0.01, 50.0), (0.1, 60.0)):
        place = {"ratio": ratio}
        write_run(tmp_path / "runs", f"{ratio}", rising(score), place=place)
    other = write_run(tmp_path / "runs", "other", rising(70.0))
    config = json.loads((other / "config.json").read_text())
    config["chosen"]["dataset"] = "the bundled lamo/hopper/medium-1pct-v0, since x is not there"
    (other / "config.json").write_text(json.dumps(config))
    command(monkeypatch, tmp_path / "runs", "--out", tmp_path)
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert sum(line.startswith("| hopper 1 % | lamo/hopper/medium-v0 |") for line in lines) == 1
    bundled = "| hopper 1 % | lamo/hopper/medium-1pct-v0 |"
    assert sum(line.startswith(bundled) for line in lines) == 1
    assert (tmp_path / "ratios.png").exists()
    assert (tmp_path / "curves-hopper-0.01-2.png").exists()


def test_what_cannot_be_counted_is_one_line_each_and_the_rest_is_reported(
    tmp_path, monkeypatch, capsys
):
    runs = tmp_path / "runs"
    write_run(runs, "good-0", rising(50.0))
    write_run(runs, "good-0-again", rising(55.0))
    write_run(runs, "good-1", rising(60.0), seed=1)
    diverged = rising(60.0)
    diverged[2] = (NAN, 3.0)
    write_run(runs, "not-a-number", diverged, seed=2)
    write_run(runs, "going", rising(1.0)[:2], "dt", finished=False)
    cut = write_run(runs, "cut", rising(1.0), "wiki-rl") / "log.jsonl"
    cut.write_text(cut.read_text()[:-40])
    twice = write_run(runs, "twice", rising(1.0), "wiki-rl", seed=1) / "log.jsonl"
    twice.write_text(twice.read_text() + twice.read_text().splitlines()[-1] + "\n")
    between = write_run(runs, "between", rising(1.0), "wiki-rl", seed=2) / "log.jsonl"
    rows = between.read_text().splitlines()
    rows.insert(4, rows[1].replace('"step": 2', '"step": 3'))
    between.write_text("\n".join(rows))
    write_run(runs, "no-log", rising(1.0), "cql")
    (runs / "no-log" / "log.jsonl").unlink()
    (runs / "foreign").mkdir()
    (runs / "foreign" / "config.json").write_text('{"model": "resnet"}')
    (runs / "list").mkdir()
    (runs / "list" / "config.json").write_text("[1, 2]")
    (runs / "pictures").mkdir()
    (runs / "logs").mkdir()  # sweep.py's own
    (runs / "notes.txt").write_text("no folder")
    empty = tmp_path / "empty"
    empty.mkdir()
    command(monkeypatch, runs, empty, "--out", tmp_path / "report", "--no-figures")
    printed = capsys.readouterr().out.splitlines()
    odd = "evaluations that are there twice, out of order or where none is due"
    assert printed[:-1] == [
        f"{runs / 'between'}: left out, for its log has {odd}",
        f"{runs / 'cut'}/log.jsonl: line 10 cannot be read",
        f"{runs / 'cut'}: left out, for its log lacks the evaluation at step 10",
        f"{runs / 'foreign'}: config.json is not of this project, or damaged",
        f"{runs / 'going'}: left out, for it is not finished (its log is of 4 of 10 steps)",
        f"{runs / 'list'}: config.json is not of this project, or damaged",
        f"{runs / 'no-log'}: left out, for it has no log.jsonl",
        f"{runs / 'not-a-number'}: left out, for its score at step 6 is not a number",
        f"{runs / 'pictures'}: no run, for it has no config.json",
        f"{runs / 'twice'}: left out, for its log has {odd}",
        f"{empty}: no run in it",
        f"{runs / 'good-0-again'}: the same run as {runs / 'good-0'}, which is counted",
    ]
    text = (tmp_path / "report" / "report.md").read_text()
    assert "**55.0 ± 5.0**" in text
    assert all(f"- {line}" in text for line in printed[:-1])


def test_many_methods_of_few_evaluations_are_drawn(tmp_path, monkeypatch):
    """Panels in several lines, of which the lowest alone have numbers below, and single points."""
    for method in ("lamo", "dt", "wiki-rl", "bc", "lamo-full"):
        for seed in (0, 1):
            write_run(
                tmp_path / "runs", f"{method}{seed}", [(50.0, 40.0)], method, seed, steps=EVERY
            )
    command(monkeypatch, tmp_path / "runs", "--out", tmp_path)
    curves = Image.open(tmp_path / "curves-hopper-0.01.png")
    assert curves.width == 850
    assert curves.height > 600  # two lines of panels


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["nowhere"], "nowhere is not a folder"), (["empty"], "no finished run in empty")],
)
def test_nothing_to_report_is_one_line(arguments, says, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        command(monkeypatch, *arguments)
    assert says in str(error.value)
    assert not (tmp_path / "report").exists()


def slow_iqm(values):
    """The mean of the middle half, where a quarter at each end is a whole number of values."""
    ordered, quarter = sorted(values), len(values) // 4
    middle = ordered[quarter : len(ordered) - quarter]
    return sum(middle) / len(middle)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.floats(-100, 200), min_size=4, max_size=4), min_size=1, max_size=4))
def test_the_interquartile_mean_is_that_of_the_middle_half(tasks):
    mean, low, high = iqm([np.array(task) for task in tasks], resamples=50)
    assert mean == pytest.approx(slow_iqm([x for task in tasks for x in task]), abs=1e-6)
    values = [x for task in tasks for x in task]
    assert min(values) - 1e-6 <= low <= high <= max(values) + 1e-6


def test_the_interval_is_a_stratified_bootstraps():
    draw = np.random.default_rng(0)
    tasks = [draw.normal(20, 5, 6), draw.normal(60, 15, 6)]
    mean, low, high = iqm(tasks)
    drawn = []
    for _ in range(4000):  # each task's seeds are drawn from that task alone
        sample = np.concatenate([draw.choice(task, len(task)) for task in tasks])
        drawn.append(slow_iqm(sample))
    expected = np.quantile(drawn, [0.025, 0.975])
    assert (low, high) == pytest.approx(tuple(expected), abs=1.0)
    assert low < mean < high
    mixed = np.quantile(
        [slow_iqm(draw.choice(np.concatenate(tasks), 12)) for _ in range(4000)], [0.025, 0.975]
    )
    assert mixed[1] - mixed[0] > 1.5 * (high - low)  # what drawing across tasks would give


def test_one_seed_has_no_interval():
    assert iqm([np.array([1.0]), np.array([3.0])]) == (2.0, None, None)


def test_aggregates_are_over_rows_that_all_their_methods_have(tmp_path):
    for env in ("hopper", "walker2d", "ant"):
        for method in ("lamo", "dt", "bc") if env != "ant" else ("lamo", "dt"):
            for seed in (0, 1):
                name, place = f"{env}-{method}-{seed}", {"env": env}
                write_run(tmp_path, name, rising(10.0 * seed), method, seed, place=place)
    plain = write_run(tmp_path, "cartpole", rising(500.0), place={"env": "cartpole"})
    config = json.loads((plain / "config.json").read_text())
    config["chosen"]["environment"] += "; no reference returns, so scores are plain returns"
    (plain / "config.json").write_text(json.dumps(config))
    three, two = aggregate(make_cells(*read_runs([tmp_path])))
    assert [row[0] for row in three[0]] == ["ant", "hopper", "walker2d"]
    assert list(three[1]) == ["lamo", "dt"]
    assert [row[0] for row in two[0]] == ["hopper", "walker2d"]
    assert list(two[1]) == ["lamo", "dt", "bc"]
    assert two[1]["bc"][0] == pytest.approx(5.0)


def test_the_readmes_tables_are_of_the_records(tmp_path, monkeypatch):
    """results/ holds the runs, results/report what they come to; the README shows parts of that."""
    monkeypatch.chdir(ROOT)
    folders = sorted(path for path in Path("results").iterdir() if path.name != "report")
    command(monkeypatch, *folders, "--no-figures", "--out", tmp_path)
    made = (tmp_path / "report.md").read_text()
    kept = (ROOT / "results" / "report" / "report.md").read_text()
    for name in ("report.csv", "report.md"):
        tables = [
            [line for line in path.read_text().splitlines() if name.endswith("csv") or "|" in line]
            for path in (tmp_path / name, ROOT / "results" / "report" / name)
        ]
        assert tables[0] == tables[1]
    readme = (ROOT / "README.md").read_text().split("\n## ")
    (results,) = [part for part in readme if part.startswith("Results\n")]
    shown = [line for line in results.splitlines() if line.startswith("| ") and "±" in line]
    assert len(shown) >= 8
    assert not [line for line in shown if line not in made.splitlines()]
    pictures = set(re.findall(r"\((results/report/[^)]*\.png)\)", results))
    assert pictures
    assert all((ROOT / picture).is_file() for picture in pictures)
    command_given = f"python -m experiments.report {' '.join(map(str, folders))}"
    assert command_given in results
    assert command_given in kept


def test_the_papers_figures_are_those_of_the_paper(shared):
    names = {"lamo-no-pretraining": "lamo-random"}
    ours, seen = read_paper(), 0
    with open(shared("paper/results.csv")) as file:
        for row in csv.DictReader(file):
            if row["table"] not in ("1", "2", "3", "11", "15", "16"):
                continue
            task = f"{row['task']}-{row['dataset']}" if row["task"] == "kitchen" else row["task"]
            method = names.get(row["method"], row["method"])
            known = ours[task, float(row["ratio"])][method]
            assert known == f"{row['mean']} ± {row['std']}"
            seen += 1
    assert seen > 200
