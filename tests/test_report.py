"""experiments/report.py on run folders written here: its tables against ones computed by hand."""

import csv
import json
import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from runs import ROOT, call

from experiments import report
from experiments.report import aggregate, iqm, make_cells, read_runs
from utils import UserError

STEPS, EVERY = 10, 2  # so that the evaluations at steps 10 alone are in the last 20 %


def write_run(top, name, scores, method="lamo", seed=0, sha256="0" * 64, note="Hopper-v5", **other):
    """A run's folder, as train.py or baselines.py leaves it. scores: at each evaluation, those of
    targets 3600 and 1800; note: on the environment; other: settings, data_score, data_dataset."""
    folder, data = top / name, {"score": 38.0, "dataset": "lamo/hopper/medium-v0"}
    data |= {key: other.pop(f"data_{key}") for key in data if f"data_{key}" in other}
    folder.mkdir(parents=True)
    chosen = {"env": "hopper", "ratio": 0.01, "mode": "normal", "method": method, "seed": seed}
    chosen |= {"lm": "mini", "steps": STEPS, "eval_every": EVERY, "name": name} | other
    config = {"settings": chosen, "notes": {"environment": note}}
    config |= {"base": {"lm": chosen["lm"], "sha256": sha256}}
    config |= {"data": data}
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
    lamo, bc = csv.DictReader((out / "report.csv").open())
    assert (lamo["method"], lamo["mean"], lamo["n"]) == ("LaMo", "50.0000", "3")
    assert (lamo["scores"], lamo["best_single"]) == ("50.0000 60.0000 40.0000", "99.0000")
    assert float(bc["std"]) == pytest.approx(math.sqrt(1400 / 3), abs=1e-3)
    for name in ("curves", "language"):
        assert Image.open(out / f"{name}-hopper-lamo-hopper-medium-v0-0.01.png").width == 544
    assert "seed by seed" not in text
    assert Image.open(out / "seeds.png").width == 544


def test_one_seed_and_missing_seeds_are_said(tmp_path):
    for method, seeds in (("dt", (0, 1, 2)), ("lamo", (0, 2)), ("bc", (1,))):
        for seed in seeds:
            write_run(tmp_path, f"{method}-{seed}", rising(10.0 * seed), method, seed)
    runs, remarks = read_runs([tmp_path])
    text = "\n".join(report.table(make_cells(runs, remarks), ["LaMo", "DT", "BC"], {}))
    assert len(remarks) == 2
    assert "| **10.0 ± 10.0 (2 seeds)** | **10.0 ± 8.2** | **10.0 (1 seed)** |" in text
    assert [score for _, score in runs[0].curve] == [1, 2, 3, 4, 10]  # of the target that scored


def test_runs_of_other_settings_have_a_column_of_their_own(tmp_path):
    early = {"lm": "assets/mini-lm-early.safetensors", "sha256": "3" * 64}
    columns = {  # in two seeds; no mean is over language models of one file name
        "LaMo": {},
        "DT": {"method": "dt"},
        "LaMo, steps 4": {"steps": 4},
        "LaMo, mini-lm-early": early,
        "LaMo, x, weights 11111111": {"lm": "a/x.safetensors", "sha256": "1" * 64},
        "LaMo, x, weights 22222222": {"lm": "b/x.safetensors", "sha256": "2" * 64},
    }
    for i, other in enumerate(columns.values()):
        for seed in (0, 1):
            scores = [(10.0 * i, 0.0)] * (other.get("steps", STEPS) // EVERY)
            other |= {"scale": 1.0, "newer": True} if seed else {"scale": 1}  # by newer code
            write_run(tmp_path, f"{i}-{seed}", scores, seed=seed, pretrained=True, **other)
    cells = make_cells(*read_runs([tmp_path]))
    (here,) = cells.values()
    scores = {name: [run.score for run in cell] for name, cell in here.items()}
    assert scores == {name: [10.0 * i] * 2 for i, name in enumerate(columns)}


def test_two_language_models_are_told_apart_and_shuffled_weights_are_pooled(tmp_path):
    """Every seed shuffles otherwise, so its weights have a hash of their own."""
    small = {"lm": "smollm2", "pretrained": True}
    for seed in range(5):
        write_run(tmp_path, f"a{seed}", rising(50.0 + seed), seed=seed, pretrained=True)
        write_run(tmp_path, f"b{seed}", rising(10.0 + seed), "lamo-nolm", seed, **small)
        sha256, shuffled = str(seed) * 64, {"shuffled": True, **small}
        write_run(tmp_path, f"c{seed}", rising(1.0), "lamo-shuffled", seed, sha256, **shuffled)
        if seed < 3:
            write_run(tmp_path, f"d{seed}", rising(3.0), seed=seed, **small)
        write_run(tmp_path, f"e{seed}", rising(4.0), "dt", seed, lm="dt", pretrained=False)
    (here,) = make_cells(*read_runs([tmp_path])).values()
    sizes = {"LaMo": 3, "DT": 5, "lamo-nolm": 5, "lamo-shuffled": 5, "LaMo, mini": 5}
    assert {name: len(cell) for name, cell in here.items()} == sizes


def test_a_ratio_is_a_row_and_so_is_a_dataset_and_both_are_drawn(tmp_path):
    for ratio in (0.01, 0.1):
        for method in ("lamo", "dt", "wiki-rl", "bc", "lamo-full"):
            name = f"{method}-{ratio}"
            write_run(tmp_path / "runs", name, [(50, 40)], method, ratio=ratio, steps=EVERY)
    write_run(tmp_path / "runs", "other", rising(70.0), data_dataset="lamo/hopper/medium-1pct-v0")
    call(report.main, tmp_path / "runs", "--out", tmp_path)
    rows = {(r["ratio"], r["dataset"]) for r in csv.DictReader((tmp_path / "report.csv").open())}
    ids = (("0.01", "medium-v0"), ("0.1", "medium-v0"), ("0.01", "medium-1pct-v0"))
    assert rows == {(ratio, f"lamo/hopper/{name}") for ratio, name in ids}
    assert (tmp_path / "ratios-hopper-lamo-hopper-medium-v0.png").exists()
    curves = Image.open(tmp_path / "curves-hopper-lamo-hopper-medium-v0-0.1.png")
    assert curves.height > 450  # two lines of panels


def test_what_cannot_be_counted_is_one_line_each_and_the_rest_is_reported(tmp_path, capsys):
    runs = tmp_path / "runs"
    write_run(runs, "good-0", rising(50.0))
    write_run(runs, "good-0-again", rising(55.0))
    write_run(runs, "good-1", rising(60.0), seed=1)
    (write_run(runs, "going", rising(1.0), "dt") / "result.json").unlink()
    (write_run(runs, "no-log", rising(1.0), "cql") / "log.jsonl").unlink()
    cut = write_run(runs, "cut", rising(1.0), "wiki-rl") / "log.jsonl"
    cut.write_text(cut.read_text()[:-40])
    (write_run(runs, "foreign", rising(1.0)) / "config.json").write_text('{"model": "resnet"}')
    call(report.main, runs, "--out", tmp_path / "report", "--no-figures")
    *odd, _ = capsys.readouterr().out.splitlines()
    names = ("cut", "foreign", "going", "no-log", "good-0-again")
    for name, line in zip(names, odd, strict=True):
        assert str(runs / name) in line
    text = (tmp_path / "report" / "report.md").read_text()
    assert "**55.0 ± 5.0 (2 seeds)**" in text
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
    for method in ("lamo", "dt"):  # a row of its own, not pooled with the others
        write_run(tmp_path, f"delayed-{method}", rising(90.0), method, mode="delayed")
    plain = "X-v0; no reference returns, so scores are plain returns"
    write_run(tmp_path, "cartpole", rising(500.0), env="cartpole", note=plain)
    three, two = aggregate(make_cells(*read_runs([tmp_path]))).items()
    assert (three[0], list(three[1])) == ("ant 1 %, hopper 1 %, walker2d 1 %", ["LaMo", "DT"])
    assert two[0] == "hopper 1 %, walker2d 1 %"
    assert {name: value[0] for name, value in two[1].items()} == {"LaMo": 5, "DT": 5, "BC": 5}


def test_pairs_are_of_one_seed_and_its_episodes(tmp_path):
    draw, scores = np.random.default_rng(0), {}
    for method, seeds in (("lamo", range(10)), ("dt", range(1, 11)), ("bc", range(4))):
        for seed in seeds:
            scores[method, seed] = draw.normal(20, 5)
            other = {"data_score": 40.0} if (method, seed) == ("dt", 9) else {}  # other episodes
            last = rising(scores[method, seed])
            write_run(tmp_path / "runs", f"{method}-{seed}", last, method, seed, **other)
            if seed < 4:
                name = f"{method}-{seed}-delayed"
                write_run(tmp_path / "runs", name, rising(90.0), method, seed, mode="delayed")
    call(report.main, tmp_path / "runs", "--out", tmp_path)
    text = (tmp_path / "report.md").read_text().partition("seed by seed")[2]
    (line,) = (line for line in text.splitlines() if line.startswith("| hopper"))  # BC has too few
    row, _, name, mean, interval, ahead, ours, theirs = line.strip("| ").split(" | ")
    pairs = [(scores["lamo", seed], scores["dt", seed]) for seed in range(1, 9)]
    minus = [a - b for a, b in pairs]
    assert (row, name, mean) == ("hopper 1 %", "DT", f"{sum(minus) / 8:+.1f}")
    assert ahead == f"{sum(a > b for a, b in pairs)} of 8 seeds"
    means = [np.mean([minus[i] for i in draw.integers(0, 8, 8)]) for _ in range(10_000)]
    limits = [float(x) for x in interval.split(" to ")]
    assert limits == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.2)
    for text, side in zip((ours, theirs), zip(*pairs, strict=True), strict=True):
        assert text.startswith(f"{slow_iqm(side):.1f} (")
    assert Image.open(tmp_path / "seeds.png").width == 1088  # two panels


def test_a_packed_study_gives_the_report_of_its_folders(tmp_path):
    runs, study = tmp_path / "runs", tmp_path / "study.jsonl"
    for seed, method in product((0, 1), ("lamo", "dt", "bc")):
        write_run(runs, f"{method}-{seed}", rising(100 / (seed + 3)), method, seed)
    (write_run(runs, "going", rising(1.0), seed=2) / "result.json").unlink()
    call(report.main, runs, "--pack", study)
    for source, out in ((runs, tmp_path / "a"), (study, tmp_path / "b")):
        call(report.main, source, "--no-figures", "--out", out)
    assert len(study.read_text().splitlines()) == 6
    assert (tmp_path / "a/report.csv").read_bytes() == (tmp_path / "b/report.csv").read_bytes()
    a, b = ((tmp_path / name / "report.md").read_text().splitlines() for name in "ab")
    assert [line for line in a if "|" in line] == [line for line in b if "|" in line]


def read_study(*names):
    """The cells of packed studies in results/, which hold no run twice and lack no seed."""
    runs, remarks = read_runs([ROOT / f"results/{name}.jsonl" for name in names])
    cells = make_cells(runs, remarks)
    assert remarks == []
    return cells


def test_docs_have_the_tables_of_the_packed_studies():
    cells, docs = read_study("bundled", "ratios"), (ROOT / "docs/results.md").read_text()
    names = sorted({name for here in cells.values() for name in here}, key=report.place_of)
    made = report.tables(cells, names, {}, report.read_paper())
    made += report.table_of_pairs(read_study("scarce"))
    assert {line for line in made if line.startswith("|")} <= set(docs.splitlines())


@pytest.mark.parametrize("study", ["scarce", "real"])
def test_docs_have_every_seed_of_a_study(study):
    docs, paper = (ROOT / "docs/results.md").read_text().splitlines(), report.read_paper()
    for row, here in read_study(study).items():
        for name, cell in here.items():
            scores = [f"{run.score:.1f}" for run in cell]
            texts = [report.title(row), name, ", ".join(scores)]
            mean = f"{report.scores_of(cell).mean():.1f} ± {report.scores_of(cell).std():.1f}"
            theirs = paper.get(row[:3], {}).get(name, "")
            assert f"| {' | '.join([*texts, mean, theirs])} |" in docs


@pytest.mark.parametrize("study", ["scarce", "real"])
def test_docs_have_the_action_errors_of_a_study(study):
    rows, errors = json.loads((ROOT / f"results/{study}-fit.json").read_text()), {}
    for row in rows:
        place = (
            f"{row['env']} {100 * row['ratio']:g} %",
            report.NAMES.get(row["method"], row["method"]),
        )
        errors.setdefault(place, []).append((row["training"], row["held_out"]))
    for place, pairs in errors.items():
        drawn, rest = np.array(pairs).T
        texts = [f"{drawn.mean():.4f} ± {drawn.std():.4f}", f"{rest.mean():.3f} ± {rest.std():.3f}"]
        line = f"| {' | '.join([*place, *texts])} |"
        assert line in (ROOT / "docs/results.md").read_text().splitlines()


def test_readme_has_the_figures_of_the_scarce_study():
    readme, paper = (ROOT / "README.md").read_text().replace("*", ""), report.read_paper()
    for row, here in read_study("scarce").items():
        texts = [report.title(row)]
        scores = [report.scores_of(here[name]) for name in ("LaMo", "lamo-random", "DT", "BC")]
        texts += [f"{x.mean():.1f} ± {x.std():.1f}" for x in scores]
        texts += [f"{np.mean([run.data_score for run in here['LaMo']]):.1f}"]
        texts += [paper.get(row[:3], {}).get(name, "") for name in ("LaMo", "DT")]
        assert f"| {' | '.join(texts)} |" in readme


def test_the_papers_figures_are_those_of_the_paper(shared):
    with open(shared("paper/results.csv")) as f:
        rows = [r for r in csv.DictReader(f) if r["table"] in ("1", "2", "3", "11", "15", "16")]
    assert len(rows) > 200
    for row in rows:
        task = f"{row['task']}-{row['dataset']}" if row["task"] == "kitchen" else row["task"]
        ours = report.read_paper()[task, float(row["ratio"]), "normal"]
        method = row["method"].replace("lamo-no-pretraining", "lamo-random")
        assert ours[report.NAMES.get(method, method)] == f"{row['mean']} ± {row['std']}"
