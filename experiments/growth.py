"""How the cost grows with the work: data, context, batch, model, environments.

    python -m experiments.growth --plot growth.png

One thing grows at a time, from where the others are as bench.py has them; the models are without
dropout. The exponent is the slope between two neighbours on logarithmic axes: 0 is free, 1 in
proportion, 2 quadratic. A machine has fixed costs, so it starts below 1 and the last one says what
growth costs from there on.
"""

import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from experiments.bench import SIZES, make_lamo, our_step, selection, synthetic
from experiments.measure import BATCH, CONTEXT, NAMES, seconds
from files import check_writable, write_atomically, write_json
from lora import merged
from plumbing import (
    Parser,
    check_package,
    choose,
    choose_device,
    choose_dtype,
    counted,
    run_command,
)
from windows import sample_windows

TRANSITIONS = (10_000, 100_000, 1_000_000, 10_000_000)
CONTEXTS = (5, 10, 20, 40, 80)
BATCHES = (8, 16, 32, 64, 128)
ENVIRONMENTS = (1, 5, 10, 20, 40, 80)


def grow(name, device, dtype, mode, repeats):
    """Yield (what grows, what is timed, its value, seconds); name: of the model, in SIZES."""
    for n in TRANSITIONS:
        data, generator = synthetic(n, device), torch.Generator(device).manual_seed(0)
        draw = partial(sample_windows, data, BATCH, CONTEXT, generator)
        yield "transitions", "a batch of windows", n, seconds(draw, 200, device)
    del data, draw
    for context in CONTEXTS:
        torch.compiler.reset()  # or it would compile for any context at once
        step = our_step(SIZES[name], 0, device, dtype, mode, context=context)
        yield "context", f"a step of {name}", context, seconds(step, repeats, device)
    for batch in BATCHES:
        torch.compiler.reset()
        step = our_step(SIZES[name], 0, device, dtype, mode, batch=batch)
        yield "batch", f"a step of {name}", batch, seconds(step, repeats, device)
    for size in SIZES.values():
        torch.compiler.reset()
        same = replace(size, config=replace(size.config, dropout=0.0))
        step = our_step(same, 0, device, dtype, mode)
        parameters = size.config.n_layer * 12 * size.config.n_embd**2
        yield "parameters of the blocks", "a step", parameters, seconds(step, 3, device)
    del step
    lamo = make_lamo(SIZES[name].config, device, dtype).eval()
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    with merged(lamo) if dtype == torch.float32 else nullcontext():
        for n in ENVIRONMENTS:
            select = selection(lamo, n, device, autocast)
            yield "environments", f"actions by {name}", n, seconds(select, 2 * repeats, device)


def short(n):
    """A number for an axis: 85M, 10K, 64."""
    return next(
        f"{n / size:,.0f}{unit}"
        for size, unit in ((10**6, "M"), (10**3, "K"), (1, ""))
        if n >= size
    )


def plot(rows, path):
    """A panel for each thing that grows, both axes logarithmic. Needs matplotlib."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    kinds = list(dict.fromkeys(row["grows"] for row in rows))
    lines = -(-len(kinds) // 3)
    figure, axes = plt.subplots(lines, 3, figsize=(9, 3 * lines), layout="constrained")
    for axis in axes.flat[len(kinds) :]:
        axis.set_axis_off()
    for axis, kind in zip(axes.flat, kinds, strict=False):
        x = [row["value"] for row in rows if row["grows"] == kind]
        y = [row["ms"] for row in rows if row["grows"] == kind]
        linear = [y[-1] * value / x[-1] for value in x]
        axis.loglog(x, linear, ":", color="#777777", label="in proportion")
        axis.loglog(x, y, "o-", color="#0072B2", label="measured")
        axis.minorticks_off()
        axis.set_xticks(x, [short(value) for value in x])
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_ylim(min(y) / 2, max(y) * 2)
        axis.set_xlabel(kind)
        axis.set_ylabel("milliseconds")
        axis.set_title(next(row["timed"] for row in rows if row["grows"] == kind), fontsize=11)
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=9)
    write_atomically(path, partial(figure.savefig, format="png", dpi=150))


def main():
    parser = Parser(prog="python -m experiments.growth", description=__doc__)
    add = parser.add_argument
    add("--model", help=f"one of {', '.join(SIZES)} (default: mini on a CPU, gpt2 on a GPU)")
    add("--device", default="auto", help="cuda or cpu (default: cuda if there is one)")
    add("--json", metavar="FILE", help="write the rows there, too")
    add("--plot", metavar="FILE", help="draw them there, as PNG")
    args = parser.parse_args()
    for flag, path in (("--json", args.json), ("--plot", args.plot)):
        if path:  # better now than after the measuring
            check_writable(Path(path).parent, flag)
    if args.plot:
        check_package("matplotlib", "--plot")
    device = choose_device(args.device)
    name = args.model or ("gpt2" if device.type == "cuda" else "mini")
    choose("model", name, SIZES)
    dtype = torch.bfloat16 if choose_dtype(device) == "bf16" else torch.float32
    mode, repeats = ("default", 50) if device.type == "cuda" else ("eager", SIZES[name].repeats)
    threads = counted(torch.get_num_threads(), "thread")
    print(f"{device}, {threads}, {NAMES[dtype]}, torch {torch.__version__}")
    print(f"{'what grows':<26}{'to':>12}  {'timed':<22}{'ms':>11}{'exponent':>10}")
    rows = []
    for grows, timed, value, taken in grow(name, device, dtype, mode, repeats):
        row = {"grows": grows, "timed": timed, "value": value, "ms": 1000 * taken, "exponent": None}
        if rows and rows[-1]["grows"] == grows:
            growth = math.log(row["ms"] / rows[-1]["ms"])
            row["exponent"] = growth / math.log(value / rows[-1]["value"])
        rows.append(row)
        exponent = "" if row["exponent"] is None else f"{row['exponent']:.2f}"
        print(f"{grows:<26}{value:>12,}  {timed:<22}{row['ms']:>11.3f}{exponent:>10}", flush=True)
    if args.json:
        write_json(args.json, rows)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    run_command(main)
