"""A run's folder: what is written into it, and what is printed beside.

config.json    settings, what was chosen and why, the data's statistics, versions
log.jsonl      a row for every log_every steps, and one for every evaluation
ckpt.pt        the last checkpoint; best.pt, that of the best evaluation (see train.py)
resume.pt      what --resume goes on from, see resume.py; removed when the run is finished
result.json    the run's score
run.lock       held while a process is at work on the run; left by one that was stopped
"""

import json
import platform
import re
import shutil
import subprocess
import sys
import textwrap
import time
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from files import try_lock, write_json
from plumbing import UserError, counted, printable
from tasks import normalised_score
from trackers import Trackers

RESUME = "resume.pt"  # the file --resume goes on from, see resume.py
LOCK = "run.lock"  # held by the process that is at work on the run
HELD = {}  # folders of runs that this process is at work in, and their locks
PACKAGES = ("torch", "numpy", "minari", "gymnasium", "mujoco", "gymnasium-robotics", "ale-py")
PACKAGES += ("h5py", "safetensors", "tiktoken")  # whose versions are recorded


def code_version():
    """The git commit of this code, and whether it was changed since; None where git knows neither.

    Files that git does not track are not looked at.
    """
    here = Path(__file__).resolve().parent
    git = partial(subprocess.run, cwd=here, capture_output=True, text=True, check=True, timeout=10)
    try:
        top = git(["git", "rev-parse", "--show-toplevel", "HEAD"]).stdout.split("\n")
        if Path(top[0]).resolve() != here:  # the repository of something around it
            return {"commit": None, "dirty": None}
        changed = git(["git", "status", "--porcelain", "--untracked-files=no"]).stdout
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}
    return {"commit": top[1], "dirty": bool(changed)}


def package_versions():
    """Versions of Python and of the packages that numbers depend on; None: not installed."""
    versions = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions | {"torch": torch.__version__}  # with what it was built for


def machine_of(device):
    """What computes: its name, and for a CPU its instructions and the number of threads."""
    device = torch.device(device)
    if device.type == "cuda":
        return {"device": str(device), "name": torch.cuda.get_device_name(device)}
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        name = models[0] if models else name
    capability = torch.backends.cpu.get_cpu_capability()
    machine = {"device": str(device), "name": name, "instructions": capability}
    return machine | {"threads": torch.get_num_threads()}


def make_run_folder(settings):
    """A new folder under --out, named after the run. Raises UserError if it cannot be made."""
    name = settings["name"]
    if name == "auto":
        parts = [settings["env"], settings["method"], f"{settings['ratio']:g}"]
        parts.append(f"s{settings['seed']}")
        name = "-".join(parts).replace("/", "-").strip("-.")  # an env may be a dataset's name
        name += time.strftime("-%Y%m%d-%H%M%S")
    elif Path(name).name != name or name in ("", ".."):
        raise UserError(f"--name is {name}, but must be a folder's name; where it goes is --out")
    folder = Path(settings["out"]) / name
    try:
        folder.mkdir(parents=True)
    except FileExistsError as error:
        raise UserError(f"{folder} exists already; give another --name") from error
    except OSError as error:
        raise UserError(f"cannot make {folder}: {error.strerror}; set --out") from error
    return folder


def begin_run(settings, environment, notes, data, model, base, world):
    """Make the run's folder, print what will be done, write it to config.json.

    Returns (a Path, Trackers). Raises UserError where either cannot be had; then no folder is left.
    """
    folder = make_run_folder(settings)
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    n_all = sum(p.numel() for p in model.parameters())
    mean, std = data.returns.mean(), data.returns.std()
    score = normalised_score(environment, mean)
    print(f"{'task':13} {printable(settings['env'])}, method {settings['method']}")
    for name, line in notes.items():
        print(f"{name:13} {printable(line)}")
    size = f"{counted(len(data.lengths), 'episode')}, {counted(len(data), 'step')}"
    print(f"{'data':13} {size}, ", end="")
    print(f"return {mean:.1f} ± {std:.1f} (score {score:.1f})")
    lists = {name: " ".join(map(str, v)) for name, v in settings.items() if isinstance(v, list)}
    every = ", ".join(f"{name} {value}" for name, value in (settings | lists).items())
    print(textwrap.fill(every, 100, initial_indent=f"{'settings':14}", subsequent_indent=" " * 14))
    processes = "" if world == 1 else f", {world} processes"
    machine = f"{settings['device']}, {settings['dtype']}, torch {torch.__version__}"
    print(f"{'machine':13} {machine}{processes}")
    print(f"{'trained':13} {n_trained:,} of {n_all:,} parameters ({n_trained / n_all:.1%})")
    print(f"{'run':13} {folder}", flush=True)
    config = {
        "settings": settings,
        "chosen": notes,
        "base": base,
        "data": {
            "episodes": len(data.lengths),
            "transitions": len(data),
            "return_mean": float(mean),
            "return_std": float(std),
            "score": float(score),
            "dataset": data.dataset_id,
            "sha256": data.digest(),
        },
        "processes": world,
        "versions": package_versions(),
        "machine": machine_of(settings["device"]),
        "git": code_version(),
    }
    try:
        write_json(folder / "config.json", config)
        hold(folder)
        return folder, Trackers(settings, folder, settings | notes)
    except UserError:
        let_go(folder)
        shutil.rmtree(folder)  # so that the same command can be given again
        raise


def hold(folder):
    """Keep a run's folder for this process, until it ends. Raises UserError if another has it."""
    if folder.resolve() in HELD:
        return
    lock = try_lock(folder / LOCK)
    if lock is None:
        raise UserError(f"another process is at work in {folder}; wait for it, or stop it")
    HELD[folder.resolve()] = lock


def let_go(folder):
    """Let other processes have a run's folder."""
    if lock := HELD.pop(folder.resolve(), None):
        lock.release()
        (folder / LOCK).unlink(missing_ok=True)


def append_to_log(folder, row):
    """Add a dictionary to log.jsonl as one line. Raises UserError if it cannot be written."""
    try:
        with open(folder / "log.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {folder / 'log.jsonl'}: {error.strerror}") from error


def record_evaluation(folder, trackers, evaluations, step, results):
    """Add an evaluation after a step to the log and to evaluations, a list of {"step", "results"}.

    results: rollout's, one for each target. Returns whether its best target's score is the highest
    yet, and that score. Raises UserError if the log cannot be written.
    """
    append_to_log(folder, row := {"step": step, "evaluation": results})
    trackers.add(row)
    score = max(r["score"] for r in results)
    best = all(score > r["score"] for e in evaluations for r in e["results"])
    evaluations.append({"step": step, "results": results})
    return best, score


def final_result(evaluations, steps):
    """A run's score by the authors' protocol: the best target's mean over late evaluations.

    Late are those in the last 20 % of the steps. evaluations: a list of {"step", "results"}, where
    results are rollout's. Returns a dictionary, the best single evaluation's score in it too.
    """
    late = [e["results"] for e in evaluations if e["step"] > 0.8 * steps]
    targets = [
        {
            "target": same[0]["target"],
            "score": sum(r["score"] for r in same) / len(same),
            "return_mean": sum(r["return_mean"] for r in same) / len(same),
        }
        for same in zip(*late, strict=True)
    ]
    best = max(targets, key=lambda t: t["score"])
    single = max(r["score"] for e in evaluations for r in e["results"])
    return {
        "score": best["score"],
        "target": best["target"],
        "return_mean": best["return_mean"],
        "targets": targets,
        "evaluations_averaged": len(late),
        "episodes_cut": sum(r["cut"] for results in late for r in results),
        "episodes_failed": sum(len(r.get("failed", ())) for e in evaluations for r in e["results"]),
        "best_single_evaluation": single,
    }


def written(target):
    """A target return as it is printed: a number, or none where a policy is told none."""
    return "none" if target is None else f"{target:g}"


def end_run(
    folder,
    settings,
    environment,
    notes,
    data,
    evaluations,
    seconds,
    evaluating,
    command="python evaluate.py",
    bad_steps=0,
):
    """Compute the run's score, write it to result.json and print it.

    command: what lets the checkpoint act; bad_steps: how many changed nothing, since their loss or
    gradient was not finite.
    """
    result = final_result(evaluations, settings["steps"])
    result |= {"dataset": notes["dataset"], "lm": notes.get("lm")}
    result |= {"dataset_return_mean": float(data.returns.mean())}
    result |= {"seconds": seconds, "seconds_evaluating": evaluating, "bad_steps": bad_steps}
    write_json(folder / "result.json", result)
    (folder / RESUME).unlink(missing_ok=True)
    let_go(folder)
    n = result["evaluations_averaged"]
    means = f"means of {counted(n, 'evaluation')}, in the last 20 % of steps"
    print(f"\n{'target':>8} {'return':>8} {'score':>7}   {means}")
    for r in result["targets"]:
        print(f"{written(r['target']):>8} {r['return_mean']:8.1f} {r['score']:7.1f}")
    mean = data.returns.mean()
    print(f"{'dataset':>8} {mean:8.1f} {normalised_score(environment, mean):7.1f}   its episodes")
    print(f"score {result['score']:.1f}, of target {written(result['target'])}; ", end="")
    print(f"best single evaluation {result['best_single_evaluation']:.1f}")
    if result["episodes_cut"]:
        limit = settings["episode_limit"]
        at = f"at {limit} steps, " if limit else ""
        cut = counted(result["episodes_cut"], "late episode")
        print(f"{cut} cut {at}before the end: such returns are not whole (--episode-limit 0)")
    if result["episodes_failed"]:
        failed = counted(result["episodes_failed"], "episode")
        print(f"{failed} ended by a failure of the environment, see failed in log.jsonl: ", end="")
        print("such returns are not whole")
    if bad_steps:
        print(f"{counted(bad_steps, 'step')} skipped: the loss or gradient was not finite")
    print(f"{seconds:.0f} s, of which {evaluating:.0f} s evaluating")
    print(f"next: {command} {folder / 'ckpt.pt'}   (or best.pt)")
