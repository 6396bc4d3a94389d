"""Train LaMo (or one of its ablations, or the Decision Transformer) on offline trajectories.

    python train.py --env hopper --ratio 0.01
    torchrun --nproc_per_node=2 train.py --env hopper --ratio 0.01

Everything that can be set stands in Config, each field a flag of the same name. The loop is in
main(), at the end. Figures without another source are from the paper, arXiv 2310.20587.
"""

import io
import json
import math
import os
import platform
import shutil
import subprocess
import time
import zipfile
from dataclasses import dataclass
from datetime import datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # imported later, by DDP, it would keep the process group alive
import torch.nn as nn
import torch.nn.functional as F
import tyro
from tqdm import tqdm

import utils
from data import find_dataset, load_text, load_trajectories, sample_text, sample_windows
from evaluate import final_result, rollout
from load_gpt2 import LANGUAGE_MODELS, choose_lm, find_weights, make_gpt
from lora import inject_lora, mark_trainable, round_frozen
from model import EMBEDDINGS, ZERO, LaMo, Objective
from tasks import TASKS, find_environment, find_task, pack, replay, task_of_dataset, unpack
from utils import UserError, choose, choose_device, reading, write_json

FORMAT = "lamo-checkpoint-4"  # a checkpoint's; another layout, or another function, is another one
ABOVE_0 = "steps batch lm_batch lm_length context lora_rank max_ep_len scale embed_std lr clip "
RANGES = (  # which test a number must pass, in words and as a function, and which settings
    ("above 0", lambda x: x > 0, ABOVE_0 + "eval_every episodes log_every"),
    ("0 or more", lambda x: x >= 0, "lm_coef similarity warmup episode_limit seed"),
    ("at least 0 and below 1", lambda x: 0 <= x < 1, "dropout lora_dropout"),
    ("above 0 and at most 1", lambda x: 0 < x <= 1, "ratio"),
)


@dataclass
class Config:
    # What to train. None stands for what the method, the preset, the task or the data say.
    env: str | None = None  # task: a row of tasks.py, or an Atari game; None: the data's, or hopper
    method: str = "lamo"  # lamo, or an ablation or baseline: a row of METHODS
    ratio: float = 1.0  # share of the dataset's trajectories, in (0, 1]
    mode: Literal["normal", "delayed"] = "normal"  # delayed: all reward at an episode's last step
    seed: int = 0  # of the data subset, the weights, batches and dropout
    # What to learn from.
    dataset: str | None = None  # Minari id or folder; None: the task's, see data.find_dataset
    quality: Literal["simple", "medium", "expert"] = "medium"  # of the task's dataset, for MuJoCo
    lm: str | None = None  # a row of load_gpt2.LANGUAGE_MODELS, or a path of weights
    corpus: str | None = None  # wikitext, english (the Python manual), or a text file
    # The model.
    pretrained: bool | None = None  # start from the language model's weights, or from random ones
    shuffled: bool | None = None  # with each matrix's numbers in random order
    train: Literal["lora", "new", "all"] | None = None  # new: only what is outside the GPT
    embed: str | None = None  # of return, state and action: a row of model.EMBEDDINGS
    embed_std: float = 1.0  # of those tokens before training; SmolLM2's words have 0.14
    lm_coef: float | None = None  # weight of the language loss; 0 does no language work
    similarity: float | None = None  # weight of Wiki-RL's pull of tokens towards words
    lora_targets: tuple[str, ...] | None = None  # layers that LoRA updates; None: Q, K and V
    lora_rank: int | None = None  # columns of LoRA's factors
    lora_alpha: float = 32  # LoRA's update is scaled by alpha / rank
    lora_dropout: float | None = None  # on the input of LoRA's update
    lora_bias: bool | None = None  # the biases of layers with LoRA are trained, too
    dropout: float | None = None  # GPT-2's: on embeddings, attention and residual branches
    context: int | None = None  # K, environment steps the model sees
    scale: float | None = None  # returns-to-go are divided by this
    max_ep_len: int | None = None  # rows of the time embedding
    # Optimisation.
    steps: int | None = None  # optimiser steps
    batch: int | None = None  # windows a step, over all processes
    lm_batch: int = 2  # blocks of text a step, over all processes
    lm_length: int | None = None  # tokens of a block of text
    lr: float | None = None  # AdamW's learning rate
    warmup: int | None = None  # first steps, over which the learning rate rises from 0
    cooldown: float | None = None  # last share of the steps, over which it falls to 0
    weight_decay: float | None = None  # AdamW's, on everything trained
    eps: float | None = None  # AdamW's epsilon
    clip: float | None = None  # the gradient's norm is clipped here
    # Evaluation.
    eval_every: int | None = None  # steps between evaluations
    episodes: int | None = None  # episodes for each target
    episode_limit: int | None = None  # steps after which an episode is cut; 0: where it ends itself
    targets: list[float] | None = None  # target returns
    sample: bool | None = None  # draw choices from their probabilities; else take the likeliest
    # The machine, and the run's folder.
    device: str | None = None  # cuda or cpu; None: cuda if there is one
    dtype: Literal["bf16", "fp32"] | None = None  # autocast's; None: bf16 where the device has it
    compile: bool | None = None  # torch.compile the step, on CUDA as a graph; None: on CUDA
    deterministic: bool = False  # the same bits in each run on CUDA, too, but slower
    log_every: int = 100  # steps averaged into a row of the log
    out: str = "runs"  # a folder for this run is made in here
    name: str | None = None  # of that folder; None: task, method, ratio, seed and time
    tensorboard: bool = False  # write the log for TensorBoard, too
    wandb: bool = False  # send the log to Weights & Biases, too
    resume: str | None = None  # go on with this run's folder, with its settings


METHODS = {  # what each one sets; a flag that is typed wins over its row
    "lamo": dict(pretrained=True, train="lora", lm_coef=0.1),
    "lamo-nolm": dict(pretrained=True, train="lora", lm_coef=0.0),
    "lamo-linear": dict(pretrained=True, train="lora", lm_coef=0.1, embed="linear"),
    "lamo-freeze": dict(pretrained=True, train="new", lm_coef=0.1),
    "lamo-full": dict(pretrained=True, train="all", lm_coef=0.1),
    "lamo-random": dict(pretrained=False, train="lora", lm_coef=0.1),
    "lamo-shuffled": dict(pretrained=True, shuffled=True, train="lora", lm_coef=0.1),  # ours
    "wiki-rl": dict(pretrained=True, train="all", embed="linear", lm_coef=0.0, similarity=0.1),
    "dt": dict(lm="dt", pretrained=False, train="all", embed="linear", lm_coef=0.0, eps=1e-8),
}
PRESETS = {  # setting: the paper's; and without CUDA, or with the mini LM, one of minutes on a CPU
    "steps": (100_000, 2000),
    "batch": (None, 32),  # None: the task's
    "warmup": (2500, 100),
    "cooldown": (0.0, 0.5),
    "lr": (None, 5e-4),
    "eval_every": (2500, 350),  # the last two of a short run are late ones
    "episodes": (20, 10),
    "episode_limit": (0, 2000),
    "lm_length": (1024, 256),
    "dropout": (0.1, 0.0),
    "lora_dropout": (None, 0.0),
}
HELP = f"{__doc__}\nmethods: {', '.join(METHODS)}; tasks: {', '.join(TASKS)}"


# --- from settings to a model --------------------------------------------------------------------


def fill(c, values):
    """Set those fields of a Config that are still None."""
    for name, value in values.items():
        if value is not None and getattr(c, name, 0) is None:
            setattr(c, name, value)


def choose_settings(c, notes):
    """Fill in, in place, what is known before the data are read; say in notes what was chosen, and
    why. Returns the task's row. Raises UserError."""
    method = METHODS[choose("method", c.method, METHODS, " (others: experiments.baselines)")]
    named = {None, "wikitext", "english", *LANGUAGE_MODELS}
    for key in ("dataset", "lm", "corpus"):  # paths stay right from another folder
        if getattr(c, key) not in named and Path(getattr(c, key)).exists():
            setattr(c, key, str(Path(getattr(c, key)).resolve()))
    env, task = task_of_dataset(c.dataset) if c.dataset else (None, None)
    if task is None or c.env not in (None, env):  # --env names another task: it wins
        env, task = find_task(c.env or "hopper")
    device = choose_device(c.device)
    cuda, why = device.type == "cuda", "as asked" if c.lm else f"{c.method}'s"  # why this lm
    fill(c, method)
    if c.lm is None:
        c.lm, why = choose_lm(cuda)
    # What cannot be had is said before anything else is done.
    if c.pretrained and (path := find_weights(c.lm)).suffix == ".gguf":
        why += f", {path}"
    c.env, c.device, short = env, str(device), not cuda or c.lm == "mini"
    notes["task"] = f"{env}, method {c.method}"
    notes["lm"] = f"{c.lm} ({why}){'' if c.pretrained else ', random weights'}"
    notes["lm"] += ", shuffled" if c.shuffled else ""
    notes["preset"] = "short (no CUDA, or the mini LM), two targets at most" if short else "paper"
    if short and c.targets is None and task.targets:
        c.targets = list(task.targets[:2])
    fill(c, {name: values[short] for name, values in PRESETS.items()})
    fill(c, {"dtype": choose_dtype(device), "compile": cuda and bool(shutil.which("cc"))})
    fill(c, vars(task) | {"similarity": 0.0, "shuffled": False, "sample": False})
    choose("embed", c.embed, EMBEDDINGS)
    check_ranges(c)
    world = int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
    if c.batch % world or (c.lm_coef and c.lm_batch % world):
        raise UserError(f"--batch and --lm-batch must be multiples of the {world} processes")
    if c.quality != "medium" and (c.dataset or "{quality}" not in task.minari):
        raise UserError(f"--quality does not apply: {c.env} has one dataset, or --dataset names it")
    if c.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return task


def check_ranges(c):
    """Raise UserError for a setting that is out of its range."""
    for words, fits, names in RANGES:
        for name in names.split():
            if (x := getattr(c, name, None)) is not None and not fits(x):
                raise UserError(f"--{name.replace('_', '-')} is {x:g}, but must be {words}")
    if getattr(c, "targets", None) == []:
        raise UserError("--targets takes one return at least")


def choose_dtype(device):
    """Autocast's type: "bf16" where the device itself multiplies it, else "fp32"."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    features = torch.cpu.get_capabilities()
    native = any(features.get(x) for x in ("avx512_bf16", "amx_bf16", "sve_bf16", "bf16"))
    return "bf16" if native else "fp32"


def complete_settings(c, data, environment):
    """Fill in, in place, what a task without a row leaves to the data."""
    longest, limit = int(data.lengths.max()), environment.spec.max_episode_steps
    best = {float(f"{x:.4g}") for x in (data.returns.max(), np.percentile(data.returns, 90))}
    fill(c, {"targets": sorted(best, reverse=True), "scale": data.scale})
    fill(c, {"max_ep_len": max(limit or 0, longest)})
    c.targets = [float(target) for target in c.targets]
    if not (limit or c.episode_limit or environment.spec.id.startswith("ALE/")):
        c.episode_limit = 10 * longest  # neither the environment nor the user ends an episode


def build_model(c, environment):
    """The LaMo that training starts from, on the CPU, and its base: {"lm", "sha256"}."""
    gpt, base = make_gpt(c.lm, c.pretrained, c.dropout, c.seed, c.shuffled)
    if c.embed == "tokens" and gpt.config.vocab_size not in ZERO:
        raise UserError(f"--embed tokens needs digits, and {c.lm}'s are not known; use --embed mlp")
    fill(c, {"lora_targets": gpt.lora_targets})
    torch.manual_seed(c.seed)  # so that the new parts do not depend on the base
    model = LaMo(gpt, *environment.sizes(), c.embed, c.max_ep_len)
    nn.init.constant_(model.embed_ln.weight, c.embed_std)
    if c.train == "lora":
        inject_lora(gpt, c.lora_targets, c.lora_rank, c.lora_alpha, c.lora_dropout)
    mark_trainable(model, c.train, language=c.lm_coef > 0, bias=c.lora_bias)
    if c.dtype == "bf16" and c.train != "all":
        round_frozen(model)
    return model, base


def get_lr(step, c):
    """Rises linearly over the warm-up, then stays (the paper's), or falls to 0 at the end."""
    rising = step / max(1, c.warmup)
    falling = (1 - (step - 1) / c.steps) / max(c.cooldown, 1e-9)
    return c.lr * min(rising, 1.0, falling)


def fading(step):
    """Wiki-RL's a(step): how much of the pull is left, 0.99 at first and half at step 2500."""
    return 1 / (1 + math.exp(min(700.0, 5 - (5000 - step) / 500)))


def word_centres(wte, clusters=1000):
    """Wiki-RL's directions (k, C): centres of a k-means of the directions of the words wte (V, C),
    or all of them if they are fewer (Reid et al. 2022, arXiv 2201.12122)."""
    words = F.normalize(wte.detach().float().cpu(), dim=-1)
    if len(words) <= clusters:
        return words
    from sklearn.cluster import KMeans

    found = KMeans(clusters, n_init=1, random_state=0).fit(words.numpy())
    return F.normalize(torch.from_numpy(found.cluster_centers_).float(), dim=-1)


# --- a run: its checkpoint, folder, log and score -------------------------------------------------


def save_checkpoint(path, run):
    """Write what read_checkpoint reads. Raises UserError for weights that are not finite."""
    if not all(tensor.isfinite().all() for tensor in run["model"].values()):
        raise UserError(f"weights are not finite by step {run['step']}; lower --lr")
    buffer = io.BytesIO()
    torch.save(run, buffer)
    utils.write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def read_checkpoint(path, expected=FORMAT):
    """The dictionary that save_checkpoint wrote. Raises UserError for what is none."""
    path = Path(path) / "ckpt.pt" if Path(path).is_dir() else path
    with reading(path, "a checkpoint of train.py"):
        if damaged := zipfile.ZipFile(path).testzip():  # torch.load looks at no checksum
            raise ValueError(f"the checksum of {damaged} is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if (had := checkpoint["format"]) != expected:
            raise UserError(f"{path} is a {had}, not a {expected}; use its own command and commit")
        return checkpoint


def load_policy(path, checkpoint):
    """The LaMo and the Environment of what read_checkpoint read at `path`, on the CPU. Raises
    UserError if they do not fit, or if the language model underneath is another one."""
    with reading(path, "a checkpoint of this code"):
        check_ranges(c := Config(**checkpoint["settings"]))
        c.pretrained &= c.train != "all"  # a checkpoint of "all" holds every weight
        environment = unpack(checkpoint["environment"])
        model, base = build_model(c, environment)
        if c.train != "all" and base["sha256"] != checkpoint["base"]["sha256"]:
            was = checkpoint["base"]["lm"]
            raise UserError(f"{path} needs {was}, and {c.lm} is not the same: give it by --lm PATH")
        missing, unexpected = model.load_state_dict(checkpoint["model"], strict=False)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        if wrong := [*unexpected, *trained.intersection(missing)]:
            raise ValueError(f"{', '.join(wrong)} does not fit")
    return model, environment


def describe(c, notes, data, environment):
    """What a run says of itself before its first step: the part of a checkpoint that stays."""
    size = {"dataset": data.dataset_id, "episodes": len(data.lengths), "transitions": len(data)}
    size |= {"return_mean": float(data.returns.mean()), "return_std": float(data.returns.std())}
    size |= {"score": float(environment.score(size["return_mean"])), "sha256": data.digest()}
    form = "{dataset}: {episodes} episodes, {transitions} steps, "
    form += "return {return_mean:.1f} ± {return_std:.1f} (score {score:.1f})"
    notes["data"] = form.format(**size)
    run = {"settings": dict(vars(c)), "notes": notes, "data": size, "evaluations": []}
    run |= {"environment": pack(environment), "step": 0, "seconds": 0.0, "evaluating": 0.0}
    return run | {"obs_mean": data.obs_mean.cpu(), "obs_std": data.obs_std.cpu(), "log_bytes": 0}


def begin_run(c, run, model):
    """Make the run's folder, print what will be done, write it to config.json. Returns a Path."""
    name = f"{c.env}-{c.method}-{c.ratio:g}-s{c.seed}-{datetime.now():%Y%m%d-%H%M%S-%f}"
    folder = Path(c.out) / (c.name or name.replace("/", "-").strip("-."))
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot make {folder}: {error.strerror}; set --name or --out") from error
    n_all = sum(p.numel() for p in model.parameters())
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    settings = ", ".join(f"{name} {x}" for name, x in vars(c).items() if x is not None)
    shown = run["notes"] | {"settings": settings, "run": folder}
    shown["trained"] = f"{n_trained:,} of {n_all:,} parameters ({n_trained / n_all:.1%})"
    print("\n".join(f"{key:13} {line}" for key, line in shown.items()))
    where = {"cwd": Path(__file__).parent, "shell": True, "capture_output": True, "text": True}
    commit = subprocess.run("git describe --always --dirty", **where).stdout.strip() or None
    versions = {p: version(p) for p in ("torch", "numpy", "gymnasium", "mujoco", "minari")}
    found = {"commit": commit, "versions": versions}
    found["machine"] = [platform.machine(), torch.get_num_threads()]
    kept = {key: x for key, x in run.items() if not torch.is_tensor(x)}
    write_json(folder / "config.json", kept | found)
    return folder


def open_log(c, folder, run):
    """A function that adds a row to log.jsonl and, if asked for, to TensorBoard and W&B. Rows later
    than the checkpoint are cut off first: training writes them again."""
    if run["step"]:
        print(f"going on with {folder} after step {run['step']}", flush=True)
    with open(folder / "log.jsonl", "ab") as file:
        file.truncate(run["log_bytes"])
    for unfinished in folder.glob(".*.tmp"):  # what a kill left of a file
        unfinished.unlink()
    if c.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(folder, purge_step=run["step"] + 1)
    if c.wandb:
        import wandb

        where = {"project": os.environ.get("WANDB_PROJECT", "lamo"), "dir": folder}
        id = "-".join(folder.resolve().parts[-2:])  # two sweeps' folders may have the same runs
        wandb.init(**where, id=id, resume="allow", config=vars(c))

    def log(row):
        with open(folder / "log.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        numbers = {name: x for name, x in row.items() if isinstance(x, float)}
        for r in row.get("evaluation", ()):
            numbers |= {f"{key}/{r['target']}": r[key] for key in ("return_mean", "score")}
        if c.wandb:
            wandb.log(numbers | {"step": row["step"]})
        for name, number in numbers.items() if c.tensorboard else ():
            writer.add_scalar(name, number, row["step"])

    return log


def evaluate(c, run, folder, model, environment, log):
    """Let the policy act, log it, and keep it as best.pt if it is. Returns the best score."""
    since, stats = time.time(), (run["obs_mean"].to(c.device), run["obs_std"].to(c.device))
    results = rollout(model, environment, c, stats, c.targets, c.episodes)
    run["evaluating"] += time.time() - since
    log({"step": run["step"], "evaluation": results})
    score = max(r["score"] for r in results)
    best = all(score > r["score"] for e in run["evaluations"] for r in e["results"])
    run["evaluations"].append({"step": run["step"], "results": results})
    if best:
        lasting = {key: x for key, x in run.items() if key not in ("optimiser", "states")}
        save_checkpoint(folder / "best.pt", lasting)
    return score


def end_run(folder, run, environment, command="python evaluate.py"):
    """Compute the run's score, write it to result.json and print it, and the command that acts."""
    result = final_result(run["evaluations"], run["settings"]["steps"]) | run["notes"]
    result |= {"dataset_return_mean": run["data"]["return_mean"]}
    result |= {"seconds": run["seconds"], "seconds_evaluating": run["evaluating"]}
    write_json(folder / "result.json", result)
    rows = [(r["target"], r["return_mean"]) for r in result["targets"]]
    print(f"\n  target   return   score   over {result['evaluations_averaged']} late evaluations")
    for name, mean in [*rows, ("dataset", run["data"]["return_mean"])]:
        print(f"{name!s:>8} {mean:8.1f} {environment.score(mean):7.1f}")
    best = f"best single evaluation {result['best_single_evaluation']:.1f}"
    print(f"score {result['score']:.1f}, of target {result['target']}; {best}")
    if cut := result["episodes_cut"]:
        print(f"{cut} late episodes cut: their returns are not whole (--episode-limit 0)")
    print(f"{run['seconds']:.0f} s, of which {run['evaluating']:.0f} s evaluating")
    print(f"next: {command} {folder / 'ckpt.pt'}")


# --- training ------------------------------------------------------------------------------------


def join_processes(device):
    """(rank, number of processes, device of its own) under torchrun; (0, 1, device) without."""
    if "RANK" not in os.environ:
        return 0, 1, device
    if device.type == "cuda":
        device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=6))  # the first one also evaluates
    return dist.get_rank(), dist.get_world_size(), device


def gather(x):
    """The object x of each process, in a list by rank."""
    if not dist.is_initialized():
        return [x]
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, x)
    return found


def prepare(c, task, notes, folder, saved, device):
    """Find, read and build all that a run needs; c and notes are completed in place. Returns
    (Trajectories, Environment, LaMo, tokens (N,) of a text or None, run): run is what a checkpoint
    holds before the first step. folder, saved: of the run that goes on, or None."""
    name = saved["dataset"] if saved else c.dataset
    dataset, share, notes["dataset"] = find_dataset(c.env, task, c.ratio, name, c.quality)
    environment, notes["environment"] = find_environment(task, dataset)
    subset = {"ratio": c.ratio / share, "mode": c.mode, "seed": c.seed, "rewards": task.rewards}
    data = load_trajectories(dataset, environment.action_space, c.scale, device=device, **subset)
    environment, notes["replay"] = replay(environment, dataset, int(data.lengths.max()), task)
    complete_settings(c, data, environment)
    if saved:
        (model, _), base = load_policy(folder / "ckpt.pt", saved), saved["base"]
    else:
        model, base = build_model(c, environment)
    tokens, text, centres = None, None, None
    if c.lm_coef:
        tokens, notes["text"] = load_text(c.corpus, model.gpt.config, c.lm_length)
        text, tokens = Path(tokens.filename).name, torch.from_numpy(tokens)  # its hash is in it
        if device.type == "cuda":  # which cannot index uint16
            tokens = tokens.int().to(device)
    if c.similarity and not saved:  # to the words as they are before training
        centres = word_centres(model.gpt.wte.weight)
    run = describe(c, notes, data, environment) | {"base": base, "centres": centres}
    run |= {"format": FORMAT, "dataset": str(Path(dataset.spec.data_path).parent.resolve())}
    run["data"]["text"] = text
    if saved and run["data"] != saved["data"]:
        raise UserError(f"{folder} was begun on other data or another text; begin anew")
    return data, environment, model, tokens, saved or run


def main():
    c, folder, saved, notes = tyro.cli(Config, description=HELP), None, None, {}
    if c.resume:
        folder = Path(c.resume.removesuffix("ckpt.pt"))
        if c != Config(resume=c.resume):
            raise UserError("--resume goes on with the run's own settings; leave out other flags")
        saved = read_checkpoint(folder / "ckpt.pt")
        c = Config(**saved["settings"])
    task = choose_settings(c, notes)
    rank, world, device = join_processes(torch.device(c.device))
    if rank > 0:
        dist.barrier()  # the first process goes ahead: nothing is fetched or tokenised twice
    data, environment, model, tokens, run = prepare(c, task, notes, folder, saved, device)
    if rank == 0 and world > 1:
        dist.barrier()
    # Other windows, text and dropout in each process, but the same in every run.
    seed = c.seed + 1_000_003 * rank
    window_rng = torch.Generator(data.obs.device).manual_seed(seed)
    text_rng = torch.Generator(device).manual_seed(seed)
    rngs, cuda = [window_rng, text_rng, torch.manual_seed(seed)], device.type == "cuda"
    if cuda:
        rngs.append(torch.cuda.default_generators[device.index or 0])
    trained = [p for p in model.to(device).parameters() if p.requires_grad]
    # What changes from step to step is a tensor: a CUDA graph would keep a number as it was.
    lr = torch.zeros((), dtype=torch.float32 if cuda else torch.float64, device=device)
    pull = torch.zeros((), device=device)
    adamw = {"eps": c.eps, "weight_decay": c.weight_decay, "fused": True, "capturable": cuda}
    optimiser = torch.optim.AdamW(trained, lr, betas=(0.9, 0.999), **adamw)
    objective = Objective(model, run["centres"]).to(device)
    objective = torch.compile(objective) if c.compile else objective
    objective = nn.parallel.DistributedDataParallel(objective) if world > 1 else objective
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=c.dtype == "bf16")

    sums = torch.zeros(4, device=device)  # since the last row of the log: three losses, and steps
    if saved:
        with reading(folder / "ckpt.pt", "a checkpoint to go on from"):
            if (n := len(saved["states"])) != world:
                raise UserError(f"{folder} was begun by {n} processes, not {world}")
            optimiser.load_state_dict(saved["optimiser"])
            optimiser.param_groups[0]["lr"] = lr.fill_(get_lr(run["step"], c))
            sums += saved["states"][rank]["sums"].to(device)
            for rng, state in zip(rngs, saved["states"][rank]["rngs"], strict=True):
                rng.set_state(state)
    elif rank == 0:
        folder = begin_run(c, run, model)
    log = open_log(c, folder, run) if rank == 0 else None
    stop, shown, stopping, started = utils.StopSignals(), {}, 0, time.time() - run["seconds"]

    def save(step):
        states = gather({"sums": sums.cpu(), "rngs": [rng.get_state() for rng in rngs]})
        run.update(states=states, step=step, seconds=time.time() - started)
        if rank == 0:
            named = model.state_dict(keep_vars=True).items()
            kept = {name: p for name, p in named if p.requires_grad or c.train == "all"}
            run["model"] = {name: p.detach().cpu() for name, p in kept.items()}
            run["optimiser"] = optimiser.state_dict()
            run["log_bytes"] = (folder / "log.jsonl").stat().st_size
            save_checkpoint(folder / "ckpt.pt", run)
        stop.at_once = True  # until the next step a signal loses nothing
        return max(gather(stop.number))

    def update():  # of the weights: a step, in which nothing may wait for the host
        window = sample_windows(data, c.batch // world, c.context, window_rng)
        window, text = [x.to(device, non_blocking=True) for x in window], None
        if c.lm_coef:
            text = sample_text(tokens, c.lm_batch // world, c.lm_length, text_rng)
        count = window[-1].sum().float()  # valid steps
        if world > 1:  # of all processes, whose gradients are averaged
            dist.all_reduce(count.div_(world))
        with autocast:
            action_loss, lm_loss, similarity = losses = objective(window, count, text)
        loss = action_loss + c.lm_coef * lm_loss - pull * similarity  # the paper's; Wiki-RL's
        loss.backward()
        nn.utils.clip_grad_norm_(trained, c.clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        sums.add_(torch.stack([*losses, torch.ones_like(loss)]).detach())

    if cuda and c.compile and world == 1 and data.obs.is_cuda:  # DDP's hooks cannot be captured
        update = utils.as_graph(update, rngs[:2])
    model.train()
    left = range(run["step"], c.steps + 1)
    bar = tqdm(left, "training", c.steps, initial=left.start, disable=rank > 0, mininterval=1)
    for step in bar:  # how many are done
        due = step % c.eval_every == 0 or step == c.steps
        if world == 1 or due or step % 10 == 0:
            stopping = max(gather(stop.number))  # all processes stop after the same step
        if due or stopping:
            stopping = save(step)
        if due and step and rank == 0 and not stopping:
            shown["score"] = evaluate(c, run, folder, model, environment, log)
        if stopping or step == c.steps:
            break

        stop.at_once = False
        lr.fill_(get_lr(step + 1, c))
        pull.fill_(c.similarity * fading(step + 1))
        update()
        if (step + 1) % c.log_every == 0 or step + 1 == c.steps:
            means = np.mean(gather((sums[:3] / sums[3]).tolist()), axis=0).tolist()
            sums.zero_()
            if not math.isfinite(sum(means)):
                raise UserError(f"the loss is not finite by step {step + 1}; lower --lr")
            names = ("action_loss", "lm_loss", "similarity")
            row = {name: x for name, x in zip(names, means, strict=True) if x}
            bar.set_postfix(shown := shown | row)
            if rank == 0:
                seconds = time.time() - started - run["evaluating"]
                log({"step": step + 1, **row, "lr": lr.item(), "seconds": seconds})

    if rank == 0 and stopping:
        print(f"stopped after step {step}; go on with: python train.py --resume {folder}")
    elif rank == 0:
        run["seconds"] = time.time() - started
        end_run(folder, run, environment)
    objective = None  # DDP's keeps the group alive
    if world > 1:
        dist.destroy_process_group()
    if stopping:
        raise SystemExit(128 + stopping)


if __name__ == "__main__":
    utils.run_command(main)
