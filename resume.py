"""What --resume goes on from: written at each checkpoint, read and checked before a run goes on.

A run that was killed goes on after its last checkpoint as if nothing had been: its log is cut back
to there, and resume.pt holds whatever decides on the steps to come. All of the folder may be a
stranger's, so each part is checked before it is used, and nothing in it is code.
"""

import os
from dataclasses import fields
from pathlib import Path

import torch
import torch.distributed as dist

from checkpoint import load_trained
from files import clear_unfinished, load_tensors, read_json, save_tensors, write_json
from plumbing import UserError, is_number, printable
from run_folder import RESUME, code_version, hold, machine_of, package_versions

FORMAT = "lamo-resume-1"  # what resume.pt says it is
SAVED = {  # what is in it
    "log_bytes": int,  # how long the log was
    "step": int,
    "model": dict,
    "optimiser": dict,
    "processes": list,  # state_of_processes
    "summed": int,  # steps since the last row of the log
    "bad_steps": int,  # before them
    "evaluations": list,
    "seconds": float,
    "evaluating": float,  # seconds of them
}
RECORDED = ("versions", "machine", "git")  # of config.json, what may not stay the same
RESULT = ("target", "score", "return_mean", "cut")  # numbers of a result that its score is from


def save_run(folder, **state):
    """Write what --resume goes on from. After a kill, the log is cut back to here."""
    try:
        with open(folder / "log.jsonl", "ab") as log:
            os.fsync(log.fileno())  # a lost row must not be one that is counted on
            length = log.tell()
    except OSError as error:
        raise UserError(f"cannot write {folder / 'log.jsonl'}: {error.strerror}") from error
    save_tensors(folder / RESUME, {"format": FORMAT, "log_bytes": length} | state)


def stamp(path):
    """By which a file can be known again: when it was written; None if there is none."""
    return path.stat().st_mtime_ns if path.is_file() else None


def read_run(path, typed, config):
    """What --resume goes on with: (config.json's dictionary, that of save_run or None).

    typed: the other flags, of which there must be none; config: train.Config. Raises UserError for
    such flags, for what is no folder of a run, and for a finished one.
    """
    folder = Path(path)
    if folder.is_file():
        raise UserError(f"{path} is a file; give the run's folder, {folder.parent}")
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
        if not isinstance(begun["data"].get("dataset", ""), str):
            raise TypeError
        parts = [begun["settings"], *(begun.get(name, {}) for name in RECORDED)]
        if not all(isinstance(part, dict) for part in parts):
            raise TypeError
    except OSError as error:
        why = "it has no config.json; give the folder that train.py made"
        raise UserError(f"{folder} is no run's folder: {why}") from error
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
        now = f"{data.dataset_id} is found now, with other numbers in it"
        raise UserError(f"{folder} was begun on {was}; {now}: put the former back, or begin anew")
    if begun["base"]["sha256"] != base["sha256"]:
        raise UserError(f"{folder} was begun on other weights of {begun['base']['lm']}")
    if begun["base"].get("text") != base["text"]:
        raise UserError(f"{folder} was begun on another text: {begun['chosen']['text']}")
    hold(folder)
    if (folder / "result.json").is_file() or stamp(folder / RESUME) != begun.pop("stamp"):
        raise UserError(f"{folder} was gone on with by another process meanwhile; look again")
    if read_json(folder / "config.json")["settings"] != begun["settings"]:  # --skip-bad-steps
        write_json(folder / "config.json", begun)
    length = saved["log_bytes"] if saved else 0
    log = folder / "log.jsonl"
    if (log.stat().st_size if log.is_file() else 0) < length:
        raise UserError(f"{log} is shorter than it was: the run cannot go on; begin it anew")
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


def state_of_processes(world, device, **mine):
    """What each process goes on from, in a list by rank: mine, and its dropout's generators."""
    mine["dropout"] = torch.get_rng_state()
    if device.type == "cuda":
        mine["dropout_cuda"] = torch.cuda.get_rng_state(device)
    if world == 1:
        return [mine]
    processes = [None] * world
    dist.all_gather_object(processes, mine)
    return processes


def restore(path, saved, rank, train, model, optimiser, window_rng, text_rng, device):
    """Put model, optimiser and generators of this rank back to what they were at save_run.

    train: which of the model's weights are trained. Returns (totals (3,), bad (2,)), the sums that
    the training goes on adding to, on the device. Raises UserError for a state that does not fit.
    """
    try:
        load_trained(model, saved["model"], train, path)
        load_optimiser(optimiser, saved["optimiser"])
        mine = saved["processes"][rank]
        totals, bad = mine["totals"].to(device), mine["bad"].to(device)
        if totals.shape != (3,) or bad.shape != (2,) or bad.dtype != torch.int64 or bad.min() < 0:
            raise ValueError("its sums are no sums")
        window_rng.set_state(mine["windows"])
        text_rng.set_state(mine["text"])
        torch.set_rng_state(mine["dropout"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(mine["dropout_cuda"], device)
    except Exception as error:  # of many kinds, for as many kinds of damage
        why = f"the state in {path} does not fit this run"
        raise UserError(f"{why}; delete resume.pt there to begin it anew") from error
    return totals, bad


def check_kinds(settings, config, path):
    """Raises UserError, naming path, unless these are all the settings of a dataclass of them."""
    for field in fields(config):
        value, kind = settings.get(field.name), field.type
        inner = kind.__args__[0] if kind in (list[float], list[str]) else None
        if inner is not None:
            inner = (int, float) if inner is float else (inner,)
            sound = isinstance(value, list) and all(type(x) in inner for x in value)
        else:
            sound = isinstance(value, (int, float) if kind is float else kind)
        sound = sound and (kind is bool or type(value) is not bool)
        if not sound:
            why = f"it has {field.name} {str(value)[:40]!r}: damaged, or another version's"
            raise UserError(f"{path} cannot be gone on with: {why}")


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
