"""Train LaMo (or one of its ablations, or the Decision Transformer) on offline trajectories.

    python train.py --env hopper --ratio 0.01
    torchrun --nproc_per_node=2 train.py --env hopper --ratio 0.01

Everything that can be set stands in Config, each field a flag of the same name. The loop is in
main(), at the end. Figures without another source are from the paper, arXiv 2310.20587.
"""

import importlib
import io
import json
import math
import os
import shutil
import subprocess
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from tqdm import tqdm

from data import (
    find_dataset,
    find_text,
    get_encoding,
    load_trajectories,
    sample_text,
    sample_windows,
    tokenise,
)
from evaluate import final_result, rollout
from load_gpt2 import find_weights, is_cached, make_gpt
from lora import inject_lora, mark_trainable, round_frozen
from model import EMBEDDINGS, LaMo, Objective
from tasks import QUALITIES, find_environment, find_task, pack, task_of_dataset, unpack
from utils import (
    StopSignals,
    UserError,
    choose,
    choose_device,
    network_available,
    reading,
    run_command,
    write_atomically,
    write_json,
)

FORMAT = "lamo-checkpoint-3"  # what ckpt["format"] says; a change of layout changes it
STOP_EVERY = 10  # steps after which several processes look whether to stop
CLUSTERS = 1000  # Wiki-RL's, of word embeddings


@dataclass
class Config:
    # What to train. None stands for what the method, the preset, the task or the data say.
    env: str | None = None  # task: a row of tasks.py, or an Atari game; None: the data's, or hopper
    method: str = "lamo"  # lamo, or an ablation or baseline: a row of METHODS
    ratio: float = 1.0  # share of the dataset's trajectories, in (0, 1]
    mode: str = "normal"  # normal, or delayed: all reward at an episode's last step
    seed: int = 0  # of the data subset, the weights, batches and dropout
    # What to learn from.
    dataset: str | None = None  # Minari id or folder; None: the task's, see data.find_dataset
    quality: str = "medium"  # of the task's dataset, where it has several: simple, medium or expert
    lm: str | None = None  # a row of load_gpt2.LANGUAGE_MODELS, or a path of weights
    corpus: str | None = None  # wikitext, english (the Python manual), or a text file
    # The model.
    pretrained: bool | None = None  # start from the language model's weights, or from random ones
    train: str | None = None  # lora, new (only what is outside the GPT) or all
    embed: str | None = None  # of return, state and action: a row of model.EMBEDDINGS
    lm_coef: float | None = None  # weight of the language loss; 0 does no language work
    similarity: float | None = None  # weight of Wiki-RL's pull of tokens towards words
    lora_targets: tuple[str, ...] = ("c_attn",)  # linear layers that LoRA updates: c_attn, c_fc, ..
    lora_rank: int | None = None  # columns of LoRA's factors
    lora_alpha: float = 32  # LoRA's update is scaled by alpha / rank
    lora_dropout: float = 0.1  # on the input of LoRA's update
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
    clip: float = 0.25  # the gradient's norm is clipped here
    # Evaluation.
    eval_every: int | None = None  # steps between evaluations
    episodes: int | None = None  # episodes for each target
    episode_limit: int | None = None  # steps after which an episode is cut; 0: where it ends itself
    targets: list[float] | None = None  # target returns
    # The machine, and the run's folder.
    device: str | None = None  # cuda or cpu; None: cuda if there is one
    dtype: str | None = None  # autocast's: bf16 or fp32; None: bf16 where the device multiplies it
    compile: bool | None = None  # torch.compile the step; None: on CUDA
    deterministic: bool = False  # the same bits again on CUDA too, at some cost; a CPU's are
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
    "wiki-rl": dict(pretrained=True, train="all", embed="linear", lm_coef=0.0, similarity=0.1),
    "dt": dict(lm="dt", pretrained=False, train="all", embed="linear", lm_coef=0.0),
}
PRESETS = {  # setting: the paper's; and without CUDA, or with the mini LM, one of minutes on a CPU
    "steps": (100_000, 2000),
    "warmup": (2500, 100),
    "cooldown": (0.0, 0.5),
    "lr": (None, 5e-4),  # the paper's is the task's
    "eval_every": (2500, 200),
    "episodes": (20, 10),
    "episode_limit": (0, 2000),
    "lm_length": (1024, 256),
    "dropout": (0.1, 0.0),
}


# --- settings ------------------------------------------------------------------------------------


def fill(c, values):
    """Set the fields of a Config that are still None."""
    for name, value in values.items():
        if value is not None and getattr(c, name, 0) is None:
            setattr(c, name, value)


def choose_settings(c, notes):
    """Fill in, in place, all that is known before the data are read. Returns the task's row.

    notes: a dictionary that gets a line for what was chosen here, and why. Raises UserError.
    """
    method = METHODS[choose("method", c.method, METHODS)]
    of_dataset = task_of_dataset(c.dataset) if c.dataset else (None, None)
    c.env, task = (
        of_dataset if c.dataset and c.env in (None, of_dataset[0]) else find_task(c.env or "hopper")
    )
    device = choose_device(c.device)
    cuda = device.type == "cuda"
    notes["lm"] = "as asked" if c.lm else f"{c.method}'s"
    fill(c, {"device": str(device)} | method)
    if c.lm is None and cuda and (not c.pretrained or is_cached("gpt2") or network_available()):
        c.lm, notes["lm"] = "gpt2", "the default on CUDA"
    elif c.lm is None:
        why = "gpt2 is not cached and there is no network" if cuda else "the default without CUDA"
        c.lm, notes["lm"] = "mini", f"bundled: {why}"
    notes["lm"] = f"{c.lm} ({notes['lm']}){'' if c.pretrained else ', random weights'}"
    if c.pretrained:
        find_weights(c.lm)  # what cannot be had is said before anything else is done
    short = not cuda or c.lm == "mini"
    notes["preset"] = "short (no CUDA, or the mini LM)" if short else "paper"
    if cuda:
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        features = torch.cpu.get_capabilities()
        native = any(features.get(x) for x in ("avx512_bf16", "amx_bf16", "sve_bf16", "bf16"))
    compiler = any(map(shutil.which, ("cc", "gcc", "clang")))  # torch.compile needs one
    fill(c, {"dtype": "bf16" if native else "fp32", "compile": cuda and compiler, "similarity": 0})
    fill(c, {name: values[short] for name, values in PRESETS.items()})
    fill(c, vars(task))
    check(c)
    return task


def check(c):
    """Raises UserError for settings that make no sense, naming the flag and what it takes."""
    for name, valid in (
        ("embed", list(EMBEDDINGS)),
        ("quality", QUALITIES),
        ("mode", ("normal", "delayed")),
        ("train", ("lora", "new", "all")),
        ("dtype", ("bf16", "fp32")),
    ):
        choose(name, getattr(c, name), valid)
    if not 0 < c.ratio <= 1:
        raise UserError(f"--ratio is {c.ratio:g}, but must be above 0 and at most 1")
    for name in ("steps", "batch", "lm_batch", "lm_length", "context", "lora_rank", "eval_every"):
        if getattr(c, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} is {getattr(c, name)}, but must be at least 1")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if c.batch % world or (c.lm_coef and c.lm_batch % world):
        raise UserError(f"--batch and --lm-batch must be multiples of the {world} processes")
    if c.similarity and not c.pretrained:
        raise UserError("--similarity is to pre-trained words; without them: --similarity 0")


def complete_settings(c, data, environment):
    """Fill in, in place, what a task without a row leaves to the data."""
    longest, limit = int(data.lengths.max()), environment.spec.max_episode_steps
    best = [float(f"{x:.4g}") for x in (data.returns.max(), np.percentile(data.returns, 90))]
    fill(c, {"targets": best[: 1 + (best[0] != best[1])], "scale": data.scale})
    fill(c, {"max_ep_len": max(limit or 0, longest)})
    c.targets = [float(target) for target in c.targets]
    if not (limit or c.episode_limit or environment.spec.id.startswith("ALE/")):
        c.episode_limit = 10 * longest  # neither the environment nor the user ends an episode


# --- the model, the learning rate, checkpoints ----------------------------------------------------


def build_model(c, environment):
    """The LaMo that training starts from, on the CPU, its trainable tensors marked; and its base,
    {"lm", "sha256"} of the language model underneath. Raises UserError."""
    gpt, base = make_gpt(c.lm, c.pretrained, c.dropout, c.seed)
    if c.lm_coef and c.lm_length > gpt.config.block_size:
        most = gpt.config.block_size
        raise UserError(f"--lm-length {c.lm_length}, but {c.lm} knows {most} positions at most")
    torch.manual_seed(c.seed)  # so that the new parts do not depend on the base
    try:
        model = LaMo(gpt, *environment.sizes(), c.embed, c.max_ep_len)
        if c.train == "lora":
            inject_lora(gpt, c.lora_targets, c.lora_rank, c.lora_alpha, c.lora_dropout)
    except ValueError as error:
        raise UserError(str(error)) from error
    mark_trainable(model, c.train, language=c.lm_coef > 0)
    if c.dtype == "bf16" and c.train != "all":
        round_frozen(model)
    return model, base


def get_lr(step, c):
    """Rises linearly over the warm-up, then stays (the paper's), or falls to 0 at the end."""
    rising = step / max(1, c.warmup)
    falling = (1 - (step - 1) / c.steps) / max(c.cooldown, 1e-9)
    return c.lr * min(rising, 1.0, falling)


def due(step, c):
    """Whether an evaluation, and a checkpoint before it, are due after this step."""
    return step % c.eval_every == 0 or step == c.steps


def fading(step):
    """Wiki-RL's a(step): how much of the pull is left, 0.99 at first and half at step 2500."""
    return 1 / (1 + math.exp(min(700.0, 5 - (5000 - step) / 500)))


def word_centres(wte):
    """Directions (k, C) of Wiki-RL's 1000 clusters of word embeddings wte (V, C), by k-means of
    their directions (Reid et al. 2022, arXiv 2201.12122). A smaller vocabulary is its own."""
    words = F.normalize(wte.detach().float().cpu(), dim=-1)
    if len(words) <= CLUSTERS:
        return words
    from sklearn.cluster import KMeans

    print(f"clustering {len(words)} word embeddings takes minutes", flush=True)
    found = KMeans(CLUSTERS, n_init=1, random_state=0).fit(words.numpy())
    return F.normalize(torch.from_numpy(found.cluster_centers_).float(), dim=-1)


def save_checkpoint(path, checkpoint):
    """Write a dictionary that load_policy and --resume read. Raises UserError for weights that are
    not finite, and for a full disk: then the file before it stays."""
    if not all(tensor.isfinite().all() for tensor in checkpoint["model"].values()):
        raise UserError(f"weights are not finite by step {checkpoint['step']}; lower --lr")
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def read_checkpoint(path, expected=FORMAT):
    """The dictionary that save_checkpoint wrote. Raises UserError for what is none."""
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder; give the ckpt.pt or best.pt in it")
    with reading(path, "a checkpoint of train.py"):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["format"] != expected:
            raise ValueError(f"its format is {checkpoint['format']}, not {expected}")
        return checkpoint


def trained_state(model, train):
    """What a checkpoint holds of a model: the tensors that are trained; with train "all" each."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad or train == "all"}
    return {n: x.detach().cpu().clone() for n, x in model.state_dict().items() if n in trained}


def load_trained(model, base, checkpoint, path):
    """Put a checkpoint's tensors into a model on `base`, in place. Raises UserError if they, or the
    language models underneath, do not fit."""
    whole = checkpoint["config"]["train"] == "all"  # then nothing of the base is left
    if not whole and base != checkpoint["base"]:
        raise UserError(f"{path} is on {checkpoint['base']}, but found {base}; give --lm PATH")
    with reading(path, "a checkpoint of this model"):
        missing, unexpected = model.load_state_dict(checkpoint["model"], strict=False)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        if wrong := [*unexpected, *trained.intersection(missing)]:
            raise ValueError(f"{', '.join(wrong)} does not fit")


def resume(path, saved, run, model, optimiser):
    """Put back what was saved at `path`, in place. Returns how far the run is, a dictionary.

    Raises UserError if data, weights or number of processes are others than when it was begun.
    """
    for what in ("data", "base", "processes"):
        if saved[what] != run[what]:
            raise UserError(f"{path} was begun with {what} {saved[what]}, but found {run[what]}")
    load_trained(model, run["base"], saved, path)
    with reading(path, "a checkpoint to go on from (best.pt is not)"):
        optimiser.load_state_dict(saved["optimiser"])
    print(f"going on with {path} after step {saved['step']}", flush=True)
    return saved


def load_policy(path, checkpoint):
    """The LaMo and the Environment of a checkpoint, on the CPU. Raises UserError as above."""
    with reading(path, "a checkpoint of train.py"):
        c = SimpleNamespace(**checkpoint["config"])
        environment = unpack(checkpoint["environment"])
    c.pretrained &= c.train != "all"  # its shape is enough
    model, base = build_model(c, environment)
    load_trained(model, base, checkpoint, path)
    return model, environment


# --- a run's folder ------------------------------------------------------------------------------


def begin_run(c, run, environment, data, model):
    """Make the run's folder, print what will be done, write it to config.json. Returns a Path."""
    name = f"{c.env}-{c.method}-{c.ratio:g}-s{c.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(c.out) / (c.name or name.replace("/", "-").strip("-."))
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        how = "give another --name or --out"
        raise UserError(f"cannot make {folder}: {error.strerror}; {how}") from error
    n_all = sum(p.numel() for p in model.parameters())
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = {"episodes": len(data.lengths), "transitions": len(data)}
    mean, std = float(data.returns.mean()), float(data.returns.std())
    size |= {"return_mean": mean, "return_std": std, "score": float(environment.score(mean))}
    shown = {"task": f"{c.env}, method {c.method}", **run["notes"]}
    shown["data"] = ", ".join(f"{key} {x:,.5g}" for key, x in size.items())
    shown["settings"] = ", ".join(f"{key} {x}" for key, x in vars(c).items() if x is not None)
    shown["trained"] = f"{n_trained:,} of {n_all:,} parameters ({n_trained / n_all:.1%})"
    shown["run"] = f"{folder}, torch {torch.__version__}, {run['processes']} process(es)"
    print("\n".join(f"{key:13} {line}" for key, line in shown.items()), flush=True)
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    versions = {"torch": torch.__version__, "numpy": np.__version__, "commit": commit}
    config = {"settings": run["config"], "notes": run["notes"], "base": run["base"]}
    config |= {"data": size | {"sha256": run["data"]}, "processes": run["processes"], **versions}
    write_json(folder / "config.json", config)
    return folder


def open_log(c, folder, run):
    """A function that adds a row to log.jsonl, and to what --tensorboard and --wandb ask for.

    What is in log.jsonl from after run["log_bytes"] is cut off: it comes again.
    """
    (folder / "log.jsonl").touch()
    os.truncate(folder / "log.jsonl", run["log_bytes"])
    writer = tracker = None
    if c.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(folder, purge_step=run["step"] + 1)
    if c.wandb:
        import wandb

        known = {"project": os.environ.get("WANDB_PROJECT", "lamo"), "id": folder.name}
        tracker = wandb.init(**known, resume="allow", dir=folder, config=asdict(c))

    def log(row):
        with open(folder / "log.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        numbers = {f"train/{name}": x for name, x in row.items() if isinstance(x, float)}
        for r in row.get("evaluation", ()):
            numbers |= {f"{key}/target {r['target']}": r[key] for key in ("return_mean", "score")}
        for name, number in numbers.items() if writer else ():
            writer.add_scalar(name, number, row["step"])
        if tracker:
            tracker.log(numbers | {"step": row["step"]})

    return log


def end_run(folder, run, environment, returns):
    """Compute the run's score, write it to result.json and print it. returns: the dataset's."""
    result = final_result(run["evaluations"], run["config"]["steps"])
    result |= {k: run["notes"][k] for k in ("dataset", "lm")}
    result |= {"dataset_return_mean": returns.mean(), "seconds": run["seconds"]}
    result |= {"seconds_evaluating": run["evaluating"]}
    write_json(folder / "result.json", result)
    print(f"\n  target   return   score   means over the last {result['evaluations_averaged']}")
    rows = [(r["target"], r["return_mean"]) for r in result["targets"]]
    for name, mean in [*rows, ("dataset", returns.mean())]:
        print(f"{name!s:>8} {mean:8.1f} {environment.score(mean):7.1f}")
    best = f"best single evaluation {result['best_single_evaluation']:.1f}"
    print(f"score {result['score']:.1f}, of target {result['target']}; {best}")
    if cut := result["episodes_cut"]:
        print(f"{cut} late episodes cut: such returns are not whole (--episode-limit 0)")
    print(f"{run['seconds']:.0f} s, of which {run['evaluating']:.0f} s evaluating")
    print(f"next: python evaluate.py {folder / 'ckpt.pt'}   (or best.pt)")


# --- several processes ---------------------------------------------------------------------------


def join_processes(device):
    """(rank, number of processes, device) of this process under torchrun; (0, 1, device) without.

    On CUDA each process has its own device.
    """
    if "RANK" not in os.environ:
        return 0, 1, device
    importlib.import_module("torch.distributed.nn")  # DDP's own, later, would keep the group alive
    if device.type == "cuda":
        device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    # The others wait for the first one's downloads and evaluations: give it time.
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=6))
    return dist.get_rank(), dist.get_world_size(), device


def reduce(x, op=dist.ReduceOp.SUM):
    """A tensor's sum (or maximum) over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x, op)
    return x


def gather(state):
    """Every process's state, in a list by rank."""
    states = [state]
    if dist.is_initialized():
        states = [None] * dist.get_world_size()
        dist.all_gather_object(states, state)
    return states


# --- training ------------------------------------------------------------------------------------


def main():
    c, saved, notes = tyro.cli(Config, description=__doc__), None, {}
    if c.resume:
        folder = Path(c.resume)
        if c != Config(resume=c.resume):
            raise UserError("--resume goes on with the run's own settings; leave out other flags")
        if (folder / "result.json").is_file():
            raise UserError(f"{folder} is finished; its score is in {folder / 'result.json'}")
        saved = read_checkpoint(folder / "ckpt.pt")
        c = Config(**saved["config"])
    task = choose_settings(c, notes)
    if c.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    rank, world, device = join_processes(torch.device(c.device))
    if rank > 0:
        dist.barrier()  # the first process goes ahead: nothing is fetched or tokenised twice
    where = saved["dataset"] if saved else c.dataset
    dataset, share, notes["dataset"] = find_dataset(c.env, task, c.ratio, where, c.quality)
    environment, notes["environment"] = find_environment(task, dataset)
    subset = {"ratio": c.ratio / share, "mode": c.mode, "seed": c.seed, "rewards": task.rewards}
    data = load_trajectories(dataset, environment.action_space, c.scale, device=device, **subset)
    complete_settings(c, data, environment)
    model, base = build_model(c, environment)
    text = None
    if c.lm_coef:
        encoding = get_encoding(model.gpt.config.vocab_size)
        path, notes["text"] = find_text(c.corpus, encoding.name == "bytes")
        tokens = tokenise(path, encoding, c.lm_length)
    if rank == 0 and world > 1:
        dist.barrier()

    # Other windows, text and dropout in each process, but the same in every run.
    seed = c.seed + 1_000_003 * rank
    window_rng = torch.Generator(data.obs.device).manual_seed(seed)
    text_rng = torch.Generator().manual_seed(seed)
    rngs = [window_rng, text_rng, torch.default_generator.manual_seed(seed)]
    if device.type == "cuda":
        rngs.append(torch.cuda.default_generators[device.index or 0].manual_seed(seed))
    trained = [p for p in model.to(device).parameters() if p.requires_grad]
    adamw = {"betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": c.weight_decay, "fused": True}
    optimiser = torch.optim.AdamW(trained, lr=c.lr, **adamw)
    centres = word_centres(model.gpt.wte.weight).to(device) if c.similarity else None
    objective = Objective(model, centres)
    objective = torch.compile(objective) if c.compile else objective
    if world > 1:
        objective = nn.parallel.DistributedDataParallel(objective)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=c.dtype == "bf16")

    # What a run is and how far it is: all that --resume goes on from.
    run = {"format": FORMAT, "config": asdict(c), "notes": notes, "environment": pack(environment)}
    run |= {"base": base, "data": data.digest(), "processes": world}
    run |= {"dataset": str(Path(dataset.spec.data_path).parent), "log_bytes": 0, "evaluations": []}
    run |= {"obs_mean": data.obs_mean.cpu(), "obs_std": data.obs_std.cpu()}
    run |= {"step": 0, "seconds": 0.0, "evaluating": 0.0}
    sums = torch.zeros(4, device=device)  # since the last row of the log: three losses, and steps
    if saved:
        run = resume(folder / "ckpt.pt", saved, run, model, optimiser)
        sums += run["states"][rank]["sums"].to(device)
        for rng, state in zip(rngs, run["states"][rank]["rngs"], strict=True):
            rng.set_state(state)
    elif rank == 0:
        folder = begin_run(c, run, environment, data, model)
    log = open_log(c, folder, run) if rank == 0 else None
    stop, shown, stopping, started = StopSignals(), {}, 0, time.time() - run["seconds"]

    def save(step):
        mine = {"sums": sums.cpu(), "rngs": [rng.get_state() for rng in rngs]}
        run.update(states=gather(mine), step=step, seconds=time.time() - started)
        if rank == 0:
            run.update(model=trained_state(model, c.train), optimiser=optimiser.state_dict())
            run["log_bytes"] = (folder / "log.jsonl").stat().st_size
            save_checkpoint(folder / "ckpt.pt", run)

    def evaluate():
        """Let the policy act. It is saved already, so a stop signal leaves this to --resume."""
        stop.at_once, since = True, time.time()
        stats = data.obs_mean, data.obs_std
        results = rollout(model, environment, c, stats, c.targets, c.episodes, progress=True)
        stop.at_once = False
        run["evaluating"] += time.time() - since
        log({"step": run["step"], "evaluation": results})
        score = max(r["score"] for r in results)
        if all(score > r["score"] for e in run["evaluations"] for r in e["results"]):
            lasting = {k: x for k, x in run.items() if k not in ("optimiser", "states")}
            save_checkpoint(folder / "best.pt", lasting)
        run["evaluations"].append({"step": run["step"], "results": results})
        shown["score"] = f"{score:.1f}"

    if not saved:
        save(0)
    elif rank == 0 and run["step"] and due(run["step"], c):
        evaluate()
    left = range(run["step"] + 1, c.steps + 1)
    bar = tqdm(left, "training", c.steps, initial=run["step"], disable=rank > 0, mininterval=1)
    model.train()
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = get_lr(step, c)
        window = sample_windows(data, c.batch // world, c.context, window_rng)
        window = [x.to(device, non_blocking=True) for x in window]
        if c.lm_coef:
            text = sample_text(tokens, c.lm_batch // world, c.lm_length, text_rng)
            text = [x.to(device, non_blocking=True) for x in text]
        count = reduce(window[-1].sum().float()) / world  # gradients are averaged over processes
        with autocast:
            losses = action_loss, lm_loss, similarity = objective(window, count, text)
        loss = action_loss + c.lm_coef * lm_loss  # the paper's objective
        if c.similarity:
            loss = loss - c.similarity * fading(step) * similarity  # Wiki-RL's
        loss.backward()
        nn.utils.clip_grad_norm_(trained, c.clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

        sums += torch.stack([*losses, torch.ones_like(loss)]).detach()
        if step % c.log_every == 0 or step == c.steps:
            means = (reduce(sums)[:3] / sums[3]).tolist()
            sums.zero_()
            if not math.isfinite(sum(means)):
                raise UserError(f"the loss is not finite by step {step}; lower --lr")
            names = ("action_loss", "lm_loss", "similarity")
            used = (True, c.lm_coef, c.similarity)
            row = {n: x if on else None for n, x, on in zip(names, means, used, strict=True)}
            shown |= {n: f"{x:.4f}" for n, x in row.items() if x is not None}
            bar.set_postfix(shown)
            if rank == 0:
                seconds = time.time() - started - run["evaluating"]
                log({"step": step, **row, "lr": get_lr(step, c), "seconds": seconds})
        stopping = stop.number
        if world > 1 and (step % STOP_EVERY == 0 or due(step, c)):  # all after the same step
            stopping = int(reduce(torch.tensor(stop.number, device=device), dist.ReduceOp.MAX))
        if due(step, c) or stopping:
            save(step)
        if stopping:
            break
        if rank == 0 and due(step, c):
            evaluate()
    if stopping and rank == 0:
        print(f"stopped after step {step}; go on with: python train.py --resume {folder}")
    elif rank == 0:
        run["seconds"] = time.time() - started
        end_run(folder, run, environment, data.returns)
    del objective  # DDP's keeps the group alive
    if world > 1:
        dist.destroy_process_group()
    if stopping:
        raise SystemExit(128 + stopping)


if __name__ == "__main__":
    run_command(main)
