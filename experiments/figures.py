"""Figures of report.py: learning curves, score against ratio, language loss, aggregates.

Made for a column of a paper, 3.4 inches wide. Colours are told apart by colour-blind readers: the
compared methods have Okabe and Ito's, ablations and other settings Paul Tol's muted ones with
dashes. A method has the same colour in every figure of a report.
"""

import textwrap
from contextlib import contextmanager
from functools import partial

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from experiments.read_runs import NAMES, label
from utils import write_atomically

COLUMN = 3.4  # inches, a column's width
DPI = 250  # of the PNG
COLOURS = "#D55E00 #0072B2 #009E73 #CC79A7 #E69F00 #56B4E9 #8C6D31 #9A9A9A #000000"
COLOURS = dict(zip(NAMES, COLOURS.split(), strict=True))
COLOURS |= {"lamo-nolm": "#332288", "lamo-linear": "#4477AA", "lamo-freeze": "#117733"}
COLOURS |= {"lamo-full": "#882255", "lamo-random": "#AA4499"}
SPARE = ("#44AA99", "#999933", "#CC6677", "#DDCC77", "#661100", "#88CCEE")  # for other settings
DASHES = {"lamo-nolm": "--", "lamo-linear": ":", "lamo-freeze": "-.", "lamo-full": "--"}
MARKERS = "osD^vPX*<>"
STYLE = {"font.size": 8, "axes.titlesize": 8, "legend.fontsize": 7, "axes.grid": True}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.3}
STYLE |= {"grid.linewidth": 0.5, "lines.linewidth": 1.3, "lines.markersize": 3.5}
STYLE |= {"svg.hashsalt": "lamo"}  # the same figure, the same bytes


def colours_of(names):
    """A colour for every name of a report; past the spare ones they begin again."""
    others = [name for name in names if name not in COLOURS]
    return COLOURS | {name: SPARE[i % len(SPARE)] for i, name in enumerate(others)}


@contextmanager
def drawing(path, height, rows=1, columns=1, shared=False):
    """A figure, and its axes (rows, columns), to draw on; then writes path.png and path.svg."""
    with matplotlib.rc_context(STYLE):
        figure = Figure((COLUMN, height), layout="constrained")
        yield figure, figure.subplots(rows, columns, squeeze=False, sharex=shared, sharey=shared)
        for kind, metadata in (("png", None), ("svg", {"Date": None})):
            save = partial(figure.savefig, format=kind, dpi=DPI, metadata=metadata)
            write_atomically(path.with_name(f"{path.name}.{kind}"), save)


def band(axis, x, curves, text, colour, dashes="-"):
    """Mean of curves (seeds, points) over x, and their standard deviation as a band."""
    mean, std = np.mean(curves, axis=0), np.std(curves, axis=0)
    if len(x) == 1:  # neither a line nor a band; at the end, where it may lie on the edge
        std = std if len(curves) > 1 else None
        axis.errorbar(x, mean, std, fmt="o", color=colour, label=text, clip_on=False)
        return
    axis.plot(x, mean, dashes, color=colour, label=text)
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
    how = dict(loc="outside lower center", frameon=False, handlelength=1.8, columnspacing=1.0)
    figure.legend(shown.values(), shown.keys(), ncols=columns, **how)


def unit(cells):
    return "return" if any(cell.runs[0].plain for cell in cells) else "normalised score"


def progress(cell):
    """(shares of the steps in %, scores (seeds, evaluations)) of a cell."""
    run = cell.runs[0]
    x = [100 * step / run.steps for step, _ in run.curve]
    return x, [[score for _, score in run.curve] for run in cell.runs]


def draw_curves(path, heading, cells, colours):
    """Score against training, a small panel for each method, the first one's mean in all of them.

    cells: {name: Cell}. Runs of value-based methods have more steps, so the axis is the share of a
    run's steps.
    """
    columns = 3 if len(cells) > 4 else min(2, len(cells))
    lines, first = -(-len(cells) // columns), next(iter(cells))
    own = np.mean([run.data_score for cell in cells.values() for run in cell.runs])
    with drawing(path, 0.95 + 1.05 * lines, lines, columns, shared=True) as (figure, axes):
        line = "" if len(cells) == 1 else f"thin: {label(first)}; "
        figure.suptitle(f"{textwrap.fill(heading, 52)}\n{line}dotted: the data's own", fontsize=8)
        figure.supxlabel("share of the training steps (%)", fontsize=8)
        figure.supylabel(unit(cells.values()), fontsize=8)
        for axis in axes.flat[len(cells) :]:
            axis.set_axis_off()
        for i, (name, cell) in enumerate(cells.items()):
            axis = axes.flat[i]
            axis.axhline(own, color="#777777", linewidth=0.9, linestyle=(0, (1, 1.5)))
            if name != first:
                x, curves = progress(cells[first])
                thin = dict(color=colours[first], linewidth=0.8)
                axis.plot(x, np.mean(curves, axis=0), marker="_" if len(x) == 1 else None, **thin)
            band(axis, *progress(cell), label(name), colours[name])
            axis.set_xlim(0, 100)
            axis.set_xticks([0, 50, 100], ["0", "50", "100"])
            names = [textwrap.fill(part, 17) for part in label(name).split(", ")]
            axis.set_title(",\n".join(names), fontsize=7)
            axis.tick_params(labelbottom=i + columns >= len(cells), labelleft=i % columns == 0)
            shown = axis.get_xticklabels()  # none but below the lowest panels
            for number, side in zip(shown, ("left", "center", "right"), strict=False):
                number.set_ha(side)  # so that neighbours' do not touch


def draw_ratios(path, panels, colours):
    """Score against the share of the data, the paper's Figure 3, a panel for each task.

    panels: [(title, {name: [(ratio, Cell)]})], ratios rising.
    """
    with drawing(path, 2.45 * len(panels), len(panels)) as (figure, axes):
        for axis, (heading, lines) in zip(axes[:, 0], panels, strict=True):
            for i, (name, points) in enumerate(lines.items()):
                aside = 1.03 ** (i - (len(lines) - 1) / 2)  # so that bars do not cover each other
                x = [100 * ratio * aside for ratio, _ in points]
                mean = [cell.scores.mean() for _, cell in points]
                std = [cell.scores.std() for _, cell in points]
                how = dict(color=colours[name], marker=MARKERS[i % len(MARKERS)], capsize=2)
                axis.errorbar(x, mean, std, label=label(name), **how)
            ratios = sorted({ratio for points in lines.values() for ratio, _ in points})
            axis.set_xscale("log")
            axis.set_xticks([100 * r for r in ratios], [f"{100 * r:g}" for r in ratios])
            axis.minorticks_off()
            axis.set_xlabel("share of the dataset's trajectories (%)")
            axis.set_ylabel(unit(cell for points in lines.values() for _, cell in points))
            axis.set_title(textwrap.fill(heading, 44))
        legend_below(figure, axes)


def draw_language(path, heading, cells, colours):
    """Language loss against step, the paper's Figure 6a. cells: {name: Cell}."""
    with drawing(path, 2.45) as (figure, axes):
        axis = axes[0, 0]
        for name, cell in cells.items():
            curves = [dict(run.language) for run in cell.runs]
            steps = sorted(set.intersection(*map(set, curves)))  # --log-every may differ
            curves = [[curve[step] for step in steps] for curve in curves]
            band(axis, steps, curves, label(name), colours[name], DASHES.get(name, "-"))
        axis.set_xlabel("training step")
        axis.set_ylabel("language loss (nats a token)")
        axis.set_title(textwrap.fill(heading, 44))
        legend_below(figure, axes)


def draw_iqm(path, panels, colours):
    """Interquartile means with their intervals. panels: [(title, {name: iqm's})]."""
    panels = [(textwrap.fill(h.replace(" %", "\xa0%"), 52), means) for h, means in panels]
    heights = [0.65 + 0.13 * h.count("\n") + 0.2 * len(means) for h, means in panels]
    with drawing(path, sum(heights), len(panels)) as (_, axes):
        axes[0, 0].get_gridspec().set_height_ratios(heights)
        bar = dict(linewidth=4, alpha=0.35, solid_capstyle="butt")  # no longer than the interval
        for axis, (heading, means) in zip(axes[:, 0], panels, strict=True):
            for y, (name, (mean, low, high)) in enumerate(means.items()):
                if low is not None:
                    axis.plot([low, high], [y, y], color=colours[name], **bar)
                axis.plot(mean, y, "o", color=colours[name], markersize=4.5)
            axis.set_yticks(range(len(means)), list(map(label, means)), fontsize=7)
            axis.set_ylim(len(means) - 0.4, -0.6)
            axis.set_xlabel("IQM of normalised scores")
            axis.set_title(heading, loc="right")
