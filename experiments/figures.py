"""Figures of report.py: learning curves, score against ratio, language loss, aggregates.

Made for a column of a paper, 3.4 inches wide. Colours are told apart by colour-blind readers: the
compared methods have Okabe and Ito's, ablations and other settings Paul Tol's muted ones with
dashes. A method has the same colour in every figure of a report. Needs matplotlib.
"""

import textwrap
from contextlib import contextmanager
from functools import partial

import numpy as np

from files import write_atomically
from plumbing import UserError

COLUMN = 3.4  # inches, a column's width
DPI = 250  # of the PNG
COLOURS = {
    "lamo": "#D55E00",
    "dt": "#0072B2",
    "wiki-rl": "#009E73",
    "cql": "#CC79A7",
    "iql": "#E69F00",
    "td3bc": "#56B4E9",
    "bcq": "#8C6D31",
    "nfq": "#9A9A9A",
    "bc": "#000000",
    "lamo-nolm": "#332288",
    "lamo-linear": "#4477AA",
    "lamo-freeze": "#117733",
    "lamo-full": "#882255",
    "lamo-random": "#AA4499",
}
SPARE = ("#44AA99", "#999933", "#CC6677", "#DDCC77", "#661100", "#88CCEE")  # for other settings
DASHES = {"lamo-nolm": "--", "lamo-linear": ":", "lamo-freeze": "-.", "lamo-full": "--"}
MARKERS = "osD^vPX*<>"


def colours_of(names):
    """A colour for every name of a report; past the spare ones they begin again."""
    others = [name for name in names if name not in COLOURS]
    return COLOURS | {name: SPARE[i % len(SPARE)] for i, name in enumerate(others)}


@contextmanager
def drawing(path, height, rows=1, columns=1, **shared):
    """Axes (rows, columns) to draw on; then writes path.png and path.svg, whole or not at all."""
    try:
        import matplotlib
    except ImportError as error:
        why = "figures need matplotlib: pip install -r requirements-experiments.txt"
        raise UserError(f"{why}, or --no-figures") from error
    from matplotlib.figure import Figure

    style = {
        "font.size": 8,
        "axes.titlesize": 8,
        "legend.fontsize": 7,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "grid.linewidth": 0.5,
        "lines.linewidth": 1.3,
        "lines.markersize": 3.5,
        "svg.hashsalt": "lamo",  # the same figure, the same bytes
    }
    with matplotlib.rc_context(style):
        figure = Figure((COLUMN, height), layout="constrained")
        yield figure, figure.subplots(rows, columns, squeeze=False, **shared)
        for kind in ("png", "svg"):
            metadata = {"Date": None} if kind == "svg" else None
            save = partial(figure.savefig, format=kind, dpi=DPI, metadata=metadata)
            write_atomically(path.with_name(f"{path.name}.{kind}"), save)


def band(axis, x, curves, label, colour, dashes="-"):
    """Mean of curves (seeds, points) over x, and their standard deviation as a band."""
    mean, std = np.mean(curves, axis=0), np.std(curves, axis=0)
    if len(x) == 1:  # neither a line nor a band; at the end, where it may lie on the edge
        std = std if len(curves) > 1 else None
        axis.errorbar(x, mean, std, fmt="o", color=colour, label=label, clip_on=False)
        return
    axis.plot(x, mean, dashes, color=colour, label=label)
    if len(curves) > 1:
        axis.fill_between(x, mean - std, mean + std, color=colour, alpha=0.13, linewidth=0)


def legend_below(figure, axes):
    """One legend of all axes below them, in as many columns as its words leave room for."""
    shown = {}
    for axis in axes.flat:
        shown |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    longest = max(map(len, shown))
    columns = 4 if longest < 8 else 3 if longest < 13 else 2 if longest < 25 else 1
    figure.set_figheight(figure.get_figheight() + 0.15 * -(-len(shown) // columns))
    figure.legend(
        shown.values(),
        shown.keys(),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        handlelength=1.8,
        columnspacing=1.0,
    )


def draw_curves(path, heading, cells, colours):
    """Score against training, a small panel for each method, the first one's mean in all of them.

    cells: {label: (name, Cell)}. Runs of value-based methods have more steps, so the axis is the
    share of a run's steps.
    """
    columns = 3 if len(cells) > 4 else min(2, len(cells))
    lines = -(-len(cells) // columns)
    (first, (reference, leader)), *_ = cells.items()
    own = np.mean([run.data_score for _, cell in cells.values() for run in cell.runs])
    plain = any(cell.runs[0].plain for _, cell in cells.values())
    with drawing(path, 0.95 + 1.05 * lines, lines, columns, sharex=True, sharey=True) as drawn:
        figure, axes = drawn
        line = "" if len(cells) == 1 else f"thin: {first}; "
        figure.suptitle(f"{textwrap.fill(heading, 52)}\n{line}dotted: the data's own", fontsize=8)
        figure.supxlabel("share of the training steps (%)", fontsize=8)
        figure.supylabel("return" if plain else "normalised score", fontsize=8)
        for axis in axes.flat[len(cells) :]:
            axis.set_axis_off()
        for i, (text, (name, cell)) in enumerate(cells.items()):
            axis = axes.flat[i]
            axis.axhline(own, color="#777777", linewidth=0.9, linestyle=(0, (1, 1.5)))
            if name != reference:
                x, curves = progress(leader)
                thin = dict(color=colours[reference], linewidth=0.8)
                axis.plot(x, np.mean(curves, axis=0), marker="_" if len(x) == 1 else None, **thin)
            x, curves = progress(cell)
            band(axis, x, curves, text, colours[name])
            axis.set_xlim(0, 100)
            axis.set_xticks([0, 50, 100], ["0", "50", "100"])
            names = [textwrap.fill(part, 17) for part in text.split(", ")]
            axis.set_title(",\n".join(names), fontsize=7)
            axis.tick_params(labelbottom=i + columns >= len(cells), labelleft=i % columns == 0)
            shown = axis.get_xticklabels()  # none but below the lowest panels
            for number, side in zip(shown, ("left", "center", "right"), strict=False):
                number.set_ha(side)  # so that neighbours' do not touch


def progress(cell):
    """(shares of the steps in %, scores (seeds, evaluations)) of a cell."""
    run = cell.runs[0]
    x = [100 * step / run.steps for step, _ in run.curve]
    return x, [[score for _, score in run.curve] for run in cell.runs]


def draw_ratios(path, panels, colours):
    """Score against the share of the data, the paper's Figure 3, a panel for each task.

    panels: [(title, {label: (name, [(ratio, Cell)])})], ratios rising.
    """
    with drawing(path, 2.45 * len(panels), len(panels)) as (figure, axes):
        for axis, (heading, lines) in zip(axes[:, 0], panels, strict=True):
            ratios = sorted({r for _, points in lines.values() for r, _ in points})
            for i, (text, (method, points)) in enumerate(lines.items()):
                aside = 1.03 ** (i - (len(lines) - 1) / 2)  # so that bars do not cover each other
                axis.errorbar(
                    [100 * ratio * aside for ratio, _ in points],
                    [cell.scores.mean() for _, cell in points],
                    [cell.scores.std() for _, cell in points],
                    color=colours[method],
                    marker=MARKERS[i % len(MARKERS)],
                    capsize=2,
                    label=text,
                )
            axis.set_xscale("log")
            axis.set_xticks([100 * r for r in ratios], [f"{100 * r:g}" for r in ratios])
            axis.minorticks_off()
            axis.set_xlabel("share of the dataset's trajectories (%)")
            plain = any(cell.runs[0].plain for _, points in lines.values() for _, cell in points)
            axis.set_ylabel("return" if plain else "normalised score")
            axis.set_title(textwrap.fill(heading, 44))
        legend_below(figure, axes)


def draw_language(path, heading, cells, colours):
    """Language loss against step, the paper's Figure 6a. cells: {label: (name, Cell)}."""
    with drawing(path, 2.45) as (figure, axes):
        axis = axes[0, 0]
        for text, (method, cell) in cells.items():
            # a run that was killed and resumed has other rows, but ends where the others end
            steps = sorted(set.intersection(*(set(dict(run.language)) for run in cell.runs)))
            curves = [[dict(run.language)[step] for step in steps] for run in cell.runs]
            band(axis, steps, curves, text, colours[method], DASHES.get(method, "-"))
        axis.set_xlabel("training step")
        axis.set_ylabel("language loss (nats a token)")
        axis.set_title(textwrap.fill(heading, 44))
        legend_below(figure, axes)


def draw_iqm(path, panels, colours):
    """Interquartile means with their intervals. panels: [(title, {label: (name, iqm's)})]."""
    whole = [(heading.replace(" %", "\xa0%"), lines) for heading, lines in panels]  # on one line
    panels = [(textwrap.fill(heading, 52), lines) for heading, lines in whole]
    heights = [0.65 + 0.13 * heading.count("\n") + 0.2 * len(lines) for heading, lines in panels]
    with drawing(path, sum(heights), len(panels)) as (_, axes):
        axes[0, 0].get_gridspec().set_height_ratios(heights)
        bar = dict(linewidth=4, alpha=0.35, solid_capstyle="butt")  # no longer than the interval
        for axis, (heading, lines) in zip(axes[:, 0], panels, strict=True):
            for y, (method, (mean, low, high)) in enumerate(lines.values()):
                if low is not None:
                    axis.plot([low, high], [y, y], color=colours[method], **bar)
                axis.plot(mean, y, "o", color=colours[method], markersize=4.5)
            axis.set_yticks(range(len(lines)), list(lines), fontsize=7)
            axis.set_ylim(len(lines) - 0.4, -0.6)
            axis.set_xlabel("IQM of normalised scores")
            axis.set_title(heading, loc="right")
