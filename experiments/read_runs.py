"""Run folders as report.py counts them: read, checked, named, and gathered into cells.

A run's score is computed anew from its log, by the protocol of run_folder.final_result. What cannot
be counted is left out, and what is odd is remarked on, each in one line.
"""

import hashlib
import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from files import check_size, parse_json, read_json
from plumbing import UserError, is_number
from run_folder import final_result

# settings that may differ between runs whose mean is taken
FREE = ("seed", "device", "compile", "log_every", "out", "name", "resume", "tensorboard", "wandb")
FREE += ("deterministic", "env_module", "skip_bad_steps")
PLACE = ("env", "method", "algo", "ratio", "mode", "dataset", "quality")  # what a table shows
MOST_EVALUATIONS = 100_000  # of a run
LARGEST = 1e15  # of its scores and losses
LONGEST_NAME = 200  # letters of a task, a method, a dataset
NOT_RUNS = ("logs", "submitit")  # sweep.py's own folders beside the runs


# --- reading -------------------------------------------------------------------------------------


@dataclass
class Run:
    folder: Path
    row: tuple  # (task, ratio, mode, dataset)
    method: str
    seed: int
    settings: dict  # what the mean over seeds must not mix
    score: float
    best_single: float  # of all evaluations
    data_score: float  # the dataset's own mean return, as a score
    plain: bool  # scores are plain returns: the task has no reference returns
    lm: str
    curve: list  # (step, score of the target that scored), one per evaluation
    language: list  # (step, language loss), one per row of the log that has one
    steps: int
    name: str = ""  # the method, and what sets this run apart from most others of it


@dataclass
class Cell:
    """The runs of one row and name, a seed each."""

    runs: list

    @property
    def scores(self):
        return np.array([run.score for run in self.runs])

    @property
    def seeds(self):
        return [run.seed for run in self.runs]


def read_log(path, remarks):
    """The rows of a log.jsonl; lines that are not whole are remarked on and left out."""
    rows, damaged = [], []
    check_size(path)
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        try:
            row = parse_json(line)
            if not is_number(row["step"]):
                raise ValueError
            rows.append(row)
        except (ValueError, KeyError, TypeError):
            damaged.append(str(number))
    if damaged:
        lines = "line" if len(damaged) == 1 else "lines"
        remarks.append(f"{path}: {lines} {', '.join(damaged)} cannot be read")
    return rows


def read_run(folder, remarks):
    """The Run of a folder. Raises UserError for what cannot be counted, saying why."""
    try:
        config = read_json(folder / "config.json")
        settings, steps = config["settings"], config["settings"]["steps"]
        every = settings["eval_every"]
        lm = words(config["base"]["lm"]) if config["base"] else "none"
        if settings.get("pretrained"):  # random weights differ with the seed, as they should
            settings["weights"] = config["base"]["sha256"]
        dataset = re.split(r",| in ", words(config["chosen"]["dataset"]))[0]
        dataset = words(config["data"].get("dataset") or dataset)  # older runs have the note alone
        plain = "plain returns" in config["chosen"]["environment"]
        run = dict(
            folder=folder,
            row=(
                words(settings["env"]),
                settings["ratio"],
                words(settings["mode"]),
                dataset.removeprefix("the bundled "),
            ),
            method=words(settings.get("algo") or settings["method"]),
            seed=settings["seed"],
            settings={k: v for k, v in settings.items() if k not in FREE + PLACE},
            data_score=config["data"]["score"],
            plain=plain,
            lm=lm,
            steps=steps,
        )
        numbers = [run["seed"], run["data_score"], steps, every]
        sound = all(is_number(x) and abs(x) < LARGEST for x in numbers)
        names = [run["method"], lm, *(x for x in run["row"] if isinstance(x, str))]
        sound = sound and max(map(len, names)) <= LONGEST_NAME
        if not sound or not is_number(settings["ratio"]) or not 0 < settings["ratio"] <= 1:
            raise ValueError
        if not 0 <= steps / every < MOST_EVALUATIONS:
            raise ValueError
        expected = {*range(every, steps + 1, every), steps}
    except OSError as error:
        raise UserError(f"{folder}: no run, for it has no config.json") from error
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{folder}: config.json is not of this project, or damaged") from error
    if not (folder / "log.jsonl").is_file():
        raise UserError(f"{folder}: left out, for it has no log.jsonl")
    try:
        log = read_log(folder / "log.jsonl", remarks)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: left out, for its log.jsonl cannot be read: {error}") from error
    if not (folder / "result.json").is_file():
        last = max((row["step"] for row in log), default=0)
        where = "it has no result.json" if last == steps else "it is not finished"
        raise UserError(f"{folder}: left out, for {where} (its log is of {last} of {steps} steps)")
    evaluations = [
        {"step": row["step"], "results": row["evaluation"]} for row in log if "evaluation" in row
    ]
    steps_seen = [e["step"] for e in evaluations]
    missing = sorted(expected - set(steps_seen))
    if missing:
        n = "" if len(missing) == 1 else f"{len(missing)} evaluations, as "
        where = f"{n}the evaluation at step {missing[0]}"
        raise UserError(f"{folder}: left out, for its log lacks {where}")
    if steps_seen != sorted(expected):
        where = "evaluations that are there twice, out of order or where none is due"
        raise UserError(f"{folder}: left out, for its log has {where}")
    try:
        bad = [e["step"] for e in evaluations for r in e["results"] if not is_number(r["score"])]
        if bad:
            raise UserError(f"{folder}: left out, for its score at step {bad[0]} is not a number")
        result = final_result(evaluations, steps)
        best = [t["target"] for t in result["targets"]].index(result["target"])
        curve = [(e["step"], e["results"][best]["score"]) for e in evaluations]
        language = [(r["step"], r["lm_loss"]) for r in log if r.get("lm_loss") is not None]
        said = read_json(folder / "result.json")["score"]
        drawn = [said, *(score for _, score in curve), *(loss for _, loss in language)]
        if not all(is_number(x) and abs(x) < LARGEST for x in drawn):
            raise ValueError
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{folder}: left out, for its log or result is damaged") from error
    if not math.isclose(said, result["score"], abs_tol=1e-6):
        what = f"result.json says {said:.2f}, its log {result['score']:.2f}, which counts"
        remarks.append(f"{folder}: {what}")
    return Run(
        **run,
        score=result["score"],
        best_single=result["best_single_evaluation"],
        curve=curve,
        language=language,
    )


def words(text):
    """A name as tables, file names and figures can show it. Raises TypeError unless it is text.

    A run may be a stranger's: what a terminal, Markdown, a spreadsheet or matplotlib would take for
    more than letters becomes a question mark.
    """
    if not isinstance(text, str):
        raise TypeError
    return re.sub(r"[^\w ./:~()+,-]|^[+-]", "?", text)


def read_runs(folders):
    """(Runs, remarks) of folders that hold run folders, or are some. Raises UserError for none."""
    runs, remarks, seen = [], [], set()
    for top in map(Path, folders):
        if not top.is_dir():
            raise UserError(f"{top} is not a folder; give the one that train.py's --out names")
        inner = [top] if (top / "config.json").is_file() else sorted(top.iterdir())
        found = [p for p in inner if p.is_dir() and p.name not in NOT_RUNS]
        if not found:
            remarks.append(f"{top}: no run in it")
        new = [p for p in found if p.resolve() not in seen]
        if len(new) < len(found):
            remarks.append(f"{top}: what was given before is counted once")
        seen |= {p.resolve() for p in new}
        for folder in new:
            try:
                runs.append(read_run(folder, remarks))
            except UserError as error:
                remarks.append(str(error))
    return runs, remarks


# --- from runs to cells --------------------------------------------------------------------------


def name_runs(runs):
    """Give each run its name: the method, and what sets it apart from most others of that method.

    Runs of other settings than the rest (steps, language model, ..) thus get a column of their own
    and are never averaged with them. Most: whose values are the commonest in all runs.
    """
    values = Counter((k, json.dumps(v)) for run in runs for k, v in run.settings.items())
    for place in {(run.row, run.method) for run in runs}:
        same = [run for run in runs if (run.row, run.method) == place]
        keys = sorted(set.intersection(*(set(run.settings) for run in same)))
        usual = max(same, key=lambda run: sum(values[k, json.dumps(run.settings[k])] for k in keys))
        for run in same:
            other = [k for k in keys if run.settings[k] != usual.settings[k]]
            if "lm" in other and "weights" in other:
                lm = written("lm", run.settings["lm"])
                alike = [r.settings for r in same if written("lm", r.settings["lm"]) == lm]
                if len({s["weights"] for s in alike}) == 1:
                    other.remove("weights")  # the name says as much
            parts = [written(k, run.settings[k]) for k in other]
            run.name = ", ".join([run.method, *parts])


def written(name, value):
    """A setting as a column's name has it."""
    if name == "lm":
        return words(Path(str(value)).name.removesuffix(".safetensors"))
    if name == "weights":
        return words(f"weights {str(value)[:8]}")
    value = str(" ".join(map(str, value)) if isinstance(value, list) else value)
    if len(value) > LONGEST_NAME:  # by what it can still be told from another one
        value = f"of SHA-256 {hashlib.sha256(value.encode()).hexdigest()[:8]}"
    return words(f"{name} {value}")


def make_cells(runs, remarks):
    """{(row, name): Cell}; remarks on runs that are there twice and on seeds that are missing."""
    name_runs(runs)
    cells = {}
    for run in runs:
        cell = cells.setdefault((run.row, run.name), Cell([]))
        twin = next((other for other in cell.runs if other.seed == run.seed), None)
        if twin:
            remarks.append(f"{run.folder}: the same run as {twin.folder}, which is counted")
        else:
            cell.runs.append(run)
    for (row, name), cell in cells.items():
        cell.runs.sort(key=lambda run: run.seed)
        seeds = {seed for (r, _), other in cells.items() if r == row for seed in other.seeds}
        if missing := sorted(seeds - set(cell.seeds)):
            lacking = ", ".join(map(str, missing))
            where = f"{title(row)} ({row[3]}), {name}"
            remarks.append(f"{where}: no seed {lacking}, so its mean is over {len(cell.runs)}")
    return cells


def rows_of(cells):
    return sorted({row for row, _ in cells}, key=lambda row: (row[0], row[3], -row[1]))


def title(row):
    """A row of the tables in words."""
    task, ratio, mode, _ = row
    return f"{task} {100 * ratio:g} %" + (f" {mode}" if mode != "normal" else "")
