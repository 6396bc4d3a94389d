"""Roll a policy out, or look at a checkpoint.

    python evaluate.py runs/<run>/ckpt.pt                       # a table per target return
    python evaluate.py runs/<run>/ckpt.pt --prompt "Hello, my name is Tom."

All targets x all episodes act together as one batch. Every episode is at the same time step, so the
windows need no padding. An episode that has ended is left out of the sums and, on a CPU, of the
model's blocks; on CUDA these are replayed as a graph, whose batch is fixed.
"""

import json
import math
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import tyro
from tqdm import tqdm

from data import find_text, get_encoding, tokenise
from lora import merged
from model import text_loss
from tasks import STACK, decode_actions, encode_actions, flatten, is_picture, make_env, shrink
from utils import UserError, as_graph, choose_device, run_command

LONGEST_EPISODE = 108_000  # steps, where no limit is known: as many as ALE plays frames
SEED = 1_000_000  # the first episode's environment seed, far from those data is recorded with
TEXT_TOKENS = 16_384  # how much of a text the perplexity is measured on


# --- rollouts ------------------------------------------------------------------------------------


@torch.no_grad()
def rollout(model, environment, c, stats, targets, episodes, seed=SEED, watch=None):
    """Let a model act in `episodes` episodes for each target return, all in one batch.

    model: LaMo, or what has its observe, remember and act; environment: a tasks.Environment; c:
    what training ran with (context, mode, scale, dtype, sample, episode_limit); stats: obs_mean and
    obs_std of the dataset, each (O,), or (0,) for frames; targets: undivided returns, None for a
    model that is told none; episode i starts from environment seed `seed + i` under every target.
    Numbers are clipped to the action's bounds; of choices the likeliest is taken or, with c.sample,
    one is drawn. watch: called after the reset and after every step with the environments (whose
    render_mode is watch.render_mode), which episodes (n,) acted and which go on, their returns so
    far (n,) and the tokens of the last K steps.
    Returns a list with a dictionary for each target, see `summarise`.
    """
    obs_mean, obs_std = stats
    device, K, n = obs_mean.device, c.context, len(targets) * episodes
    space, action_space = environment.observation_space, environment.action_space
    _, n_act, choice = environment.sizes()
    T = min(c.episode_limit or LONGEST_EPISODE, environment.spec.max_episode_steps or 10**9)
    draws = torch.Generator(device).manual_seed(seed)
    envs = [make_env(environment.spec, getattr(watch, "render_mode", None)) for _ in range(n)]
    seen = [env.reset(seed=seed + i % episodes)[0] for i, env in enumerate(envs)]

    tokens = deque(maxlen=2 * K)  # of the last K steps: (n, 2, C), (n, 1, C), .. (n, 1, C)
    pictures = deque(maxlen=STACK)  # (n, 84, 84) each; before the first one it was dark
    if is_picture(space):
        pictures.extend([torch.zeros(n, 84, 84, dtype=torch.uint8, device=device)] * STACK)
    asked = [target or 0.0 for target in targets]
    to_go = torch.tensor(np.repeat(asked, episodes) / c.scale, dtype=torch.float32, device=device)
    actions = decode_actions(action_space, np.zeros(n, int) if choice else np.zeros((n, n_act)))
    alive, returns, lengths = np.ones(n, bool), np.zeros(n), np.zeros(n, int)

    training = model.training
    model.eval()
    if watch is not None:
        watch(envs, alive, alive, returns, tokens)
    bar = tqdm(total=T, desc="evaluating", leave=False)
    autocast = torch.autocast(device.type, torch.bfloat16, c.dtype == "bf16")

    def predict(context):  # (n, 3K - 1, C), or for fewer episodes or steps
        with autocast:
            return model.act(context).float()

    cuda = device.type == "cuda"
    replay = as_graph(predict) if cuda else predict
    with merged(model) if c.dtype == "fp32" else nullcontext(), bar:
        for t in range(T):
            if is_picture(space):
                pictures.append(torch.as_tensor(shrink(np.stack(seen)), device=device))
                obs = torch.stack(tuple(pictures), dim=1)  # (n, STACK, 84, 84)
            else:
                flat = np.stack([flatten(space, observation) for observation in seen])
                flat = torch.as_tensor(flat, dtype=torch.float32, device=device)
                obs = ((flat - obs_mean) / obs_std)[:, None]  # (n, 1, O)
            timestep = torch.full((n, 1), t, device=device)
            going = alive.nonzero()[0]  # an episode's row in the batch
            with autocast:
                tokens.append(model.observe(to_go[:, None, None], obs, timestep)[:, 0])
            context = torch.cat(tuple(tokens)[1 - 2 * K :], dim=1)  # (n, up to 3K - 1, C)
            rows = slice(None) if cuda else going
            predicted = (replay if t >= K - 1 else predict)(context[rows])
            if choice:
                drawn = torch.multinomial(predicted.softmax(-1), 1, generator=draws)[:, 0]
                predicted = drawn if c.sample else predicted.argmax(-1)
            actions[rows] = decode_actions(action_space, predicted.cpu().numpy())
            encoded = torch.as_tensor(encode_actions(action_space, actions), device=device)
            with autocast:
                tokens.append(model.remember(encoded[:, None], timestep)[:, 0])
            acted, alive, reward = alive, alive.copy(), np.zeros(n)
            for i in going:
                seen[i], reward[i], terminated, truncated, _ = envs[i].step(actions[i])
                alive[i] = not (terminated or truncated)
            returns += reward
            lengths += acted
            if c.mode != "delayed":
                to_go = to_go - torch.as_tensor(reward / c.scale, dtype=torch.float32).to(device)
            if watch is not None:
                watch(envs, acted, alive, returns, tokens)
            bar.update()
            if not alive.any():
                break
    for env in envs:
        env.close()
    model.train(training)
    parts = (x.reshape(len(targets), episodes) for x in (returns, lengths, alive))
    return [summarise(environment, *part) for part in zip(targets, *parts, strict=True)]


def summarise(environment, target, returns, lengths, cut):
    """The episodes under one target as plain numbers: returns, lengths and cut (E,), the last one
    whether an episode was stopped before its end."""
    return {
        "target": target,
        "return_mean": float(returns.mean()),
        "return_std": float(returns.std()),
        "score": float(environment.score(returns.mean())),
        "length_mean": float(lengths.mean()),
        "returns": returns.tolist(),
        "lengths": lengths.tolist(),
        "cut": int(cut.sum()),
    }


def final_result(evaluations, steps):
    """A run's score by the authors' protocol: the best target's mean over late evaluations, those
    in the last 20 % of the steps. evaluations: a list of {"step", "results"}, where results are
    rollout's. Returns a dictionary, the best single evaluation's score in it too."""
    late = [e["results"] for e in evaluations if e["step"] > 0.8 * steps]
    targets = [
        {"target": same[0]["target"]}
        | {key: sum(r[key] for r in same) / len(same) for key in ("score", "return_mean")}
        for same in zip(*late, strict=True)
    ]
    best = max(targets, key=lambda t: t["score"])
    return best | {
        "targets": targets,
        "evaluations_averaged": len(late),
        "episodes_cut": sum(r["cut"] for results in late for r in results),
        "best_single_evaluation": max(r["score"] for e in evaluations for r in e["results"]),
    }


# --- the command ---------------------------------------------------------------------------------


@dataclass
class Arguments:
    checkpoint: tyro.conf.Positional[str]  # ckpt.pt or best.pt of a run
    targets: list[float] | None = None  # target returns (None: the run's)
    episodes: int | None = None  # for each target (None: the run's)
    episode_limit: int | None = None  # cut episodes here; 0 does not (None: the run's)
    sample: bool | None = None  # draw choices, or take the likeliest (None: as the run)
    seed: int = SEED  # environment seed of the first episode
    lm: str | None = None  # where the language model's weights are (None: as in training)
    device: str | None = None  # cuda or cpu (None: cuda if there is one)
    json: bool = False  # print one JSON object instead of a table
    prompt: str | None = None  # do not act but continue this text, before and after training
    tokens: int = 100  # with --prompt: how many to add
    corpus: str = "english"  # with --prompt: perplexity on a file, wikitext or english


def print_table(results):
    """One line a target, and the best."""
    print(f"{'target':>8} {'return':>18} {'score':>7} {'length':>7}  episodes")
    for r in results:
        target = "none" if r["target"] is None else f"{r['target']:g}"
        spread = f"{r['return_mean']:.1f} ± {r['return_std']:.1f}"
        numbers = f"{r['score']:7.1f} {r['length_mean']:7.0f}  {len(r['returns'])}"
        print(f"{target:>8} {spread:>18} {numbers}")
    if cut := sum(r["cut"] for r in results):
        print(f"{cut} cut before their end: such returns are not whole (--episode-limit 0)")
    print(f"best score {max(r['score'] for r in results):.1f}")


def talk(gpt, prompt, n, tokens, encoding, dtype):
    """What a GPT says after a prompt, n tokens sampled at temperature 0.8 from the 40 likeliest,
    and its perplexity per token on a text of tokens (N,)."""
    gpt.eval()
    device = gpt.wte.weight.device
    start = torch.tensor([encoding.encode_ordinary(prompt)], device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.autocast(device.type, torch.bfloat16, dtype == "bf16"):
        out = gpt.generate(start, n, temperature=0.8, top_k=40, generator=generator)
        return encoding.decode(out[0].tolist()), math.exp(text_loss(gpt, tokens))


def main():
    import train  # which imports this file

    args = tyro.cli(Arguments, description=__doc__)
    checkpoint = train.read_checkpoint(args.checkpoint)
    config = checkpoint["settings"]
    for name in ("lm", "targets", "episodes", "episode_limit", "sample"):
        if getattr(args, name) is not None:
            config[name] = getattr(args, name)
    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}, but must be 0 or more")
    model, environment = train.load_policy(args.checkpoint, checkpoint)
    device, c = choose_device(args.device), train.Config(**config)
    model.to(device)
    if args.prompt is not None:
        before = train.build_model(c, environment)[0].to(device)
        encoding = model.gpt.config.encoding or get_encoding(model.gpt.config.vocab_size)
        path, note = find_text(args.corpus)
        tokens = tokenise(path, encoding)[:TEXT_TOKENS]
        print(f"perplexity per token, on the first {len(tokens)} tokens of {note.split(',')[0]}")
        steps = f"after {checkpoint['step']} steps"
        for when, lamo in (("before training", before), (steps, model)):
            text, perplexity = talk(lamo.gpt, args.prompt, args.tokens, tokens, encoding, c.dtype)
            print(f"\n--- {when}: perplexity {perplexity:.2f}\n{text}")
        return
    stats = checkpoint["obs_mean"].to(device), checkpoint["obs_std"].to(device)
    results = rollout(model, environment, c, stats, c.targets, c.episodes, args.seed)
    if args.json:
        shown = {"checkpoint": args.checkpoint, "step": checkpoint["step"], "results": results}
        print(json.dumps(shown))
        return
    print(f"{c.env}, {c.method}, step {checkpoint['step']}")
    print(f"trained on {checkpoint['notes']['dataset']}")
    print_table(results)


if __name__ == "__main__":
    run_command(main)
