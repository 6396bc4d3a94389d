"""Figures of report.py: learning curves, scores by ratio and by seed, language loss, IQM.

Made for a column of a paper. A method has the same colour in every figure of a report. A cell is a
list of report.py's Runs, a seed each.
"""

import textwrap
from contextlib import contextmanager

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from utils import write_atomically

COLUMN, DPI = 3.4, 160  # inches, a column's width; dots an inch
# Okabe and Ito's, then Paul Tol's, which colour-blind readers tell apart
COLOURS = ["#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#9A9A9A"]
COLOURS += ["#332288", "#117733", "#882255", "#AA4499", "#4477AA", "#8C6D31", "#44AA99", "#CC6677"]
STYLE = {"font.size": 8, "axes.titlesize": 8, "legend.fontsize": 7, "figure.titlesize": 8}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
STYLE |= {"grid.alpha": 0.3, "grid.linewidth": 0.5, "lines.linewidth": 1.3, "lines.markersize": 3.5}


@contextmanager
def drawing(path, height, panels=1, columns=1, width=COLUMN, legend=0, **more):
    """A figure, and a list of its axes, to draw on; then writes a PNG. height, width: in inches;
    legend: the number of its entries, below the axes."""
    with matplotlib.rc_context(STYLE):
        figure = Figure((width, height + 0.08 * legend), layout="constrained")
        axes = figure.subplots(-(-panels // columns), columns, squeeze=False, **more).flat
        for axis in axes[panels:]:
            axis.set_axis_off()
        for axis in axes[max(0, panels - columns) : panels]:  # where sharex hides it, below is none
            axis.tick_params(labelbottom=True)
        yield figure, axes[:panels]
        if legend:
            figure.legend(loc="outside lower center", ncols=2, frameon=False)
        write_atomically(path, lambda file: figure.savefig(file, dpi=DPI))


def band(axis, curves, name, colour):
    """Mean of curves (seeds, points, x and y), and their standard deviation as a band."""
    x, y = np.array(curves).transpose(2, 0, 1)  # (seeds, points) each
    mean, std = y.mean(0), y.std(0)
    axis.plot(x[0], mean, color=colour, label=name, marker="o" if len(mean) == 1 else None)
    axis.fill_between(x[0], mean - std, mean + std, color=colour, alpha=0.13, linewidth=0)


def draw_curves(path, heading, cells, colours):
    """Score against training, a small panel for each method, the first one's mean in all of them.
    cells: {name: cell}. Runs of value-based methods have more steps, so the axis is the share of a
    run's steps."""
    columns, first = min(3, len(cells)), next(iter(cells))
    own = np.mean([run.data_score for cell in cells.values() for run in cell])
    height, shared = 0.95 + 1.05 * -(-len(cells) // columns), dict(sharex=True, sharey=True)
    with drawing(path, height, len(cells), columns, **shared) as (figure, axes):
        figure.suptitle(f"{textwrap.fill(heading, 52)}\nthin: {first}; dotted: the data's own")
        figure.supxlabel("share of the training steps (%)", fontsize=8)
        figure.supylabel("score", fontsize=8)
        for axis, (name, cell) in zip(axes, cells.items(), strict=True):
            axis.axhline(own, color="#777777", linewidth=0.9, linestyle=":")
            mean = np.mean([run.curve for run in cells[first]], axis=0)  # (evaluations, 2)
            axis.plot(*mean.T, color=colours[first], linewidth=0.8)
            band(axis, [run.curve for run in cell], name, colours[name])
            axis.set_xticks([0, 50, 100], ["0", "50", "100"], fontsize=7)
            axis.set_title(textwrap.fill(name, 18), fontsize=7)


def draw_ratios(path, heading, lines, colours):
    """Score against the share of the data, the paper's Figure 3. lines: {name: {ratio: cell}}."""
    with drawing(path, 2.4, legend=len(lines)) as (_, (axis,)):
        for i, (name, points) in enumerate(lines.items()):
            x = [100 * ratio * 1.02**i for ratio in points]  # so that no bar covers another
            scores = [[run.score for run in cell] for cell in points.values()]
            mean, std = list(map(np.mean, scores)), list(map(np.std, scores))
            axis.errorbar(x, mean, std, color=colours[name], marker="o", capsize=2, label=name)
        ratios = sorted({ratio for points in lines.values() for ratio in points})
        axis.set(xlabel="share of the dataset's trajectories (%)", ylabel="score", title=heading)
        axis.set_xscale("log")
        axis.set_xticks([100 * r for r in ratios], [f"{100 * r:g}" for r in ratios])
        axis.minorticks_off()


def draw_language(path, heading, cells, colours):
    """Language loss against step, the paper's Figure 6a. cells: {name: cell}."""
    with drawing(path, 2.4, legend=len(cells)) as (_, (axis,)):
        for name, cell in cells.items():
            # --log-every may differ between seeds
            steps = set.intersection(*({step for step, _ in run.language} for run in cell))
            curves = [[point for point in run.language if point[0] in steps] for run in cell]
            band(axis, curves, name, colours[name])
        axis.set(xlabel="training step", ylabel="language loss (nats a token)")
        axis.set_title(textwrap.fill(heading, 44))


def draw_iqm(path, heading, panels, colours):
    """Interquartile means with their intervals. panels: {title: {name: (mean, low, high)}}."""
    titles = [textwrap.fill(rows.replace(" %", "\xa0%"), 52) for rows in panels]
    sizes = [0.65 + 0.0025 * len(rows) + 0.2 * len(panels[rows]) for rows in panels]
    with drawing(path, sum(sizes), len(panels), height_ratios=sizes) as (_, axes):
        for axis, title, means in zip(axes, titles, panels.values(), strict=True):
            for y, (name, (mean, low, high)) in enumerate(means.items()):
                bar = dict(color=colours[name], linewidth=4, alpha=0.35, solid_capstyle="butt")
                if low is not None:
                    axis.plot([low, high], [y, y], **bar)
                axis.plot(mean, y, "o", color=colours[name], markersize=4.5)
            axis.set_yticks(range(len(means)), list(means), fontsize=7)
            axis.set_ylim(len(means) - 0.4, -0.6)
            axis.set_xlabel(heading)
            axis.set_title(title, loc="right")


def draw_seeds(path, heading, panels, colours):
    """Every seed's score by method, and a line through those of the same episodes. panels:
    {title: ({name: cell}, {name: the paper's "mean ± std"})}."""
    names = [name for name in colours if any(name in cells for cells, _ in panels.values())]
    columns = min(3, len(panels))
    height = (0.75 + 0.3 * len(names)) * -(-len(panels) // columns)
    size = dict(columns=columns, width=COLUMN * min(2, columns), sharey=True)
    with drawing(path, height, len(panels), **size) as (figure, axes):
        figure.supxlabel(f"{heading}; bar: mean; diamond: the paper's mean ± std", fontsize=7)
        axes[0].set_yticks(range(len(names)), [textwrap.fill(name, 20) for name in names])
        axes[0].set_ylim(len(names) - 0.4, -0.6)
        for axis, (title, (cells, paper)) in zip(axes, panels.items(), strict=True):
            axis.set_title(textwrap.fill(title, 30), fontsize=7)
            axis.tick_params(labelsize=7)
            lines = {}  # of each draw of episodes: its points
            for name, cell in cells.items():
                y, scores = names.index(name), [run.score for run in cell]
                for run in cell:
                    lines.setdefault(run.draw, []).append((run.score, y))
                axis.plot(scores, [y] * len(cell), "o", color=colours[name], alpha=0.7)
                axis.plot(np.mean(scores), y, "|k", markersize=13, markeredgewidth=1.5)
                if name in paper:
                    mean, std = map(float, paper[name].split(" ± "))
                    bar = dict(xerr=std, fmt="D", linewidth=0.9, markerfacecolor="white")
                    axis.errorbar(mean, y + 0.3, color="#777777", **bar)
            for line in lines.values():
                axis.plot(*np.array(line).T, color="#999999", linewidth=0.5, zorder=1)
