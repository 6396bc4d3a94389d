"""A run of a sweep: its name and command, what became of it, and how long a step of it takes."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import settings
from experiments import baselines
from files import check_size, parse_json, read_json, write_json
from plumbing import UserError, printable
from run_folder import hold, let_go

ROOT = Path(__file__).resolve().parent.parent
ALGORITHMS = ("bc", "td3bc", "iql", "cql", "bcq", "nfq")  # the others are train.py's methods
PROBE_STEPS = 20  # of a run that only measures how long a step takes
SAID_AGAIN = ("--env-module", "--skip-bad-steps")  # what train.py --resume takes
FAILING = {}  # kinds of run that failed so in this process, and why


def name_of(run):
    """The run's folder in --out: its place in the grid."""
    parts = [run["env"], run["method"], f"{run['ratio']:g}"]
    if run["lm"] != "auto":
        parts.append(Path(run["lm"]).name.removesuffix(".safetensors"))
    return "-".join([*parts, f"s{run['seed']}"]).replace("/", "-")


def command_of(run, out, flags):
    """The process of a run that begins: a list of words."""
    if run["method"] in ALGORITHMS:
        command = ["-m", "experiments.baselines", "--algo", run["method"]]
    else:
        command = ["train.py", "--method", run["method"]]
    command += ["--env", run["env"], "--ratio", str(run["ratio"]), "--seed", str(run["seed"])]
    if run["lm"] != "auto":
        command += ["--lm", run["lm"]]
    place = Path(out).absolute()  # runs start in the root, and need not know where that is
    place = place.relative_to(ROOT) if place.is_relative_to(ROOT) else place
    return [sys.executable, *command, "--out", str(place), *flags]


def state_of(folder):
    """What has become of a run: "finished", "interrupted" or "new"."""
    if (folder / "result.json").is_file():
        return "finished"
    return "interrupted" if folder.exists() else "new"


def begin_or_go_on(run, out, flags):
    """The process that brings a run to its end, whatever has become of it so far.

    Raises UserError where another process is still at work on a run that would begin anew.
    """
    folder = Path(out) / name_of(run)
    if state_of(folder) == "interrupted":
        if run["method"] not in ALGORITHMS and (folder / "config.json").is_file():
            typed = values_of(flags)
            again = [w for flag in SAID_AGAIN if flag in typed for w in (flag, *typed[flag])]
            return [sys.executable, "train.py", "--resume", str(folder.absolute()), *again]
        if (folder / "config.json").is_file():
            hold(folder)
            let_go(folder)
        shutil.rmtree(folder)  # a baseline's, or one that had not really begun
    return [*command_of(run, out, flags), "--name", name_of(run)]


def carry_out(run, out, flags, threads, at_work=None):
    """Run it in a process, its output in out/logs. Returns the exit code.

    at_work: a list that the process is added to, by whoever is to tell it of a stop: then it is no
    part of the terminal's group, from which a Ctrl-C would reach it a second time.
    """
    log = Path(out) / "logs" / f"{name_of(run)}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        command = begin_or_go_on(run, out, flags)
    except UserError as error:
        with open(log, "a") as file:  # whose beginning is of the process that is at work
            file.write(f"error: {error}\n")
        return 2
    if "--resume" not in command:
        write_json(log.with_suffix(".json"), {"flags": list(flags)})
    with open(log, "w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=at_work is not None,
        )
        if at_work is not None:
            at_work.append(process)
        return process.wait()


def flags_begun(run, out):
    """--flags that a run was begun with, by what carry_out wrote; none where it wrote nothing."""
    try:
        flags = read_json(Path(out) / "logs" / f"{name_of(run)}.json")["flags"]
    except (OSError, ValueError, KeyError):
        return []
    return [word for word in flags if isinstance(word, str)] if isinstance(flags, list) else []


def last_lines(run, out, n=3):
    """The end of a run's output, without its bars."""
    log = Path(out) / "logs" / f"{name_of(run)}.txt"
    text = log.read_text(errors="replace") if log.is_file() else ""
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return [printable(line) for line in lines if "it/s" not in line and "s/it" not in line][-n:]


def progress_of(run, out):
    """(steps done, steps in all, seconds a step) by a run's own files; zeros if it has none yet."""
    folder = Path(out) / name_of(run)
    try:
        steps = int(read_json(folder / "config.json")["settings"]["steps"])
        check_size(folder / "log.jsonl")
        rows = (folder / "log.jsonl").read_text().splitlines()
    except (OSError, ValueError, KeyError, TypeError):
        return 0, 0, 0.0
    for line in reversed(rows):
        try:
            row = parse_json(line)
            return int(row["step"]), steps, float(row["seconds"]) / int(row["step"])
        except (ValueError, KeyError, TypeError, ZeroDivisionError):
            continue  # it is being written, or of an evaluation
    return 0, steps, 0.0


def seconds_a_step(run, out, flags, threads):
    """Measured on this machine by a run of PROBE_STEPS steps, kept in out/probes.json.

    Returns None, and says why, where such a run fails: so would the real one. Seeds are alike in
    that; ratios are not, for a dataset may hold a part only.
    """
    kept = Path(out) / "probes.json"
    try:
        known = {kind: float(seconds) for kind, seconds in read_json(kept).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        known = {}  # none yet, or damaged: they are measured again
    key = f"{run['env']} {run['method']} {run['ratio']:g} {run['lm']} {' '.join(flags)}"
    key += f" {threads} threads"
    if key not in known | FAILING:
        print(f"measuring {PROBE_STEPS} steps of {name_of(run)}", flush=True)
        with tempfile.TemporaryDirectory() as aside:
            probe = ["--steps", PROBE_STEPS, "--eval-every", PROBE_STEPS, "--episodes", 1]
            probe += ["--episode-limit", 1, "--log-every", PROBE_STEPS]
            probe += ["--name", name_of(run)]
            command = command_of(run, aside, [*flags, *map(str, probe)])
            environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True
            )
            if done.returncode:
                words = done.stderr.strip().splitlines() or ["no word"]
                FAILING[key] = words[-1].removeprefix("error: ")
                print(f"{name_of(run)} will fail: {printable(FAILING[key])}", flush=True)
            else:
                _, _, known[key] = progress_of(run, aside)
                write_json(kept, known)
    return known.get(key)


def values_of(flags):
    """{"--name": its values} of a run's flags; none for one that stands alone."""
    values, latest = {}, []
    for word in flags:
        if word.startswith("--"):
            flag, *value = word.split("=", 1)
            values[flag] = latest = value
        else:
            latest.append(word)
    return values


def steps_of(run, flags):
    """How many steps a run will take: as typed, or the preset's."""
    typed = values_of(flags).get("--steps", [])
    if len(typed) == 1 and typed[0].isdecimal():
        return int(typed[0])
    short = not torch.cuda.is_available() or values_of(flags).get("--device") == ["cpu"]
    if run["method"] in ALGORITHMS:
        return (baselines.SHORT if short else baselines.PAPER)["steps"]
    return (settings.SHORT if short or run["lm"] == "mini" else settings.PAPER)["steps"]
