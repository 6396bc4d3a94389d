"""How fast it is, how far from what the machine can do, and how the cost grows.

    python -m experiments.bench                     # all rows
    python -m experiments.bench --models mini --only step act --json bench.json
    python -m experiments.bench --only growth --plot growth.png

Everything is timed in one run at the same shapes: the machine's matrix products, a training step,
the same step put together from transformers and peft, sampling, action selection, evaluations.
Times are medians after a warm-up, on a device that has finished its work.

"Share" is the speed of the work's floor over the ceiling. The floor is the operations of the
products with the blocks' frozen matrices, forward and backward to their inputs, and with the
language model's head; attention, LoRA, embeddings, GELU and the optimiser count as nothing. The
ceiling is how fast the machine does such products alone. MB are PyTorch's peak on a GPU.
"""

import math
import platform
import time
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from types import SimpleNamespace
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro

from data import Trajectories, sample_windows
from evaluate import rollout
from lora import inject_lora, mark_trainable, merged, round_frozen
from model import GPT, GPTConfig, LaMo, Objective
from tasks import Environment, make_env
from train import choose_dtype
from utils import UserError, choose_device, run_command, write_atomically, write_json

BATCH, CONTEXT = 64, 20  # windows a step and environment steps of each, the paper's on MuJoCo
OBS, ACT = 11, 3  # numbers of an observation and an action, Hopper's
LM_BATCH = 2  # blocks of text a step, the paper's
ENVIRONMENTS = 40  # 2 targets x 20 episodes, the paper's evaluation
PAPER_RUN = 100_000, 40, 1000  # steps, evaluations, environment steps of the longest episode
EPISODE_STEPS = 50  # of an evaluation timed here; a whole one has up to 1000
TRANSITIONS = (10_000, 100_000, 1_000_000, 10_000_000)
GROWTH = {"context": (5, 10, 20, 40, 80), "batch": (8, 16, 32, 64, 128)}
GROWTH_ENVIRONMENTS = (1, 5, 10, 20, 40, 80)
CPU = torch.device("cpu")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Size:
    """A language model's shape, and how often what takes long is repeated."""

    config: GPTConfig
    lm_length: int  # tokens of a block of text
    repeats: int  # timed ones, on a CPU; on a GPU always 50


SIZES = {
    "mini": Size(GPTConfig(3, 3, 192, 257, 256, dropout=0.0), 256, 50),  # the short preset's
    "gpt2": Size(GPTConfig(), 1024, 5),
    "gpt2-medium": Size(GPTConfig(24, 16, 1024), 1024, 3),
}


@dataclass
class Arguments:
    models: list[Literal["mini", "gpt2", "gpt2-medium"]] = field(default_factory=lambda: [*SIZES])
    only: list[Literal["windows", "step", "act", "evaluate", "growth"]] = field(
        default_factory=lambda: ["windows", "step", "act", "evaluate"]
    )  # what to measure; growth is of the first of the models
    device: str | None = None  # cuda or cpu (default: cuda if there is one)
    json: str | None = None  # write the rows to this file, too
    plot: str | None = None  # draw growth to this PNG file; needs matplotlib


# --- measuring -----------------------------------------------------------------------------------


def seconds(work, repeats, device):
    """Median seconds of work(), called `repeats` times after 2, or a tenth as many, for warm-up."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    found = []
    for _ in range(repeats + max(2, repeats // 10)):
        wait()
        since = time.perf_counter()
        work()
        wait()
        found.append(time.perf_counter() - since)
    return median(found[-repeats:])


def peak(device):
    """MB that PyTorch had allocated at most on a GPU since this was last called; None on a CPU."""
    if device.type != "cuda":
        return None
    most = torch.cuda.max_memory_allocated(device) / 1e6
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return most


def ceiling(config, device, dtype):
    """Floating-point operations a second of a block's four products, each at its own share.

    Over a step's 3 * BATCH * CONTEXT tokens, forward.
    """
    C, N = config.n_embd, 3 * BATCH * CONTEXT
    times = 100 if device.type == "cuda" else 1  # so that launching and waiting do not count
    total = 0.0
    for n_in, n_out in ((C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)):
        x = torch.randn(N, n_in, device=device, dtype=dtype)
        weight = torch.randn(n_out, n_in, device=device, dtype=dtype)

        def products(x=x, weight=weight):
            for _ in range(times):
                F.linear(x, weight)

        total += seconds(products, 30, device) / times
    return block_operations(replace(config, n_layer=1), N, N) / total


def block_operations(config, tokens, read):
    """Operations of the blocks' matrices, forward: `read` of `tokens` leave the last block."""
    every = 2 * 12 * config.n_embd**2  # c_attn 3, c_proj 1, the MLP 8; a multiply and an add
    last = 2 / 12 * tokens + 10 / 12 * read  # only K and V are needed of all
    return every * ((config.n_layer - 1) * tokens + last)


def step_operations(config, lm_tokens):
    """The floor of a training step: forward, and backward to the inputs."""
    actions = BATCH * CONTEXT
    forward = block_operations(config, 3 * actions, actions)
    forward += block_operations(config, lm_tokens, lm_tokens)
    forward += 2 * config.n_embd * config.vocab_size * lm_tokens
    unlearnt = 2 * 3 * config.n_embd**2 * lm_tokens  # nothing before a text's first c_attn learns
    return 2 * forward - unlearnt


class Table:
    """Rows, printed as they come."""

    def __init__(self):
        self.rows = []
        print(f"{'what':<60}{'ms':>10}{'tokens/s':>10}{'share':>8}{'ratio':>8}{'MB':>8}")

    def add(self, what, seconds, tokens=None, share=None, ratio=None, memory=None):
        """share: of the ceiling; ratio: to what the row's name says; memory: MB at the peak."""
        rate = None if tokens is None else tokens / seconds
        row = {"what": what, "ms": 1000 * seconds, "tokens_per_s": rate}
        self.rows.append(row | {"share_of_ceiling": share, "ratio": ratio, "peak_mb": memory})
        cells = ((rate, "10.0f"), (share, "8.0%"), (ratio, "8.2f"), (memory, "8.0f"))
        shown = [" " * int(form[:-3]) if x is None else format(x, form) for x, form in cells]
        print(f"{what:<60}{1000 * seconds:10.3f}{''.join(shown)}", flush=True)


# --- a training step -----------------------------------------------------------------------------


def synthetic(n, device):
    """Trajectories of n random transitions in episodes of up to 1000 steps."""
    timestep = torch.arange(n) % 1000
    end = (torch.arange(n) - timestep + 1000).clamp(max=n)
    E = len(end.unique())
    return Trajectories(
        obs=torch.randn(n, OBS, device=device),
        act=torch.rand(n, ACT, device=device),
        rtg=torch.randn(n, 1, device=device),
        timestep=timestep.to(device),
        end=end.to(device),
        obs_mean=torch.zeros(OBS, device=device),
        obs_std=torch.ones(OBS, device=device),
        scale=1.0,
        returns=np.ones(E),
        lengths=np.full(E, 1000),
    )


def make_lamo(config, device, dtype):
    """LaMo as train.py makes it on hopper, with random weights."""
    torch.manual_seed(0)
    lamo = LaMo(GPT(config), (OBS,), ACT, embed="linear")
    inject_lora(lamo.gpt)
    mark_trainable(lamo, "lora")
    if dtype == "bf16":
        round_frozen(lamo)
    return lamo.to(device)


def make_text(size, device):
    """Random blocks of text, and what follows each token: both (LM_BATCH, L)."""
    shape = LM_BATCH, size.lm_length
    return [torch.randint(size.config.vocab_size, shape, device=device) for _ in range(2)]


def autocast(device, dtype):
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16")


def training_step(losses, model, lm_coef, device, dtype):
    """A function that does one step, as the loop of train.py does it.

    losses: a function that returns the action loss and the language loss.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4, weight_decay=1e-5, eps=1e-6, fused=True)

    def step():
        with autocast(device, dtype):
            action_loss, lm_loss = losses()
        (action_loss + lm_coef * lm_loss).backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.25)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def our_step(size, lm_coef, device, dtype, mode="eager", batch=BATCH, context=CONTEXT):
    """This project's step, data drawn in it; mode: "eager", or torch.compile's."""
    lamo, data = make_lamo(size.config, device, dtype), synthetic(100_000, device)
    generator = torch.Generator(device).manual_seed(0)
    objective = Objective(lamo)
    if mode != "eager":
        objective = torch.compile(objective, mode=mode)
    text = make_text(size, device) if lm_coef else None

    def losses():
        window = sample_windows(data, batch, context, generator)
        return objective(window, window[-1].sum().float(), text)[:2]

    return training_step(losses, lamo, lm_coef, device, dtype)


def peer_model(config):
    """LaMo as one would put it together from transformers and peft. Returns it and its body.

    transformers' DecisionTransformerModel has GPT-2's blocks, and peft's LoRA goes into their
    c_attn, with one factor A for Q, K and V together where ours has three, so ours has a little
    more work to do. Its embeddings are linear, as ours are here.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import DecisionTransformerConfig, DecisionTransformerModel

    sizes = {"hidden_size": config.n_embd, "n_layer": config.n_layer, "n_head": config.n_head}
    sizes |= {"state_dim": OBS, "act_dim": ACT, "max_ep_len": 1000, "vocab_size": config.vocab_size}
    sizes |= {k: config.dropout for k in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    sizes |= {k: config.vocab_size - 1 for k in ("bos_token_id", "eos_token_id")}
    model = DecisionTransformerModel(
        DecisionTransformerConfig(activation_function="gelu_new", **sizes)
    )
    trained = [f"embed_{part}" for part in ("timestep", "return", "state", "action", "ln")]
    where = {"target_modules": ["c_attn"], "modules_to_save": [*trained, "predict_action"]}
    lora = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.1, "bias": "lora_only"}
    body = model.encoder
    return get_peft_model(model, LoraConfig(fan_in_fan_out=True, **lora, **where)).train(), body


def peer_step(size, lm_coef, device, dtype):
    """The same step with peer_model."""
    model, body = peer_model(size.config)
    model.to(device)
    data, generator = synthetic(100_000, device), torch.Generator(device).manual_seed(0)
    text = make_text(size, device)

    def losses():
        rtg, obs, act, timestep, valid = sample_windows(data, BATCH, CONTEXT, generator)
        inputs = {"states": obs, "actions": act, "rewards": rtg, "returns_to_go": rtg}
        out = model(**inputs, timesteps=timestep, attention_mask=valid.long())
        action_loss = F.mse_loss(out.action_preds.float()[valid], act[valid])
        if not lm_coef:
            return action_loss, 0.0
        logits = F.linear(body(input_ids=text[0]).last_hidden_state, body.wte.weight).float()
        return action_loss, F.cross_entropy(logits.flatten(0, 1), text[1].flatten())

    return training_step(losses, model, lm_coef, device, dtype)


# --- the rows ------------------------------------------------------------------------------------


def bench_windows(table, device):
    """Rows of sampling."""
    for n in TRANSITIONS:
        data, generator = synthetic(n, device), torch.Generator(device).manual_seed(0)
        taken = seconds(partial(sample_windows, data, BATCH, CONTEXT, generator), 200, device)
        table.add(f"sample {BATCH} windows of {CONTEXT} of {n:,} transitions", taken)


def bench_steps(table, name, size, device, dtypes, ceilings):
    """Rows of training steps of one size. Returns the seconds of train.py's step with language."""
    repeats = 50 if device.type == "cuda" else size.repeats
    modes = ["default", "reduce-overhead", "eager"] if device.type == "cuda" else ["eager"]
    for lm_coef in (0, 0.1):
        lm_tokens = LM_BATCH * size.lm_length if lm_coef else 0
        tokens = 3 * BATCH * CONTEXT + lm_tokens
        floor, times = step_operations(size.config, lm_tokens), {}
        for mode in modes:
            peak(device)
            step = our_step(size, lm_coef, device, dtypes[0], mode)
            since = time.perf_counter()
            step()
            first = time.perf_counter() - since
            times[mode] = taken = seconds(step, repeats, device)
            what = f"step, {name}, lm_coef {lm_coef}, {dtypes[0]}, {mode}"
            share = floor / taken / ceilings[dtypes[0]]
            table.add(what, taken, tokens, share, memory=peak(device))
            if mode != "eager":
                table.add(f"  its first call, compiling ({mode})", first)
            del step
            torch.compiler.reset()
        for dtype in dtypes:
            step = peer_step(size, lm_coef, device, dtype)
            taken = seconds(step, max(2, repeats // 2), device)
            what = f"  transformers + peft, {dtype}, eager (ratio: to {modes[0]} {dtypes[0]})"
            share, ratio = floor / taken / ceilings[dtype], taken / times[modes[0]]
            table.add(what, taken, tokens, share, ratio, peak(device))
            del step
    return times[modes[0]]


def selection(lamo, n, device, dtype):
    """A function that does what the model does in a step of n environments, as evaluate.rollout."""
    tokens = deque(maxlen=2 * CONTEXT - 1)
    rtg, obs = torch.randn(n, 1, 1, device=device), torch.randn(n, 1, OBS, device=device)
    act = torch.rand(n, 1, ACT, device=device)
    timestep = torch.full((n, 1), 7, device=device)
    rows = torch.arange(n, device=device)

    def select():
        with torch.no_grad(), autocast(device, dtype):
            tokens.append(lamo.observe(rtg, obs, timestep)[:, 0])
            lamo.act(torch.cat(tuple(tokens), dim=1)[rows]).float().cpu()
            tokens.append(lamo.remember(act, timestep)[:, 0])

    for _ in range(CONTEXT):
        select()
    return select


def bench_acting(table, name, size, device, dtype, ceilings):
    """Rows of action selection."""
    lamo = make_lamo(size.config, device, dtype).eval()
    repeats, alone = 50 if device.type == "cuda" else 2 * size.repeats, None
    with merged(lamo) if dtype == "fp32" else nullcontext():  # as in a rollout
        for n in (1, ENVIRONMENTS):
            taken = seconds(selection(lamo, n, device, dtype), repeats, device)
            tokens = n * (3 * CONTEXT - 1)
            share = block_operations(size.config, tokens, n) / taken / ceilings[dtype]
            alone = alone or taken
            what = f"act, {name}, {n} environments (ratio: to alone)"
            table.add(what, taken, tokens, share, n * alone / taken)
            table.add("  for each environment step", taken / n)


def bench_evaluation(table, name, size, device, dtype):
    """Rows of evaluations on hopper, environment time apart.

    Returns the seconds of a step of ENVIRONMENTS episodes together.
    """
    env = gym.make("Hopper-v5", terminate_when_unhealthy=False)  # so that episodes are whole
    environment = Environment(env.spec, env.observation_space, env.action_space, -20.3, 3234.3)
    lamo, rates = make_lamo(size.config, device, dtype), {}
    c = SimpleNamespace(context=CONTEXT, scale=1000.0, mode="normal", dtype=dtype)
    c.episode_limit = EPISODE_STEPS
    stats = torch.zeros(OBS, device=device), torch.ones(OBS, device=device)
    actions = np.random.default_rng(0).uniform(-1, 1, (ENVIRONMENTS, ACT)).astype(np.float32)
    for targets, episodes in (([3600.0], 1), ([3600.0, 1800.0], ENVIRONMENTS // 2)):
        n = len(targets) * episodes
        envs = [make_env(environment.spec) for _ in range(n)]
        for env in envs:
            env.reset(seed=0)

        def act(envs=envs):
            for env, action in zip(envs, actions, strict=False):
                env.step(action)

        each = seconds(act, EPISODE_STEPS, CPU)
        play = partial(rollout, lamo, environment, c, stats, targets, episodes)
        taken = seconds(play, 1 if size.repeats < 20 else 3, device)
        rates[n] = n * EPISODE_STEPS / taken
        what = f"evaluate, {name}, {n} episodes of {EPISODE_STEPS} steps (ratio: to alone)"
        table.add(what, taken, ratio=rates[n] / rates[1])
        table.add(f"  of it the environments, a step of {n}", each)
        table.add("  the rest, for each environment step", (taken / EPISODE_STEPS - each) / n)
    return taken / EPISODE_STEPS


# --- growth --------------------------------------------------------------------------------------


def grow(name, device, dtype):
    """Yield (what grows, what is timed, its value, seconds); name: of the model, in SIZES.

    One thing grows at a time, from where the other rows have them; models are without dropout.
    """
    mode, repeats = ("default", 50) if device.type == "cuda" else ("eager", SIZES[name].repeats)
    for n in TRANSITIONS:
        data, generator = synthetic(n, device), torch.Generator(device).manual_seed(0)
        draw = partial(sample_windows, data, BATCH, CONTEXT, generator)
        yield "transitions", "a batch of windows", n, seconds(draw, 200, device)
    del data, draw
    for kind, values in GROWTH.items():
        for value in values:
            torch.compiler.reset()  # or it would compile for any value at once
            step = our_step(SIZES[name], 0, device, dtype, mode, **{kind: value})
            yield kind, f"a step of {name}", value, seconds(step, repeats, device)
    for size in SIZES.values():
        torch.compiler.reset()
        same = replace(size, config=replace(size.config, dropout=0.0))
        step = our_step(same, 0, device, dtype, mode)
        parameters = size.config.n_layer * 12 * size.config.n_embd**2
        yield "parameters of the blocks", "a step", parameters, seconds(step, 3, device)
    del step
    lamo = make_lamo(SIZES[name].config, device, dtype).eval()
    with merged(lamo) if dtype == "fp32" else nullcontext():
        for n in GROWTH_ENVIRONMENTS:
            select = selection(lamo, n, device, dtype)
            yield "environments", f"actions by {name}", n, seconds(select, 2 * repeats, device)


def bench_growth(name, device, dtype):
    """Print rows of `grow`, and return them. The exponent is the slope between two neighbours on
    logarithmic axes: 0 is free, 1 in proportion, 2 quadratic."""
    print(f"{'what grows':<26}{'to':>12}  {'timed':<22}{'ms':>11}{'exponent':>10}")
    rows = []
    for grows, timed, value, taken in grow(name, device, dtype):
        row = {"grows": grows, "timed": timed, "value": value, "ms": 1000 * taken, "exponent": None}
        if rows and rows[-1]["grows"] == grows:
            growth = math.log(row["ms"] / rows[-1]["ms"])
            row["exponent"] = growth / math.log(value / rows[-1]["value"])
        rows.append(row)
        exponent = "" if row["exponent"] is None else f"{row['exponent']:.2f}"
        print(f"{grows:<26}{value:>12,}  {timed:<22}{row['ms']:>11.3f}{exponent:>10}", flush=True)
    return rows


def plot(rows, path):
    """A panel for each thing that grows, both axes logarithmic."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter, LogLocator

    kinds = list(dict.fromkeys(row["grows"] for row in rows))
    figure, axes = plt.subplots(2, 3, figsize=(9, 6), layout="constrained")
    for axis in axes.flat[len(kinds) :]:
        axis.set_axis_off()
    for axis, kind in zip(axes.flat, kinds, strict=False):
        x = [row["value"] for row in rows if row["grows"] == kind]
        y = [row["ms"] for row in rows if row["grows"] == kind]
        linear = [y[-1] * value / x[-1] for value in x]
        axis.loglog(x, linear, ":", color="#777777", label="in proportion")
        axis.loglog(x, y, "o-", color="#0072B2", label="measured")
        axis.minorticks_off()
        axis.set_xticks(x, [EngFormatter(places=0, sep="")(value) for value in x])
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_ylim(min(y) / 2, max(y) * 2)
        axis.set_xlabel(kind)
        axis.set_ylabel("milliseconds")
        axis.set_title(next(row["timed"] for row in rows if row["grows"] == kind), fontsize=11)
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=9)
    write_atomically(path, partial(figure.savefig, format="png", dpi=150))


def main():
    args = tyro.cli(Arguments, description=__doc__)
    if args.plot and "growth" not in args.only:
        raise UserError("--plot draws growth: give --only growth, too")
    device = choose_device(args.device)
    machine = {"device": str(device), "processor": platform.processor() or platform.machine()}
    if device.type == "cuda":
        machine["processor"] = torch.cuda.get_device_name(device)
    machine |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    dtypes = ["bf16", "fp32"] if choose_dtype(device) == "bf16" else ["fp32"]
    table, growth = Table(), []
    if "windows" in args.only:
        bench_windows(table, device)
    for name in args.models if {"step", "act", "evaluate"} & {*args.only} else ():
        size = SIZES[name]
        ceilings = {dtype: ceiling(size.config, device, DTYPES[dtype]) for dtype in dtypes}
        for dtype, operations in ceilings.items():
            tokens = 3 * BATCH * CONTEXT
            what = f"ceiling, {name}, {dtype}: {operations / 1e12:.3f} TFLOP/s; all blocks once"
            taken = block_operations(size.config, tokens, tokens) / operations
            table.add(what, taken, tokens, 1.0)
        if "step" in args.only:
            step = bench_steps(table, name, size, device, dtypes, ceilings)
        if "act" in args.only:
            bench_acting(table, name, size, device, dtypes[0], ceilings)
        if "evaluate" in args.only:
            played = bench_evaluation(table, name, size, device, dtypes[0])
            if "step" in args.only:
                steps, evaluations, length = PAPER_RUN
                what = f"{steps:,} steps and {evaluations} whole evaluations, extrapolated"
                table.add(what, steps * step + evaluations * length * played)
    if "growth" in args.only:
        growth = bench_growth(args.models[0], device, dtypes[0])
    if args.json:
        write_json(args.json, {"machine": machine, "rows": table.rows, "growth": growth})
    if args.plot:
        plot(growth, args.plot)


if __name__ == "__main__":
    run_command(main)
