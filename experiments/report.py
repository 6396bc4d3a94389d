"""Tables and figures from run folders, in the paper's layout.

    python -m experiments.report runs                  # writes report/report.md, CSV, PNG and SVG
    python -m experiments.report runs more --out both

Reads config.json and log.jsonl of every run, of train.py's and baselines.py's alike. A run's score
is computed anew from its log, by evaluate.final_result; a table shows mean and standard deviation
over seeds. What is missing or odd is one line each, printed and in the report. The paper's figures,
from paper.txt beside this file, stand next to ours: they are of other data and larger language
models. Figures are drawn in experiments/figures.py.
"""

import csv
import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from experiments.read_runs import NAMES, label, make_cells, place_of, read_runs, title
from utils import UserError, run_command, write_atomically

RESAMPLES = 10_000  # bootstrap samples of an interval
PAPER = Path(__file__).with_name("paper.txt")
CSV = "task,ratio,mode,dataset,method,steps,mean,std,n,seeds,scores,best_single,data_score,lm,"
CSV += "paper_mean_std"


@dataclass
class Arguments:
    runs: tyro.conf.Positional[list[str]]  # folders that hold runs' folders, or are some
    out: str = "report"  # where it is written
    figures: bool = True  # draw, which needs matplotlib


def read_paper():
    """{(task, ratio): {method: "mean ± std"}} of paper.txt."""
    lines = [line for line in PAPER.read_text().splitlines() if not line.startswith("#")]
    _, _, *methods = lines[0].split()
    paper = {}
    for line in lines[1:]:
        task, ratio, *cells = line.split()
        known = zip(methods, cells, strict=True)
        paper[task, float(ratio)] = {m: c.replace("±", " ± ") for m, c in known if c != "-"}
    return paper


def iqm(scores, resamples=RESAMPLES, seed=0):
    """Interquartile mean over runs and tasks, with its interval (Agarwal et al. 2021).

    scores: one array of seeds' scores per task. The mean of the middle half of all of them; the
    interval is a percentile bootstrap that draws seeds anew within each task. Returns (mean, low,
    high), the last two None where a task has one seed, which says nothing of its spread.
    """
    from scipy.stats import bootstrap, trim_mean

    def statistic(*tasks, axis=-1):
        return trim_mean(np.concatenate(tasks, axis=axis), 0.25, axis=axis)

    mean = float(statistic(*scores))
    if min(map(len, scores)) < 2:
        return mean, None, None
    how = dict(n_resamples=resamples, confidence_level=0.95, method="percentile")
    drawn = bootstrap(scores, statistic, rng=np.random.default_rng(seed), **how)
    return mean, *map(float, drawn.confidence_interval)


def aggregate(cells):
    """[(rows, {name: (IQM, low, high)})]: for sets of two rows or more, the names that have all.

    A set is what some method was run on. Rows whose scores are plain returns are in none.
    """
    of_name = {}
    for (row, name), cell in cells.items():
        if not cell.runs[0].plain:
            of_name.setdefault(name, []).append(row)
    sets = {tuple(rows) for rows in of_name.values() if len(rows) > 1}
    out = []
    for rows in sorted(sets, key=lambda rows: (-len(rows), sorted(rows))):
        names = [name for name in sorted(of_name, key=place_of) if set(of_name[name]) >= set(rows)]
        out.append((rows, {n: iqm([cells[row, n].scores for row in rows]) for n in names}))
    return out


# --- writing -------------------------------------------------------------------------------------


def listing(rows):
    """Rows in words; with their data where two would read alike."""
    times = Counter(map(title, rows))
    return ", ".join(title(r) + (f" ({r[3]})" if times[title(r)] > 1 else "") for r in rows)


def cell_text(cell, usual):
    """ "50.9 ± 3.1", with the number of seeds where it is not the usual one."""
    n, mean = len(cell.runs), f"{cell.scores.mean():.1f}"
    if n == 1:
        return f"{mean} (1 seed)"
    return f"{mean} ± {cell.scores.std():.1f}" + ("" if n == usual else f" ({n} seeds)")


def table(cells, names, paper):
    """Lines of a Markdown table: a line a row, a column a name, the paper's figure below ours."""
    usual = max(len(cell.runs) for cell in cells.values())
    lines = ["| task | data | " + " | ".join(map(label, names)) + " | data's own |"]
    lines.append("|---" * (len(names) + 3) + "|")
    for row in dict.fromkeys(row for row, name in cells if name in names):
        here = {name: cells[row, name] for name in names if (row, name) in cells}
        best = max(cell.scores.mean() for cell in here.values())
        texts = dict.fromkeys(names, "")
        for name, cell in here.items():
            text = cell_text(cell, usual)
            texts[name] = f"**{text}**" if cell.scores.mean() == best else text
            if row[2] == "normal" and name in paper.get(row[:2], {}):
                texts[name] += f"<br>*paper {paper[row[:2]][name]}*"
        own = np.mean([run.data_score for cell in here.values() for run in cell.runs])
        lines.append(f"| {title(row)} | {row[3]} | {' | '.join(texts.values())} | {own:.1f} |")
    return lines


def seeds_table(cells):
    """Lines of a Markdown table: a line a cell, every seed's score in it."""
    lines = ["| task | method | seeds | scores | mean ± std | best single | language model |"]
    lines.append("|---" * 7 + "|")
    for (row, name), cell in cells.items():
        parts = [title(row), label(name), ", ".join(map(str, cell.seeds))]
        parts += [", ".join(f"{s:.1f}" for s in cell.scores), cell_text(cell, len(cell.runs))]
        parts += [f"{max(run.best_single for run in cell.runs):.1f}", Path(cell.runs[0].lm).stem]
        lines.append(f"| {' | '.join(parts)} |")
    return lines


def csv_text(cells, paper):
    """The cells as CSV, a line each."""
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(CSV.split(","))
    for ((task, ratio, mode, dataset), name), cell in cells.items():
        run, scores, n = cell.runs[0], cell.scores, len(cell.runs)
        line = [task, f"{ratio:g}", mode, dataset, name, run.steps, f"{scores.mean():.4f}"]
        line += [f"{scores.std():.4f}" if n > 1 else "", n, " ".join(map(str, cell.seeds))]
        line += [" ".join(f"{s:.4f}" for s in scores)]
        line += [f"{max(r.best_single for r in cell.runs):.4f}"]
        line += [f"{np.mean([r.data_score for r in cell.runs]):.4f}", run.lm]
        known = paper.get((task, ratio), {}) if mode == "normal" else {}
        out.writerow([*line, known.get(name, "")])
    return text.getvalue()


def draw_all(folder, cells, aggregates):
    """Draw every figure that these cells have something for. Returns {heading: [file's stem]}."""
    from experiments import figures

    names = sorted({name for _, name in cells}, key=place_of)
    colours, stems, drawn, lines = figures.colours_of(names), Counter(), {}, {}
    for row in dict.fromkeys(row for row, _ in cells):
        stem = f"{row[0]}-{row[1]:g}".replace("/", "-") + ("" if row[2] == "normal" else "-delayed")
        stems[stem] += 1
        stem += f"-{stems[stem]}" if stems[stem] > 1 else ""
        here = {name: cell for (r, name), cell in cells.items() if r == row}
        heading = f"{title(row)}, {row[3]}"
        figures.draw_curves(folder / f"curves-{stem}", heading, here, colours)
        drawn.setdefault("Learning curves", []).append(f"curves-{stem}")
        if talking := {n: cell for n, cell in here.items() if all(r.language for r in cell.runs)}:
            figures.draw_language(folder / f"language-{stem}", heading, talking, colours)
            drawn.setdefault("Language loss", []).append(f"language-{stem}")
    for ((task, ratio, mode, dataset), name), cell in reversed(cells.items()):  # ratios rise
        lines.setdefault((task, dataset, mode), {}).setdefault(name, []).append((ratio, cell))
    panels = []
    for (task, dataset, _), of_name in reversed(lines.items()):
        shown = {n: of_name[n] for n in names if len(of_name.get(n, ())) > 1}
        panels += [(f"{task}, {dataset}", shown)] if shown else []
    if panels:
        figures.draw_ratios(folder / "ratios", panels, colours)
        drawn["Score against the share of the data"] = ["ratios"]
    if aggregates:
        panels = [(listing(rows), means) for rows, means in aggregates]
        figures.draw_iqm(folder / "iqm", panels, colours)
        drawn["Interquartile means"] = ["iqm"]
    return drawn


def report_text(cells, remarks, aggregates, drawn, paper, command):
    """The whole report as Markdown."""
    names = sorted({name for _, name in cells}, key=place_of)
    compared = [name for name in names if name in NAMES]
    others = [name for name in names if name not in NAMES]
    runs = [run for cell in cells.values() for run in cell.runs]
    usual = max(len(cell.runs) for cell in cells.values())
    often = "" if usual == 1 else f", {usual} where it does not say otherwise"
    lms = ", ".join(sorted({Path(run.lm).stem for run in runs} - {"none"})) or "none"
    steps = {}
    for run in runs:
        if run.name == run.method:
            steps.setdefault(run.steps, set()).add(label(run.name))
    steps = "; ".join(f"{n} of {', '.join(sorted(steps[n]))}" for n in sorted(steps))
    made_by = ["", f"`{command}`", ""]
    text = ["# Report", "", f"{len(runs)} runs; language models: {lms}; steps: {steps}.", ""]
    text += [
        "A run's score is its best target's mean over the evaluations in the last 20 % of the "
        f"steps. A cell is mean ± standard deviation over seeds{often}; **bold** is a line's best "
        "mean. *Paper* is arXiv 2310.20587's figure: other data (D4RL v2, DQN replay) and GPT-2 "
        "small or medium, so it compares in kind only. The last column is the mean return of the "
        "data themselves, as a score.",
        "",
    ]
    if remarks:
        text += ["Missing or odd:", "", *[f"- {remark}" for remark in remarks], ""]
    if compared:
        text += ["## Methods", "", *table(cells, compared, paper), *made_by]
    if others:
        rows = {row for row, name in cells if name in others}
        there = {key: cell for key, cell in cells.items() if key[0] in rows}
        beside = [name for name in names if name == "lamo" or name in others]
        text += ["## Ablations and other settings", "", *table(there, beside, paper), *made_by]
    if aggregates:
        what = "Interquartile mean of all seeds' scores, with a bootstrap's interval: "
        what += f"{RESAMPLES:,} samples that draw seeds within each task (Agarwal et al. 2021)."
        text += ["## Over tasks", "", what, ""]
        for rows, means in aggregates:
            text += [f"Over {len(rows)} rows: {listing(rows)}.", ""]
            text += ["| method | IQM | 95 % interval |", "|---|---|---|"]
            for name, (mean, low, high) in means.items():
                interval = "one seed: none" if low is None else f"{low:.1f} to {high:.1f}"
                text.append(f"| {label(name)} | {mean:.1f} | {interval} |")
            text.append("")
        text += made_by[1:]
    for heading, stems in drawn.items():
        text += [f"## {heading}", "", *[f"![{stem}]({stem}.png)" for stem in stems], *made_by]
    text += ["## Every seed", "", *seeds_table(cells), *made_by]
    return "\n".join(text)


def main():
    args = tyro.cli(Arguments, description=__doc__)
    runs, remarks = read_runs(args.runs)
    cells, out, paper = make_cells(runs, remarks), Path(args.out), read_paper()
    for remark in remarks:
        print(remark)
    if not runs:
        where = ", ".join(args.runs)
        raise UserError(f"no finished run in {where}; give the folder that --out of runs named")
    aggregates = aggregate(cells)
    drawn = draw_all(out, cells, aggregates) if args.figures else {}
    command = f"python -m experiments.report {' '.join(args.runs)}"
    command += f" --out {args.out}" if args.out != Arguments.out else ""
    text = report_text(cells, remarks, aggregates, drawn, paper, command)
    write_atomically(out / "report.md", lambda file: file.write(text.encode()))
    write_atomically(out / "report.csv", lambda file: file.write(csv_text(cells, paper).encode()))
    print(f"{len(runs)} runs read: {out / 'report.md'}, {out / 'report.csv'}")


if __name__ == "__main__":
    run_command(main)
