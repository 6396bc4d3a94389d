"""Tables and figures of finished runs, in the paper's layout.

    python -m experiments.report runs                      # writes report/: Markdown, CSV and PNG
    python -m experiments.report runs --pack study.jsonl   # the same runs as one file, to share
    python -m experiments.report study.jsonl more --out both

Reads run folders of train.py and baselines.py, or what --pack wrote of them. A run's score is
computed anew from its evaluations; tables show mean and standard deviation over seeds. Runs whose
settings differ are never averaged. What is left out or missing is one line each, printed and in the
report. The paper's scores, from paper.txt beside this file, are of other data and larger language
models, so they compare in kind only. The figures are drawn by experiments/figures.py.
"""

import csv
import io
import json
import re
from collections import Counter
from dataclasses import dataclass
from itertools import cycle, product
from pathlib import Path

import numpy as np
import tyro

from evaluate import final_result
from utils import UserError, reading, run_command, write_atomically

SEEDS = 3  # the protocol's; a cell with more or fewer says so
PAIRS = 5  # seeds from which on methods are compared seed by seed
RESAMPLES = 10_000  # bootstrap samples of an interval
PAPER = Path(__file__).with_name("paper.txt")
ABOUT_PAIRS = """Of the seeds that both have, which draw the same episodes for both (where all of a
dataset is used, seeds differ in weights and batches alone). Of so few pairs a 95 % bootstrap is
narrow: of normal differences it holds the true mean in 84 % of cases with 5 pairs, in 90 % with 10.
The last two columns are LaMo's and the method's interquartile means."""
# Methods as the paper writes them, in its columns' order; the others go by our names.
NAMES = {"lamo": "LaMo", "dt": "DT", "wiki-rl": "Wiki-RL", "cql": "CQL", "iql": "IQL"}
NAMES |= {"td3bc": "TD3+BC", "bcq": "BCQ", "nfq": "NFQ", "bc": "BC"}
# Settings that a table shows itself, or in which runs may differ whose mean is taken.
FREE = {"env", "ratio", "mode", "dataset", "quality", "method", "algo", "seed", "device", "compile"}
FREE |= {"deterministic", "log_every", "out", "name", "resume", "tensorboard", "wandb"}


@dataclass
class Arguments:
    runs: tyro.conf.Positional[list[str]]  # run folders, folders of them, or files of --pack
    out: str = "report"  # the folder it is written to
    figures: bool = True  # draw, which needs matplotlib
    pack: str | None = None  # write no report, but the runs to this file, a line each


# --- runs -----------------------------------------------------------------------------------------


def read_folder(folder):
    """What a report needs of a run's folder: a line of --pack. Raises UserError if unfinished."""
    if not (folder / "result.json").is_file():
        raise UserError(f"{folder}: left out, for it has no result.json: it is not finished")
    config, result = (json.loads((folder / f"{n}.json").read_text()) for n in ("config", "result"))
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    keys = ("settings", "base", "data", "commit", "machine", "versions")
    record = {key: config.get(key) for key in keys}
    record["settings"].pop("out", None)  # this and most notes name folders of the machine
    record["notes"] = {"environment": config["notes"]["environment"]}
    record |= {key: result.get(key) for key in ("seconds", "seconds_evaluating")}
    kept = ("target", "return_mean", "score", "cut")  # not every episode's return
    record["evaluations"] = [
        {"step": row["step"], "results": [{key: r[key] for key in kept} for r in row["evaluation"]]}
        for row in log
        if "evaluation" in row
    ]
    record["language"] = [(row["step"], row["lm_loss"]) for row in log if row.get("lm_loss")]
    return record


class Run:
    """A finished run. where: its folder, or FILE:LINE; record: what read_folder returned."""

    def __init__(self, where, record):
        self.where, self.record = where, record
        settings, base, evaluations = (record[k] for k in ("settings", "base", "evaluations"))
        self.method, self.seed, self.steps = (settings[k] for k in ("method", "seed", "steps"))
        task, ratio, mode = (settings[k] for k in ("env", "ratio", "mode"))
        self.row = task, ratio, mode, record["data"]["dataset"]
        self.place = task, self.row[3], -ratio, mode  # the order of rows
        result = final_result(evaluations, self.steps)
        self.score, self.best_single = result["score"], result["best_single_evaluation"]
        self.data_score = record["data"]["score"]  # of the dataset's own mean return
        self.draw = self.seed, round(self.data_score, 3)  # of its episodes
        self.plain = "plain returns" in record["notes"]["environment"]  # no reference returns
        best = [target["target"] for target in result["targets"]].index(result["target"])
        share = 100 / self.steps  # curve: (share of the steps in %, score of the best target)
        self.curve = [(share * e["step"], e["results"][best]["score"]) for e in evaluations]
        self.language = record["language"]  # (step, nats a token)
        self.lm = Path(base["lm"]).name.removesuffix(".safetensors") if base else "none"
        tied = {k: v for k, v in settings.items() if k not in FREE}  # no mean mixes these
        tied.setdefault("eps", 1e-6)  # of runs from before it was a setting
        self.settings = {k: tuple(v) if isinstance(v, list) else v for k, v in tied.items()}
        self.settings["lm"] = self.lm
        self.body = Path(settings["lm"]).name if base and self.method != "dt" else None
        if settings.get("pretrained") and not settings.get("shuffled"):  # others go by the seed
            self.settings["weights"] = base["sha256"][:8]


def read_runs(paths):
    """(Runs, remarks) of run folders, folders of them, and packed studies."""
    runs, remarks = [], []
    for top in map(Path, paths):
        with reading(top, "a folder of runs, or a file that --pack wrote"):
            if top.is_file():
                lines = enumerate(top.read_text().splitlines(), 1)
                runs += [Run(f"{top}:{i}", json.loads(line)) for i, line in lines]
                continue
            folders = [p for p in (top, *sorted(top.iterdir())) if (p / "config.json").is_file()]
        remarks += [] if folders else [f"{top}: no run in it"]
        for folder in folders:
            try:
                with reading(folder, "a run's folder"):
                    runs.append(Run(folder, read_folder(folder)))
            except UserError as error:
                remarks.append(str(error))
    return runs, remarks


def name_runs(runs):
    """Give each run its name: the method, and the settings in which it differs from the most
    typical run of its row and method, the one whose values are the commonest over all runs. A
    run's language model is compared with the row's commonest. An older run has no value for a newer
    setting; that is no difference.
    """
    common = Counter(item for run in runs for item in run.settings.items())
    bodies = {}  # of each row: how many runs have which language model
    for run in runs:
        bodies.setdefault(run.row, Counter())[run.body] += run.body is not None
    for place in {(run.row, run.method) for run in runs}:
        same = [run for run in runs if (run.row, run.method) == place]
        settings = (run.settings for run in same)
        typical = max(settings, key=lambda s: sum(common[item] for item in s.items()))
        lms = {(run.settings.get("lm"), run.settings.get("weights")) for run in same}
        for run in same:
            other = {k: v for k, v in sorted(run.settings.items()) if typical.get(k, v) != v}
            if run.body not in (None, bodies[run.row].most_common(1)[0][0]):
                other["lm"] = run.lm
            if "lm" in other and sum(lm == other["lm"] for lm, _ in lms) == 1:
                other.pop("weights", None)  # the file's name says as much
            parts = [v if k == "lm" else f"{k} {v}" for k, v in other.items()]
            run.name = ", ".join([NAMES.get(run.method, run.method), *parts])


def make_cells(runs, remarks):
    """{row: {name: runs, a seed each}}, in the tables' order. Adds to remarks what is there twice,
    and seeds that are missing."""
    name_runs(runs)
    cells = {}
    for run in sorted(runs, key=lambda run: (*run.place, place_of(run.name), run.seed)):
        cell = cells.setdefault(run.row, {}).setdefault(run.name, [])
        if cell and cell[-1].seed == run.seed:
            remarks.append(f"{run.where}: the same run as {cell[-1].where}, which is counted")
        else:
            cell.append(run)
    for row, here in cells.items():
        seeds = {run.seed for cell in here.values() for run in cell}
        for name, cell in here.items():
            if missing := sorted(seeds - {run.seed for run in cell}):
                lacking = ", ".join(map(str, missing))
                remarks.append(f"{title(row)} ({row[3]}), {name}: no seed {lacking}")
    return cells


def place_of(name):
    """Where a name stands: the paper's columns, then the ablations, then other settings."""
    order, method = list(NAMES.values()), name.partition(", ")[0]
    return ", " in name, order.index(method) if method in order else len(order), name


def title(row):
    """A row of the tables in words."""
    task, ratio, mode, _ = row
    return f"{task} {100 * ratio:g} %" + (f" {mode}" if mode != "normal" else "")


def scores_of(cell):
    return np.array([run.score for run in cell])


# --- numbers --------------------------------------------------------------------------------------


def read_paper():
    """{(task, ratio, mode): {name: "mean ± std"}} of paper.txt."""
    lines, paper = [line for line in PAPER.read_text().splitlines() if line[0] != "#"], {}
    for row in csv.DictReader(lines, delimiter=" ", skipinitialspace=True):
        here = paper[row.pop("task"), float(row.pop("ratio")), "normal"] = {}
        here |= {NAMES.get(m, m): x.replace("±", " ± ") for m, x in row.items() if x != "-"}
    return paper


def interval(samples, statistic, resamples=RESAMPLES):
    """(low, high): a 95 % percentile bootstrap interval, which draws anew within each sample."""
    from scipy.stats import bootstrap

    how = dict(n_resamples=resamples, method="percentile", rng=np.random.default_rng(0))
    return tuple(map(float, bootstrap(samples, statistic, **how).confidence_interval))


def iqm(scores, resamples=RESAMPLES):
    """Interquartile mean over runs and tasks, with its interval (Agarwal et al. 2021).

    scores: one array of seeds' scores per task. The mean of the middle half of all of them; the
    interval draws seeds anew within each task. Returns (mean, low, high), the last two None where a
    task has one seed, which says nothing of its spread.
    """
    from scipy.stats import trim_mean

    def statistic(*tasks, axis=-1):
        return trim_mean(np.concatenate(tasks, axis=axis), 0.25, axis=axis)

    alone = min(map(len, scores)) < 2
    spread = (None, None) if alone else interval(scores, statistic, resamples)
    return float(statistic(*scores)), *spread


def aggregate(cells):
    """{rows in words: {name: (IQM, low, high)}}, of two rows or more of a mode, with the names that
    have all of them. A set is what some method was run on, without rows of plain returns."""
    of_name, out, alike = {}, {}, Counter(map(title, cells))
    for row, here in cells.items():
        for name in (name for name, cell in here.items() if not cell[0].plain):
            of_name.setdefault(name, []).append(row)
    pairs = product(of_name.values(), {row[2] for row in cells})
    sets = {tuple(row for row in rows if row[2] == mode) for rows, mode in pairs}
    for rows in sorted(sets, key=lambda rows: (-len(rows), sorted(rows))):
        if len(rows) < 2:
            break
        words = [title(r) + (f" ({r[3]})" if alike[title(r)] > 1 else "") for r in rows]
        names = [name for name in sorted(of_name, key=place_of) if set(of_name[name]) >= set(rows)]
        means = {name: iqm([scores_of(cells[row][name]) for row in rows]) for name in names}
        out[", ".join(words)] = means
    return out


# --- writing --------------------------------------------------------------------------------------


def cell_text(cell):
    """ "50.9 ± 3.1", with the number of seeds where it is not the protocol's."""
    scores, n = scores_of(cell), len(cell)
    seeds = {SEEDS: "", 1: " (1 seed)"}.get(n, f" ({n} seeds)")
    return f"{scores.mean():.1f}" + (f" ± {scores.std():.1f}" if n > 1 else "") + seeds


def table(cells, names, paper):
    """Lines of a Markdown table: a line a row, a column a name, the paper's figure below ours."""
    lines = [f"| task | data | {' | '.join(names)} | data's own |", "|---" * (len(names) + 3) + "|"]
    for row in cells:
        here = {name: cells[row][name] for name in names if name in cells[row]}
        best = max(scores_of(cell).mean() for cell in here.values())
        texts = dict.fromkeys(names, "")
        for name, cell in here.items():
            bold = "**" if scores_of(cell).mean() == best else ""
            texts[name] = bold + cell_text(cell) + bold
            if name in paper.get(row[:3], {}):
                texts[name] += f"<br>*paper {paper[row[:3]][name]}*"
        own = np.mean([run.data_score for cell in here.values() for run in cell])
        lines.append(f"| {title(row)} | {row[3]} | {' | '.join(texts.values())} | {own:.1f} |")
    return lines


def table_of_pairs(cells):
    """Lines of a Markdown table: LaMo's score minus each method's, by the seeds that both have. A
    seed draws the same episodes for every method, unless the dataset was recorded anew: then it
    makes no pair. Methods with fewer than PAIRS pairs are left out."""
    lines = ["| task | data | LaMo minus | mean | 95 % interval | LaMo ahead | LaMo's IQM | IQM |"]
    lines.append("|---" * 8 + "|")
    for row, here in cells.items():
        ours = {run.draw: run.score for run in here.get("LaMo", [])}
        for name, cell in here.items():
            pairs = [(ours[run.draw], run.score) for run in cell if run.draw in ours]
            if name == "LaMo" or len(pairs) < PAIRS:
                continue
            both = np.array(pairs).T  # (2, seeds): LaMo's and the method's
            minus = both[0] - both[1]
            low, high = interval([minus], np.mean)
            line = [title(row), row[3], name, f"{minus.mean():+.1f}", f"{low:+.1f} to {high:+.1f}"]
            line += [f"{(minus > 0).sum()} of {len(minus)} seeds"]
            line += ["{:.1f} ({:.1f} to {:.1f})".format(*iqm([scores])) for scores in both]
            lines.append(f"| {' | '.join(line)} |")
    return lines


def tables(cells, names, aggregates, paper):
    """All tables as lines of Markdown."""
    compared = [name for name in names if name in NAMES.values()]
    others = [name for name in names if name not in compared]
    text = []
    for heading, some in {"Methods": compared, "Ablations and other settings": others}.items():
        there = {row: here for row, here in cells.items() if here.keys() & set(some)}
        beside = [name for name in names if name == "LaMo" or name in some]
        text += [f"## {heading}", "", *table(there, beside, paper), ""] if some else []
    if len(pairs := table_of_pairs(cells)) > 2:
        text += ["## LaMo minus the others, seed by seed", "", ABOUT_PAIRS, "", *pairs, ""]
    for rows, means in aggregates.items():
        text += [f"## Over {rows}", ""]
        text += ["| method | interquartile mean | 95 % interval |", "|---|---|---|"]
        for name, (mean, low, high) in means.items():
            spread = "one seed: none" if low is None else f"{low:.1f} to {high:.1f}"
            text.append(f"| {name} | {mean:.1f} | {spread} |")
        text.append("")
    return text


def csv_text(cells):
    """The cells as CSV, a line each."""
    head = "task,ratio,mode,dataset,method,lm,steps,n,mean,std,seeds,scores,best_single,data_score"
    out = csv.writer(text := io.StringIO(), lineterminator="\n")
    out.writerow(head.split(","))
    for row, here in cells.items():
        for name, cell in here.items():
            scores, own = scores_of(cell), np.mean([run.data_score for run in cell])
            numbers = [scores.mean(), scores.std(), max(run.best_single for run in cell), own]
            mean, std, best, own = (f"{x:.4f}" for x in numbers)
            every = [" ".join(str(run.seed) for run in cell), " ".join(f"{x:.4f}" for x in scores)]
            first = [*row, name, cell[0].lm, cell[0].steps, len(cell)]
            out.writerow([*first, mean, std, *every, best, own])
    return text.getvalue()


def draw_all(folder, cells, names, aggregates, paper):
    """Draw every figure that these cells have something for. Returns the files' names."""
    from experiments import figures

    plan, shares, seeds = {}, {}, {}  # plan: file: (function, heading, what it draws)
    for row, here in cells.items():
        task, ratio, mode, dataset = row
        place = f"{task}, {dataset}" + (f", {mode}" if mode != "normal" else "")
        heading = f"{title(row)}, {dataset}"
        plan[f"curves-{place}-{ratio:g}"] = figures.draw_curves, heading, here
        if talking := {n: cell for n, cell in here.items() if all(r.language for r in cell)}:
            plan[f"language-{place}-{ratio:g}"] = figures.draw_language, heading, talking
        seeds[heading] = here, paper.get(row[:3], {})
        for name, cell in here.items():
            shares.setdefault(place, {}).setdefault(name, {})[ratio] = cell
    for place, lines in shares.items():
        if several := {name: points for name, points in lines.items() if len(points) > 1}:
            plan[f"ratios-{place}"] = figures.draw_ratios, place, several
    if aggregates:
        plan["iqm"] = figures.draw_iqm, "IQM of normalised scores", aggregates
    plan["seeds"] = figures.draw_seeds, "normalised score", seeds
    colours, drawn = dict(zip(names, cycle(figures.COLOURS), strict=False)), []
    for file, (draw, heading, content) in plan.items():
        drawn.append(re.sub("[/, ]+", "-", file) + ".png")
        draw(folder / drawn[-1], heading, content, colours)
    return drawn


def main():
    args = tyro.cli(Arguments, description=__doc__)
    runs, remarks = read_runs(args.runs)
    cells, out, paper = make_cells(runs, remarks), Path(args.out), read_paper()
    for remark in remarks:
        print(remark)
    if not runs:
        raise UserError(f"no finished run in {', '.join(args.runs)}; give the --out of a run")
    if args.pack:
        lines = [json.dumps(run.record, separators=(",", ":")) + "\n" for run in runs]
        write_atomically(args.pack, lambda file: file.write("".join(lines).encode()))
        print(f"{len(runs)} runs packed: {args.pack}")
        return
    names, aggregates = sorted({run.name for run in runs}, key=place_of), aggregate(cells)
    drawn = draw_all(out, cells, names, aggregates, paper) if args.figures else []
    text = f"""# Report

{len(runs)} runs, read by `python -m experiments.report {" ".join(args.runs)}`. Language models:
{", ".join(sorted({run.lm for run in runs}))}.

A run's score is its best target's mean over the evaluations in the last 20 % of the steps. A cell
is mean ± standard deviation over {SEEDS} seeds, or as many as it says; **bold** is a line's best
mean. *Paper* is arXiv 2310.20587's figure: other data (D4RL v2, DQN replay) and GPT-2 small or
medium, so it compares in kind only. The last column is the mean return of the data themselves, as a
score. Interquartile means are over all seeds' scores, with a bootstrap's interval: {RESAMPLES:,}
samples that draw seeds within each task (Agarwal et al. 2021). Every seed's score is in report.csv.

"""
    text += "".join(f"- {remark}\n" for remark in remarks) + "\n" * bool(remarks)
    text += "\n".join(tables(cells, names, aggregates, paper)) + "\n"
    text += "".join(f"![{Path(file).stem}]({file})\n" for file in drawn)
    write_atomically(out / "report.md", lambda file: file.write(text.encode()))
    write_atomically(out / "report.csv", lambda file: file.write(csv_text(cells).encode()))
    print(f"{len(runs)} runs read: {out / 'report.md'}, {out / 'report.csv'}")


if __name__ == "__main__":
    run_command(main)
