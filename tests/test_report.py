"""experiments/report.py on run folders written here: its tables against ones computed by hand."""

import csv
import json
import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from runs import ROOT, call

from experiments import report
from experiments.read_runs import make_cells, read_runs
from experiments.report import aggregate, iqm
from utils import UserError

STEPS, EVERY = 10, 2  # so that the evaluations at steps 10 alone are in the last 20 %


def write_run(top, name, scores, method="lamo", seed=0, sha256="0" * 64, notes=None, **other):
    """A run's folder, as train.py or baselines.py leaves it. scores: at each evaluation, the score
    of targets 3600 and 1800; other: settings."""
    folder, which = top / name, "algo" if method in ("bc", "cql") else "method"
    folder.mkdir(parents=True)
    chosen = {"env": "hopper", "ratio": 0.01, "mode": "normal", which: method, "seed": seed}
    chosen |= {"lm": "mini", "steps": STEPS, "eval_every": EVERY, "name": name} | other
    said = {"dataset": "/x/datasets/lamo/hopper/medium-v0, as asked", "environment": "Hopper-v5"}
    config = {"settings": chosen, "notes": said | (notes or {})}
    config |= {"base": {"lm": "mini", "sha256": sha256}, "data": {"score": 38.0}}
    (folder / "config.json").write_text(json.dumps(config))
    rows = []
    for i, pair in enumerate(scores, 1):
        step = i * EVERY
        results = [{"target": t, "score": s} for t, s in zip((3600, 1800), pair, strict=True)]
        results = [r | {"return_mean": 0.0, "cut": 0} for r in results]
        rows += [{"step": step, "lm_loss": 1 / step}, {"step": step, "evaluation": results}]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "result.json").write_text(json.dumps({"score": max(scores[-1])}))
    return folder


def rising(last):
    """Five evaluations, of which the last alone counts, by its second target."""
    return [(1.0, 1.0), (2.0, 2.0), (99.0, 3.0), (4.0, 4.0), (0.0, last)]


def test_a_table_is_what_one_computes_by_hand(tmp_path):
    for seed, scores in enumerate(((50.0, 70.0), (60.0, 30.0), (40.0, 20.0))):
        write_run(tmp_path / "runs", f"lamo-{seed}", rising(scores[0]), seed=seed)
        write_run(tmp_path / "runs", f"bc-{seed}", rising(scores[1]), "bc", seed)
    call(report.main, tmp_path / "runs", "--out", out := tmp_path / "report")
    text = (out / "report.md").read_text()
    # sqrt(200 / 3) and sqrt(1400 / 3)
    line = "| hopper 1 % | lamo/hopper/medium-v0 | **50.0 ± 8.2**<br>*paper 52.0 ± 4.6* "
    assert line + "| 40.0 ± 21.6<br>*paper 50.0 ± 12.6* | 38.0 |" in text
    assert "| LaMo | 0, 1, 2 | 50.0, 60.0, 40.0 | 50.0 ± 8.2 | 99.0 | mini |" in text
    lamo, bc = csv.DictReader((out / "report.csv").open())
    assert (lamo["method"], lamo["mean"], lamo["n"]) == ("lamo", "50.0000", "3")
    assert float(bc["std"]) == pytest.approx(math.sqrt(1400 / 3), abs=1e-3)
    for name in ("curves-hopper-0.01", "language-hopper-0.01"):
        assert Image.open(out / f"{name}.png").width == 850
        assert "<svg" in (out / f"{name}.svg").read_text()


def test_one_seed_and_missing_seeds_are_said(tmp_path):
    for method, seeds in (("dt", (0, 1, 2)), ("lamo", (0, 2)), ("bc", (1,))):
        for seed in seeds:
            write_run(tmp_path, f"{method}-{seed}", rising(10.0 * seed), method, seed)
    runs, remarks = read_runs([tmp_path])
    text = "\n".join(report.table(make_cells(runs, remarks), ["lamo", "dt", "bc"], {}))
    assert len(remarks) == 2
    assert "| **10.0 ± 10.0 (2 seeds)** | **10.0 ± 8.2** | **10.0 (1 seed)** |" in text
    assert [score for _, score in runs[0].curve] == [1, 2, 3, 4, 10]  # of the target that scored


def test_runs_of_other_settings_have_a_column_of_their_own(tmp_path):
    early = {"lm": "assets/mini-lm-early.safetensors", "sha256": "3" * 64}
    columns = {  # in two seeds; no mean is over language models of one file name
        "lamo": {},
        "dt": {"method": "dt"},
        "lamo, steps 4": {"steps": 4},
        "lamo, mini-lm-early": early,
        "lamo, x, weights 11111111": {"lm": "a/x.safetensors", "sha256": "1" * 64},
        "lamo, x, weights 22222222": {"lm": "b/x.safetensors", "sha256": "2" * 64},
    }
    for i, other in enumerate(columns.values()):
        for seed in (0, 1):
            scores = [(10.0 * i, 0.0)] * (other.get("steps", STEPS) // EVERY)
            write_run(tmp_path, f"{i}-{seed}", scores, seed=seed, pretrained=True, **other)
    cells = make_cells(*read_runs([tmp_path]))
    scores = {name: cell.scores.tolist() for (_, name), cell in cells.items()}
    assert scores == {name: [10.0 * i] * 2 for i, name in enumerate(columns)}


def test_a_ratio_is_a_row_and_so_is_a_dataset_and_both_are_drawn(tmp_path):
    for ratio in (0.01, 0.1):
        for method in ("lamo", "dt", "wiki-rl", "bc", "lamo-full"):
            name = f"{method}-{ratio}"
            write_run(tmp_path / "runs", name, [(50, 40)], method, ratio=ratio, steps=EVERY)
    notes = {"dataset": "/y/assets/minari/lamo/hopper/medium-1pct-v0, since x is not there"}
    write_run(tmp_path / "runs", "other", rising(70.0), notes=notes)
    call(report.main, tmp_path / "runs", "--out", tmp_path)
    rows = {(r["ratio"], r["dataset"]) for r in csv.DictReader((tmp_path / "report.csv").open())}
    ids = (("0.01", "medium-v0"), ("0.1", "medium-v0"), ("0.01", "medium-1pct-v0"))
    assert rows == {(ratio, f"lamo/hopper/{name}") for ratio, name in ids}
    assert (tmp_path / "ratios.png").exists()
    assert Image.open(tmp_path / "curves-hopper-0.01-2.png").height > 600  # two lines of panels


def test_what_cannot_be_counted_is_one_line_each_and_the_rest_is_reported(tmp_path, capsys):
    runs = tmp_path / "runs"
    write_run(runs, "good-0", rising(50.0))
    write_run(runs, "good-0-again", rising(55.0))
    write_run(runs, "good-1", rising(60.0), seed=1)
    (write_run(runs, "going", rising(1.0), "dt") / "result.json").unlink()
    (write_run(runs, "no-log", rising(1.0), "cql") / "log.jsonl").unlink()
    cut = write_run(runs, "cut", rising(1.0), "wiki-rl") / "log.jsonl"
    cut.write_text(cut.read_text()[:-40])
    write_run(runs, "other-steps", rising(1.0)[:3], "wiki-rl", seed=1)
    (write_run(runs, "foreign", rising(1.0)) / "config.json").write_text('{"model": "resnet"}')
    call(report.main, runs, runs, "--out", tmp_path / "report", "--no-figures")
    *odd, _ = capsys.readouterr().out.splitlines()
    names = ("cut", "foreign", "going", "no-log", "other-steps", "good-0-again")
    for name, line in zip(names, odd, strict=True):
        assert line.startswith(str(runs / name))
    text = (tmp_path / "report" / "report.md").read_text()
    assert "**55.0 ± 5.0**" in text
    assert all(f"- {line}" in text for line in odd)


def test_nothing_to_report_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in ("nowhere", "empty"):
        with pytest.raises(UserError, match=folder):
            call(report.main, tmp_path / folder, "--out", tmp_path / "report")


def slow_iqm(values):
    """The mean of the middle half, where a quarter of the values is a whole number of them."""
    return np.mean(sorted(values)[len(values) // 4 : -len(values) // 4])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.floats(-100, 200), min_size=4, max_size=4), min_size=1, max_size=4))
def test_the_interquartile_mean_is_that_of_the_middle_half(tasks):
    mean, low, high = iqm([np.array(task) for task in tasks], resamples=50)
    values = [x for task in tasks for x in task]
    assert mean == pytest.approx(slow_iqm(values), abs=1e-6)
    assert min(values) - 1e-6 <= low <= high <= max(values) + 1e-6


def test_the_interval_is_a_stratified_bootstraps():
    draw = np.random.default_rng(0)
    tasks = [draw.normal(20, 5, 6), draw.normal(60, 15, 6)]
    # each task's seeds are drawn from that task alone: else the interval were 1.5 times as wide
    drawn = [slow_iqm(np.concatenate([draw.choice(t, 6) for t in tasks])) for _ in range(4000)]
    assert iqm(tasks)[1:] == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=1.0)
    assert iqm([np.array([1.0]), np.array([3.0])]) == (2.0, None, None)  # one seed: no spread


def test_aggregates_are_over_rows_that_all_their_methods_have(tmp_path):
    for env, method, seed in product(("hopper", "walker2d", "ant"), ("lamo", "dt", "bc"), (0, 1)):
        if (env, method) != ("ant", "bc"):
            name = f"{env}-{method}-{seed}"
            write_run(tmp_path, name, rising(10.0 * seed), method, seed, env=env)
    plain = {"environment": "X-v0; no reference returns, so scores are plain returns"}
    write_run(tmp_path, "cartpole", rising(500.0), env="cartpole", notes=plain)
    three, two = aggregate(make_cells(*read_runs([tmp_path])))
    assert [row[0] for row in three[0]] == ["ant", "hopper", "walker2d"]
    assert list(three[1]) == ["lamo", "dt"]
    assert [row[0] for row in two[0]] == ["hopper", "walker2d"]
    assert {name: value[0] for name, value in two[1].items()} == {"lamo": 5, "dt": 5, "bc": 5}


def test_the_committed_report_and_the_readmes_tables_are_of_the_records(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    folders = [Path("results/bundled"), Path("results/ratios")]
    call(report.main, *folders, "--no-figures", "--out", tmp_path)
    kept = ROOT / "results" / "report"
    assert (tmp_path / "report.csv").read_bytes() == (kept / "report.csv").read_bytes()
    made = (tmp_path / "report.md").read_text().splitlines()
    tables = [line for line in (kept / "report.md").read_text().splitlines() if "|" in line]
    assert [line for line in made if "|" in line] == tables
    text = (ROOT / "README.md").read_text().splitlines()
    assert {line for line in text if "<br>*paper" in line} <= set(tables)


def test_the_papers_figures_are_those_of_the_paper(shared):
    with open(shared("paper/results.csv")) as f:
        rows = [r for r in csv.DictReader(f) if r["table"] in ("1", "2", "3", "11", "15", "16")]
    assert len(rows) > 200
    for row in rows:
        task = f"{row['task']}-{row['dataset']}" if row["task"] == "kitchen" else row["task"]
        ours = report.read_paper()[task, float(row["ratio"])]
        method = row["method"].replace("lamo-no-pretraining", "lamo-random")
        assert ours[method] == f"{row['mean']} ± {row['std']}"
