"""How fast it is, and how far from what the machine can do.

    python -m experiments.bench                     # all rows this machine can run
    python -m experiments.bench --models mini --only step act --json bench.json

Everything is timed in one run at the same shapes: the machine's matrix products, a training step,
the same step as one would write it with transformers and peft, sampling, action selection and whole
episodes. Needs torch and NumPy; rows that need transformers or gymnasium say so where they are
missing. Times are medians after a warm-up, on a device that has finished its work.

"Share" is the floor of the work (see measure.py) over what the machine's products would do in the
time. Memory is the peak: on a GPU what PyTorch has allocated, on Linux all of this process.
"""

import importlib.util
import platform
import time
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from experiments.measure import (
    BATCH,
    CONTEXT,
    CPU,
    NAMES,
    Table,
    block_operations,
    ceiling,
    forget_peak,
    peak,
    seconds,
    step_operations,
    wait,
)
from experiments.peer import peer_model
from files import check_writable, write_json
from lora import inject_lora, mark_trainable, merged, round_frozen
from model import GPT, GPTConfig, LaMo, Objective, attend
from plumbing import Parser, choose, choose_device, choose_dtype, run_command
from windows import Trajectories, sample_windows

OBS, ACT = 11, 3  # numbers of an observation and an action, Hopper's
LM_BATCH = 2  # blocks of text a step, the paper's
ENVIRONMENTS = 40  # 2 targets x 20 episodes, the paper's evaluation
PAPER_RUN = 100_000, 40, 1000  # steps, evaluations, environment steps of the longest episode
EPISODE_STEPS = 50  # of an evaluation timed here; a whole one has up to 1000


@dataclass(frozen=True)
class Size:
    """A language model's shape and how often what takes long is repeated."""

    config: GPTConfig
    lm_length: int  # tokens of a block of text
    repeats: int  # timed ones, on a CPU; on a GPU always 50


SIZES = {
    "mini": Size(GPTConfig(3, 3, 192, 257, 256, dropout=0.0), 256, 50),  # the short preset's
    "gpt2": Size(GPTConfig(), 1024, 5),
    "gpt2-medium": Size(GPTConfig(24, 16, 1024), 1024, 3),
}


# --- a training step -----------------------------------------------------------------------------


def synthetic(n, device):
    """Trajectories of n random transitions in episodes of up to 1000 steps."""
    end = torch.arange(1, n // 1000 + 2).repeat_interleave(1000)[:n] * 1000
    return Trajectories(
        obs=torch.randn(n, OBS, device=device),
        act=torch.rand(n, ACT, device=device),
        rtg=torch.randn(n, 1, device=device),
        timestep=(torch.arange(n) % 1000).to(device),
        end=end.clamp(max=n).to(device),
        obs_mean=torch.zeros(OBS, device=device),
        obs_std=torch.ones(OBS, device=device),
        scale=1.0,
        returns=np.ones(len(end.unique())),
        lengths=np.full(len(end.unique()), 1000),
    )


def make_lamo(config, device, dtype):
    """LaMo as train.py makes it, with random weights."""
    torch.manual_seed(0)
    lamo = LaMo(GPT(config), (OBS,), ACT, embed="linear")  # Hopper's
    inject_lora(lamo.gpt)
    mark_trainable(lamo, "lora")
    if dtype == torch.bfloat16:
        round_frozen(lamo)
    return lamo.to(device)


def make_text(size, device):
    """Random blocks of text, and what follows each token: both (LM_BATCH, L)."""
    shape = LM_BATCH, size.lm_length
    return [torch.randint(size.config.vocab_size, shape, device=device) for _ in range(2)]


def training_step(losses, parameters, lm_coef, autocast):
    """A function that does one step, as the loop of train.py does it.

    losses: a function that returns the action loss and the language loss.
    """
    trained = [p for p in parameters if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4, weight_decay=1e-5, eps=1e-6, fused=True)

    def step():
        with autocast:
            action_loss, lm_loss = losses()
        (action_loss + lm_coef * lm_loss).backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.25)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def our_step(size, lm_coef, device, dtype, mode, batch=BATCH, context=CONTEXT):
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

    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    return training_step(losses, lamo.parameters(), lm_coef, autocast)


def peer_step(size, lm_coef, device, dtype):
    """The same step as one would write it with transformers, and its name."""
    model, body, name = peer_model(size.config, OBS, ACT)
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

    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    return training_step(losses, model.parameters(), lm_coef, autocast), name


# --- acting --------------------------------------------------------------------------------------


def selection(lamo, n, device, autocast):
    """A function that does what the model does in a step of n environments, as evaluate.rollout."""
    tokens = deque(maxlen=2 * CONTEXT - 1)
    rtg, obs = torch.randn(n, 1, 1, device=device), torch.randn(n, 1, OBS, device=device)
    act = torch.rand(n, 1, ACT, device=device)
    timestep = torch.full((n, 1), 7, device=device)
    rows = torch.arange(n, device=device)

    def select():
        with torch.no_grad(), autocast:
            tokens.append(lamo.observe(rtg, obs, timestep)[:, 0])
            action = lamo.act(torch.cat(tuple(tokens), dim=1)[rows]).float().cpu()
            tokens.append(lamo.remember(act, timestep)[:, 0])
        return action

    for _ in range(CONTEXT):
        select()
    return select


def hopper():
    """Hopper as an Environment that goes on when the robot falls, so that episodes are whole."""
    import gymnasium as gym

    from tasks import Environment

    env = gym.make("Hopper-v5", terminate_when_unhealthy=False)
    return Environment(env.spec, env.observation_space, env.action_space, -20.3, 3234.3)


# --- the rows ------------------------------------------------------------------------------------


def bench_steps(table, name, size, device, dtypes, ceilings):
    """Rows of training steps of one size. Returns the seconds of train.py's step with language."""
    repeats = 50 if device.type == "cuda" else size.repeats
    modes = ["default", "reduce-overhead", "eager"] if device.type == "cuda" else ["eager"]
    for lm_coef in (0, 0.1):
        lm_tokens = LM_BATCH * size.lm_length if lm_coef else 0
        tokens = 3 * BATCH * CONTEXT + lm_tokens
        floor, times = step_operations(size.config, lm_tokens), {}
        for mode in modes:
            forget_peak(device)
            step = our_step(size, lm_coef, device, dtypes[0], mode)
            since = time.perf_counter()
            step()
            wait(device)
            first = time.perf_counter() - since
            taken = seconds(step, repeats, device)
            times[mode] = taken
            what = f"step, {name}, lm_coef {lm_coef}, {NAMES[dtypes[0]]}, {mode}"
            table.add(what, taken, tokens, floor / taken / ceilings[dtypes[0]], None, peak(device))
            if mode != "eager":
                table.add(f"  its first call, compiling ({mode})", first)
            del step
            torch.compiler.reset()
        if importlib.util.find_spec("transformers") is None:
            print("  no peer: transformers is not installed (requirements-experiments.txt)")
            continue
        for dtype in dtypes:
            forget_peak(device)
            step, peer = peer_step(size, lm_coef, device, dtype)
            taken = seconds(step, max(2, repeats // 2), device)
            what = f"  {peer}, {NAMES[dtype]}, eager (ratio: to {modes[0]} {NAMES[dtypes[0]]})"
            share = floor / taken / ceilings[dtype]
            table.add(what, taken, tokens, share, taken / times[modes[0]], peak(device))
            del step
    return times[modes[0]]


def bench_acting(table, name, size, device, dtype, ceilings):
    """Rows of action selection, and of whole evaluations where gymnasium is installed."""
    lamo = make_lamo(size.config, device, dtype).eval()
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    repeats = 50 if device.type == "cuda" else 2 * size.repeats
    alone = None
    with merged(lamo) if dtype == torch.float32 else nullcontext():  # as in a rollout
        for n in (1, ENVIRONMENTS):
            taken = seconds(selection(lamo, n, device, autocast), repeats, device)
            tokens = n * (3 * CONTEXT - 1)
            share = block_operations(size.config, tokens, n) / taken / ceilings[dtype]
            alone = alone or taken
            what = f"act, {name}, {n} environments (ratio: to alone)"
            table.add(what, taken, tokens, share, n * alone / taken)
            table.add("  for each environment step", taken / n)


def bench_evaluation(table, name, size, device, dtype):
    """Rows of evaluations on hopper, environment time apart.

    Returns the seconds of a step of ENVIRONMENTS episodes together, or None without an environment.
    """
    missing = [p for p in ("gymnasium", "mujoco", "minari") if not importlib.util.find_spec(p)]
    if missing:
        print(f"no evaluations: {', '.join(missing)} is not installed (requirements.txt)")
        return None
    from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv

    from evaluate import rollout
    from tasks import make_env

    environment, rates = hopper(), {}
    lamo = make_lamo(size.config, device, dtype)
    config = {"context": CONTEXT, "scale": 1000.0, "mode": "normal", "dtype": NAMES[dtype]}
    config["episode_limit"] = EPISODE_STEPS
    stats = torch.zeros(OBS, device=device), torch.ones(OBS, device=device)
    action = np.random.default_rng(0).uniform(-1, 1, (ENVIRONMENTS, ACT)).astype(np.float32)
    for targets, episodes in (([3600.0], 1), ([3600.0, 1800.0], ENVIRONMENTS // 2)):
        n = len(targets) * episodes
        envs = SyncVectorEnv([partial(make_env, environment.spec)] * n)
        envs.reset(seed=0)
        apart = EPISODE_STEPS * seconds(partial(envs.step, action[:n]), EPISODE_STEPS, CPU)
        envs.close()
        play = partial(rollout, lamo, environment, config, stats, targets, episodes)
        taken = seconds(play, 1 if size.repeats < 20 else 3, device)
        rates[n] = n * EPISODE_STEPS / taken
        taken_together = taken / EPISODE_STEPS
        ratio = rates[n] / rates[1]
        what = f"evaluate, {name}, {n} episodes of {EPISODE_STEPS} steps (ratio: to alone)"
        table.add(what, taken, ratio=ratio)
        table.add("  of it the environments", apart)
        table.add(
            "  of it the rest, for each environment step", (taken - apart) / n / EPISODE_STEPS
        )
    if name == next(iter(SIZES)):
        for kind in (SyncVectorEnv, AsyncVectorEnv):
            envs = kind([partial(make_env, environment.spec)] * ENVIRONMENTS)
            envs.reset(seed=0)
            taken = seconds(partial(envs.step, action), EPISODE_STEPS, CPU)
            envs.close()
            table.add(f"{kind.__name__}, a step of {ENVIRONMENTS} hoppers", taken)
    return taken_together


def both_ways(attention, qkv, gradient):
    """Forward and backward of attention."""
    torch.autograd.grad(attention(*qkv), qkv, gradient)


def bench_parts(table, device, dtype):
    """Rows of attention and of sampling."""
    for B, H, T in ((BATCH, 3, 3 * CONTEXT), (BATCH, 12, 3 * CONTEXT), (LM_BATCH, 12, 1024)):
        qkv = torch.randn(B, T, 3, H, 64, device=device, dtype=dtype, requires_grad=True)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # as the model has them
        gradient, found = torch.randn(B, H, T, 64, device=device, dtype=dtype), {}
        theirs = partial(F.scaled_dot_product_attention, is_causal=True)
        for what, attention in (("PyTorch's", theirs), ("ours", partial(attend, p=0.0))):
            work = partial(both_ways, attention, (q, k, v), gradient)
            found[what] = seconds(work, 20, device)
            ratio = found["PyTorch's"] / found[what]
            table.add(
                f"attention {B} x {H} x {T}, {what} (ratio: to PyTorch's)", found[what], ratio=ratio
            )
    for n in (10_000, 100_000, 1_000_000, 10_000_000):
        data, generator = synthetic(n, device), torch.Generator(device).manual_seed(0)
        work = partial(sample_windows, data, BATCH, CONTEXT, generator)
        table.add(
            f"sample {BATCH} windows of {CONTEXT} of {n:,} transitions", seconds(work, 200, device)
        )


PARTS = ("parts", "step", "act", "evaluate")


def main():
    parser = Parser(prog="python -m experiments.bench", description=__doc__)
    add = parser.add_argument
    add("--models", nargs="+", default=list(SIZES), help=f"of {', '.join(SIZES)} (default all)")
    add("--only", nargs="+", default=PARTS, help=f"of {', '.join(PARTS)} (default all)")
    add("--device", default="auto", help="cuda or cpu (default: cuda if there is one)")
    add("--json", metavar="FILE", help="write the rows there, too")
    args = parser.parse_args()
    for name, given, known in (("models", args.models, SIZES), ("only", args.only, PARTS)):
        for value in given:
            choose(name, value, known)
    if args.json:  # better now than after the measuring
        check_writable(Path(args.json).parent, "--json")
    device = choose_device(args.device)
    machine = {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    machine["processor"] = platform.processor() or platform.machine()
    if device.type == "cuda":
        machine["processor"] = torch.cuda.get_device_name(device)
    machine["python"] = platform.python_version()
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    dtypes = [torch.bfloat16, torch.float32]
    if choose_dtype(device) == "fp32":  # nothing is gained from bf16 here
        dtypes = [torch.float32]

    table = Table()
    if "parts" in args.only:
        bench_parts(table, device, dtypes[0])
    for name in args.models:
        size = SIZES[name]
        ceilings = {dtype: ceiling(size.config, device, dtype) for dtype in dtypes}
        for dtype, operations in ceilings.items():
            floor = block_operations(size.config, 3 * BATCH * CONTEXT, 3 * BATCH * CONTEXT)
            what = (
                f"ceiling, {name}, {NAMES[dtype]}: {operations / 1e12:.3f} TFLOP/s; all blocks once"
            )
            table.add(what, floor / operations, 3 * BATCH * CONTEXT, 1.0)
        if "step" in args.only:
            step = bench_steps(table, name, size, device, dtypes, ceilings)
        if "act" in args.only:
            bench_acting(table, name, size, device, dtypes[0], ceilings)
        if "evaluate" in args.only:
            played = bench_evaluation(table, name, size, device, dtypes[0])
            if played and "step" in args.only:
                steps, evaluations, length = PAPER_RUN
                whole = steps * step + evaluations * length * played
                print(f"{steps:,} steps and {evaluations} whole evaluations, extrapolated:")
                table.add(f"  {whole / 60:.0f} minutes", whole)
    if args.json:
        write_json(args.json, {"machine": machine, "rows": table.rows})


if __name__ == "__main__":
    run_command(main)
