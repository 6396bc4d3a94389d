"""Roll a policy out, or look at a checkpoint.

    python evaluate.py runs/<run>/ckpt.pt                       # a table per target return
    python evaluate.py runs/<run>/ckpt.pt --prompt "Hello, my name is Tom."

All targets x all episodes act together as one batch. Every episode is at the same time step, so the
windows need no padding. An episode that has ended is no longer shown to the model nor counted.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import find_text, get_encoding, tokenise
from load_gpt2 import TEXT_TOKENS, find_config, fingerprint, load_gpt2, talk
from lora import inject_lora, mark_trainable, merged
from model import GPT, LaMo
from plumbing import Parser, UserError, check_numbers, choose_device, run_command
from tasks import find_task, make_env, make_vector_env, normalised_score

FORMAT = "lamo-checkpoint-1"  # what ckpt["format"] says; a change of layout changes it
SEED = 1_000_000  # the first episode's environment seed, far from those data is recorded with


# --- rollouts ------------------------------------------------------------------------------------


@torch.no_grad()
def rollout(model, task, settings, obs_mean, obs_std, targets, episodes, seed=SEED, progress=False):
    """Let a model act in `episodes` episodes for each target return, all in one batch.

    model: LaMo; task: a row of tasks.TASKS; settings: what training ran with (context, mode, scale,
    dtype); obs_mean, obs_std (O,): the dataset's; targets: undivided returns; episode i starts from
    environment seed `seed + i` under every target. Returns a list with a dictionary for each
    target: target, returns and lengths (one per episode), and their summary (see `summarise`).
    """
    device = obs_mean.device
    n = len(targets) * episodes
    envs = make_vector_env(task, n)
    low, high = envs.single_action_space.low, envs.single_action_space.high
    T = envs.envs[0].spec.max_episode_steps
    K, scale = settings["context"], settings["scale"]
    delayed = settings["mode"] == "delayed"

    # All that has happened, for all episodes; a window is a slice of these.
    obs = torch.zeros(n, T, len(obs_mean), device=device)
    act = torch.zeros(n, T, len(low), device=device)
    rtg = torch.zeros(n, T, 1, device=device)
    rtg[:, 0, 0] = torch.tensor(np.repeat(targets, episodes) / scale, dtype=torch.float32)
    timestep = torch.arange(T, device=device)
    alive = np.ones(n, bool)
    returns, lengths = np.zeros(n), np.zeros(n, int)
    actions = np.zeros((n, len(low)), np.float32)  # of ended episodes: anything that is in bounds

    training = model.training
    model.eval()
    observation, _ = envs.reset(seed=[seed + i for _ in targets for i in range(episodes)])
    bar = tqdm(total=T, desc="evaluating", leave=False, disable=not progress)
    with (
        merged(model),
        bar,
        torch.autocast(device.type, torch.bfloat16, settings["dtype"] == "bf16"),
    ):
        for t in range(T):
            observation = torch.as_tensor(observation, dtype=torch.float32, device=device)
            obs[:, t] = (observation - obs_mean) / obs_std
            rows = torch.as_tensor(alive.nonzero()[0], device=device)
            window = slice(max(0, t + 1 - K), t + 1)
            predicted = model(
                rtg[rows, window],
                obs[rows, window],
                act[rows, window],
                timestep[window].expand(len(rows), -1),
            )  # (rows, up to K, A)
            actions[alive] = predicted[:, -1].float().cpu().numpy().clip(low, high)
            act[:, t] = torch.as_tensor(actions, device=device)
            observation, reward, terminated, truncated, _ = envs.step(actions)
            returns[alive] += reward[alive]
            lengths[alive] += 1
            if t + 1 < T:
                earned = torch.as_tensor(reward / scale, dtype=torch.float32, device=device)
                rtg[:, t + 1, 0] = rtg[:, t, 0] - (0 if delayed else earned)
            alive &= ~(terminated | truncated)
            bar.update()
            if not alive.any():
                break
    envs.close()
    model.train(training)
    return [
        {"target": target, **summarise(task, returns[i], lengths[i])}
        for target, i in zip(targets, np.arange(n).reshape(len(targets), episodes), strict=True)
    ]


def summarise(task, returns, lengths):
    """Plain numbers of the episodes under one target: returns (E,), lengths (E,) -> dictionary."""
    return {
        "return_mean": float(returns.mean()),
        "return_std": float(returns.std()),
        "score": float(normalised_score(task, returns.mean())),
        "length_mean": float(lengths.mean()),
        "returns": returns.tolist(),
        "lengths": lengths.tolist(),
    }


def print_table(results):
    """One line a target, and the best."""
    print(f"{'target':>8} {'return':>18} {'score':>7} {'length':>7}  episodes")
    for r in results:
        spread = f"{r['return_mean']:.1f} ± {r['return_std']:.1f}"
        line = f"{r['target']:8g} {spread:>18} {r['score']:7.1f} {r['length_mean']:7.0f}"
        print(f"{line}  {len(r['returns'])}")
    best = max(results, key=lambda r: r["return_mean"])
    print(f"best: target {best['target']:g}, score {best['score']:.1f}")


# --- from a checkpoint to a model ----------------------------------------------------------------


def build_model(settings, obs_dim, act_dim):
    """The model that training starts from: on the CPU, in fp32, its trainable tensors marked.

    settings: the fields of train.Config as a dictionary; of them lm, pretrained, train, embed,
    max_ep_len, dropout, lora_*, lm_coef and seed are read. Returns (LaMo, base), where base names
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
    model = LaMo(gpt, obs_dim, act_dim, settings["embed"], settings["max_ep_len"])
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


def read_checkpoint(path):
    """A checkpoint's dictionary, checked. Raises UserError for what train.py did not write."""
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder; give the ckpt.pt or best.pt in it")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"there is no checkpoint {path}; train.py prints where it is") from error
    except Exception as error:  # truncated zip, pickled code, a folder: torch.load has many kinds
        raise UserError(f"{path} is no readable checkpoint: damaged, or not train.py's") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this project's ({FORMAT})")
    kinds = {"settings": dict, "chosen": dict, "base": dict, "model": dict, "step": int}
    kinds |= {"act_dim": int, "obs_mean": torch.Tensor, "obs_std": torch.Tensor}
    wrong = [k for k, kind in kinds.items() if not isinstance(checkpoint.get(k), kind)]
    wrong += [k for k, t in checkpoint.get("model", {}).items() if not torch.is_tensor(t)]
    if wrong or checkpoint["obs_mean"].shape != checkpoint["obs_std"].shape:
        raise UserError(f"{path} lacks {', '.join(wrong) or 'obs_std'} as it should be: damaged")
    return checkpoint


def load_model(path, checkpoint):
    """The LaMo of a checkpoint (from read_checkpoint), on the CPU.

    Raises UserError if its tensors do not fit, or if the language model underneath is not to be
    had or is not the same one.
    """
    settings, train = checkpoint["settings"], checkpoint["settings"]["train"]
    if train == "all":  # nothing of the base is left: only its shape matters
        settings = settings | {"pretrained": False}
    obs_dim, act_dim = len(checkpoint["obs_mean"]), checkpoint["act_dim"]
    model, base = build_model(settings, obs_dim, act_dim)
    if train != "all" and base["sha256"] != checkpoint["base"]["sha256"]:
        raise UserError(
            f"{path} was trained on other weights ({checkpoint['base']['lm']}): SHA-256 "
            f"{checkpoint['base']['sha256'][:12]}, found {base['sha256'][:12]}"
        )
    names, state = checkpoint_names(model, train), checkpoint["model"]
    parameters = dict(model.named_parameters())
    for name in sorted(names ^ state.keys()):
        where = "lacks" if name in names else "has a tensor the model does not know:"
        raise UserError(f"{path} {where} {name}; it is damaged or from another version")
    for name, tensor in state.items():
        if tensor.shape != parameters[name].shape:
            found, expected = tuple(tensor.shape), tuple(parameters[name].shape)
            raise UserError(f"{path}: {name} is {found}, expected {expected}")
        parameters[name].data.copy_(tensor)
    return model


# --- the command ---------------------------------------------------------------------------------


def main():
    parser = Parser(prog="evaluate.py", description="Let a checkpoint of train.py act, or talk.")
    add = parser.add_argument
    add("checkpoint", help="ckpt.pt or best.pt of a run")
    add("--env", help="refuse a checkpoint of any other environment")
    add("--target", type=float, nargs="+", help="target returns (default: the run's)")
    add("--episodes", type=int, help="episodes per target (default: the run's)")
    add(
        "--seed",
        type=int,
        default=SEED,
        help=f"environment seed of the first episode (default {SEED}, as in training)",
    )
    add("--lm", help="where the language model's weights are (default: as in training)")
    add("--device", default="auto", help="cuda or cpu (default: cuda if there is one)")
    add("--json", action="store_true", help="print one JSON object instead of a table")
    add("--prompt", help="do not act but continue this text, before and after training")
    add("--tokens", type=int, default=100, help="with --prompt: how many to add (default 100)")
    add(
        "--corpus",
        default="english",
        help="with --prompt: perplexity on a file, wikitext or english",
    )
    args = parser.parse_args()
    check_numbers(vars(args), may_be_zero=("seed", "target"))
    checkpoint = read_checkpoint(args.checkpoint)
    settings, step = checkpoint["settings"], checkpoint["step"]
    if args.env and args.env != settings["env"]:
        raise UserError(f"{args.checkpoint} was trained on {settings['env']}, not {args.env}")
    if args.lm:
        settings["lm"] = args.lm
    task, device = find_task(settings["env"]), choose_device(args.device)
    model = load_model(args.checkpoint, checkpoint).to(device)
    if args.prompt is not None:
        compare_language(args, checkpoint, model)
        return

    env = make_env(task)
    shapes = (len(checkpoint["obs_mean"]),), (checkpoint["act_dim"],)
    if shapes != (env.observation_space.shape, env.action_space.shape):
        raise UserError(f"{args.checkpoint} has spaces {shapes}, not those of {task.env_id}")
    env.close()
    stats = checkpoint["obs_mean"].to(device), checkpoint["obs_std"].to(device)
    targets = args.target or settings["targets"]
    episodes, quiet = args.episodes or settings["episodes"], args.json
    results = rollout(
        model, task, settings, *stats, targets, episodes, args.seed, progress=not quiet
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
    obs_dim, act_dim = len(checkpoint["obs_mean"]), checkpoint["act_dim"]
    before, _ = build_model(checkpoint["settings"], obs_dim, act_dim)
    encoding = get_encoding(before.gpt.config.vocab_size)
    path, note = find_text(args.corpus, byte_level=True)
    tokens = tokenise(path, encoding)[:TEXT_TOKENS]
    text_name = note.split(",")[0]
    learnt = checkpoint["chosen"].get("text", "").startswith(text_name)
    known = ", which this run learnt from" if learnt else ""
    print(f"perplexity per token, on the first {len(tokens)} tokens of {text_name}{known}")
    steps = f"after {checkpoint['step']} steps"
    for when, lamo in (("before training", before.to(device)), (steps, model)):
        with merged(lamo):
            text, perplexity = talk(lamo.gpt, args.prompt, args.tokens, tokens, encoding)
        print(f"\n--- {when}: perplexity {perplexity:.2f}\n{text}")


if __name__ == "__main__":
    run_command(main)
