"""What the paper compares LaMo with: imitation and value-based offline RL, on the same data.

    python -m experiments.baselines --algo iql --env hopper --ratio 0.01
    python -m experiments.baselines --evaluate runs/<run>/ckpt.pt

bc, td3bc, iql and cql are for actions that are numbers; bc, cql, bcq and nfq for choices (Atari).
Networks and losses are in algorithms.py, all else is train.py's, so runs compare. A policy sees one
observation, or four frames, and no target return. A stopped run is kept, but cannot be resumed.
"""

import math
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn as nn
import tyro
from tqdm import tqdm

import train
from data import find_dataset, load_trajectories, sample_windows
from evaluate import print_table, rollout
from tasks import find_environment, find_task, replay, task_of_dataset, unpack
from train import begin_run, describe, end_run, fill, open_log, read_checkpoint, save_checkpoint
from utils import StopSignals, UserError, choose_device, reading, run_command

FORMAT = "lamo-baseline-2"  # what ckpt["format"] says
PAPER = dict(steps=1_000_000, eval_every=25_000, episodes=20, episode_limit=0)  # CORL's steps
SHORT = dict(steps=5000, eval_every=250, episodes=10, episode_limit=2000)  # without CUDA

# Hyperparameters for numbers are CORL's (github.com/tinkoff-ai/CORL: configs/offline/*/hopper/
# medium_v2.yaml, defaults of algorithms/offline/*.py; it has no kitchen, which takes the same), for
# choices d3rlpy's (github.com/takuseno/d3rlpy: reproductions/offline; BC's of DiscreteBCConfig).
NUMBERS = {
    "bc": dict(lr=3e-4, batch=256, layers=2),
    "td3bc": dict(lr=3e-4, batch=256, layers=2, discount=0.99, tau=0.005, alpha=2.5),
    "iql": dict(lr=3e-4, batch=256, layers=2, discount=0.99, tau=0.001, beta=3.0, expectile=0.7),
    "cql": dict(lr=3e-4, batch=256, layers=3, discount=0.99, tau=0.005, alpha=10.0, actor_lr=3e-5),
}
# Ours, for the short preset's 5000 steps, in which CORL's tau hardly moves the target networks.
SHORT_NUMBERS = {"td3bc": dict(tau=0.1), "cql": dict(tau=0.1, actor_lr=3e-4, batch=64)}
CHOICES = {
    "bc": dict(lr=1e-3, batch=100, layers=2, beta=0.5),
    "cql": dict(lr=5e-5, batch=32, layers=2, discount=0.99, target_every=2000, alpha=4.0),
    "bcq": dict(lr=5e-5, batch=32, layers=2, discount=0.99, target_every=2000, beta=0.01),
    "nfq": dict(lr=5e-5, batch=32, layers=2, discount=0.99),
}


@dataclass
class Config:
    # What to train. None stands for what the algorithm, the preset or the task say.
    algo: Literal["bc", "td3bc", "iql", "cql", "bcq", "nfq"] | None = None  # see above
    env: str | None = None  # task: a row of tasks.py, or an Atari game; None: the data's, or hopper
    ratio: float = 1.0  # share of the dataset's trajectories, in (0, 1]
    mode: Literal["normal", "delayed"] = "normal"  # delayed: all reward at an episode's last step
    seed: int = 0  # of the data subset, the weights and batches
    dataset: str | None = None  # Minari id or folder; None: the task's, see data.find_dataset
    quality: Literal["simple", "medium", "expert"] = "medium"  # of the task's dataset
    evaluate: str | None = None  # do not train: let this checkpoint act
    # The algorithm's hyperparameters. None: those of its row above, if it has them.
    layers: int | None = None  # hidden layers of 256 units
    lr: float | None = None  # Adam's learning rate
    actor_lr: float | None = None  # of CQL's policy
    batch: int | None = None  # transitions a step
    discount: float | None = None  # gamma
    tau: float | None = None  # share of new weights in the target networks, each step (numbers)
    target_every: int | None = None  # steps between copies into the target network (choices)
    alpha: float | None = None  # TD3+BC's weight of Q; CQL's of the conservative term
    beta: float | None = None  # IQL's inverse temperature; of BC's and BCQ's squared logits
    expectile: float | None = None  # IQL's
    return_span: float | None = None  # rewards are scaled until returns span this; 0: as they are
    clip_rewards: bool | None = None  # cut rewards to [-1, 1]; None: Atari's, unless delayed
    # The run.
    steps: int | None = None  # optimiser steps
    eval_every: int | None = None  # steps between evaluations
    episodes: int | None = None  # of each evaluation
    episode_limit: int | None = None  # steps after which an episode is cut; 0: where it ends itself
    device: str | None = None  # cuda or cpu; None: cuda if there is one
    log_every: int = 100  # steps averaged into a row of the log
    out: str = "runs"  # a folder for this run is made in here
    name: str | None = None  # of that folder; None: task, algorithm, ratio, seed and time
    tensorboard: bool = False  # write the log for TensorBoard, too
    wandb: bool = False  # send the log to Weights & Biases, too


def make_transitions(data, c):
    """The Trajectories that sample_transitions draws from: in place of returns-to-go, rtg (N, 3)
    holds the reward, scaled or clipped, whether the episode terminated, and its number."""
    span = float(data.returns.max() - data.returns.min())
    rewards = data.reward * (c.return_span / span if c.return_span and span else 1)
    rewards = rewards.clamp(-1, 1) if c.clip_rewards else rewards
    episode = torch.searchsorted(data.end.unique(), data.end)
    return replace(data, rtg=torch.stack([rewards, data.terminated, episode], dim=1))


def sample_transitions(data, batch, generator):
    """A batch of transitions, uniform over all: a dictionary as TorchRL's losses read it.

    data: make_transitions's; generator: a torch.Generator on its device. observation (B, O), or
    STACK frames (B, 4, 84, 84); action (B, A) or (B,); next: observation, reward (B, 1), terminated
    (B, 1), and done, the same, so that what follows a cut has a value.
    """
    told, obs, act, _, valid = sample_windows(data, batch, 2, generator)
    reward, terminated, episode = told[:, 0].split(1, dim=1)  # (B, 1) each
    last = ~valid[:, 1]  # (B,), of its episode: the observation that follows is kept apart
    obs[last, -1] = data.last_obs[episode[last, 0].long()]
    obs, following = obs[:, :-1].squeeze(1), obs[:, 1:].squeeze(1)  # (B, O) or (B, 4, 84, 84)
    after = {"observation": following, "reward": reward, "terminated": terminated.bool()}
    return {"observation": obs, "action": act[:, 0], "next": after | {"done": terminated.bool()}}


class Actor(nn.Module):
    """A policy as evaluate.rollout calls one. Its only token is the last observation: (n, 1, O) or
    (n, 1, 4, 84, 84)."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def observe(self, rtg, obs, timestep):
        return obs[:, :, None] if obs.dim() == 3 else obs[:, None, None]

    def remember(self, act, timestep):
        return torch.empty(len(act), 1, 0, device=act.device)  # nothing

    def act(self, tokens):
        return self.policy(tokens[:, -1])


def choose_hyperparameters(c, notes, environment):
    """Fill in, in place, the algorithm's row. Raises UserError if it is not for the environment's
    kind of actions, and for flags that it does not read."""
    shape, _, choices = environment.sizes()
    rows, kind = (CHOICES, "choices") if choices else (NUMBERS, "numbers")
    if c.algo not in rows:
        raise UserError(f"--algo {c.algo} is not for {kind} as actions; use {', '.join(rows)}")
    row = dict(rows[c.algo])
    if c.algo != "bc":
        scaled = c.algo in ("iql", "cql") and c.env in ("hopper", "halfcheetah", "walker2d")
        clipped = environment.spec.id.startswith("ALE/") and c.mode == "normal"
        row |= {"return_span": 1000.0 if scaled else 0.0, "clip_rewards": clipped}  # CORL's 1000
    if len(shape) == 3:  # frames
        del row["layers"]  # the convolutions are what they are
    every = set().union(*NUMBERS.values(), *CHOICES.values(), {"return_span", "clip_rewards"})
    for name in sorted(every - row.keys()):
        if getattr(c, name) is not None:
            raise UserError(f"{c.algo} for {kind} does not use --{name.replace('_', '-')}")
    short = SHORT_NUMBERS.get(c.algo, {}) if c.device == "cpu" and not choices else {}
    ours = {name: x for name, x in short.items() if getattr(c, name) is None}
    notes["preset"] += "".join(f", {name} {x:g} instead of CORL's" for name, x in ours.items())
    fill(c, row | ours)


def evaluate(c):
    """Let a checkpoint act, and print how it went."""
    given = {name: x for name, x in vars(c).items() if x != getattr(Config, name)}
    if given.keys() - {"evaluate", "episodes", "episode_limit", "device"}:
        raise UserError("--evaluate takes --episodes, --episode-limit and --device only")
    from experiments.algorithms import make_learner

    checkpoint, device = read_checkpoint(c.evaluate, FORMAT), choose_device(c.device)
    with reading(c.evaluate, "a checkpoint of experiments.baselines"):
        vars(c).update(checkpoint["settings"] | given)
        train.check_ranges(c)
        environment = unpack(checkpoint["environment"])
        actor = Actor(make_learner(*environment.sizes(), c).policy)
        actor.load_state_dict(checkpoint["model"])
    stats = checkpoint["obs_mean"].to(device), checkpoint["obs_std"].to(device)
    results = rollout(actor.to(device), environment, c, stats, [None], c.episodes)
    dataset = checkpoint["notes"]["dataset"]
    print(f"{c.env}, {c.algo}, step {checkpoint['step']}, trained on {dataset}")
    print_table(results)


def main():
    c, notes = tyro.cli(Config, description=__doc__), {}
    if c.evaluate:
        return evaluate(c)
    from experiments.algorithms import TensorDict, make_learner

    env, task = task_of_dataset(c.dataset) if c.dataset else (None, None)
    if task is None or c.env not in (None, env):  # --env says more than the dataset's name
        env, task = find_task(c.env or "hopper")
    device = choose_device(c.device)
    fill(c, SHORT if device.type == "cpu" else PAPER)
    notes["task"] = f"{env}, {c.algo}"
    notes["preset"] = "short (no CUDA)" if device.type == "cpu" else "CORL's steps"
    vars(c).update(env=env, device=str(device), method=c.algo)
    vars(c).update(context=1, scale=1, dtype="fp32", targets=[None], sample=False)  # for rollout
    train.check_ranges(c)
    dataset, share, notes["dataset"] = find_dataset(c.env, task, c.ratio, c.dataset, c.quality)
    environment, notes["environment"] = find_environment(task, dataset)
    choose_hyperparameters(c, notes, environment)
    subset = {"ratio": c.ratio / share, "mode": c.mode, "seed": c.seed, "rewards": task.rewards}
    data = load_trajectories(dataset, environment.action_space, c.scale, device=device, **subset)
    environment, notes["replay"] = replay(environment, dataset, int(data.lengths.max()), task)
    transitions = make_transitions(data, c)
    if not (environment.spec.max_episode_steps or environment.spec.id.startswith("ALE/")):
        c.episode_limit = c.episode_limit or 10 * int(data.lengths.max())  # nothing else ends one
    torch.manual_seed(c.seed)
    learner = make_learner(*environment.sizes(), c)
    learner.trained.to(device)
    actor = Actor(learner.policy).to(device)
    generator = torch.Generator(data.obs.device).manual_seed(c.seed)
    run = describe(c, notes, data, environment) | {"format": FORMAT, "base": None}
    folder = begin_run(c, run, learner.trained)
    log, stop, started = open_log(c, folder, run), StopSignals(), time.time()
    sums = defaultdict(list)  # each loss of the steps since the last row of the log
    for step in (bar := tqdm(range(1, c.steps + 1), "training", mininterval=1)):
        stop.at_once = False
        batch = sample_transitions(transitions, c.batch, generator)
        for name, loss in learner.update(TensorDict(batch, [c.batch]).to(device)).items():
            sums[name].append(loss.detach())
        if step % c.log_every == 0 or step == c.steps:
            means = {name: (sum(losses) / len(losses)).item() for name, losses in sums.items()}
            sums.clear()
            if not math.isfinite(sum(means.values())):
                raise UserError(f"a loss is not finite by step {step}; lower --lr")
            log({"step": step, **means, "seconds": time.time() - started - run["evaluating"]})
        due = step % c.eval_every == 0 or step == c.steps
        if due or stop.number:
            run |= {"step": step, "seconds": time.time() - started}
            run["model"] = {name: x.cpu() for name, x in actor.state_dict().items()}
            save_checkpoint(folder / "ckpt.pt", run)
        if stop.number:
            print(f"stopped after step {step}; a baseline cannot be resumed, its policy is kept")
            raise SystemExit(128 + stop.number)
        stop.at_once = due  # the policy is saved: an evaluation need not be waited for
        if due:
            bar.set_postfix(score=train.evaluate(c, run, folder, actor, environment, log))
    run["seconds"] = time.time() - started
    end_run(folder, run, environment, "python -m experiments.baselines --evaluate")


if __name__ == "__main__":
    run_command(main)
