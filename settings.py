"""From what was typed to what will be done: methods, presets, and every "auto" of train.Config.

A typed flag wins over the method, the method over the task and the preset. What only the data can
tell, for a task that no table knows, is filled in once they are read.
"""

import shutil
from dataclasses import asdict

from checkpoint import CHOICES, MOST
from data import choose_targets
from files import check_writable
from load_gpt2 import find_weights, is_cached
from plumbing import (
    UserError,
    check_numbers,
    choose,
    choose_device,
    choose_dtype,
    n_processes,
    network_available,
)
from tasks import QUALITIES, TASKS, find_task, task_of_dataset

METHODS = {  # what each one changes; a flag that is typed wins over its row
    "lamo": dict(pretrained=True, train="lora", lm_coef=0.1),
    "lamo-nolm": dict(pretrained=True, train="lora", lm_coef=0.0),
    "lamo-linear": dict(pretrained=True, train="lora", lm_coef=0.1, embed="linear"),
    "lamo-freeze": dict(pretrained=True, train="new", lm_coef=0.1),
    "lamo-full": dict(pretrained=True, train="all", lm_coef=0.1),
    "lamo-random": dict(pretrained=False, train="lora", lm_coef=0.1),
    "wiki-rl": dict(pretrained=True, train="all", embed="linear", lm_coef=0.0, similarity=0.1),
    "dt": dict(lm="dt", pretrained=False, train="all", embed="linear", lm_coef=0.0),
}
PAPER = dict(  # the authors'; the learning rate is the task's
    steps=100_000,
    warmup=2500,
    cooldown=0.0,
    eval_every=2500,
    episodes=20,
    episode_limit=0,
    lm_length=1024,
    dropout=0.1,
)
SHORT = dict(  # without CUDA, or with the mini LM: minutes on two CPU cores
    steps=2000,
    warmup=100,
    cooldown=0.5,
    lr=5e-4,
    eval_every=200,
    episodes=10,
    episode_limit=2000,
    lm_length=256,
    dropout=0.0,
)
LIMIT_OVER_DATA = 10  # where neither environment nor user limits an episode
FROM_DATA = ("targets", "scale", "max_ep_len")  # where no task has them
MAY_BE_ZERO = ("seed", "lm_coef", "similarity", "weight_decay", "dropout", "lora_dropout")
MAY_BE_ZERO += ("warmup", "cooldown", "targets", "episode_limit")


# --- from the command line to settings -----------------------------------------------------------


def presets():
    """What "auto" stands for, as lines for --help."""
    lines = [f"methods: {', '.join(METHODS)}", f"tasks: {', '.join(TASKS)}"]
    lines += ["       any other Atari game by its name, anything else with --dataset"]
    for name, preset in (("paper", PAPER), ("short", SHORT)):
        values = ", ".join(f"{key.replace('_', '-')} {value}" for key, value in preset.items())
        lines.append(f"preset {name}: {values}")
    return "\n".join([*lines, "The short preset is taken without CUDA, or with the mini LM."])


def choose_task(settings, typed):
    """The task's row, by --env or --dataset; fills in settings["env"]. Raises UserError."""
    if settings["env"] == "auto" and settings["dataset"] != "auto":
        settings["env"], task = task_of_dataset(settings["dataset"])
    else:
        settings["env"] = "hopper" if settings["env"] == "auto" else settings["env"]
        settings["env"], task = find_task(settings["env"])
    choose("quality", settings["quality"], QUALITIES)
    if "quality" in typed and "{quality}" not in (task.dataset or ""):
        raise UserError(f"--quality does not apply: {settings['env']} has one dataset")
    if "quality" in typed and settings["dataset"] != "auto":
        raise UserError("--quality and --dataset both say which dataset; give one of them")
    return task


def resolve(config, typed):
    """Fill in every "auto" that does not wait for the data (see `complete`).

    config: a train.Config, the defaults; typed: what parse_flags returns. Returns (settings, task,
    notes): the fields of Config as a dictionary, the task's row, and a line for each choice made
    here, with the reason.
    Raises UserError for values that cannot be.
    """
    settings = asdict(config) | typed
    del settings["resume"]
    task = choose_task(settings, typed)
    method = METHODS[choose("method", settings["method"], METHODS)]
    device = choose_device(settings["device"])
    known = vars(task) | method | typed

    lm = known.get("lm", "auto")
    if lm != "auto":
        why = "as asked" if "lm" in typed else f"{settings['method']}'s"
    elif device.type == "cpu":
        lm, why = "mini", "bundled; the default without CUDA"
    elif not known["pretrained"] or is_cached("gpt2") or network_available():
        lm, why = "gpt2", "the default on CUDA"
    else:
        lm, why = "mini", "bundled; gpt2 is not cached and there is no network"
    if known["pretrained"] and lm != "dt":
        find_weights(lm)  # what cannot be had is said before anything else is done
    short = device.type == "cpu" or lm == "mini"
    weights = "" if known["pretrained"] else ", random weights"
    notes = {"lm": f"{lm} ({why}){weights}"}
    notes["preset"] = "short (no CUDA, or the mini LM)" if short else "paper"

    known = {"similarity": 0.0} | vars(task) | (SHORT if short else PAPER) | method | typed
    known |= {"lm": lm, "device": str(device)}
    known.setdefault("dtype", choose_dtype(device))
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    known.setdefault("compile", device.type == "cuda" and compiler is not None)
    if device.type == "cuda" and compiler is None and not known["compile"]:
        notes["compile"] = "off: torch.compile needs a C compiler (cc), and there is none"
    for name, value in settings.items():
        if (
            value == "auto"
            and name not in ("dataset", "corpus", "name")
            and known[name] is not None
        ):
            settings[name] = known[name]
    if settings["targets"] != "auto":
        settings["targets"] = list(settings["targets"])
    for name in FROM_DATA:
        notes[name] = "as asked" if name in typed else "the task's"
    check(settings)
    return settings, task, notes


def task_of_run(settings):
    """The task's row again, from settings that `resolve` has filled in."""
    if settings["dataset"] != "auto":
        env, task = task_of_dataset(settings["dataset"])
        if env == settings["env"]:  # else both were given
            return task
    return find_task(settings["env"])[1]


def complete(settings, notes, data, environment):
    """Fill in, in place, what a task without a row leaves to the data, and note where it is from.

    notes: has `resolve`'s word on those that are known; data: Trajectories; environment:
    tasks.Environment.
    """
    longest, limit = int(data.lengths.max()), environment.spec.max_episode_steps
    source = {name: notes.pop(name, None) for name in FROM_DATA}
    if settings["targets"] == "auto":
        settings["targets"] = choose_targets(data.returns)
        source["targets"] = "the best of the data's returns, and their 90th percentile"
    if settings["scale"] == "auto":
        settings["scale"], source["scale"] = data.scale, "of the size of the data's returns"
    if settings["max_ep_len"] == "auto":
        settings["max_ep_len"] = max(limit or 0, longest)
        source["max_ep_len"] = "the longest episode of the data or the environment"
    largest = MOST["target"] * settings["scale"]
    if any(abs(target) > largest for target in settings["targets"]):
        raise UserError(f"--targets has one beyond {largest:g}; ask for less, or raise --scale")
    if len(settings["targets"]) * settings["episodes"] > MOST["episodes"]:  # that the data gave
        check_most(settings)
    targets = ", ".join(f"{target:g}" for target in settings["targets"])
    notes["targets"] = f"{targets} ({source['targets']})"
    notes["scale"] = f"{settings['scale']:g} ({source['scale']})"
    notes["max_ep_len"] = f"{settings['max_ep_len']} ({source['max_ep_len']})"
    limit_episodes(settings, notes, data, environment)


def limit_episodes(settings, notes, data, environment):
    """Fill in, in place, where to cut episodes that neither the user nor the environment ends."""
    longest, limit = int(data.lengths.max()), environment.spec.max_episode_steps
    if not (limit or settings["episode_limit"] or environment.spec.id.startswith("ALE/")):
        settings["episode_limit"] = LIMIT_OVER_DATA * longest
        notes["episode_limit"] = f"{settings['episode_limit']}, for the environment has none: "
        notes["episode_limit"] += f"{LIMIT_OVER_DATA} times the data's longest episode"


def check_most(settings):
    """Raises UserError for more than a checkpoint may ask for: nobody could evaluate it."""
    for name in ("context", "episodes", "episode_limit"):
        if settings[name] > MOST[name]:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} is {settings[name]}, but must be at most {MOST[name]}")
    n = 1 if settings["targets"] == "auto" else len(settings["targets"])
    if n * settings["episodes"] > MOST["episodes"]:
        what = f"{n} targets with {settings['episodes']} episodes each"
        raise UserError(f"{what} are more than {MOST['episodes']}; lower --episodes")


def check(settings):
    """Raises UserError for settings that make no sense, naming the flag and what it takes."""
    for name, valid in (CHOICES | {"quality": QUALITIES}).items():
        choose(name, settings[name], valid)
    if not 0 < settings["ratio"] <= 1:
        raise UserError(f"--ratio is {settings['ratio']:g}, but must be above 0 and at most 1")
    if settings["lm"] == "dt" and (settings["pretrained"] or settings["lm_coef"]):
        raise UserError("--lm dt is a shape without weights; add --no-pretrained --lm-coef 0")
    if settings["similarity"] and not settings["pretrained"]:
        raise UserError("--similarity is to pre-trained words; without: --similarity 0")
    if settings["cooldown"] > 1:
        raise UserError(f"--cooldown is {settings['cooldown']:g}, but is a share: at most 1")
    if settings["targets"] == []:
        raise UserError("--targets is empty: give one at least")
    check_numbers(settings, MAY_BE_ZERO)
    check_most(settings)
    check_writable(settings["out"], "--out")
    world = n_processes()
    for name in ("batch", "lm_batch") if settings["lm_coef"] else ("batch",):
        if settings[name] % world:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {settings[name]} cannot be shared by {world} processes")
