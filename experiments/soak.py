"""Does a long run stay flat? Its memory, open files and time a step, watched from outside.

    python -m experiments.soak --steps 20000 --out soak

A real run of train.py, in a process of its own, is looked at every SECONDS. Time is CPU time, which
other programs on the machine do not stretch; rows of the log that an evaluation falls into are left
out of it. Writes what was seen as JSON (soak.json) and as a picture (soak.png).
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil

from files import check_writable, write_atomically, write_json
from plumbing import Parser, UserError, check_package, run_command, split_flags
from run_folder import code_version

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 0.5  # between two looks
FLAGS = "--env reacher2d --seed 0"  # of the run
EVALUATIONS = 20  # in it
PARTS = 20  # of the run, each with its medians


def last_step(log):
    """The step of the log's last row of losses, 0 if there is none yet."""
    rows = log.read_text().splitlines() if log.is_file() else []
    return next((json.loads(r)["step"] for r in reversed(rows) if '"seconds"' in r), 0)


def watch(command, log):
    """Run a command and look at it until it ends. Returns a list of dictionaries, one a look.

    Raises UserError if it fails.
    """
    looks, started = [], time.time()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
        seen = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                with seen.oneshot():
                    cpu, memory = seen.cpu_times(), seen.memory_info().rss
                    look = {"seconds": time.time() - started, "cpu": cpu.user + cpu.system}
                    look |= {"memory": memory, "files": seen.num_fds()}
                    look |= {"threads": seen.num_threads(), "step": last_step(log)}
            except psutil.Error:  # it has just ended
                break
            looks.append(look)
            time.sleep(SECONDS)
    if process.returncode:
        raise UserError(f"the run failed with exit code {process.returncode}")
    return looks


def summarise(looks, steps, every, evaluated):
    """Medians of each part of a run: a list of dictionaries.

    steps: of the whole run; every: steps of a log row; evaluated: steps between evaluations.
    """
    first = {}  # the first look at each row of the log
    for look in looks:
        first.setdefault(look["step"], look)
    times = {}  # row's step: CPU seconds a step
    for step, look in first.items():
        before = first.get(step - every)
        # else an evaluation was in between, or the looks were too far apart to tell
        known = before and look["seconds"] - before["seconds"] > 4 * SECONDS
        if known and (step - every) % evaluated:
            times[step] = (look["cpu"] - before["cpu"]) / every
    parts = []
    for i in range(PARTS):
        low, high = steps * i / PARTS, steps * (i + 1) / PARTS
        inside = [look for look in looks if look["step"] and low < look["step"] <= high]
        timed = [t for step, t in times.items() if low < step <= high]
        part = {"until": high, "cpu_ms_a_step": 1000 * statistics.median(timed) if timed else None}
        for name in ("memory", "files", "threads"):
            part[name] = statistics.median(look[name] for look in inside) if inside else None
        part["memory_peak"] = max((look["memory"] for look in inside), default=None)
        parts.append(part)
    return parts


def draw(parts, path):
    """Three small pictures over the steps: memory, open files and threads, time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 2.4), layout="constrained")
    panels = {
        "resident memory, MiB": {
            "peak": ("memory_peak", "#999999"),
            "median": ("memory", "#0072B2"),
        },
        "open files and threads": {
            "files": ("files", "#D55E00"),
            "threads": ("threads", "#009E73"),
        },
        "CPU time a step, ms": {"median": ("cpu_ms_a_step", "#0072B2")},
    }
    for axis, (title, lines) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for label, (name, colour) in lines.items():
            known = [part for part in parts if part[name] is not None]
            values = [part[name] / (2**20 if "memory" in name else 1) for part in known]
            steps = [part["until"] / 1000 for part in known]
            axis.plot(steps, values, "o-", color=colour, markersize=2.5, linewidth=1, label=label)
        axis.set_title(title, fontsize=9)
        axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
        axis.set_xlabel("thousand steps", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="lower right")
    write_atomically(path, partial(figure.savefig, format="png", dpi=150))


def main():
    parser = Parser(prog="python -m experiments.soak", description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000, help="of the run (default: 20000)")
    parser.add_argument("--flags", default=FLAGS, help=f"train.py's, in quotes (default: {FLAGS})")
    parser.add_argument("--out", default="soak", help="a folder for all of it (default: soak)")
    arguments = parser.parse_args()
    if arguments.steps < 10 * EVALUATIONS:
        raise UserError(f"--steps is {arguments.steps}, but must be at least {10 * EVALUATIONS}")
    check_writable(arguments.out, "--out")
    check_package("matplotlib", "the picture")
    out = Path(arguments.out).absolute()
    evaluated = arguments.steps // EVALUATIONS
    every = max(1, evaluated // 10)
    command = [sys.executable, "train.py", *split_flags(arguments.flags), "--name", "run"]
    command += ["--steps", str(arguments.steps), "--eval-every", str(evaluated)]
    command += ["--log-every", str(every), "--out", str(out)]
    if (out / "run").exists():
        raise UserError(f"{out / 'run'} exists already; give another --out")
    looks = watch(command, out / "run" / "log.jsonl")
    parts = summarise(looks, arguments.steps, every, evaluated)
    about = {"command": shlex.join(["python", *sys.orig_argv[1:]]), "git": code_version()}
    about["parts"] = parts
    write_json(out / "soak.json", about)
    draw(parts, out / "soak.png")
    print(f"{'until':>7} {'memory':>9} {'peak':>9} {'files':>6} {'threads':>8} {'CPU a step':>11}")
    for part in parts:
        if part["memory"] is None:
            continue
        sizes = f"{part['memory'] / 2**20:5.0f} MiB {part['memory_peak'] / 2**20:5.0f} MiB"
        speed = f"{part['cpu_ms_a_step']:8.1f} ms" if part["cpu_ms_a_step"] else ""
        print(f"{part['until']:7.0f} {sizes} {part['files']:6.0f} {part['threads']:8.0f} {speed}")


if __name__ == "__main__":
    run_command(main)
