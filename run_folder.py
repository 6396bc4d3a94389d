"""A run's folder: what is written into it, and what is printed beside.

config.json    settings, what was chosen and why, the data's statistics, versions
log.jsonl      a row for every log_every steps, and one for every evaluation
ckpt.pt        the last checkpoint; best.pt, that of the best evaluation (see train.py)
resume.pt      what --resume goes on from; removed when the run is finished
result.json    the run's score
"""

import fcntl
import json
import os
import platform
import re
import subprocess
import sys
import textwrap
import time
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from files import clear_unfinished, load_tensors, read_json, save_tensors, write_json
from plumbing import UserError, check_kinds, counted, is_number, printable
from tasks import normalised_score

RESUME, FORMAT = "resume.pt", "lamo-resume-1"  # the file --resume goes on from, and what it is
SAVED = {"log_bytes": int, "step": int, "model": dict, "optimiser": dict, "processes": list}
SAVED |= {"summed": int, "evaluations": list, "best_score": float, "seconds": float}
SAVED |= {"evaluating": float, "bad_steps": int}  # what is in it
HELD = {}  # folders of runs that this process is at work in: a file of each that is locked
RECORDED = ("versions", "machine", "git")  # of config.json, what may not stay the same
RESULT = ("target", "score", "return_mean", "cut")  # numbers of a result that its score is from
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
    """Make the run's folder, print what will be done, write it to config.json. Returns a Path."""
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
    except UserError:
        folder.rmdir()  # so that the same command can be given again
        raise
    hold(folder)
    return folder


def hold(folder):
    """Keep a run's folder for this process, until it ends. Raises UserError if another has it."""
    if folder.resolve() in HELD:
        return
    file = open(folder / "config.json")  # noqa: SIM115  (closed with the process, or by let_go)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise UserError(
            f"another process is at work in {folder}; wait for it, or stop it"
        ) from error
    HELD[folder.resolve()] = file


def let_go(folder):
    """Let other processes have a run's folder."""
    if file := HELD.pop(folder.resolve(), None):
        file.close()


def stamp(path):
    """By which a file can be known again: when it was written; None if there is none."""
    return path.stat().st_mtime_ns if path.is_file() else None


def read_run(path, typed, config):
    """What --resume goes on with: (config.json's dictionary, that of save_run or None).

    typed: the other flags, of which there must be none; config: train.Config. Raises UserError for
    such flags, for what is no folder of a run, and for a finished one.
    """
    folder = Path(path)
    for name in typed:
        flag = "--" + name.replace("_", "-")
        why = "is as it was when the run began; --resume takes --env-module and --skip-bad-steps"
        raise UserError(f"{flag} {why}, and no other flag")
    for part in folder.iterdir() if folder.is_dir() else ():
        if part.is_symlink():
            why = f"a link in it, {part.name}: it could lead anywhere"
            raise UserError(f"{folder} has {why}; remove it")
        if not (part.is_file() or part.is_dir()):
            raise UserError(f"{part} is no ordinary file, and could be read for ever; remove it")
    if (folder / "result.json").is_file():
        raise UserError(f"{folder} is finished; its score is in {folder / 'result.json'}")
    try:
        begun = read_json(folder / "config.json")
        if "algo" in begun["settings"]:
            raise UserError(f"{folder} is a baseline's run, which cannot go on; begin it anew")
        begun["data"]["sha256"], begun["base"]["sha256"], begun["base"]["lm"], begun["processes"]
        begun["chosen"]["dataset"], begun["chosen"]["text"]
        if not all(isinstance(line, str) for line in begun["chosen"].values()):
            raise TypeError
        parts = [begun["settings"], *(begun.get(name, {}) for name in RECORDED)]
        if not all(isinstance(part, dict) for part in parts):
            raise TypeError
    except OSError as error:
        raise UserError(f"{folder} is no run's folder: it has no config.json") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'config.json'} is damaged, or another version's") from error
    begun["settings"]["resume"] = ""  # the one field that is not kept
    check_kinds(begun["settings"], config, folder)
    del begun["settings"]["resume"]
    begun["stamp"] = stamp(folder / RESUME)  # of what is read here, before the run is held
    if begun["stamp"] is None:
        return begun, None
    try:
        saved = load_tensors(folder / RESUME)
    except Exception as error:  # torch.load has many kinds
        raise UserError(f"{folder / RESUME} is damaged; delete it to start the run anew") from error
    if not isinstance(saved, dict) or saved.get("format") != FORMAT or SAVED.keys() - saved:
        raise UserError(f"{folder / RESUME} is another version's ({FORMAT} is expected)")
    for name, kind in SAVED.items():
        if not isinstance(saved[name], kind) or (kind is int and saved[name] < 0):
            why = f"{name} in it is no {kind.__name__} that could be"
            raise UserError(f"{folder / RESUME} is damaged: {why}; delete it to start anew")
    check_evaluations(folder / RESUME, saved["evaluations"], len(begun["settings"]["targets"]))
    if saved["step"] > begun["settings"]["steps"]:
        raise UserError(f"{folder / RESUME} is damaged: its step; delete it to start anew")
    return begun, saved


def load_optimiser(optimiser, state):
    """Put back what an optimiser had. Raises what it does, or ValueError for another kind."""
    fixed = [name for name in optimiser.defaults if name != "lr"]
    before = [[group[name] for name in fixed] for group in optimiser.param_groups]
    optimiser.load_state_dict(state)
    if before != [[group[name] for name in fixed] for group in optimiser.param_groups]:
        raise ValueError("its settings are others")
    for parameter, kept in optimiser.state.items():
        for x in kept.values():
            if x.shape not in ((), parameter.shape) or not x.isfinite().all():
                raise ValueError("its tensors are not the weights'")


def check_evaluations(path, evaluations, n_targets):
    """Raises UserError unless these are evaluations, each of so many targets."""
    try:
        for e in evaluations:
            sound = all(is_number(r[name]) for r in e["results"] for name in RESULT)
            alike = len(e["results"]) == n_targets
            lists = all(type(r.get("failed", [])) is list for r in e["results"])
            if not sound or not alike or not lists or type(e["step"]) is not int:
                raise TypeError
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{path} is damaged: its evaluations; delete it to start anew") from error


def continue_run(path, begun, saved, data, base, world):
    """Check that a run can go on as it began, and cut its log to what was saved. Returns a Path.

    Raises UserError if the data, the language model or the number of processes are others.
    """
    folder = Path(path)
    if begun["processes"] != world:
        raise UserError(f"{folder} was begun by {begun['processes']} processes, not {world}")
    if begun["data"]["sha256"] != data.digest():
        was = begun["chosen"]["dataset"]
        raise UserError(f"{folder} was begun on other data than are found now: {was}")
    if begun["base"]["sha256"] != base["sha256"]:
        raise UserError(f"{folder} was begun on other weights of {begun['base']['lm']}")
    if begun["base"].get("text") != base["text"]:
        raise UserError(f"{folder} was begun on another text: {begun['chosen']['text']}")
    hold(folder)
    if (folder / "result.json").is_file() or stamp(folder / RESUME) != begun.pop("stamp"):
        raise UserError(f"{folder} was gone on with by another process meanwhile; look again")
    if read_json(folder / "config.json")["settings"] != begun["settings"]:  # --skip-bad-steps
        let_go(folder)  # its lock is of the file that is replaced
        write_json(folder / "config.json", begun)
        hold(folder)
    length = saved["log_bytes"] if saved else 0
    log = folder / "log.jsonl"
    if (log.stat().st_size if log.is_file() else 0) < length:
        raise UserError(f"{log} is shorter than it was; the run cannot go on from it")
    if log.is_file():
        os.truncate(log, length)
    for name in ("config.json", "ckpt.pt", "best.pt", RESUME, "result.json"):
        clear_unfinished(folder / name)
    print(f"going on with {folder} after step {saved['step'] if saved else 0}", flush=True)
    now = {"versions": package_versions(), "machine": machine_of(begun["settings"]["device"])}
    now["git"] = code_version()
    for kind, values in now.items():
        before = begun.get(kind, {})
        for name in [name for name in values if before.get(name) != values[name]]:
            what = f"{name} {before.get(name)} when it was begun, {values[name]} now"
            print(f"{kind:13} {printable(what)}: it may not end with the same bits", flush=True)
    return folder


def save_run(folder, **state):
    """Write what --resume goes on from. After a kill, the log is cut back to here."""
    try:
        with open(folder / "log.jsonl", "ab") as log:
            os.fsync(log.fileno())  # a lost row must not be one that is counted on
            length = log.tell()
    except OSError as error:
        raise UserError(f"cannot write {folder / 'log.jsonl'}: {error.strerror}") from error
    save_tensors(folder / RESUME, {"format": FORMAT, "log_bytes": length} | state)


def append_to_log(folder, row):
    """Add a dictionary to log.jsonl as one line. Raises UserError if it cannot be written."""
    try:
        with open(folder / "log.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {folder / 'log.jsonl'}: {error.strerror}") from error


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
