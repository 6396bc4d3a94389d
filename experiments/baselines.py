"""What the paper compares LaMo with: imitation and value-based offline RL, on the same data.

    python -m experiments.baselines --algo iql --env hopper --ratio 0.01
    python -m experiments.baselines --evaluate runs/<run>/ckpt.pt

bc, td3bc, iql and cql for actions that are numbers; bc, cql, bcq and nfq for choices (Atari). Data,
tasks, evaluations, the run's folder and its score are train.py's, so that runs compare; algorithms
and their hyperparameters are in experiments/algorithms.py. A policy here sees one observation, or
four frames, and is told no target return.
"""

import math
import time
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
from tqdm import tqdm

from checkpoint import check_finite, check_settings, read_checkpoint, save_checkpoint
from data import find_dataset, load_trajectories
from evaluate import print_table, rollout
from files import check_writable
from plumbing import (
    StopSignals,
    UserError,
    check_numbers,
    choose,
    choose_device,
    n_processes,
    parse_flags,
    printable,
    run_command,
)
from run_folder import append_to_log, begin_run, end_run, record_evaluation
from settings import check_most, choose_task, limit_episodes
from spaces import action_size, is_choice, is_picture, observation_shape
from tasks import find_environment, trust
from trackers import check_trackers
from windows import STACK

try:
    from tensordict import TensorDict

    from experiments.algorithms import CHOICES, NUMBERS, SHORT_NUMBERS, SPAN, make_learner
except ModuleNotFoundError as error:
    if error.name not in ("tensordict", "torchrl"):
        raise
    CHOICES = NUMBERS = None

FORMAT = "lamo-baseline-1"  # what ckpt["format"] says
PAPER = dict(steps=1_000_000, eval_every=25_000, episodes=20, episode_limit=0)  # CORL's steps
SHORT = dict(steps=5000, eval_every=250, episodes=10, episode_limit=2000)  # without CUDA
MAY_BE_ZERO = ("seed", "alpha", "beta", "return_span", "discount", "episode_limit")
ALGORITHM_FLAGS = {"layers", "lr", "actor_lr", "batch", "discount", "tau", "target_every", "alpha"}
ALGORITHM_FLAGS |= {"beta", "expectile", "return_span", "clip_rewards"}
KINDS = {"algo": str, "env": str, "mode": str, "dtype": str, "targets": list}  # of settings that
KINDS |= {"context": int, "scale": (int, float), "episodes": int, "episode_limit": int}  # act
MOST_LAYERS = 64
SCALED = ("hopper", "halfcheetah", "walker2d")  # tasks whose rewards return_span scales


@dataclass
class Config:
    # what to train; "auto" comes from the algorithm, a preset or the task, and is printed
    algo: str = None  # bc, td3bc, iql, cql; for choices bc, cql, bcq, nfq
    env: str = "auto"  # task: a row of tasks.py, or an Atari game; auto: the dataset's, or hopper
    ratio: float = 1.0  # share of the dataset's trajectories, in (0, 1]
    mode: str = "normal"  # normal, or delayed: all reward at an episode's last step
    seed: int = 0  # of the data subset, the weights and batches
    dataset: str = "auto"  # Minari id or folder; auto: the task's, see data.find_dataset
    quality: str = "medium"  # of the task's dataset, where it has several: simple, medium or expert
    env_module: str = ""  # a module of yours that the dataset's environment is in: it is imported
    evaluate: str = ""  # do not train: let this checkpoint act
    # the algorithm; auto: the rows of experiments/algorithms.py
    layers: int = "auto"  # hidden layers of 256 units
    lr: float = "auto"  # Adam's learning rate
    actor_lr: float = "auto"  # of CQL's policy
    batch: int = "auto"  # transitions a step
    discount: float = "auto"  # gamma
    tau: float = "auto"  # share of new weights in the target networks, each step (numbers)
    target_every: int = "auto"  # steps between copies into the target network (choices)
    alpha: float = "auto"  # TD3+BC's weight of Q; CQL's of the conservative term
    beta: float = "auto"  # IQL's inverse temperature; of BC's and BCQ's squared logits
    expectile: float = "auto"  # IQL's
    return_span: float = "auto"  # rewards are scaled until returns span this; 0: as they are
    clip_rewards: bool = "auto"  # rewards are cut to [-1, 1]; auto: Atari's, unless delayed
    # the run
    steps: int = "auto"  # optimiser steps
    eval_every: int = "auto"  # steps between evaluations
    episodes: int = "auto"  # episodes an evaluation
    episode_limit: int = "auto"  # steps after which an episode is cut; 0: where it ends by itself
    device: str = "auto"  # cuda or cpu; auto: cuda if there is one
    log_every: int = 100  # steps averaged into a row of the log
    out: str = "runs"  # a folder for this run is made in here
    name: str = "auto"  # of that folder; auto: task, algorithm, ratio, seed and time
    tensorboard: bool = False  # write the log's rows for TensorBoard, too; see trackers.py
    wandb: bool = False  # send them to Weights & Biases


# --- data ----------------------------------------------------------------------------------------


def rewards_of(data, settings):
    """The rewards an algorithm learns from: (N,), scaled or clipped as the settings say."""
    rewards = data.reward
    if settings.get("return_span"):  # BC's settings have neither
        span = float(data.returns.max() - data.returns.min())
        if span == 0:
            raise UserError("all returns are equal, so none can span anything: --return-span 0")
        rewards = rewards * (settings["return_span"] / span)
    return rewards.clamp(-1, 1) if settings.get("clip_rewards") else rewards


def sample_transitions(data, rewards, batch, generator):
    """A batch of transitions, uniform over all: a TensorDict as TorchRL's losses read it.

    rewards (N,): what rewards_of returns; generator: a torch.Generator on the data's device.
    observation (B, O), or STACK frames (B, 4, 84, 84); action (B, A) or (B,); next: observation,
    reward (B, 1), terminated (B, 1) and done (B, 1), the same: what follows a cut has a value.
    """
    device = data.obs.device
    index = torch.randint(len(data), (batch,), generator=generator, device=device)
    last = index + 1 == data.end[index]  # (B,)
    ends = torch.as_tensor(data.lengths, device=device).cumsum(0)  # (E,)
    episode = torch.bucketize(index, ends, right=True)  # (B,)
    if data.obs.dim() == 2:
        obs = data.obs[index]
        following = data.obs[(index + 1).clamp(max=len(data) - 1)]
        following[last] = data.last_obs[episode[last]]
    else:
        stack = index[:, None] - torch.arange(STACK - 1, -1, -1, device=device)  # (B, 4)
        first = (index - data.timestep[index])[:, None]  # (B, 1), where the episode begins
        obs = data.obs[stack.clamp(min=first)]
        obs[stack < first] = 0  # before the episode it was dark
        newest = data.obs[(index + 1).clamp(max=len(data) - 1)]
        newest[last] = data.last_obs[episode[last]]
        following = torch.cat([obs[:, 1:], newest[:, None]], dim=1)
    terminated = data.terminated[index][:, None]
    after = {"observation": following, "reward": rewards[index][:, None]}
    after |= {"terminated": terminated, "done": terminated}
    return TensorDict({"observation": obs, "action": data.act[index], "next": after}, [batch])


# --- acting --------------------------------------------------------------------------------------


class Actor(nn.Module):
    """A policy as evaluate.rollout calls one: it sees the last observation and nothing else."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def observe(self, rtg, obs, timestep):
        """One token, the observation itself: (n, 1, O) or (n, 4, 84, 84) -> (n, 1, 1, ..)."""
        return obs[:, :, None] if obs.dim() == 3 else obs[:, None, None]

    def remember(self, act, timestep):
        """No token: (n, 1, 0)."""
        return torch.empty(len(act), 1, 0, device=act.device)

    def act(self, tokens):
        """(n, 1, O) or (n, 1, 4, 84, 84) -> actions (n, A), or logits."""
        return self.policy(tokens[:, -1])


# --- settings ------------------------------------------------------------------------------------


def resolve(typed):
    """Fill in what does not wait for the data. Returns (settings, task, notes), as train.py's."""
    settings = asdict(Config()) | typed
    algos = list(NUMBERS | CHOICES)
    if settings["algo"] is None:
        raise UserError(f"--algo is missing; give one of {', '.join(algos)}")
    choose("algo", settings["algo"], algos)
    if n_processes() > 1:
        raise UserError("baselines train in one process; start them without torchrun")
    check_numbers(typed, MAY_BE_ZERO)
    task = choose_task(settings, typed)
    device = choose_device(settings["device"])
    settings["device"] = str(device)
    short = device.type == "cpu"
    settings |= {k: v for k, v in (SHORT if short else PAPER).items() if k not in typed}
    choose("mode", settings["mode"], ["normal", "delayed"])
    if not 0 < settings["ratio"] <= 1:
        raise UserError(f"--ratio is {settings['ratio']:g}, but must be above 0 and at most 1")
    check_writable(settings["out"], "--out")
    # what rollout and the run's folder ask for: a policy that sees one step, and no target
    settings |= {"method": settings["algo"], "context": 1, "scale": 1.0, "dtype": "fp32"}
    settings |= {"targets": [None]}
    check_most(settings)
    del settings["evaluate"]
    return settings, task, {"preset": "short (no CUDA)" if short else "CORL's steps"}


def complete_algorithm(settings, typed, notes, environment):
    """Fill in, in place, the algorithm's row, now that it is known what actions are.

    Raises UserError for an algorithm that is not for such actions, for flags it does not read, and
    for impossible numbers.
    """
    discrete = is_choice(environment.action_space)
    rows, kind = (CHOICES, "choices") if discrete else (NUMBERS, "numbers")
    if settings["algo"] not in rows:
        fitting = ", ".join(rows)
        raise UserError(f"{settings['algo']} is not for actions that are {kind}; use {fitting}")
    row, preset = dict(rows[settings["algo"]]), {}
    if not discrete and settings["device"] == "cpu":
        preset = SHORT_NUMBERS.get(settings["algo"], {})
        preset = {name: value for name, value in preset.items() if name not in typed}
    if preset:
        changed = ", ".join(f"{name} {value:g}" for name, value in preset.items())
        notes["preset"] += f", with {changed} instead of CORL's"
    if settings["algo"] != "bc":
        row["return_span"] = SPAN.get(settings["algo"], 0.0) if settings["env"] in SCALED else 0.0
        if discrete:
            row["return_span"] = 0.0
        atari = environment.spec.id.startswith("ALE/")
        row["clip_rewards"] = atari and settings["mode"] == "normal"  # else a return becomes 1
    if is_picture(environment.observation_space):
        del row["layers"]  # the convolutions are what they are
    for name in ALGORITHM_FLAGS - row.keys():
        del settings[name]
        if name in typed:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{settings['algo']} has no use for {flag} on these {kind}")
    settings |= {name: value for name, value in (row | preset).items() if name not in typed}
    for name in ("discount", "tau", "expectile"):
        if settings.get(name, 0) > 1:
            raise UserError(f"--{name} is {settings[name]:g}, but must be at most 1")


# --- the commands --------------------------------------------------------------------------------


def train(typed):
    """Train an algorithm and write a run's folder."""
    settings, task, notes = resolve(typed)
    check_trackers(settings)
    device = torch.device(settings["device"])
    source, share, notes["dataset"] = find_dataset(
        settings["env"], task, settings["ratio"], settings["dataset"], settings["quality"]
    )
    environment, notes["environment"] = find_environment(task, source)
    complete_algorithm(settings, typed, notes, environment)
    data = load_trajectories(
        source,
        environment.action_space,
        scale=settings["scale"],
        ratio=settings["ratio"] / share,
        mode=settings["mode"],
        seed=settings["seed"],
        device=device,
        rewards=task.rewards,
    )
    limit_episodes(settings, notes, data, environment)
    rewards = rewards_of(data, settings)
    torch.manual_seed(settings["seed"])
    learner = learn_from(environment, settings)
    learner.trained.to(device)
    actor = Actor(learner.policy).to(device)
    folder, trackers = begin_run(settings, environment, notes, data, learner.trained, None, world=1)

    def save(*names):
        state = {n: t.detach().cpu().clone() for n, t in actor.state_dict().items()}
        check_finite(state, step)
        run = settings, notes, {}, environment, data
        for name in names:
            save_checkpoint(folder / name, step, state, *run, format=FORMAT)

    generator = torch.Generator(data.obs.device).manual_seed(settings["seed"])
    stats, evaluations = (data.obs_mean, data.obs_std), []
    totals = {}  # of each loss since the last row of the log: its sum and its count
    started, evaluating = time.time(), 0.0
    bar = tqdm(total=settings["steps"], desc="training", mininterval=1)
    stop = StopSignals()
    for step in range(1, settings["steps"] + 1):
        batch = sample_transitions(data, rewards, settings["batch"], generator).to(device)
        for name, loss in learner.update(batch).items():
            total, count = totals.get(name, (0.0, 0))
            totals[name] = total + loss.detach(), count + 1
        bar.update()
        last = step == settings["steps"]
        if step % settings["log_every"] == 0 or last:
            means = {name: (total / count).item() for name, (total, count) in totals.items()}
            totals = {}
            if not all(math.isfinite(mean) for mean in means.values()):
                raise UserError(f"a loss is not finite any more by step {step}; lower --lr")
            seconds = time.time() - started - evaluating
            append_to_log(folder, row := {"step": step, **means, "seconds": seconds})
            trackers.add(row)
        if step % settings["eval_every"] == 0 or last:
            since = time.time()
            results = rollout(
                *(actor, environment, settings, stats, [None], settings["episodes"]),
                progress=True,
                stop=None if last else stop,  # a baseline cannot go on to make up for the last one
            )
            evaluating += time.time() - since
            if results is None:
                break
            best, score = record_evaluation(folder, trackers, evaluations, step, results)
            bar.set_postfix(score=f"{score:.1f}")
            save("ckpt.pt", *(["best.pt"] if best else []))
        if stop.number:
            break
    stop.restore()
    bar.close()
    if step < settings["steps"]:
        save("ckpt.pt")
        print(f"stopped after step {step}, whose policy is {folder / 'ckpt.pt'}; a baseline's run")
        print("cannot go on: begin it anew")
        trackers.close()
        raise SystemExit(128 + stop.number)
    seconds = time.time() - started
    command = "python -m experiments.baselines --evaluate"
    end_run(folder, settings, environment, notes, data, evaluations, seconds, evaluating, command)
    trackers.close()


def learn_from(environment, settings):
    """The Learner for an environment's observations and actions."""
    obs_shape = observation_shape(environment.observation_space)
    n_act, discrete = action_size(environment.action_space), is_choice(environment.action_space)
    return make_learner(obs_shape, n_act, discrete, settings)


def evaluate(typed):
    """Let a checkpoint act, and print how it went."""
    for name in typed.keys() - {"evaluate", "episodes", "episode_limit", "env_module", "device"}:
        raise UserError(f"--{name.replace('_', '-')} is for training, not for --evaluate")
    check_numbers(typed, may_be_zero=("episode_limit",))
    path = typed["evaluate"]
    checkpoint = read_checkpoint(path, FORMAT)
    check_settings(path, checkpoint, KINDS, {"context": [1], "scale": [1], "dtype": ["fp32"]})
    for name, tensor in checkpoint["model"].items():
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {name} holds what is no finite number; it is damaged")
    settings = checkpoint["settings"] | typed
    environment = checkpoint["environment"]
    device = choose_device(typed.get("device", "auto"))
    layers = settings.get("layers", 1)
    if type(layers) is not int or not 0 < layers <= MOST_LAYERS:
        raise UserError(f"{path} has the setting layers {layers}: damaged")
    try:
        actor = Actor(learn_from(environment, settings).policy)
        actor.load_state_dict(checkpoint["model"])
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} does not fit its own settings; it is damaged") from error
    stats = checkpoint["obs_mean"].to(device), checkpoint["obs_std"].to(device)
    results = rollout(
        *(actor.to(device), environment, settings, stats, [None], settings["episodes"]),
        progress=True,
    )
    print(f"{printable(settings['env'])}, {settings['algo']}, step {checkpoint['step']}")
    print(f"trained on {printable(checkpoint['chosen'].get('dataset'))}")
    print_table(results)


def main():
    typed = parse_flags(Config, "python -m experiments.baselines", __doc__)
    if NUMBERS is None:
        raise UserError("baselines need TorchRL: pip install -r requirements-experiments.txt")
    trust(typed.get("env_module"))
    if "evaluate" in typed:
        evaluate(typed)
    else:
        train(typed)


if __name__ == "__main__":
    run_command(main)
