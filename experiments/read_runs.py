"""Run folders as report.py counts them: read, checked, named, and gathered into cells.

What cannot be counted is left out, and what is odd is remarked on, each in one line.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluate import final_result
from utils import UserError, reading

FREE = {"seed", "device", "compile", "log_every", "out", "name", "resume", "tensorboard", "wandb"}
FREE |= {"deterministic"}  # settings that may differ between runs whose mean is taken
PLACE = {"env", "method", "algo", "ratio", "mode", "dataset", "quality"}  # what a table shows
NAMES = {  # as the paper writes them, in its columns' order; the others go by our names
    "lamo": "LaMo",
    "dt": "DT",
    "wiki-rl": "Wiki-RL",
    "cql": "CQL",
    "iql": "IQL",
    "td3bc": "TD3+BC",
    "bcq": "BCQ",
    "nfq": "NFQ",
    "bc": "BC",
}


@dataclass
class Run:
    folder: Path
    row: tuple  # (task, ratio, mode, dataset)
    method: str
    seed: int
    settings: dict  # what the mean over seeds must not mix
    score: float  # computed anew from the log, by evaluate.final_result
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


def read_run(folder):
    """The Run of a folder. Raises UserError for what cannot be counted, saying why."""
    for name in ("log.jsonl", "result.json"):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: left out, for it has no {name}: it is not finished")
    with reading(folder, "a run's folder"):
        config = json.loads((folder / "config.json").read_text())
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        notes = config.get("notes") or config["chosen"]  # the records in results/ are older
        settings = {k: None if v == "auto" else v for k, v in config["settings"].items()}
        steps, every = settings["steps"], settings["eval_every"]
        if settings.get("pretrained"):  # random weights differ with the seed, as they should
            settings["weights"] = config["base"]["sha256"]
        # the id, or in the note on it: "the bundled ID, since ..", "ID in FOLDER", "FOLDER/ID"
        note = re.split(r",| in ", notes["dataset"].removeprefix("the bundled "))[0]
        dataset = config["data"].get("dataset") or re.sub(r"^.*/(datasets|minari)/", "", note)
        rows = [row for row in log if "evaluation" in row]
        if [row["step"] for row in rows] != sorted({*range(every, steps + 1, every), steps}):
            what = f"every {every} of its {steps} steps"
            raise UserError(f"{folder}: left out, for its log has not one evaluation {what}")
        result = final_result([row | {"results": row["evaluation"]} for row in rows], steps)
        best = [target["target"] for target in result["targets"]].index(result["target"])
        return Run(
            folder=folder,
            row=(settings["env"], settings["ratio"], settings["mode"], dataset),
            method=settings.get("algo") or settings["method"],
            seed=settings["seed"],
            settings={k: v for k, v in settings.items() if k not in FREE | PLACE},
            score=result["score"],
            best_single=result["best_single_evaluation"],
            data_score=config["data"]["score"],
            plain="plain returns" in notes["environment"],
            lm=config["base"]["lm"] if config.get("base") else "none",
            curve=[(row["step"], row["evaluation"][best]["score"]) for row in rows],
            language=[(r["step"], r["lm_loss"]) for r in log if r.get("lm_loss") is not None],
            steps=steps,
        )


def read_runs(folders):
    """(Runs, remarks) of folders that hold run folders, or are some. Raises UserError for none."""
    runs, remarks, found = [], [], {}
    for top in map(Path, folders):
        with reading(top, "a folder of runs"):
            inside = [p for p in (top, *sorted(top.iterdir())) if (p / "config.json").is_file()]
        remarks += [] if inside else [f"{top}: no run in it"]
        found |= {path.resolve(): path for path in inside}  # each once
    for folder in found.values():
        try:
            runs.append(read_run(folder))
        except UserError as error:
            remarks.append(str(error))
    return runs, remarks


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
            run.name = ", ".join([run.method, *(written(k, run.settings[k]) for k in other)])


def written(name, value):
    """A setting as a column's name has it."""
    if name == "lm":
        return Path(str(value)).name.removesuffix(".safetensors")
    if name == "weights":
        return f"weights {value[:8]}"
    return f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def make_cells(runs, remarks):
    """{(row, name): Cell} in the tables' order; remarks on runs that are there twice, and on seeds
    that are missing."""
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
    by_place = sorted((t, d, -r, m, place_of(name), name) for (t, r, m, d), name in cells)
    keys = [((t, -r, m, d), name) for t, d, r, m, _, name in by_place]
    return {key: cells[key] for key in keys}


def place_of(name):
    """Where a name stands: the paper's columns, then the ablations, then other settings."""
    method, _, variant = name.partition(", ")
    order = list(NAMES)
    return bool(variant), order.index(method) if method in order else len(order), name


def label(name):
    method, comma, variant = name.partition(", ")
    return NAMES.get(method, method) + comma + variant


def title(row):
    """A row of the tables in words."""
    task, ratio, mode, _ = row
    return f"{task} {100 * ratio:g} %" + (f" {mode}" if mode != "normal" else "")
