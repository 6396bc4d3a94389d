"""Train LaMo (or one of its ablations, or the Decision Transformer) on offline trajectories.

    python train.py --env hopper --ratio 0.01
    torchrun --nproc_per_node=2 train.py --env hopper --ratio 0.01

Everything that can be set stands in Config, each field a flag of the same name. The loop is in
main(), at the end. Figures without another source are from the paper, arXiv 2310.20587.

"""

import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from tqdm import tqdm

from checkpoint import build_model, save_checkpoint, trained_state
from data import find_dataset, load_trajectories
from evaluate import rollout
from files import check_memory
from lora import round_frozen
from model import Objective
from plumbing import (
    StopSignals,
    UserError,
    agree,
    be_deterministic,
    check_same,
    choose_device,
    join_processes,
    leave_processes,
    parse_flags,
    run_command,
)
from resume import continue_run, read_run, restore, save_run, state_of_processes
from run_folder import append_to_log, begin_run, end_run, record_evaluation
from settings import check, complete, presets, resolve, task_of_run
from tasks import find_environment, trust
from text import check_text, find_text, get_encoding, sample_text, tokenise
from trackers import Trackers, check_trackers
from wiki_rl import fading, find_centres
from windows import ahead, describe_window, sample_windows, valid_steps

MOST_BARREN = 100  # steps without a sound one that --skip-bad-steps puts up with
STOP_EVERY = 10  # steps after which several processes look whether to stop


@dataclass
class Config:
    # what to train; "auto" comes from the method, a preset or the task, and is printed
    env: str = "auto"  # task: a row of tasks.py, or an Atari game; auto: the dataset's, or hopper
    method: str = "lamo"  # lamo, or an ablation or baseline: a row of METHODS, settings.py
    ratio: float = 1.0  # share of the dataset's trajectories, in (0, 1]
    mode: str = "normal"  # normal, or delayed: all reward at an episode's last step
    seed: int = 0  # of the data subset, the weights, batches and dropout
    # what to learn from
    dataset: str = "auto"  # Minari id or folder; auto: the task's, see data.find_dataset
    quality: str = "medium"  # of the task's dataset, where it has several: simple, medium or expert
    env_module: str = ""  # a module of yours that the dataset's environment is in: it is imported
    lm: str = "auto"  # gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2, mini, or weights' path
    corpus: str = "auto"  # wikitext, english (the Python manual), or a text file
    # the model
    pretrained: bool = "auto"  # start from the language model's weights, or from random ones
    train: str = "auto"  # lora, new (only what is outside the GPT) or all
    embed: str = "auto"  # linear, mlp or tokens, for return, state and action; see embeddings.py
    lm_coef: float = "auto"  # weight of the language loss; 0 does no language work
    similarity: float = "auto"  # weight of Wiki-RL's pull of tokens towards words, see wiki_rl.py
    lora_rank: int = "auto"  # columns of LoRA's factors
    lora_alpha: float = 32  # LoRA's update is scaled by alpha / rank
    lora_dropout: float = 0.1  # on the input of LoRA's update
    dropout: float = "auto"  # GPT-2's: on embeddings, attention and residual branches
    context: int = "auto"  # K, environment steps the model sees
    scale: float = "auto"  # returns-to-go are divided by this
    max_ep_len: int = "auto"  # rows of the time embedding
    # optimisation
    steps: int = "auto"  # optimiser steps
    batch: int = "auto"  # windows a step, over all processes
    lm_batch: int = 2  # blocks of text a step, over all processes
    lm_length: int = "auto"  # tokens of a block of text
    lr: float = "auto"  # AdamW's learning rate
    warmup: int = "auto"  # first steps, over which the learning rate rises from 0
    cooldown: float = "auto"  # last share of the steps, over which it falls to 0
    weight_decay: float = "auto"  # AdamW's, on everything trained
    clip: float = 0.25  # the gradient's norm is clipped here
    skip_bad_steps: bool = False  # go on after a step whose loss or gradient is not finite
    # evaluation
    eval_every: int = "auto"  # steps between evaluations
    episodes: int = "auto"  # episodes for each target
    episode_limit: int = "auto"  # steps after which an episode is cut; 0: where it ends by itself
    targets: list[float] = "auto"  # target returns
    # machine
    device: str = "auto"  # cuda or cpu; auto: cuda if there is one
    deterministic: bool = False  # the same bits again on CUDA too, at some cost; a CPU's are
    dtype: str = "auto"  # autocast's: bf16 or fp32; auto: bf16 where the device multiplies it
    compile: bool = "auto"  # torch.compile the step; auto: on CUDA
    log_every: int = 100  # steps averaged into a row of the log
    out: str = "runs"  # a folder for this run is made in here
    name: str = "auto"  # of that folder; auto: task, method, ratio, seed and time
    tensorboard: bool = False  # write the log's rows for TensorBoard, too; see trackers.py
    wandb: bool = False  # send them to Weights & Biases
    resume: str = ""  # go on with this run's folder; takes --env-module and --skip-bad-steps


# --- before training -----------------------------------------------------------------------------


def prepare(settings, task, notes, device, dataset):
    """Find, load and check all that a run needs, before anything of the run is written.

    Completes settings, and adds to notes what was taken and why. dataset: an id or a folder, or
    "auto". Returns (Environment, Trajectories, LaMo, base, tokens): base as in build_model, tokens
    (N,) of the text or None without a language loss. Raises UserError.
    """
    source, share, notes["dataset"] = find_dataset(
        settings["env"], task, settings["ratio"], dataset, settings["quality"]
    )
    environment, notes["environment"] = find_environment(task, source)
    data = load_trajectories(
        source,
        environment.action_space,
        scale=None if settings["scale"] == "auto" else settings["scale"],
        ratio=settings["ratio"] / share,
        mode=settings["mode"],
        seed=settings["seed"],
        device=device,
        rewards=task.rewards,
    )
    complete(settings, notes, data, environment)
    model, base = build_model(settings, environment)
    if device.type == "cpu":  # attention is written out there, see model.py
        pairs = settings["batch"] * model.gpt.config.n_head * (3 * settings["context"]) ** 2
        check_memory(4 * pairs, f"--context {settings['context']} with --batch {settings['batch']}")
    if settings["dtype"] == "bf16" and settings["train"] != "all":
        round_frozen(model)
    base["text"] = None
    if settings["lm_coef"] == 0:
        unread = "" if settings["corpus"] == "auto" else ", and --corpus is not read"
        notes["text"] = f"none, for lm_coef is 0{unread}"
        return environment, data, model.to(device), base, None
    encoding = get_encoding(model.gpt.config.vocab_size)
    longest = model.gpt.config.block_size
    if settings["lm_length"] > longest:
        blocks = f"blocks of {settings['lm_length']} tokens"
        raise UserError(f"{blocks}, but the model knows {longest}: use --lm-length {longest}")
    text_file, notes["text"] = find_text(settings["corpus"], encoding.name == "bytes")
    tokens = tokenise(text_file, encoding)
    base["text"] = Path(tokens.filename).stem  # the text's SHA-256, and the encoding
    check_text(tokens, settings["lm_length"])
    return environment, data, model.to(device), base, tokens


# --- training ------------------------------------------------------------------------------------


def main():
    typed = parse_flags(Config, "train.py", __doc__ + presets())
    trust(typed.get("env_module"))
    begun = saved = None
    if "resume" in typed:
        path = typed.pop("resume")
        typed.pop("env_module", None)  # said again, for a run's folder may be a stranger's
        skip = typed.pop("skip_bad_steps", False)
        begun, saved = read_run(path, typed, Config)
        begun["settings"]["skip_bad_steps"] |= skip
        settings, notes = begun["settings"], dict(begun["chosen"])
        check(settings | {"out": path})  # where it was begun matters no more
        task = task_of_run(settings)
    else:
        settings, task, notes = resolve(Config(), typed)
    check_trackers(settings)
    if settings["deterministic"]:
        be_deterministic()
    rank, world, device = join_processes(choose_device(settings["device"]))
    settings["device"] = str(device)

    if rank > 0:
        dist.barrier()  # the first process goes ahead: nothing is fetched or tokenised twice
    # What was chosen when a run began stays chosen, though another dataset may be there by now.
    dataset = settings["dataset"]
    if begun and dataset == "auto":
        dataset = begun["data"].get("dataset", "auto")  # older runs do not tell
    made = prepare(settings, task, {} if begun else notes, device, dataset)
    environment, data, model, base, tokens = made
    centres = None
    if settings["similarity"]:
        centres, notes["similarity"] = find_centres(model.gpt.wte.weight)
        centres = centres.to(device)
    if rank == 0 and world > 1:
        dist.barrier()
    if world > 1:
        found = [int(base["sha256"][:12], 16), len(data), 0 if tokens is None else len(tokens)]
        check_same(found, device)

    # Other windows, text and dropout in each process, but the same in every run.
    seed = settings["seed"] + 1_000_003 * rank
    torch.manual_seed(seed)
    window_rng = torch.Generator(data.obs.device).manual_seed(seed)
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
    objective = Objective(model, centres)
    if settings["compile"]:
        objective = torch.compile(objective)
    if world > 1:
        objective = nn.parallel.DistributedDataParallel(objective)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=settings["dtype"] == "bf16")

    if rank == 0:
        if begun:
            folder = continue_run(path, begun, saved, data, base, world)
            since = saved["step"] if saved else 0
            trackers = Trackers(settings, folder, settings | notes, since)
        else:
            folder, trackers = begin_run(settings, environment, notes, data, model, base, world)
        if settings["compile"]:
            print("compiling during the first step; it takes a minute or so", flush=True)

    run = {"settings": settings, "notes": notes, "environment": environment, "data": data}
    save = partial(save_checkpoint, **run, base=base)

    def report_bad(first, n, step):
        """Log the first of n bad steps and what its windows held; stop, unless told to skip."""
        row = {"step": first, "bad_steps": n, "windows": None}
        if first in dict(drawn):  # not if the run was resumed since
            again = torch.Generator(data.obs.device)
            again.set_state(dict(drawn)[first])
            again = sample_windows(data, settings["batch"] // world, settings["context"], again)
            row["windows"] = describe_window(again)
        if rank == 0:
            append_to_log(folder, row)
        what = f"{n} of the steps {first} to {step} had a loss or gradient that is not finite"
        why = "none of them changed the weights; log.jsonl has the first one's windows"
        if barren >= MOST_BARREN:
            raise UserError(f"{what}, as all of the {barren} last ones; {why}; lower --lr")
        if not settings["skip_bad_steps"]:
            how = "begin anew with a lower --lr"
            if rank == 0:
                how += f", or go on: --resume {folder} --skip-bad-steps"
            raise UserError(f"{what}; {why}; {how}")
        if rank == 0:
            bar.write(f"{what}; skipped")

    def evaluate(state):
        """Let the policy act as it is after this step. A stop signal leaves that to --resume."""
        nonlocal evaluating
        since = time.time()
        stats, ask = (data.obs_mean, data.obs_std), (settings["targets"], settings["episodes"])
        results = rollout(model, environment, settings, stats, *ask, progress=True, stop=stop)
        evaluating += time.time() - since
        if results is None:
            return
        best, score = record_evaluation(folder, trackers, evaluations, step, results)
        shown["score"] = f"{score:.1f}"
        bar.set_postfix(shown)
        if best:
            save(folder / "best.pt", step, state)

    def next_window():
        window = sample_windows(data, settings["batch"] // world, settings["context"], window_rng)
        return [x.to(device, non_blocking=True) for x in window], window_rng.get_state()

    # Frames that do not fit on the GPU are fetched while it works on those before.
    apart = data.obs.device.type != device.type

    evaluations, shown = [], {}
    totals = torch.zeros(3, device=device)  # of the losses; reading them waits for the device
    new_bad, first_bad = torch.zeros(2, dtype=torch.int64, device=device)  # of the same steps
    summed, bad_steps = 0, 0  # steps in totals; bad ones before them
    barren = 0  # bad steps since the last row of the log that had a sound one
    drawn = deque(maxlen=settings["log_every"])  # (step, the state its window was drawn from)
    started, evaluating, done = time.time(), 0.0, 0
    if saved:  # from here on all is as it was after that step
        done, summed = saved["step"], saved["summed"]
        evaluations, bad_steps = saved["evaluations"], saved["bad_steps"]
        started, evaluating = started - saved["seconds"], saved["evaluating"]
        into = (model, optimiser, window_rng, text_rng, device)
        totals, (new_bad, first_bad) = restore(path, saved, rank, settings["train"], *into)
    after_window = window_rng.get_state()
    # Only now, for the first window is drawn at once in another thread.
    windows = ahead(next_window) if apart else iter(next_window, None)
    stop = StopSignals()
    bar = tqdm(
        total=settings["steps"], initial=done, desc="training", disable=rank > 0, mininterval=1
    )
    step, stopping = done, 0
    model.train()
    due = done % settings["eval_every"] == 0 or done == settings["steps"]
    if done > 0 and due and done not in [e["step"] for e in evaluations]:  # given up at a stop
        if rank == 0:
            evaluate(trained_state(model, settings["train"], step))
        stopping = agree(stop.number, device)
    for step in range(done + 1, 0 if stopping else settings["steps"] + 1):
        rising = step / max(1, settings["warmup"])
        falling = (1 - (step - 1) / settings["steps"]) / max(settings["cooldown"], 1e-9)
        lr = settings["lr"] * min(rising, 1.0, falling)  # constant in between, the paper's for ever
        for group in optimiser.param_groups:
            group["lr"] = lr

        drawn.append((step, after_window))
        window, after_window = next(windows)
        text = None
        if tokens is not None:
            blocks = settings["lm_batch"] // world
            text = sample_text(tokens, blocks, settings["lm_length"], text_rng)
            text = [t.to(device, non_blocking=True) for t in text]

        with autocast:
            losses = objective(window, valid_steps(window[-1], world), text)
        action_loss, lm_loss, similarity = losses
        loss = action_loss + settings["lm_coef"] * lm_loss  # the paper's objective
        if settings["similarity"]:
            loss = loss - settings["similarity"] * fading(step) * similarity  # Wiki-RL's
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trainable, settings["clip"])
        # Each process has its own loss, but all must step alike: between them the norm decides.
        bad = ~(norm if world > 1 else norm + loss.detach()).isfinite()
        optimiser.found_inf = bad.float()  # where it is 1, fused AdamW leaves all as it is
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

        totals += torch.where(bad, 0, torch.stack(losses).detach())
        new_bad, first_bad = new_bad + bad, torch.where(bad & (new_bad == 0), step, first_bad)
        summed += 1
        bar.update()
        if step == 1 and rank == 0 and settings["compile"]:
            bar.write(f"compiled; the first step took {time.time() - started:.0f} s")
        last = step == settings["steps"]
        logged = step % settings["log_every"] == 0 or last
        due = step % settings["eval_every"] == 0 or last  # for an evaluation
        if logged:
            if world > 1:
                dist.all_reduce(totals)
            n = int(new_bad)
            barren = barren + n if n == summed else 0
            if n:
                report_bad(int(first_bad), n, step)
                bad_steps += n
            means = (totals / ((summed - n) * world)).tolist() if n < summed else [None] * 3
            action_mean, lm_mean, similarity_mean = means
            totals.zero_()
            new_bad, summed = torch.zeros_like(new_bad), 0
            if rank == 0:
                row = {"step": step, "action_loss": action_mean, "lr": lr}
                row["lm_loss"] = None if tokens is None else lm_mean
                row["similarity"] = similarity_mean if settings["similarity"] else None
                row["seconds"] = time.time() - started - evaluating
                append_to_log(folder, row)
                trackers.add(row)
                if action_mean is not None:
                    shown |= {"loss": f"{action_mean:.4f}"}
                    shown |= {} if tokens is None else {"lm": f"{lm_mean:.3f}"}
                bar.set_postfix(shown)

        if rank == 0 and due:
            state = trained_state(model, settings["train"], step)
            evaluate(state)
        # Processes stop after the same step, before torchrun's patience of 30 s is over.
        if world == 1 or step % STOP_EVERY == 0 or logged or due:
            stopping = agree(stop.number, device)
        if due or stopping:
            processes = state_of_processes(
                world,
                device,
                totals=totals.cpu(),
                bad=torch.stack([new_bad, first_bad]).cpu(),
                windows=after_window,
                text=text_rng.get_state(),
            )
            if rank == 0:
                if not due:  # else it was made for the evaluation
                    state = trained_state(model, settings["train"], step)
                save(folder / "ckpt.pt", step, state)
                save_run(
                    folder,
                    step=step,
                    model=state,
                    optimiser=optimiser.state_dict(),
                    processes=processes,
                    summed=summed,
                    bad_steps=bad_steps,
                    evaluations=evaluations,
                    seconds=time.time() - started,
                    evaluating=evaluating,
                )
        if stopping:
            break
    stop.restore()
    bar.close()
    seconds = time.time() - started
    if rank == 0 and not stopping:
        times = {"seconds": seconds, "evaluating": evaluating}
        end_run(folder, **run, evaluations=evaluations, **times, bad_steps=bad_steps)
    elif rank == 0:
        print(f"stopped after step {step}; go on with: python train.py --resume {folder}")
    if rank == 0:
        trackers.close()
    del objective
    leave_processes()
    if stopping:
        raise SystemExit(128 + stopping)


if __name__ == "__main__":
    run_command(main)
