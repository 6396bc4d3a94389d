"""Train LaMo (or one of its ablations, or the Decision Transformer) on offline trajectories.

    python train.py --env hopper --ratio 0.01
    torchrun --nproc_per_node=2 train.py --env hopper --ratio 0.01

Everything that can be set stands in Config, each field a flag of the same name. The loop is in
main(), at the end. Figures without another source are from the paper, arXiv 2310.20587.

"""

import io
import math
import os
import shutil
import time
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn as nn
from tqdm import tqdm

from data import (
    check_text,
    find_dataset,
    find_text,
    get_encoding,
    load_trajectories,
    sample_text,
    sample_windows,
    tokenise,
)
from evaluate import FORMAT, build_model, rollout, trained_state
from load_gpt2 import find_weights, is_cached
from plumbing import (
    UserError,
    check_numbers,
    check_writable,
    choose,
    choose_device,
    choose_dtype,
    network_available,
    parse_flags,
    run_command,
    write_atomically,
)
from run_folder import append_to_log, begin_run, end_run
from tasks import TASKS, find_task, make_env


@dataclass
class Config:
    # what to train; "auto" comes from the method, a preset or the task, and is printed
    env: str = "hopper"  # task: a row of tasks.py
    method: str = "lamo"  # lamo, or an ablation or baseline: a row of METHODS below
    ratio: float = 1.0  # share of the dataset's trajectories, in (0, 1]
    mode: str = "normal"  # normal, or delayed: all reward at an episode's last step
    seed: int = 0  # of the data subset, the weights, batches and dropout
    # what to learn from
    dataset: str = "auto"  # Minari id or folder; auto: the task's, see data.find_dataset
    lm: str = "auto"  # gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2, mini, or weights' path
    corpus: str = "auto"  # wikitext, english (the Python manual), or a text file
    # the model
    pretrained: bool = "auto"  # start from the language model's weights, or from random ones
    train: str = "auto"  # lora, new (only what is outside the GPT) or all
    embed: str = "auto"  # linear or mlp, for return, state, action and the head
    lm_coef: float = "auto"  # weight of the language loss; 0 does no language work
    lora_rank: int = 16  # columns of LoRA's factors
    lora_alpha: float = 32  # LoRA's update is scaled by alpha / rank
    lora_dropout: float = 0.1  # on the input of LoRA's update
    dropout: float = "auto"  # GPT-2's: on embeddings, attention and residual branches
    context: int = "auto"  # K, environment steps the model sees
    scale: float = "auto"  # returns-to-go are divided by this
    max_ep_len: int = "auto"  # rows of the time embedding
    # optimisation
    steps: int = "auto"  # optimiser steps
    batch: int = 64  # windows a step, over all processes
    lm_batch: int = 2  # blocks of text a step, over all processes
    lm_length: int = "auto"  # tokens of a block of text
    lr: float = "auto"  # AdamW's learning rate
    warmup: int = "auto"  # steps of linear warm-up, then constant
    weight_decay: float = "auto"  # AdamW's, on everything trained
    clip: float = 0.25  # the gradient's norm is clipped here
    # evaluation
    eval_every: int = "auto"  # steps between evaluations
    episodes: int = "auto"  # episodes for each target
    targets: list[float] = "auto"  # target returns
    # machine
    device: str = "auto"  # cuda or cpu; auto: cuda if there is one
    dtype: str = "auto"  # autocast's: bf16 or fp32; auto: bf16 where the device multiplies it
    compile: bool = "auto"  # torch.compile the step; auto: on CUDA
    log_every: int = 100  # steps averaged into a row of the log
    out: str = "runs"  # a folder for this run is made in here


METHODS = {  # what each one changes; a flag that is typed wins over its row
    "lamo": dict(pretrained=True, train="lora", lm_coef=0.1),
    "lamo-nolm": dict(pretrained=True, train="lora", lm_coef=0.0),
    "lamo-linear": dict(pretrained=True, train="lora", lm_coef=0.1, embed="linear"),
    "lamo-freeze": dict(pretrained=True, train="new", lm_coef=0.1),
    "lamo-full": dict(pretrained=True, train="all", lm_coef=0.1),
    "lamo-random": dict(pretrained=False, train="lora", lm_coef=0.1),
    "dt": dict(lm="dt", pretrained=False, train="all", embed="linear", lm_coef=0.0),
}
PAPER = dict(  # the authors'; the learning rate is the task's
    steps=100_000, warmup=2500, eval_every=2500, episodes=20, lm_length=1024, dropout=0.1
)
SHORT = dict(  # without CUDA, or with the mini LM: minutes on two CPU cores
    steps=1000, warmup=100, eval_every=100, episodes=10, lm_length=256, lr=1e-3, dropout=0.0
)
MAY_BE_ZERO = ("seed", "lm_coef", "weight_decay", "dropout", "lora_dropout", "warmup", "targets")


# --- from the command line to settings -----------------------------------------------------------


def presets():
    """What "auto" stands for, as lines for --help."""
    lines = [f"methods: {', '.join(METHODS)}", f"tasks: {', '.join(TASKS)}"]
    for name, preset in (("paper", PAPER), ("short", SHORT)):
        values = ", ".join(f"{key.replace('_', '-')} {value}" for key, value in preset.items())
        lines.append(f"preset {name}: {values}")
    return "\n".join([*lines, "The short preset is taken without CUDA, or with the mini LM."])


def resolve(typed):
    """Fill in every "auto": a typed flag wins over the method, it over the preset and the task.

    typed: what parse_flags returns. Returns (settings, task, notes): the fields of Config as a
    dictionary, the task's row, and a line for each choice made here, with the reason.
    Raises UserError for values that cannot be.
    """
    settings = asdict(Config()) | typed
    task = find_task(settings["env"])
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
    notes = {"lm": f"{lm} ({why})"}
    notes["preset"] = "short (no CUDA, or the mini LM)" if short else "paper"

    known = vars(task) | (SHORT if short else PAPER) | method | typed
    known |= {"lm": lm, "device": str(device)}
    known.setdefault("dtype", choose_dtype(device))
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    known.setdefault("compile", device.type == "cuda" and compiler is not None)
    if device.type == "cuda" and compiler is None and not known["compile"]:
        notes["compile"] = "off: torch.compile needs a C compiler (cc), and there is none"
    for name, value in settings.items():
        if value == "auto" and name not in ("dataset", "corpus"):
            settings[name] = known[name]
    settings["targets"] = list(settings["targets"])
    check(settings)
    return settings, task, notes


def check(settings):
    """Raises UserError for settings that make no sense, naming the flag and what it takes."""
    for name, valid in {
        "mode": ["normal", "delayed"],
        "embed": ["linear", "mlp"],
        "train": ["lora", "new", "all"],
        "dtype": ["bf16", "fp32"],
    }.items():
        choose(name, settings[name], valid)
    if not 0 < settings["ratio"] <= 1:
        raise UserError(f"--ratio is {settings['ratio']:g}, but must be above 0 and at most 1")
    if settings["lm"] == "dt" and (settings["pretrained"] or settings["lm_coef"]):
        raise UserError("--lm dt is a shape without weights; add --no-pretrained --lm-coef 0")
    check_numbers(settings, MAY_BE_ZERO)
    check_writable(settings["out"], "--out")
    world = int(os.environ.get("WORLD_SIZE", 1))
    for name in ("batch", "lm_batch") if settings["lm_coef"] else ("batch",):
        if settings[name] % world:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {settings[name]} cannot be shared by {world} processes")


# --- the two losses ------------------------------------------------------------------------------


class Objective(nn.Module):
    """Both losses of a step in one call, so that torch.compile and DDP see a step as one graph."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, window, count, text):
        """The action loss and the language loss, which a step adds up.

        window: what sample_windows returns; count: what valid_steps returns; text: what sample_text
        returns, or None.
        Returns (mean squared error over valid action entries, mean cross-entropy or 0.0).
        """
        rtg, obs, act, timestep, valid = window
        error = (self.model(rtg, obs, act, timestep).float() - act) ** 2  # (B, K, A)
        action_loss = (error * valid[..., None]).sum() / (count * act.shape[-1])
        lm_loss = self.model.gpt(*text)[1] if text is not None else torch.zeros_like(action_loss)
        return action_loss, lm_loss


def valid_steps(valid, world):
    """How many steps the action loss is a mean over: valid (B, K) bool -> scalar tensor.

    Under DDP it is the mean over processes: gradients are averaged between them, and only so is
    that average the gradient of the joined batch, whose windows are not equally long.
    """
    count = valid.sum().float()
    if world > 1:
        dist.all_reduce(count)
        count /= world
    return count


def check_same(base, data, tokens, device):
    """Raises UserError unless all processes found the same language model, data and text."""
    mine = [int(base["sha256"][:12], 16), len(data), 0 if tokens is None else len(tokens)]
    mine = torch.tensor(mine, device=device)
    first = mine.clone()
    dist.broadcast(first, 0)
    if not torch.equal(mine, first):
        raise UserError("the processes found different models, data or text; start them again")


def prepare(settings, task, notes, device):
    """Find, load and check all that a run needs, before anything of the run is written.

    Adds to notes what was taken and why. Returns (Trajectories, LaMo, base, tokens): base as in
    build_model, tokens (N,) of the text or None without a language loss. Raises UserError.
    """
    env = make_env(task)
    source, share, notes["dataset"] = find_dataset(task, settings["ratio"], settings["dataset"])
    data = load_trajectories(
        source,
        env.observation_space,
        env.action_space,
        scale=settings["scale"],
        ratio=settings["ratio"] / share,
        mode=settings["mode"],
        seed=settings["seed"],
        device=device,
    )
    env.close()
    model, base = build_model(settings, data.obs.shape[1], data.act.shape[1])
    if settings["lm_coef"] == 0:
        notes["text"] = "none, for lm_coef is 0"
        return data, model.to(device), base, None
    longest = model.gpt.config.block_size
    if settings["lm_length"] > longest:
        raise UserError(f"--lm-length is {settings['lm_length']}; the model knows {longest}")
    vocab_size = model.gpt.config.vocab_size
    text_file, notes["text"] = find_text(settings["corpus"], vocab_size == 257)
    tokens = tokenise(text_file, get_encoding(vocab_size))
    check_text(tokens, settings["lm_length"])
    return data, model.to(device), base, tokens


# --- training ------------------------------------------------------------------------------------


def main():
    settings, task, notes = resolve(parse_flags(Config, "train.py", __doc__ + presets()))
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:  # torchrun started us
        cuda = settings["device"].startswith("cuda")
        if cuda:  # each process its own, whatever --device says
            settings["device"] = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(settings["device"])
        # The others wait for the first one's downloads and evaluations: give it time.
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=6))
    device = torch.device(settings["device"])

    if rank > 0:
        dist.barrier()  # the first process goes ahead: nothing is fetched or tokenised twice
    data, model, base, tokens = prepare(settings, task, notes, device)
    if rank == 0 and world > 1:
        dist.barrier()
    if world > 1:
        check_same(base, data, tokens, device)

    # Other windows, text and dropout in each process, but the same in every run.
    seed = settings["seed"] + 1_000_003 * rank
    torch.manual_seed(seed)
    window_rng = torch.Generator(device).manual_seed(seed)
    text_rng = torch.Generator().manual_seed(seed)

    trainable = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        trainable,
        lr=settings["lr"],
        betas=(0.9, 0.999),
        eps=1e-6,
        weight_decay=settings["weight_decay"],
        fused=True,
    )
    objective = Objective(model)
    if settings["compile"]:
        objective = torch.compile(objective)
    if world > 1:
        objective = nn.parallel.DistributedDataParallel(objective)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=settings["dtype"] == "bf16")

    if rank == 0:
        folder = begin_run(settings, task, notes, data, model, base, world)
        if settings["compile"]:
            print("compiling during the first step; it takes a minute or so", flush=True)

    def save(name):
        checkpoint = {
            "format": FORMAT,
            "settings": settings,
            "chosen": notes,
            "base": base,
            "step": step,
            "model": trained_state(model, settings["train"]),
            "obs_mean": data.obs_mean.cpu(),
            "obs_std": data.obs_std.cpu(),
            "act_dim": data.act.shape[1],
        }
        buffer = io.BytesIO()  # torch.save reports a full disk as no error of the disk
        torch.save(checkpoint, buffer)
        write_atomically(folder / name, lambda file: file.write(buffer.getbuffer()))

    evaluations, best_score, shown = [], -math.inf, {}
    totals = torch.zeros(2, device=device)  # of the losses; reading them waits for the device
    summed = 0  # steps in totals
    started, evaluating = time.time(), 0.0
    bar = tqdm(total=settings["steps"], desc="training", disable=rank > 0, mininterval=1)
    model.train()
    for step in range(1, settings["steps"] + 1):
        lr = settings["lr"] * min(1.0, step / max(1, settings["warmup"]))
        for group in optimiser.param_groups:
            group["lr"] = lr

        window = sample_windows(data, settings["batch"] // world, settings["context"], window_rng)
        text = None
        if tokens is not None:
            blocks = settings["lm_batch"] // world
            text = sample_text(tokens, blocks, settings["lm_length"], text_rng)
            text = [t.to(device, non_blocking=True) for t in text]

        with autocast:
            action_loss, lm_loss = objective(window, valid_steps(window[-1], world), text)
        loss = action_loss + settings["lm_coef"] * lm_loss  # the paper's objective
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, settings["clip"])
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

        totals += torch.stack([action_loss.detach(), lm_loss.detach()])
        summed += 1
        bar.update()
        last = step == settings["steps"]
        if step % settings["log_every"] == 0 or last:
            if world > 1:
                dist.all_reduce(totals)
            action_mean, lm_mean = (totals / (summed * world)).tolist()
            totals.zero_()
            summed = 0
            if not math.isfinite(action_mean + lm_mean):
                raise UserError(f"a loss is not finite any more by step {step}; lower --lr")
            if rank == 0:
                row = {"step": step, "action_loss": action_mean, "lr": lr}
                row["lm_loss"] = None if tokens is None else lm_mean
                append_to_log(folder, row | {"seconds": time.time() - started - evaluating})
                shown |= {"loss": f"{action_mean:.4f}"}
                shown |= {} if tokens is None else {"lm": f"{lm_mean:.3f}"}
                bar.set_postfix(shown)

        if rank == 0 and (step % settings["eval_every"] == 0 or last):
            since = time.time()
            stats, targets = (data.obs_mean, data.obs_std), settings["targets"]
            episodes = settings["episodes"]
            results = rollout(model, task, settings, *stats, targets, episodes, progress=True)
            evaluating += time.time() - since
            evaluations.append({"step": step, "results": results})
            append_to_log(folder, {"step": step, "evaluation": results})
            score = max(r["score"] for r in results)
            shown |= {"score": f"{score:.1f}"}
            bar.set_postfix(shown)
            save("ckpt.pt")
            if score > best_score:
                best_score = score
                save("best.pt")
    bar.close()
    if rank == 0:
        seconds = time.time() - started
        end_run(folder, settings, task, notes, data, evaluations, seconds, evaluating)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
