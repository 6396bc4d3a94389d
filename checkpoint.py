"""Checkpoints: the model that training starts from, what is saved of it, and back again.

A checkpoint holds what was trained, and no frozen language model: it names that by its SHA-256, and
is read only on top of the same weights. Nothing in it is code.
"""

from dataclasses import asdict, replace
from pathlib import Path

import torch

from embeddings import ZERO
from files import check_memory, load_tensors, save_tensors
from load_gpt2 import find_config, fingerprint, load_gpt2
from lora import inject_lora, mark_trainable
from model import GPT, LaMo
from plumbing import UserError, first_line, is_number
from spaces import action_size, is_choice, is_picture, observation_shape
from tasks import pack, unpack

FORMAT = "lamo-checkpoint-2"  # what ckpt["format"] says; a change of layout changes it
READERS = {  # of each format, the command that lets its checkpoints act
    FORMAT: "python evaluate.py",
    "lamo-baseline-1": "python -m experiments.baselines --evaluate",
}


KINDS = {  # of the settings that a checkpoint must have, to be built and to act
    "env": str,
    "method": str,
    "lm": str,
    "pretrained": bool,
    "train": str,
    "embed": str,
    "mode": str,
    "dtype": str,
    "targets": list,
    **dict.fromkeys(("seed", "max_ep_len", "lora_rank", "context"), int),
    **dict.fromkeys(("episodes", "episode_limit"), int),
    **dict.fromkeys(("lora_alpha", "lora_dropout", "dropout", "lm_coef", "scale"), (int, float)),
}
CHOICES = {  # of settings that are words
    "mode": ["normal", "delayed"],
    "embed": ["linear", "mlp", "tokens"],
    "train": ["lora", "new", "all"],
    "dtype": ["bf16", "fp32"],
}
MOST = {
    "context": 10_000,
    "episodes": 2000,
    "episode_limit": 10**9,
    "target": 10**9,
}  # that a file may ask for
ABOVE_ZERO = ("context", "max_ep_len", "episodes", "scale", "lora_rank")


def check_settings(path, checkpoint, kinds=KINDS, choices=CHOICES):
    """Raises UserError for settings of a kind or size that no run's can have been."""
    settings = checkpoint["settings"]

    def refuse(name):
        shown = f"{name} {str(settings.get(name))[:40]}"
        raise UserError(f"{path} has the setting {shown}, which cannot be: damaged")

    for name, kind in kinds.items():
        value = settings.get(name)
        sound = isinstance(value, kind) and (kind is bool or type(value) is not bool)
        if sound and type(value) in (int, float):
            sound = 0 <= value <= MOST.get(name, 2**63)
            sound = sound and not (name.endswith("dropout") and value >= 1)
            sound = sound and not (value == 0 and name in ABOVE_ZERO)
        if not sound or (name in choices and value not in choices[name]):
            refuse(name)
    targets = [0.0 if target is None else target for target in settings["targets"]]  # of baselines
    if not all(is_number(x) and abs(x) <= MOST["target"] * settings["scale"] for x in targets):
        refuse("targets")
    if not 0 < len(targets) * settings["episodes"] <= MOST["episodes"]:
        refuse("targets" if len(targets) != 1 else "episodes")


def check_tensors(path, checkpoint):
    """Raises UserError where tensors have not the sizes that settings say, before any is made."""
    settings, tensors = checkpoint["settings"], checkpoint["model"]
    said = {"embed_time.weight": settings["max_ep_len"]}
    if settings["train"] == "lora":
        said |= {n: 3 * settings["lora_rank"] for n in tensors if n.endswith(".lora_A")}
    for name, size in said.items():
        found = tuple(tensors[name].shape) if name in tensors else None
        if found is None or found[:1] != (size,) or 0 in found:
            raise UserError(f"{path}: {name} is {found}, not of {size} rows; it is damaged")


def check_observations(path, checkpoint):
    """Raises UserError unless mean and deviation are those of the environment's observations."""
    environment = checkpoint["environment"]
    frames = is_picture(environment.observation_space)
    expected = (0,) if frames else observation_shape(environment.observation_space)
    for name in ("obs_mean", "obs_std"):
        tensor = checkpoint[name]
        sound = tuple(tensor.shape) == expected and tensor.dtype == torch.float32
        if not sound or not tensor.isfinite().all() or (name == "obs_std" and (tensor <= 0).any()):
            raise UserError(f"{path}: {name} is not of the environment's observations; damaged")


def build_model(settings, environment):
    """The model that training starts from: on the CPU, in fp32, its trainable tensors marked.

    environment: a tasks.Environment, for the shapes; settings: the fields of train.Config as a
    dictionary; of them lm, pretrained, train, embed, max_ep_len, dropout, lora_*, lm_coef and seed
    are read. Returns (LaMo, base), where base names
    the language model underneath: {"lm", "sha256", "config"}. Raises UserError as load_gpt2 does.
    """
    torch.manual_seed(settings["seed"])  # random weights are part of what a seed fixes
    if settings["pretrained"]:
        gpt = load_gpt2(settings["lm"], settings["dropout"])
        lm = settings["lm"]
    else:
        gpt = GPT(replace(find_config(settings["lm"]), dropout=settings["dropout"]))
        lm = f"random weights in the shape of {settings['lm']}"
    base = {"lm": lm, "sha256": fingerprint(gpt), "config": asdict(gpt.config)}
    torch.manual_seed(settings["seed"])  # so that the new parts do not depend on the base
    obs_shape = observation_shape(environment.observation_space)
    n_act, discrete = action_size(environment.action_space), is_choice(environment.action_space)
    if settings["embed"] == "tokens" and gpt.config.vocab_size not in ZERO:
        known = " or ".join(map(str, ZERO))
        why = f"--embed tokens knows the digits of vocabularies of {known} words only"
        raise UserError(f"{why}; use --embed mlp")
    sizes = {"max_ep_len": gpt.config.n_embd}  # numbers for each
    if settings["train"] == "lora":
        sizes["lora_rank"] = 6 * gpt.config.n_layer * gpt.config.n_embd
    for name, numbers in sizes.items():  # weight, gradient and AdamW's two moments, 4 bytes each
        check_memory(16 * numbers * settings[name], f"--{name.replace('_', '-')} {settings[name]}")
    model = LaMo(gpt, obs_shape, n_act, discrete, settings["embed"], settings["max_ep_len"])
    if settings["train"] == "lora":
        rank, alpha = settings["lora_rank"], settings["lora_alpha"]
        inject_lora(gpt, rank, alpha, settings["lora_dropout"])
    mark_trainable(model, settings["train"], language=settings["lm_coef"] > 0)
    return model, base


def checkpoint_names(model, train):
    """Names of the parameters a checkpoint holds: those trained, and no frozen base.

    With train "all" it is every one, wte and wpe too, so that such a checkpoint needs no base.
    """
    return {n for n, p in model.named_parameters() if p.requires_grad or train == "all"}


def trained_state(model, train, step):
    """The tensors of a checkpoint, on the CPU. Raises UserError as check_finite does."""
    names = checkpoint_names(model, train)
    state = {n: p.detach().cpu().clone() for n, p in model.named_parameters() if n in names}
    check_finite(state, step)
    return state


def check_finite(state, step):
    """Raises UserError if a tensor of a checkpoint's is not finite: it would replace a good one."""
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            why = f"{name} is not finite any more by step {step}"
            raise UserError(f"{why}; the checkpoint before it is kept; lower --lr")


def save_checkpoint(path, step, state, settings, notes, base, environment, data, format=FORMAT):
    """Write the policy as it is after a step, with all that acting needs besides base.

    state: its tensors, finite ones; notes: what was chosen and why, as in settings.resolve; base as
    in build_model; data: Trajectories, for the observations' mean and deviation. Raises UserError
    if the file cannot be written: one that was there stays as it was.
    """
    checkpoint = {
        "format": format,
        "settings": settings,
        "chosen": notes,
        "base": base,
        "environment": pack(environment),
        "step": step,
        "model": state,
        "obs_mean": data.obs_mean.cpu(),
        "obs_std": data.obs_std.cpu(),
    }
    save_tensors(path, checkpoint)


def read_checkpoint(path, expected=FORMAT):
    """A checkpoint's dictionary, checked. Raises UserError for what is not of the expected format.

    expected: FORMAT, train.py's, or that of experiments/baselines.py.
    """
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder; give the ckpt.pt or best.pt in it")
    try:
        checkpoint = load_tensors(path)
    except FileNotFoundError as error:
        raise UserError(
            f"there is no checkpoint {path}; a training says at its end where it is"
        ) from error
    except Exception as error:  # truncated zip, pickled code, a folder: torch.load has many kinds
        raise UserError(f"{path} is no readable checkpoint: damaged, or not train.py's") from error
    found = checkpoint.get("format") if isinstance(checkpoint, dict) else None
    if found != expected:
        reader = READERS.get(str(found))
        hint = f", but {found}'s: {reader} {path}" if reader else ""
        raise UserError(f"{path} is not a checkpoint of this project's ({expected}){hint}")
    kinds = {"settings": dict, "chosen": dict, "base": dict, "model": dict, "step": int}
    kinds |= {"environment": dict, "obs_mean": torch.Tensor, "obs_std": torch.Tensor}
    wrong = [k for k, kind in kinds.items() if not isinstance(checkpoint.get(k), kind)]
    if not wrong:
        model = checkpoint["model"].items()
        wrong = [str(name) for name, t in model if not torch.is_tensor(t) or type(name) is not str]
    if wrong:
        raise UserError(f"{path} lacks {', '.join(wrong)} as it should be: damaged")
    if not all(isinstance(line, str) for line in checkpoint["chosen"].values()):
        raise UserError(f"{path} does not tell what was chosen in words: damaged")
    if expected == FORMAT:
        check_settings(path, checkpoint)
        check_tensors(path, checkpoint)
        if not all(isinstance(checkpoint["base"].get(name), str) for name in ("lm", "sha256")):
            raise UserError(f"{path} does not name its language model: damaged")
    try:
        checkpoint["environment"] = unpack(checkpoint["environment"])
    except Exception as error:  # of JSON, gymnasium and Minari
        raise UserError(f"{path} describes no environment: {first_line(error)}") from error
    check_observations(path, checkpoint)
    return checkpoint


def load_model(path, checkpoint):
    """The LaMo of a checkpoint (from read_checkpoint), on the CPU.

    Raises UserError if its tensors do not fit, or if the language model underneath is not to be
    had or is not the same one.
    """
    settings, train = checkpoint["settings"], checkpoint["settings"]["train"]
    if train == "all":  # nothing of the base is left: only its shape matters
        settings = settings | {"pretrained": False}
        with torch.device("meta"):
            needed = sum(p.numel() for p in GPT(find_config(settings["lm"])).parameters())
        if needed > sum(tensor.numel() for tensor in checkpoint["model"].values()):
            raise UserError(f"{path} is not all of a {settings['lm']}; it is damaged")
    model, base = build_model(settings, checkpoint["environment"])
    if train != "all" and base["sha256"] != checkpoint["base"]["sha256"]:
        raise UserError(
            f"{path} was trained on other weights ({checkpoint['base']['lm']}): SHA-256 "
            f"{checkpoint['base']['sha256'][:12]}, found {base['sha256'][:12]}"
        )
    load_trained(model, checkpoint["model"], train, path)
    return model


def load_trained(model, state, train, path):
    """Put a checkpoint's tensors in place. Raises UserError, naming path, if they do not fit."""
    names, parameters = checkpoint_names(model, train), dict(model.named_parameters())
    for name in sorted(names ^ state.keys()):
        where = "lacks" if name in names else "has a tensor the model does not know:"
        raise UserError(f"{path} {where} {name}; it is damaged or from another version")
    for name, tensor in state.items():
        if not torch.is_tensor(tensor):
            raise UserError(f"{path}: {name} is no tensor; it is damaged")
        if tensor.shape != parameters[name].shape:
            found, expected = tuple(tensor.shape), tuple(parameters[name].shape)
            raise UserError(f"{path}: {name} is {found}, expected {expected}")
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise UserError(f"{path}: {name} holds what is no finite number; it is damaged")
        parameters[name].data.copy_(tensor)
