"""Tables and figures from run folders, in the paper's layout.

    python -m experiments.report runs                  # writes report/report.md, CSV, PNG and SVG
    python -m experiments.report runs more --out both

Reads config.json and log.jsonl of every run, of train.py's and baselines.py's alike. A run's score
is computed anew from its log, by the protocol of run_folder.final_result; a table shows mean and
standard deviation over seeds. What is missing or odd is one line each, printed and in the report.
The paper's figures, from paper.txt beside this file, stand next to ours: they are of other data and
larger language models. Figures are drawn in experiments/figures.py.
"""

import csv
import io
from pathlib import Path

import numpy as np

from experiments.read_runs import make_cells, read_runs, rows_of, title, words
from files import check_writable, write_atomically
from plumbing import Parser, UserError, counted, printable, run_command

RESAMPLES = 10_000  # bootstrap samples of an interval
CONFIDENCE = 0.95  # of the intervals
PAPER = Path(__file__).with_name("paper.txt")
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


# --- the paper ------------------------------------------------------------------------------------


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


# --- aggregates ----------------------------------------------------------------------------------


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
    drawn = bootstrap(
        scores,
        statistic,
        n_resamples=resamples,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return mean, float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def aggregate(cells):
    """[(rows, {name: (IQM, low, high)})]: for sets of two rows or more, the names that have all.

    A set is what some method was run on. Rows whose scores are plain returns are in none.
    """
    of_name = {}
    for (row, name), cell in cells.items():
        if not cell.runs[0].plain:
            of_name.setdefault(name, set()).add(row)
    sets = {frozenset(rows) for rows in of_name.values() if len(rows) > 1}
    out = []
    for chosen in sorted(sets, key=lambda rows: (-len(rows), sorted(rows))):
        names = sorted((n for n, rows in of_name.items() if rows >= chosen), key=place_of)
        rows = [row for row in rows_of(cells) if row in chosen]
        out.append((rows, {n: iqm([cells[row, n].scores for row in rows]) for n in names}))
    return out


# --- writing -------------------------------------------------------------------------------------


def place_of(name):
    """Where a name stands: the paper's columns, then the ablations, then other settings."""
    method, _, variant = name.partition(", ")
    order = list(NAMES)
    return bool(variant), order.index(method) if method in order else len(order), name


def label(name):
    method, comma, variant = name.partition(", ")
    return NAMES.get(method, method) + comma + variant


def listing(rows):
    """Rows in words; with their data where two would read alike."""
    short = list(map(title, rows))
    return ", ".join(
        t if short.count(t) == 1 else f"{t} ({row[3]})" for t, row in zip(short, rows, strict=True)
    )


def cell_text(cell, all_seeds):
    """ "50.9 ± 3.1", with the number of seeds where it is not the usual one."""
    mean, std = cell.scores.mean(), cell.scores.std()
    n = len(cell.runs)
    if n == 1:
        return f"{mean:.1f} (1 seed)"
    return f"{mean:.1f} ± {std:.1f}" + ("" if n == all_seeds else f" ({n} seeds)")


def table(cells, names, paper):
    """Lines of a Markdown table: a line a row, a column a name, the paper's figure below ours."""
    usual = max(len(cell.runs) for cell in cells.values())
    lines = ["| task | data | " + " | ".join(map(label, names)) + " | data's own |"]
    lines.append("|---" * (len(names) + 3) + "|")
    for row in rows_of(cells):
        here = {name: cells[row, name] for name in names if (row, name) in cells}
        if not here:
            continue
        best = max(cell.scores.mean() for cell in here.values())
        texts = []
        for name in names:
            text = ""
            if name in here:
                text = cell_text(here[name], usual)
                text = f"**{text}**" if here[name].scores.mean() == best else text
                if row[2] == "normal" and name in paper.get(row[:2], {}):
                    text += f"<br>*paper {paper[row[:2]][name]}*"
            texts.append(text)
        own = np.mean([run.data_score for cell in here.values() for run in cell.runs])
        lines.append(f"| {title(row)} | {row[3]} | " + " | ".join(texts) + f" | {own:.1f} |")
    return lines


def seeds_table(cells):
    """Lines of a Markdown table: a line a cell, every seed's score in it."""
    lines = ["| task | method | seeds | scores | mean ± std | best single | language model |"]
    lines.append("|---" * 7 + "|")
    for row in rows_of(cells):
        for name in sorted((n for r, n in cells if r == row), key=place_of):
            cell = cells[row, name]
            scores = ", ".join(f"{s:.1f}" for s in cell.scores)
            seeds = ", ".join(map(str, cell.seeds))
            single = max(run.best_single for run in cell.runs)
            mean = cell_text(cell, len(cell.runs))
            parts = [title(row), label(name), seeds, scores, mean, f"{single:.1f}"]
            lines.append(f"| {' | '.join([*parts, Path(cell.runs[0].lm).stem])} |")
    return lines


def csv_text(cells, paper):
    """The cells as CSV, a line each."""
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    head = "task,ratio,mode,dataset,method,steps,mean,std,n,seeds,scores,best_single,data_score"
    out.writerow([*head.split(","), "lm", "paper_mean_std"])
    for row in rows_of(cells):
        for name in sorted((n for r, n in cells if r == row), key=place_of):
            cell = cells[row, name]
            run, scores = cell.runs[0], cell.scores
            known = paper.get(row[:2], {}).get(name, "") if row[2] == "normal" else ""
            out.writerow(
                [
                    *[row[0], f"{row[1]:g}", row[2], row[3], name, run.steps],
                    *[f"{scores.mean():.4f}", f"{scores.std():.4f}" if len(scores) > 1 else ""],
                    *[len(scores), " ".join(map(str, cell.seeds))],
                    " ".join(f"{s:.4f}" for s in scores),
                    f"{max(r.best_single for r in cell.runs):.4f}",
                    *[f"{np.mean([r.data_score for r in cell.runs]):.4f}", run.lm, known],
                ]
            )
    return text.getvalue()


def draw_all(folder, cells, aggregates):
    """Draw every figure that these cells have something for. Returns {heading: [file's stem]}."""
    from experiments import figures

    names = sorted({name for _, name in cells}, key=place_of)
    colours, stems, drawn = figures.colours_of(names), {}, {}
    for row in rows_of(cells):
        stem = f"{row[0]}-{row[1]:g}".replace("/", "-") + ("" if row[2] == "normal" else "-delayed")
        stem += f"-{n}" if (n := 1 + sum(s.startswith(stem) for s in stems.values())) > 1 else ""
        stems[row] = stem
        here = {label(n): (n, cells[row, n]) for n in names if (row, n) in cells}
        heading = f"{title(row)}, {row[3]}"
        figures.draw_curves(folder / f"curves-{stem}", heading, here, colours)
        drawn.setdefault("Learning curves", []).append(f"curves-{stem}")
        talking = {text: p for text, p in here.items() if all(run.language for run in p[1].runs)}
        if talking:
            figures.draw_language(folder / f"language-{stem}", heading, talking, colours)
            drawn.setdefault("Language loss", []).append(f"language-{stem}")
    panels = []
    for task, mode, dataset in dict.fromkeys((r[0], r[2], r[3]) for r in rows_of(cells)):
        lines = {}
        for name in names:
            ratios = sorted(
                row[1]
                for row, n in cells
                if n == name and (row[0], row[2], row[3]) == (task, mode, dataset)
            )
            if len(ratios) > 1:
                points = [(r, cells[(task, r, mode, dataset), name]) for r in ratios]
                lines[label(name)] = name, points
        if lines:
            panels.append((f"{task}, {dataset}", lines))
    if panels:
        figures.draw_ratios(folder / "ratios", panels, colours)
        drawn["Score against the share of the data"] = ["ratios"]
    if aggregates:
        panels = [
            (listing(rows), {label(n): (n, value) for n, value in means.items()})
            for rows, means in aggregates
        ]
        figures.draw_iqm(folder / "iqm", panels, colours)
        drawn["Interquartile means"] = ["iqm"]
    return drawn


def iqm_table(aggregates):
    """Lines of Markdown: a table for each set of rows."""
    lines = []
    for rows, means in aggregates:
        lines += [f"Over {len(rows)} rows: {listing(rows)}.", ""]
        lines += ["| method | IQM | 95 % interval |", "|---|---|---|"]
        for name, (mean, low, high) in means.items():
            interval = "one seed: none" if low is None else f"{low:.1f} to {high:.1f}"
            lines.append(f"| {label(name)} | {mean:.1f} | {interval} |")
        lines.append("")
    return lines


def report_text(cells, remarks, aggregates, drawn, paper, command):
    """The whole report as Markdown."""
    names = sorted({name for _, name in cells}, key=place_of)
    compared = [name for name in names if name in NAMES]
    others = [name for name in names if name not in NAMES]
    n_runs = sum(len(cell.runs) for cell in cells.values())
    usual = max(len(cell.runs) for cell in cells.values())
    often = "" if usual == 1 else f", {usual} where it does not say otherwise"
    lms = sorted({Path(run.lm).stem for cell in cells.values() for run in cell.runs} - {"none"})
    made_by = ["", f"`{command}`", ""]
    made_of = f"{counted(n_runs, 'run')}; language models: {', '.join(lms) or 'none'}; steps: "
    plain = {(label(n), c.runs[0].steps) for (_, n), c in cells.items() if ", " not in n}
    by_steps = {steps: sorted(n for n, s in plain if s == steps) for _, steps in plain}
    made_of += "; ".join(f"{s} of {', '.join(n)}" for s, n in sorted(by_steps.items())) + "."
    text = ["# Report", "", made_of, ""]
    text += [
        "A run's score is its best target's mean over the evaluations in the last 20 % of the "
        f"steps. A cell is mean ± standard deviation over seeds{often}; **bold** is a line's best "
        "mean. *Paper* is arXiv 2310.20587's figure: other data (D4RL v2, DQN replay) and GPT-2 "
        "small or medium, so it compares in kind only. The last column is the mean return of the "
        "data themselves, as a score.",
        "",
    ]
    if remarks:
        text += ["Missing or odd:", "", *[f"- {words(remark)}" for remark in remarks], ""]
    if compared:
        text += ["## Methods", "", *table(cells, compared, paper), *made_by]
    if others:
        beside = [*(["lamo"] if "lamo" in compared else []), *others]
        rows = {row for row, name in cells if name in others}
        there = {key: cell for key, cell in cells.items() if key[0] in rows}
        text += ["## Ablations and other settings", "", *table(there, beside, paper), *made_by]
    if aggregates:
        what = "Interquartile mean of all seeds' scores, with a bootstrap's interval: "
        what += f"{RESAMPLES:,} samples that draw seeds within each task (Agarwal et al. 2021)."
        text += ["## Over tasks", "", what, "", *iqm_table(aggregates), *made_by[1:]]
    for heading, stems in drawn.items():
        text += [f"## {heading}", ""]
        text += [f"![{stem}]({stem}.png)" for stem in stems] + made_by
    text += ["## Every seed", "", *seeds_table(cells), *made_by]
    return "\n".join(text)


def main():
    parser = Parser(prog="python -m experiments.report", description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", help="folders that hold runs' folders, or runs' folders themselves")
    add("--out", default="report", help="where it is written (default: report)")
    add("--no-figures", action="store_true", help="tables only, without matplotlib")
    arguments = parser.parse_args()
    check_writable(arguments.out, "--out")
    out = Path(arguments.out)
    runs, remarks = read_runs(arguments.runs)
    if not runs:
        for remark in remarks:
            print(printable(remark))
        where = ", ".join(arguments.runs)
        raise UserError(f"no finished run in {where}; give the folder that --out of runs named")
    cells = make_cells(runs, remarks)
    for remark in remarks:
        print(printable(remark))
    aggregates, paper = aggregate(cells), read_paper()
    out.mkdir(parents=True, exist_ok=True)
    drawn = {} if arguments.no_figures else draw_all(out, cells, aggregates)
    command = f"python -m experiments.report {' '.join(arguments.runs)}"
    command += f" --out {arguments.out}" if arguments.out != parser.get_default("out") else ""
    text = report_text(cells, remarks, aggregates, drawn, paper, command)
    write_atomically(out / "report.md", lambda file: file.write(text.encode()))
    write_atomically(out / "report.csv", lambda file: file.write(csv_text(cells, paper).encode()))
    n = sum(len(cell.runs) for cell in cells.values())
    made = f"{counted(n, 'run')} in {counted(len(cells), 'cell')}"
    print(f"{made}: {out / 'report.md'}, {out / 'report.csv'}")


if __name__ == "__main__":
    run_command(main)
