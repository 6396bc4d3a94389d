"""Roll a policy out, or look at a checkpoint.

    python evaluate.py runs/<run>/ckpt.pt                       # a table per target return
    python evaluate.py runs/<run>/ckpt.pt --prompt "Hello, my name is Tom."

All targets x all episodes act together as one batch. Every episode is at the same time step, so the
windows need no padding. An episode that has ended is no longer shown to the model nor counted.
"""

import json
from collections import deque
from contextlib import nullcontext
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from embeddings import ZERO
from load_gpt2 import TEXT_TOKENS, find_config, fingerprint, load_gpt2, talk
from lora import inject_lora, mark_trainable, merged, round_frozen
from model import GPT, LaMo
from plumbing import Parser, UserError, check_numbers, choose_device, first_line, run_command
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
from tasks import make_vector_env, normalised_score, unpack
from text import find_text, get_encoding, tokenise
from windows import STACK

FORMAT = "lamo-checkpoint-2"  # what ckpt["format"] says; a change of layout changes it
READERS = {  # of each format, the command that lets its checkpoints act
    FORMAT: "python evaluate.py",
    "lamo-baseline-1": "python -m experiments.baselines --evaluate",
}
SEED = 1_000_000  # the first episode's environment seed, far from those data is recorded with


# --- rollouts ------------------------------------------------------------------------------------


@torch.no_grad()
def rollout(model, environment, settings, stats, targets, episodes, seed=SEED, progress=False):
    """Let a model act in `episodes` episodes for each target return, all in one batch.

    model: LaMo, or what has its observe, remember and act; environment: a tasks.Environment;
    settings: what training ran with (context, mode, scale, dtype, episode_limit); stats: the
    dataset's obs_mean and obs_std, each (O,), or (0,) for frames; targets: undivided returns, None
    for a model that is told none; episode i starts from environment seed `seed + i` under every
    target. Numbers are acted on as predicted, and a choice is drawn from the predicted
    probabilities, as in Decision Transformer's code for Atari.
    Returns a list with a dictionary for each target: target, returns and lengths (one per episode),
    their summary (see `summarise`), and cut, how many episodes episode_limit stopped before their
    end: their returns are not whole.
    """
    obs_mean, obs_std = stats
    device = obs_mean.device
    space, action_space = environment.observation_space, environment.action_space
    n = len(targets) * episodes
    envs = make_vector_env(environment, n)
    limits = [settings["episode_limit"], environment.spec.max_episode_steps]
    T = min((limit for limit in limits if limit), default=None)  # None: the game itself ends
    K, scale = settings["context"], settings["scale"]
    delayed, frames = settings["mode"] == "delayed", is_picture(space)
    choice = is_choice(action_space)
    draws = torch.Generator(device).manual_seed(seed)

    tokens = deque(maxlen=2 * K - 1)  # of the last K steps: (n, 2, C), (n, 1, C), .. (n, 2, C)
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

    training = model.training
    model.eval()
    observation, _ = envs.reset(seed=[seed + i for _ in targets for i in range(episodes)])
    bar = tqdm(total=T, desc="evaluating", leave=False, disable=not progress)
    autocast = torch.autocast(device.type, torch.bfloat16, settings["dtype"] == "bf16")
    # merged into bf16, small updates would be lost: another policy would act than was trained
    whole = merged(model) if settings["dtype"] == "fp32" else nullcontext()
    with whole, bar:
        for t in count():
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
                predicted = model.act(torch.cat(tuple(tokens), dim=1)[rows]).float()
            if choice:
                predicted = torch.multinomial(predicted.softmax(-1), 1, generator=draws)[:, 0]
            actions[alive] = decode_actions(action_space, predicted.cpu().numpy())
            encoded = torch.as_tensor(encode_actions(action_space, actions), device=device)
            with autocast:
                tokens.append(model.remember(encoded[:, None], timestep)[:, 0])
            observation, reward, terminated, truncated, _ = envs.step(actions)
            returns[alive] += reward[alive]
            lengths[alive] += 1
            if not delayed:
                to_go = to_go - torch.as_tensor(reward / scale, dtype=torch.float32, device=device)
            alive &= ~(terminated | truncated)
            bar.update()
            if not alive.any() or t + 1 == T:
                break
    envs.close()
    model.train(training)
    return [
        {
            "target": target,
            **summarise(environment, returns[i], lengths[i]),
            "cut": int(alive[i].sum()),
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
        print(f"{cut} episodes were cut before their end (--episode-limit): returns are not whole")
    best = max(results, key=lambda r: r["return_mean"])
    print(f"best: target {written(best['target'])}, score {best['score']:.1f}")


# --- from a checkpoint to a model ----------------------------------------------------------------


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


def trained_state(model, train):
    """The tensors of a checkpoint, on the CPU."""
    names = checkpoint_names(model, train)
    return {n: p.detach().cpu().clone() for n, p in model.named_parameters() if n in names}


def read_checkpoint(path, expected=FORMAT):
    """A checkpoint's dictionary, checked. Raises UserError for what is not of the expected format.

    expected: FORMAT, train.py's, or that of experiments/baselines.py.
    """
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder; give the ckpt.pt or best.pt in it")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"there is no checkpoint {path}; train.py prints where it is") from error
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
        wrong = [name for name, t in checkpoint["model"].items() if not torch.is_tensor(t)]
    if wrong or checkpoint["obs_mean"].shape != checkpoint["obs_std"].shape:
        raise UserError(f"{path} lacks {', '.join(wrong) or 'obs_std'} as it should be: damaged")
    try:
        checkpoint["environment"] = unpack(checkpoint["environment"])
    except Exception as error:  # of JSON, gymnasium and Minari
        raise UserError(f"{path} describes no environment: {first_line(error)}") from error
    return checkpoint


def load_model(path, checkpoint):
    """The LaMo of a checkpoint (from read_checkpoint), on the CPU.

    Raises UserError if its tensors do not fit, or if the language model underneath is not to be
    had or is not the same one.
    """
    settings, train = checkpoint["settings"], checkpoint["settings"]["train"]
    if train == "all":  # nothing of the base is left: only its shape matters
        settings = settings | {"pretrained": False}
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
        if tensor.shape != parameters[name].shape:
            found, expected = tuple(tensor.shape), tuple(parameters[name].shape)
            raise UserError(f"{path}: {name} is {found}, expected {expected}")
        parameters[name].data.copy_(tensor)


# --- the command ---------------------------------------------------------------------------------


def check_mode(args):
    """Raises UserError for a flag that acting, or talking, would not look at."""
    acting, talking = ("target", "episodes", "episode_limit", "seed"), ("tokens", "corpus")
    for name in talking if args.prompt is None else acting:
        if getattr(args, name) is not None:
            flag = "--" + name.replace("_", "-")
            use = "talking: add --prompt TEXT" if name in talking else "acting, not for --prompt"
            raise UserError(f"{flag} is for {use}")
    if args.prompt is not None and args.json:
        raise UserError("--json is for acting, not --prompt")


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
    add("--device", default="auto", help="cuda or cpu (default: cuda if there is one)")
    add("--json", action="store_true", help="print one JSON object instead of a table")
    add("--prompt", help="do not act but continue this text, before and after training")
    add("--tokens", type=int, help="with --prompt: how many to add (default 100)")
    add("--corpus", help="with --prompt: perplexity on a file, wikitext or english (the default)")
    args = parser.parse_args()
    check_mode(args)
    check_numbers(vars(args), may_be_zero=("seed", "target", "episode_limit"))
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
    results = rollout(
        model, environment, settings, stats, targets, episodes, seed, progress=not quiet
    )
    if args.json:
        print(json.dumps({"checkpoint": args.checkpoint, "step": step, "results": results}))
        return
    print(f"{settings['env']}, {settings['method']}, step {step}")
    print(f"trained on {checkpoint['chosen'].get('dataset')}")
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
