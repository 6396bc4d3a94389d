"""Roll a policy out, or look at a checkpoint.

    python evaluate.py runs/<run>/ckpt.pt                       # a table per target return
    python evaluate.py runs/<run>/ckpt.pt --prompt "Hello, my name is Tom."
    python evaluate.py runs/<run>/ckpt.pt --video out.mp4       # or --gif, or --attention out.png

All targets x all episodes act together as one batch. Every episode is at the same time step, so the
windows need no padding. An episode that has ended is no longer shown to the model nor counted.
"""

import json
import sys
from collections import deque
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import build_model, load_model, read_checkpoint
from environments import make_vector_env
from files import check_writable
from load_gpt2 import TEXT_TOKENS, talk
from lora import merged, round_frozen
from plumbing import (
    Parser,
    UserError,
    check_numbers,
    check_package,
    choose_device,
    counted,
    give_back_memory,
    printable,
    run_command,
)
from run_folder import written
from spaces import (
    action_size,
    decode_actions,
    encode_actions,
    flatten,
    is_choice,
    is_picture,
    observation_shape,
    shrink,
)
from tasks import normalised_score, trust
from text import find_text, get_encoding, tokenise
from watch import Gif, Mp4, film, map_attention
from windows import STACK

LONGEST_EPISODE = 108_000  # steps, where no limit is known: as many as ALE plays frames
SEED = 1_000_000  # the first episode's environment seed, far from those data is recorded with


# --- rollouts ------------------------------------------------------------------------------------


def longest_episode(settings, environment):
    """After how many steps an episode is cut, by the run's limit or the environment's."""
    limits = [settings["episode_limit"], environment.spec.max_episode_steps]
    return min((limit for limit in limits if limit), default=LONGEST_EPISODE)


@torch.no_grad()
def rollout(
    model,
    environment,
    settings,
    stats,
    targets,
    episodes,
    seed=SEED,
    progress=False,
    watch=None,
    render_mode=None,
    stop=None,
):
    """Let a model act in `episodes` episodes for each target return, all in one batch.

    model: LaMo, or what has its observe, remember and act; environment: a tasks.Environment;
    settings: what training ran with (context, mode, scale, dtype, episode_limit); stats: the
    dataset's obs_mean and obs_std, each (O,), or (0,) for frames; targets: undivided returns, None
    for a model that is told none; episode i starts from environment seed `seed + i` under every
    target. Numbers are acted on as predicted, and a choice is drawn from the predicted
    probabilities, as in Decision Transformer's code for Atari.
    watch: None, or watch.Film or watch.LastContext: called after the reset and after every step
    with the environments (which draw as render_mode says), which episodes (n,) acted and which go
    on, their returns so far (n,) and the tokens of the last K steps.
    stop: None, or plumbing.StopSignals: after a signal the episodes are given up.
    Returns a list with a dictionary for each target: target, returns and lengths (one per episode),
    their summary (see `summarise`), cut, how many episodes were stopped before their end,
    and failed, a line for each that its environment's failure ended: their returns are not whole;
    or None, if it was given up.
    """
    obs_mean, obs_std = stats
    device = obs_mean.device
    space, action_space = environment.observation_space, environment.action_space
    n = len(targets) * episodes
    envs = make_vector_env(environment, n, render_mode)
    T = longest_episode(settings, environment)
    K, scale = settings["context"], settings["scale"]
    delayed, frames = settings["mode"] == "delayed", is_picture(space)
    choice = is_choice(action_space)
    draws = torch.Generator(device).manual_seed(seed)

    tokens = deque(maxlen=2 * K)  # of the last K steps: (n, 2, C), (n, 1, C), .. (n, 1, C)
    pictures = deque(maxlen=STACK)  # (n, 84, 84) each; before the first one it was dark
    if frames:
        black = torch.zeros(n, *observation_shape(space), dtype=torch.uint8, device=device)
        pictures.extend([black] * STACK)
    asked = [0.0 if target is None else target for target in targets]
    to_go = torch.tensor(np.repeat(asked, episodes) / scale, dtype=torch.float32, device=device)
    # where every environment's action is put; ended ones go on with their last
    empty = np.zeros(n, np.int64) if choice else np.zeros((n, action_size(action_space)))
    actions = decode_actions(action_space, empty)
    alive = np.ones(n, bool)
    returns, lengths = np.zeros(n), np.zeros(n, int)
    failed = [[] for _ in targets]

    training = model.training
    model.eval()
    observation, _ = envs.reset(seed=[seed + i for _ in targets for i in range(episodes)])
    if watch is not None:
        watch(envs, alive, alive, returns, tokens)
    total = None if T == LONGEST_EPISODE else T  # else the games are known to end before
    bar = tqdm(total=total, desc="evaluating", leave=False, disable=not progress)
    autocast = torch.autocast(device.type, torch.bfloat16, settings["dtype"] == "bf16")
    # merged into bf16, small updates would be lost: another policy would act than was trained
    whole = merged(model) if settings["dtype"] == "fp32" else nullcontext()
    with whole, bar:
        for t in range(T):
            if frames:
                pictures.append(shrink(observation).to(device))
                obs = torch.stack(tuple(pictures), dim=1)  # (n, STACK, 84, 84)
            else:
                flat = torch.as_tensor(flatten(space, observation), dtype=torch.float32)
                obs = ((flat.to(device) - obs_mean) / obs_std)[:, None]  # (n, 1, O)
            rows = torch.as_tensor(alive.nonzero()[0], device=device)
            timestep = torch.full((n, 1), t, device=device)
            with autocast:
                tokens.append(model.observe(to_go[:, None, None], obs, timestep)[:, 0])
                context = torch.cat(tuple(tokens)[1 - 2 * K :], dim=1)  # (n, up to 3K - 1, C)
                predicted = model.act(context[rows]).float()
            if choice:
                predicted = predicted.softmax(-1)
            if not predicted.isfinite().all():
                raise UserError(f"the model's actions are not finite at step {t} of an episode")
            if choice:
                predicted = torch.multinomial(predicted, 1, generator=draws)[:, 0]
            actions[alive] = decode_actions(action_space, predicted.cpu().numpy())
            encoded = torch.as_tensor(encode_actions(action_space, actions), device=device)
            with autocast:
                tokens.append(model.remember(encoded[:, None], timestep)[:, 0])
            observation, reward, terminated, truncated, info = envs.step(actions)
            for i in np.flatnonzero(alive & info.get("_lamo_failed", False)):
                what = f"episode {i % episodes}, step {t}: {info['lamo_failed'][i]}"
                failed[i // episodes].append(what)
            returns[alive] += reward[alive]
            lengths[alive] += 1
            if not delayed:
                to_go = to_go - torch.as_tensor(reward / scale, dtype=torch.float32, device=device)
            acted, alive = alive, alive & ~(terminated | truncated)
            if watch is not None:
                watch(envs, acted, alive, returns, tokens)
            bar.update()
            given_up = stop is not None and stop.number > 0
            if given_up or not alive.any():
                break
    envs.close()
    del envs
    give_back_memory()
    model.train(training)
    if given_up:
        return None
    return [
        {
            "target": target,
            **summarise(environment, returns[i], lengths[i]),
            "cut": int(alive[i].sum()),
            "failed": failed[i[0] // episodes],
        }
        for target, i in zip(targets, np.arange(n).reshape(len(targets), episodes), strict=True)
    ]


def summarise(environment, returns, lengths):
    """Plain numbers of the episodes under one target: returns (E,), lengths (E,) -> dictionary."""
    return {
        "return_mean": float(returns.mean()),
        "return_std": float(returns.std()),
        "score": float(normalised_score(environment, returns.mean())),
        "length_mean": float(lengths.mean()),
        "returns": returns.tolist(),
        "lengths": lengths.tolist(),
    }


def print_table(results):
    """One line a target, and the best."""
    print(f"{'target':>8} {'return':>18} {'score':>7} {'length':>7}  episodes")
    for r in results:
        spread = f"{r['return_mean']:.1f} ± {r['return_std']:.1f}"
        line = f"{written(r['target']):>8} {spread:>18} {r['score']:7.1f} {r['length_mean']:7.0f}"
        print(f"{line}  {len(r['returns'])}")
    if cut := sum(r["cut"] for r in results):
        how = "such returns are not whole (see --episode-limit)"
        print(f"{counted(cut, 'episode')} cut before the end: {how}")
    for r in results:
        for what in r["failed"]:
            print(f"target {written(r['target'])}: the environment failed in {printable(what)}")
    best = max(results, key=lambda r: r["return_mean"])
    print(f"best: target {written(best['target'])}, score {best['score']:.1f}")


# --- the command ---------------------------------------------------------------------------------


def check_mode(args):
    """Raises UserError for a flag that would not be looked at."""
    acting, talking = ["target", "episodes", "episode_limit", "seed"], ["tokens", "corpus"]
    acting += ["video", "gif", "attention", "at"]
    for name in talking if args.prompt is None else acting:
        if getattr(args, name) is not None:
            flag = "--" + name.replace("_", "-")
            use = "talking: add --prompt TEXT" if name in talking else "acting, not for --prompt"
            raise UserError(f"{flag} is for {use}")
    if args.prompt is not None and args.json:
        raise UserError("--json is for acting, not --prompt")
    filming = args.video or args.gif
    if args.episodes is not None and (filming or args.attention):
        raise UserError("--episodes is for a table; one episode is filmed under each target")
    if args.attention and (filming or args.json):
        raise UserError("--attention makes its picture and nothing else; leave the others out")
    if args.at is not None and not args.attention:
        raise UserError("--at is for --attention PICTURE")
    for flag, path, kinds in (
        ("--video", args.video, (".mp4",)),
        ("--gif", args.gif, (".gif",)),
        ("--attention", args.attention, (".png",)),
    ):
        if path and Path(path).suffix.lower() not in kinds:
            raise UserError(f"{flag} {path}: the name must end in {kinds[0]}")


def main():
    parser = Parser(prog="evaluate.py", description="Let a checkpoint of train.py act, or talk.")
    add = parser.add_argument
    add("checkpoint", help="ckpt.pt or best.pt of a run")
    add("--env", help="refuse a checkpoint of any other environment")
    add("--target", "--targets", type=float, nargs="+", help="target returns (default: the run's)")
    add("--episodes", type=int, help="episodes per target (default: the run's)")
    add("--episode-limit", type=int, help="cut episodes here; 0 does not (default: the run's)")
    add(
        "--seed",
        type=int,
        help=f"environment seed of the first episode (default {SEED}, as in training)",
    )
    add("--lm", help="where the language model's weights are (default: as in training)")
    add("--env-module", help="a module of yours that the environment is in: it is imported")
    add("--device", default="auto", help="cuda or cpu (default: cuda if there is one)")
    add("--json", action="store_true", help="print one JSON object instead of a table")
    add("--video", metavar="MP4", help="film an episode under each target")
    add("--gif", metavar="GIF", help="the same, smaller and slower")
    add("--attention", metavar="PNG", help="draw what an action attends to, under the first target")
    add("--at", type=int, help="with --attention: that action's step (default: the first full K)")
    add("--prompt", help="do not act but continue this text, before and after training")
    add("--tokens", type=int, help="with --prompt: how many to add (default 100)")
    add("--corpus", help="with --prompt: perplexity on a file, wikitext or english (the default)")
    args = parser.parse_args()
    check_mode(args)
    check_numbers(vars(args), may_be_zero=("seed", "target", "episode_limit", "at"))
    trust(args.env_module)
    checkpoint = read_checkpoint(args.checkpoint)
    settings, step = checkpoint["settings"], checkpoint["step"]
    if args.env and args.env != settings["env"]:
        raise UserError(f"{args.checkpoint} was trained on {settings['env']}, not {args.env}")
    if args.lm:
        settings["lm"] = args.lm
    if args.episode_limit is not None:
        settings["episode_limit"] = args.episode_limit
    device = choose_device(args.device)
    model = load_model(args.checkpoint, checkpoint).to(device)
    if args.prompt is not None:
        compare_language(args, checkpoint, model)
        return

    if settings["dtype"] == "bf16" and settings["train"] != "all":
        round_frozen(model)  # as in training
    stats = checkpoint["obs_mean"].to(device), checkpoint["obs_std"].to(device)
    targets = args.target or settings["targets"]
    episodes, quiet = args.episodes or settings["episodes"], args.json
    seed = SEED if args.seed is None else args.seed
    environment = checkpoint["environment"]
    play = partial(rollout, model, environment, settings, stats)
    if args.attention:
        check_package("matplotlib", "--attention")
        check_writable(Path(args.attention).parent, "--attention in")
        at = settings["context"] - 1 if args.at is None else args.at
        longest = longest_episode(settings, environment)
        if at >= longest:
            raise UserError(f"--at {at}, but episodes have {longest} steps at most")
        map_attention(play, model.gpt, targets[0], seed, at, args.attention)
        return
    if args.video or args.gif:
        films = {Mp4: args.video, Gif: args.gif}
        results = film(play, environment, targets, seed, films, sys.stderr if quiet else None)
    else:
        results = play(targets, episodes, seed, progress=not quiet)
    if args.json:
        print(json.dumps({"checkpoint": args.checkpoint, "step": step, "results": results}))
        return
    print(printable(f"{settings['env']}, {settings['method']}, step {step}"))
    print(printable(f"trained on {checkpoint['chosen'].get('dataset')}"))
    print_table(results)


def compare_language(args, checkpoint, model):
    """Print what the language model says, and how well it knows a text, before and after training.

    Before training is the base with untrained LoRA, which changes nothing.
    """
    device = model.gpt.wte.weight.device
    before, _ = build_model(checkpoint["settings"], checkpoint["environment"])
    encoding = get_encoding(before.gpt.config.vocab_size)
    path, note = find_text(args.corpus or "english", byte_level=True)
    tokens = tokenise(path, encoding)[:TEXT_TOKENS]
    text_name = note.split(",")[0]
    learnt = checkpoint["chosen"].get("text", "").startswith(text_name)
    known = ", which this run learnt from" if learnt else ""
    print(f"perplexity per token, on the first {len(tokens)} tokens of {text_name}{known}")
    steps = f"after {checkpoint['step']} steps"
    for when, lamo in (("before training", before.to(device)), (steps, model)):
        with merged(lamo):
            text, perplexity = talk(lamo.gpt, args.prompt, args.tokens or 100, tokens, encoding)
        print(f"\n--- {when}: perplexity {perplexity:.2f}\n{text}")


if __name__ == "__main__":
    run_command(main)
