"""How fast it is, how far from what the machine can do, and how the cost grows.

    python -m experiments.bench                     # of every size of language model
    python -m experiments.bench --models mini --only step act --json bench.json
    python -m experiments.bench --models mini --only growth --plot growth.png

One run times, at the same shapes, the machine's matrix products (the ceiling), a training step, the
same step put together from transformers and peft (the peer), acting and evaluations. Columns:

ms        median, of a device that has finished its work
share     of it that the products would take at the ceiling: those with the blocks' frozen matrices,
          forward and backward, and with the language model's head; all else counts as nothing
ratio     of a step: times as fast as the peer; else environment steps a second, over one's alone
mb        PyTorch's peak on a GPU
first_s   seconds of a step's first call on a GPU, compiling included
exponent  slope between two neighbours on logarithmic axes: 0 is free, 1 in proportion
"""

import math
import platform
import time
from collections import deque
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

from data import Trajectories, sample_text, sample_windows
from evaluate import rollout
from lora import inject_lora, mark_trainable, round_frozen
from model import GPT, GPTConfig, LaMo, Objective
from tasks import Environment, make_env
from train import choose_dtype
from utils import as_graph, choose_device, run_command, write_atomically, write_json

SIZES = {  # of a language model, and the tokens of its blocks of text
    "mini": (GPTConfig(3, 3, 192, 257, 256, dropout=0.0), 256),  # the short preset's
    "gpt2": (GPTConfig(), 1024),
    "gpt2-medium": (GPTConfig(24, 16, 1024), 1024),
}
BATCH, CONTEXT = 64, 20  # windows a step and environment steps of each, the paper's on MuJoCo
OBS, ACT = 11, 3  # numbers of an observation and an action, Hopper's
LM_BATCH = 2  # blocks of text a step, the paper's
ENVIRONMENTS = 40  # 2 targets x 20 episodes, the paper's evaluation
PAPER_RUN = 100_000, 40, 1000  # steps, evaluations, environment steps of the longest episode
EPISODE_STEPS = 50  # of an evaluation timed here; a whole one has up to 1000
TRANSITIONS = (10_000, 100_000, 1_000_000, 10_000_000)  # what growth goes through
CONTEXTS, BATCHES, ACTING = (5, 10, 20, 40, 80), (8, 16, 32, 64, 128), (1, 5, 10, 20, 40, 80)
LONG_ENOUGH, CALLS = 6.0, 100  # seconds, and calls, after which nothing is timed again
CPU = torch.device("cpu")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
COLUMNS = {"ms": (15, ",.3f"), "share": (7, ".0%"), "ratio": (7, ".2f"), "mb": (8, ".0f")}
COLUMNS |= {"first_s": (8, ".1f"), "exponent": (10, ".2f")}  # their widths and formats


@dataclass
class Arguments:
    models: list[Literal["mini", "gpt2", "gpt2-medium"]] = field(default_factory=lambda: [*SIZES])
    only: list[Literal["step", "act", "evaluate", "growth"]] = field(
        default_factory=lambda: ["step", "act", "evaluate"]
    )  # what to measure; growth is of the first of the models
    device: str | None = None  # cuda or cpu (None: cuda if there is one)
    json: str | None = None  # write the rows to this file, too
    plot: str | None = None  # draw growth to this PNG file; needs matplotlib


# --- measuring -----------------------------------------------------------------------------------


def seconds(work, device):
    """Median seconds of work(), called twice or more after once to warm up."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    found = []
    while len(found) < 3 or (len(found) < CALLS and sum(found) < LONG_ENOUGH):
        wait()
        since = time.perf_counter()
        work()
        wait()
        found.append(time.perf_counter() - since)
    return median(found[1:])


def add(rows, what, taken, **more):
    """Append a row to rows, and print its COLUMNS; taken: seconds."""
    row = {"what": what, "ms": 1000 * taken, **more}
    rows.append(row)
    line = f"{what:<50}"
    for name, (width, form) in COLUMNS.items():
        shown = "" if row.get(name) is None else format(row[name], form)
        line += f"{shown:>{width}}"
    print(line.rstrip(), flush=True)


def block_operations(config, tokens, read):
    """Operations of the blocks' matrices, forward: `read` of `tokens` leave the last block."""
    every = 2 * 12 * config.n_embd**2  # c_attn 3, c_proj 1, the MLP 8; a multiply and an add
    last = 2 / 12 * tokens + 10 / 12 * read  # only K and V are needed of all
    return every * ((config.n_layer - 1) * tokens + last)


def step_operations(config, lm_tokens):
    """What a training step multiplies at least: forward, and backward to the inputs."""
    actions = BATCH * CONTEXT
    forward = block_operations(config, 3 * actions, actions)
    forward += block_operations(config, lm_tokens, lm_tokens)
    forward += 2 * config.n_embd * config.vocab_size * lm_tokens
    unlearnt = 2 * 3 * config.n_embd**2 * lm_tokens  # nothing before a text's first c_attn learns
    return 2 * forward - unlearnt


def ceiling(rows, name, device, dtype):
    """Operations a second of a block's four products over a step's trajectory tokens, forward."""
    config = SIZES[name][0]
    C, N = config.n_embd, 3 * BATCH * CONTEXT
    draw = partial(torch.randn, device=device, dtype=DTYPES[dtype])
    pairs = [(draw(N, n), draw(m, n)) for n, m in ((C, 3 * C), (C, C), (C, 4 * C), (4 * C, C))]

    def products():
        for x, weight in 10 * pairs:  # so that launching and waiting hardly count
            F.linear(x, weight)

    taken = seconds(products, device) / 10
    most = block_operations(replace(config, n_layer=1), N, N) / taken
    add(rows, f"{name}, a block's products, {dtype}: {most / 1e12:.3f} TFLOP/s", taken, share=1.0)
    return most


# --- a training step -----------------------------------------------------------------------------


def synthetic(n, device):
    """Trajectories of n random transitions in episodes of up to 1000 steps."""
    timestep = torch.arange(n) % 1000
    end = (torch.arange(n) - timestep + 1000).clamp(max=n)
    made = [torch.randn(n, size, device=device) for size in (OBS, ACT, 1)]
    unused = dict.fromkeys(("obs_mean", "obs_std", "scale", "returns", "lengths"))  # by windows
    return Trajectories(*made, timestep.to(device), end.to(device), **unused)


def make_lamo(config, device, dtype):
    """LaMo as train.py makes it on hopper, with random weights."""
    torch.manual_seed(0)
    lamo = LaMo(GPT(config), (OBS,), ACT, embed="linear")
    inject_lora(lamo.gpt)
    mark_trainable(lamo, "lora")
    if dtype == "bf16":
        round_frozen(lamo)
    return lamo.to(device)


def make_step(model, objective, size, lm_coef, device, dtype, batch, context):
    """A function that does one step, as the loop of train.py does it. objective: called as
    model.Objective is; its first two losses count."""
    config, lm_length = size
    data, cuda = synthetic(100_000, device), device.type == "cuda"
    tokens = torch.randint(config.vocab_size, (10**6,), dtype=torch.int32, device=device)
    trained = [p for p in model.parameters() if p.requires_grad]
    lr = torch.tensor(1e-4, device=device)
    adamw = {"weight_decay": 1e-5, "eps": 1e-6, "fused": True, "capturable": cuda}
    optimiser, sums = torch.optim.AdamW(trained, lr, **adamw), torch.zeros(3, device=device)

    def step():
        window = sample_windows(data, batch, context, None)
        text = sample_text(tokens, LM_BATCH, lm_length, None) if lm_coef else None
        count = window[-1].sum().float()
        with torch.autocast(device.type, torch.bfloat16, dtype == "bf16"):
            action_loss, lm_loss = objective(window, count, text)[:2]
        loss = action_loss + lm_coef * lm_loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.25)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        sums.add_(torch.stack([action_loss, lm_loss, torch.ones_like(loss)]).detach())

    return step


def our_step(size, lm_coef, device, dtype, mode="eager", batch=BATCH, context=CONTEXT):
    """This project's step; mode: "eager", or "graph", compiled and captured."""
    lamo = make_lamo(size[0], device, dtype)
    objective = torch.compile(Objective(lamo)) if mode == "graph" else Objective(lamo)
    step = make_step(lamo, objective, size, lm_coef, device, dtype, batch, context)
    return as_graph(step) if mode == "graph" else step


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
    sizes["activation_function"] = "gelu_new"
    model = DecisionTransformerModel(DecisionTransformerConfig(**sizes))
    trained = [f"embed_{part}" for part in ("timestep", "return", "state", "action", "ln")]
    where = {"target_modules": ["c_attn"], "modules_to_save": [*trained, "predict_action"]}
    lora = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.1, "bias": "lora_only"}
    body = model.encoder
    return get_peft_model(model, LoraConfig(fan_in_fan_out=True, **lora, **where)).train(), body


def peer_step(size, lm_coef, device, dtype):
    """The same step with peer_model."""
    model, body = peer_model(size[0])
    model.to(device)

    def objective(window, count, text):
        rtg, obs, act, timestep, valid = window
        inputs = {"states": obs, "actions": act, "rewards": rtg, "returns_to_go": rtg}
        out = model(**inputs, timesteps=timestep, attention_mask=valid.long())
        action_loss = F.mse_loss(out.action_preds.float()[valid], act[valid])
        if text is None:
            return action_loss, torch.zeros_like(action_loss)
        logits = F.linear(body(input_ids=text[0]).last_hidden_state, body.wte.weight).float()
        return action_loss, F.cross_entropy(logits.flatten(0, 1), text[1].flatten())

    return make_step(model, objective, size, lm_coef, device, dtype, BATCH, CONTEXT)


# --- the rows ------------------------------------------------------------------------------------


def bench_steps(rows, name, device, ceilings):
    """Rows of training steps. Returns the seconds of train.py's, with the language loss."""
    config, lm_length = size = SIZES[name]
    dtype, cuda = next(iter(ceilings)), device.type == "cuda"  # train.py's dtype comes first
    modes = ["eager", "graph"] if cuda else ["eager"]  # train.py's last
    for lm_coef in (0, 0.1):
        operations, peer = step_operations(config, LM_BATCH * lm_length if lm_coef else 0), None
        what = f"{name}, step, lm_coef {lm_coef}"
        add(rows, f"{what}, products alone", operations / ceilings[dtype], share=1.0)
        kinds = [(f"peer, {x}", x, partial(peer_step, size, lm_coef, device, x)) for x in ceilings]
        ours = partial(our_step, size, lm_coef, device, dtype)
        kinds += [(f"ours, {dtype}, {mode}", dtype, partial(ours, mode)) for mode in modes]
        for kind, precision, make in kinds:
            torch.compiler.reset()
            step, more = make(), {}
            if cuda:
                torch.cuda.reset_peak_memory_stats(device)
                since = time.perf_counter()
                step()
                more["first_s"] = time.perf_counter() - since
            taken = seconds(step, device)
            if cuda:
                more["mb"] = torch.cuda.max_memory_allocated(device) / 1e6
            peer = peer or taken
            more |= {"share": operations / taken / ceilings[precision], "ratio": peer / taken}
            add(rows, f"{what}, {kind}", taken, **more)
            del step
    return taken


def selection(lamo, n, device, dtype):
    """A function that does what the model does in a step of n environments, as evaluate.rollout."""
    autocast = partial(torch.autocast, device.type, torch.bfloat16, dtype == "bf16")

    def predict(context):
        with autocast():
            return lamo.act(context).float()

    replay = as_graph(predict) if device.type == "cuda" else predict
    tokens = deque(maxlen=2 * CONTEXT)  # of the last steps: R_t and s_t (n, 2, C), a_t (n, 1, C)
    rtg, obs = torch.randn(n, 1, 1, device=device), torch.randn(n, 1, OBS, device=device)
    act = torch.rand(n, 1, ACT, device=device)
    timestep = torch.full((n, 1), 7, device=device)

    @torch.no_grad()
    def select():
        with autocast():
            tokens.append(lamo.observe(rtg, obs, timestep)[:, 0])
            tokens.append(lamo.remember(act, timestep)[:, 0])
        context = torch.cat(tuple(tokens)[:-1], dim=1)  # it ends in the last s_t
        (replay if len(tokens) == tokens.maxlen else predict)(context).cpu()

    for _ in range(CONTEXT + 3):  # a full window, and captured
        select()
    return select


def bench_acting(rows, name, device, dtype, most):
    """Rows of action selection, windows full; most: the ceiling."""
    config, alone = SIZES[name][0], None
    lamo = make_lamo(config, device, dtype).eval()
    for n in (1, ENVIRONMENTS):
        taken = seconds(selection(lamo, n, device, dtype), device)
        alone = alone or taken
        share = block_operations(config, n * (3 * CONTEXT - 1), n) / taken / most
        add(rows, f"{name}, act, {n} at once", taken, share=share, ratio=n * alone / taken)


def bench_evaluation(rows, name, device, dtype):
    """Rows of evaluations' steps on hopper. Returns the seconds of one of ENVIRONMENTS."""
    env = gym.make("Hopper-v5", terminate_when_unhealthy=False)  # so that episodes are whole
    environment = Environment(env.spec, env.observation_space, env.action_space, -20.3, 3234.3)
    lamo, alone = make_lamo(SIZES[name][0], device, dtype), None
    c = SimpleNamespace(context=CONTEXT, scale=1000.0, mode="normal", dtype=dtype)
    c.episode_limit = EPISODE_STEPS
    stats = torch.zeros(OBS, device=device), torch.ones(OBS, device=device)
    action = np.full(ACT, 0.5, np.float32)
    for n in (1, ENVIRONMENTS):
        envs = [make_env(environment.spec) for _ in range(n)]
        for env in envs:
            env.reset(seed=0)
        acting = seconds(lambda envs=envs: [env.step(action) for env in envs], CPU)
        play = partial(rollout, lamo, environment, c, stats, [3600.0], n)
        taken = seconds(play, device) / EPISODE_STEPS
        alone = alone or taken
        what = f"{name}, evaluate, a step of {n}"
        add(rows, what, taken, ratio=n * alone / taken)
        add(rows, f"{what}: the environments", acting)
        add(rows, f"{what}: the rest", taken - acting)
    return taken


def bench_growth(rows, name, device, dtype):
    """Rows of what one thing costs as another grows, from where the other rows have it."""
    size, mode = SIZES[name], "graph" if device.type == "cuda" else "eager"
    step = partial(our_step, lm_coef=0, device=device, dtype=dtype, mode=mode)
    sizes = {12 * c.n_layer * c.n_embd**2: (replace(c, dropout=0.0), n) for c, n in SIZES.values()}
    lamo = make_lamo(size[0], device, dtype).eval()
    draw = partial(sample_windows, batch=BATCH, context=CONTEXT, generator=torch.Generator(device))
    for grows, timed, values, make in (
        ("transitions", "a batch", TRANSITIONS, lambda n: partial(draw, synthetic(n, device))),
        ("context", f"a step of {name}", CONTEXTS, lambda n: step(size, context=n)),
        ("batch", f"a step of {name}", BATCHES, lambda n: step(size, batch=n)),
        ("weights of the blocks", "a step", sizes, lambda n: step(sizes[n])),
        ("environments", f"actions by {name}", ACTING, lambda n: selection(lamo, n, device, dtype)),
    ):
        before = None
        for value in values:
            torch.compiler.reset()  # or it would compile for any value at once
            work = None  # the graph before it must not end after this one is captured
            row = {"grows": grows, "timed": timed, "value": value, "exponent": None}
            work = make(value)
            for _ in range(4 if device.type == "cuda" else 0):  # until it is compiled and captured
                work()
            taken = seconds(work, device)
            if before:
                row["exponent"] = math.log(taken / before[1]) / math.log(value / before[0])
            add(rows, f"{timed}, {grows} {value:,}", taken, **row)
            before = value, taken


def plot(rows, path):
    """All that grows, and what it costs, both as multiples of the first, on logarithmic axes."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(10, 6), layout="constrained")
    for kind in dict.fromkeys(row["grows"] for row in rows if "grows" in row):
        same = [row for row in rows if row.get("grows") == kind]
        first = same[0]
        x = [row["value"] / first["value"] for row in same]
        label = f"{first['timed']}, {kind} (from {first['value']:,}: {first['ms']:.3g} ms)"
        axis.loglog(x, [row["ms"] / first["ms"] for row in same], "o-", label=label)
    axis.loglog([1, 100], [1, 100], ":", color="gray", label="in proportion")
    axis.set(xlabel="times as much", ylabel="times as long")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    write_atomically(path, partial(figure.savefig, format="png", dpi=120))


def main():
    args, rows = tyro.cli(Arguments, description=__doc__), []
    device = choose_device(args.device)
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    machine = f"{chip}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{machine:<50}" + "".join(f"{name:>{width}}" for name, (width, _) in COLUMNS.items()))
    dtypes = ["bf16", "fp32"] if choose_dtype(device) == "bf16" else ["fp32"]
    for name in args.models if {*args.only} - {"growth"} else ():
        ceilings = {dtype: ceiling(rows, name, device, dtype) for dtype in dtypes}
        if "step" in args.only:
            step = bench_steps(rows, name, device, ceilings)
        if "act" in args.only:
            bench_acting(rows, name, device, dtypes[0], ceilings[dtypes[0]])
        if "evaluate" in args.only:
            played = bench_evaluation(rows, name, device, dtypes[0])
        if {"step", "evaluate"} <= {*args.only}:
            steps, evaluations, length = PAPER_RUN
            taken = steps * step + evaluations * length * played
            what = f"{name}, {steps:,} steps, {evaluations} evaluations"
            add(rows, f"{what}: {taken / 3600:.1f} h", taken)
    if "growth" in args.only or args.plot:
        bench_growth(rows, args.models[0], device, dtypes[0])
    if args.json:
        write_json(args.json, {"machine": machine, "rows": rows})
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    run_command(main)
