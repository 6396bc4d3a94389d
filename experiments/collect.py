"""Make a Minari dataset: record a behaviour policy, train one first, or import what others made.

    python -m experiments.collect --env hopper --steps 1000000      # the full medium set
    python -m experiments.collect --env pong --random --steps 5000  # a policy that knows nothing
    python -m experiments.collect --import-d4rl hopper_medium-v2.hdf5 --env hopper
    python -m experiments.collect --import-dqn-replay FOLDER --env breakout
    python -m experiments.collect --env hopper --train              # the policy, about an hour

D4RL (Fu et al. 2020, arXiv 2004.07219) calls "medium" the data of a Soft Actor-Critic policy
stopped at about a third of expert skill, its actions sampled. So here, with Stable-Baselines3: SAC
for MuJoCo, PPO for Reacher2d (the paper's choice), stopped at the first look at which the score
lies in the recipe's range and the returns spread enough. The spread matters: where all episodes end
alike, nothing can be learnt about what a higher return-to-go asks for, and every target is out of
distribution.

A policy is kept as plain tensors in assets/policies, so that anyone can record the same behaviour
without training. With one seed, a shorter recording is the beginning of a longer.

DQN-replay (Agarwal et al. 2020, arXiv 1907.04543) is the replay buffer of Dopamine's DQN, written
down each time it was full. Its files and D4RL's mark where an episode ends in one long run of
transitions. What belongs to no whole episode is left out and counted.
"""

import copy
import gzip
import json
import os
import signal
import tempfile
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import count, pairwise
from pathlib import Path
from typing import Literal

import gymnasium as gym
import h5py
import minari
import numpy as np
import torch
import tyro
from gymnasium.vector.utils import concatenate, create_empty_array
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_storage import MinariStorage
from safetensors.numpy import load_file, save
from tqdm import tqdm

from data import BUNDLED
from tasks import FRAME, find_task
from utils import UserError, choose, reading, run_command, write_atomically, write_json


@dataclass
class Arguments:
    env: str  # task: a row of tasks.TASKS, or an Atari game
    steps: int | None = None  # record at least this many environment steps, whole episodes
    train: bool = False  # train the policy first: hopper, halfcheetah, walker2d or reacher2d
    random: bool = False  # record random actions, for any task
    seed: int = 0  # of policy or recording
    bundle: bool = False  # record into assets/minari
    import_d4rl: str | None = None  # D4RL's v2 HDF5 file of a MuJoCo task
    # which of D4RL's datasets it is
    quality: Literal["random", "medium", "expert", "medium-replay", "medium-expert"] = "medium"
    import_dqn_replay: str | None = None  # folder of DQN-replay's gzipped arrays


POLICIES = BUNDLED.parent / "policies"
SURE_EPISODES = 100  # episodes of a second look, which decides
MAX_STEPS = 1_000_000  # training of a policy gives up here
ANT_SEEN = 27  # of D4RL's 111 numbers in an Ant observation; the rest, contact forces, are all zero
DQN_KEYS = ("observation", "action", "reward", "terminal")
PADDING = 3  # blank transitions before each episode in Dopamine's replay buffer: its stack less one
AT_A_TIME = 4096  # transitions of a DQN-replay file in memory


@dataclass(frozen=True)
class Recipe:
    """When training of a behaviour policy stops."""

    algorithm: str  # SAC or PPO
    lowest: float  # normalised score, at least
    highest: float  # and at most
    least_spread: float = 0.0  # standard deviation of returns over their mean, at least
    look_every: int = 1000  # environment steps between two looks at the score
    look_episodes: int = 20  # episodes of a look


RECIPES = {
    "hopper": Recipe("SAC", 100 / 3, 50, least_spread=0.25),  # D4RL's medium: 0.27
    "halfcheetah": Recipe("SAC", 100 / 3, 50),  # never falls, so its returns hardly spread
    "walker2d": Recipe("SAC", 100 / 3, 50, least_spread=0.25),  # D4RL's medium: 0.38
    "reacher2d": Recipe("PPO", 34, 38, look_every=10_000, look_episodes=100),  # the paper's: 36
}


# --- policies ------------------------------------------------------------------------------------


def sample_action(policy, rng, obs):
    """A sampled action of an SB3 actor, as Stable-Baselines3 samples it. policy: the actor's
    tensors as NumPy arrays, of SAC (a Gaussian squashed by tanh) or PPO (a Gaussian cut at the
    bounds); obs (O,); returns (A,) float32 in [-1, 1]."""
    h = obs.astype(np.float32)
    if "mu.weight" in policy:
        for layer in ("latent_pi.0", "latent_pi.2"):
            h = np.maximum(policy[f"{layer}.weight"] @ h + policy[f"{layer}.bias"], 0)  # (256,)
        mu = policy["mu.weight"] @ h + policy["mu.bias"]  # (A,)
        log_std = policy["log_std.weight"] @ h + policy["log_std.bias"]  # (A,)
        noise = rng.standard_normal(len(mu))
        return np.tanh(mu + np.exp(log_std.clip(-20, 2)) * noise).astype(np.float32)
    for layer in ("mlp_extractor.policy_net.0", "mlp_extractor.policy_net.2"):
        h = np.tanh(policy[f"{layer}.weight"] @ h + policy[f"{layer}.bias"])  # (64,)
    mu = policy["action_net.weight"] @ h + policy["action_net.bias"]  # (A,)
    noise = rng.standard_normal(len(mu))
    return (mu + np.exp(policy["log_std"]) * noise).clip(-1, 1).astype(np.float32)


def play_episode(env, act, seed):
    """One episode from environment seed `seed`, its actions from act(observation). Returns T + 1
    observations, T actions, T rewards, and whether the episode terminated."""
    observation, _ = env.reset(seed=seed)
    # copies, for some environments (FrankaKitchen) show the same object again, changed
    observations, actions, rewards = [copy.deepcopy(observation)], [], []
    terminated = truncated = False
    while not (terminated or truncated):
        actions.append(act(observation))
        observation, reward, terminated, truncated, _ = env.step(actions[-1])
        observations.append(copy.deepcopy(observation))
        rewards.append(reward)
    return observations, actions, rewards, terminated


def train_policy(name, task, path, seed):
    """Train a policy until its recipe says that it is medium, and write its actor to the path."""
    import stable_baselines3

    recipe = RECIPES[choose("recipe", name, RECIPES)]
    torch.set_num_threads(1)  # batches this small gain nothing from more
    env, look_env = gym.make(task.env_id), gym.make(task.env_id)
    sac, found = recipe.algorithm == "SAC", {}
    own = {"learning_starts": 10_000} if sac else {}  # random steps before; RL Zoo's for Hopper
    own |= {"seed": seed, "device": "cpu"}
    learner = getattr(stable_baselines3, recipe.algorithm)("MlpPolicy", env, **own)

    def actor():  # PPO's tensors have the critic's among them
        state = (learner.actor if sac else learner.policy).state_dict()
        return {key: x.numpy() for key, x in state.items() if "value_net" not in key}

    def look(_locals, _globals):
        """Whether training goes on after this step."""
        if (step := learner.num_timesteps) % recipe.look_every:
            return True
        policy = actor()
        for episodes, first in ((recipe.look_episodes, 10_000), (SURE_EPISODES, 20_000)):
            act = partial(sample_action, policy, np.random.default_rng(first))
            played = [play_episode(look_env, act, first + i) for i in range(episodes)]
            returns = np.array([sum(rewards) for _, _, rewards, _ in played])
            score = 100 * (returns.mean() - task.random) / (task.expert - task.random)
            mean, std = f"{returns.mean():.1f}", f"{returns.std():.1f}"
            line = f"return {mean} ± {std} over {episodes} episodes, score {score:.1f}"
            print(f"step {step}: {line}", flush=True)
            spread = returns.std() / max(returns.mean(), 1e-9)
            if not recipe.lowest <= score <= recipe.highest or spread < recipe.least_spread:
                return True  # not medium yet
        found.update(steps=str(step), return_mean=mean, score=f"{score:.1f}", return_std=std)
        return False

    learner.learn(MAX_STEPS, callback=look)
    if not found:
        raise UserError(f"no policy of medium skill within {MAX_STEPS} steps; try another --seed")
    about = found | {"env": env.spec.id, "seed": str(seed), "mujoco": version("mujoco")}
    about["algorithm"] = f"{recipe.algorithm}, stable_baselines3 {stable_baselines3.__version__}"
    about["torch"] = torch.__version__
    write_atomically(path, lambda file: file.write(save(actor(), about)))
    print(f"wrote {path}: {about}")


# --- episodes: recorded or imported --------------------------------------------------------------


def make_episode(observations, actions, rewards, terminated, seed=None):
    """An episode of T steps for Minari. terminated: its end is terminal, not a cut."""
    last = np.arange(len(rewards)) == len(rewards) - 1
    return EpisodeBuffer(
        seed=seed,
        observations=observations,
        actions=np.asarray(actions),
        rewards=np.asarray(rewards, np.float64),
        terminations=last & terminated,
        truncations=last & (not terminated),
    )


def record(name, task, path, steps, seed):
    """Whole episodes, of at least `steps` steps together. path: of a policy, or None for actions
    uniformly at random. Returns what write_dataset takes, as the imports below do: episodes, made
    one at a time, their environment, and the space of their observations."""
    env = gym.make(task.env_id, **task.env_kwargs)
    env.action_space.seed(seed)
    policy, rng = path and load_file(path), np.random.default_rng(seed)
    space = env.observation_space
    if isinstance(space, gym.spaces.Box) and space.dtype == np.float64:
        low, high = space.low.astype(np.float32), space.high.astype(np.float32)
        space = gym.spaces.Box(low, high)  # what training reads: half the size

    def act(obs):
        return sample_action(policy, rng, obs) if policy else env.action_space.sample()

    def episodes():
        with tqdm(total=steps, unit="step", unit_scale=True, desc=name) as bar:
            for episode_seed in count(seed):
                if bar.n >= steps:
                    return
                observations, *rest = play_episode(env, act, episode_seed)
                rows = create_empty_array(space, len(observations))
                yield make_episode(concatenate(space, observations, rows), *rest, episode_seed)
                bar.update(len(observations) - 1)

    return episodes(), env, space


def import_d4rl(path, name, task, about):
    """D4RL's file of a task, see record. Adds to `about` how many transitions belong to no whole
    episode. Raises UserError for a file of another kind or task."""
    if not task.minari.startswith("mujoco/"):
        raise UserError(f"D4RL's HDF5 files are of the MuJoCo tasks, not of {name}")
    with reading(path, "a D4RL file, hopper_medium-v2.hdf5 say"), h5py.File(path) as file:
        keys = ("observations", "actions", "rewards", "terminals", "timeouts")
        observations, actions, rewards, terminals, timeouts = (file[key][()] for key in keys)
        # no file says what came after a timeout: without it, the last observation stands twice
        following = file.get("next_observations", file["observations"])[()]
    kwargs, width = {}, observations.shape[1]
    if name == "ant" and width == 111:
        kwargs, width = {"include_cfrc_ext_in_observation": False}, ANT_SEEN
    env = gym.make(task.env_id, **kwargs)
    if env.observation_space.shape != (width,) or env.action_space.shape != actions.shape[1:]:
        raise UserError(f"{path} has observations of {width} numbers, so it is not of {name}")
    ends = np.flatnonzero(terminals.astype(bool) | timeouts.astype(bool)) + 1
    about["left_out"] = int(len(rewards) - max(ends, default=0))

    def episodes():
        for start, end in tqdm(list(pairwise([0, *ends])), name, unit="episode"):
            seen = np.concatenate([observations[start:end], following[end - 1 : end]])[:, :width]
            ended = bool(terminals[end - 1])
            yield make_episode(seen, actions[start:end], rewards[start:end], ended)

    return episodes(), env, gym.spaces.Box(-np.inf, np.inf, (width,), observations.dtype)


def read_rows(path):
    """A gzipped .npy file, AT_A_TIME rows of it at a time. Raises UserError for a damaged one."""
    with reading(path, "one of DQN-replay's gzipped arrays"), gzip.open(path) as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        for at in range(0, shape[0], AT_A_TIME):
            part = (min(AT_A_TIME, shape[0] - at), *shape[1:])
            yield np.frombuffer(file.read(int(np.prod(part)) * dtype.itemsize), dtype).reshape(part)
        file.read(1)  # at the end, gzip compares its checksum


def import_dqn_replay(folder, name, task, about):
    """A game's DQN-replay folder, see record. One part of a file is in memory at a time.

    Frames are 84 x 84 and grey already, each the maximum of two of the game's, and rewards are
    clipped to [-1, 1]: both as Dopamine stored them. A checkpoint begins and ends within an
    episode; about["left_out"] counts the transitions of both pieces. Raises UserError for what is
    no such folder, or another game's.
    """
    if not task.minari.startswith("atari/"):
        raise UserError(f"DQN-replay is of Atari games, and {name} is none")
    found = Path(folder).glob("$store$_observation_ckpt.*.gz")
    numbers = sorted(int(path.name.split(".")[-2]) for path in found)
    if not numbers:
        raise UserError(f"{folder} has no $store$_observation_ckpt.N.gz, as DQN-replay names them")
    env = gym.make(task.env_id)  # 4 frames an action, repeated with probability 0.25: as logged
    about |= {"checkpoints": len(numbers), "left_out": 0, "rewards": "clipped to [-1, 1]"}

    def episodes():
        for number in numbers:
            files = [Path(folder) / f"$store$_{key}_ckpt.{number}.gz" for key in DQN_KEYS]
            kept = []  # pieces of the episode that is being read, four arrays each
            for part in tqdm(zip(*map(read_rows, files), strict=True), files[0].name, unit="part"):
                if not 0 <= part[1].min() <= part[1].max() < env.action_space.n:
                    raise UserError(f"{files[1]} has actions that {name} has not")
                cuts = np.flatnonzero(part[3]) + 1
                # pieces that end with a terminal, then what follows the last: 4 arrays each
                *ended, rest = zip(*(np.split(x, cuts) for x in part), strict=True)
                for piece in ended:
                    whole = [np.concatenate(x) for x in zip(*kept, piece, strict=True)]
                    kept = []
                    if any(x[:PADDING].any() for x in whole):  # not logged from its start
                        about["left_out"] += len(whole[0])
                        continue
                    frames, actions, rewards, _ = (x[PADDING:] for x in whole)
                    # the log ends with the last action: what it led to is not in it
                    seen = np.concatenate([frames, frames[-1:]])
                    yield make_episode(seen, actions.astype(np.int64), rewards, True)
                kept.append(rest)
            about["left_out"] += sum(len(piece[0]) for piece in kept)

    return episodes(), env, gym.spaces.Box(0, 255, (FRAME, FRAME), np.uint8)


# --- writing -------------------------------------------------------------------------------------


def compress(path):
    """Rewrite an HDF5 file with its datasets gzipped; Minari reads it as before."""
    small = path.with_suffix(".tmp")
    with h5py.File(path) as source, h5py.File(small, "w") as target:

        def copy_item(name, item):
            if isinstance(item, h5py.Dataset):
                target.create_dataset(name, data=item[()], compression="gzip", shuffle=True)
            else:
                target.require_group(name).attrs.update(item.attrs)

        source.visititems(copy_item)
    os.replace(small, path)


def write_dataset(folder, episodes, env, space, task, about, metadata):
    """Write episodes as a Minari dataset into `folder`, whole or not at all.

    episodes, env, space: see record; about: what about.json says besides the statistics; metadata:
    dataset_id, author and so on, for Minari. Minari writes uncompressed first: 7 GB of disk for a
    million frames. Raises UserError if the folder exists.
    """
    if folder.exists():
        raise UserError(f"{folder} exists already; delete it first if you want to make it again")
    module = env.spec.entry_point.partition(".")[0]
    engine = module.replace("_", "-") if module in ("ale_py", "gymnasium_robotics") else "mujoco"
    versions = {p: version(p) for p in ("minari", "gymnasium", "numpy", engine)}
    metadata |= {"minari_version": minari.__version__, "eval_env_spec": env.spec.to_json()}
    if scored := task.expert is not None:
        metadata |= {"ref_max_score": task.expert, "ref_min_score": task.random}
        metadata["num_episodes_average_score"] = 100
    metadata["requirements"] = [f"{p}=={versions[p]}" for p in ("gymnasium", engine)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as aside:
        (made := Path(aside) / "dataset").mkdir()
        where, exact = made / "data", {"jpeg_encoding": False}  # JPEG loses detail
        storage = MinariStorage.new(where, space, env.action_space, env.spec, **exact)
        storage.update_metadata(metadata)
        storage.update_episodes(episodes)
        if storage.total_episodes == 0:
            raise UserError(f"no whole episode for {folder}")
        compress(where / "main_data.hdf5")
        with h5py.File(where / "main_data.hdf5") as file:
            rewards = [file[f"episode_{i}/rewards"][()] for i in range(storage.total_episodes)]
        returns, lengths = [float(np.sum(r)) for r in rewards], [len(r) for r in rewards]
        mean = np.mean(returns)
        score = 100 * (mean - task.random) / (task.expert - task.random) if scored else None
        about |= {"episodes": len(lengths), "steps": sum(lengths), "return_mean": mean}
        about |= {"return_std": np.std(returns), "return_min": min(returns)}
        about |= {"return_max": max(returns), "length_mean": np.mean(lengths)}
        about |= {"score": score, "versions": versions}
        write_json(made / "about.json", about)
        os.rename(made, folder)
    print(f"wrote {folder}\n{json.dumps(about, indent=1)}")


# --- the command ---------------------------------------------------------------------------------


def main():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # its temporary folder goes, too
    args = tyro.cli(Arguments, description=__doc__)
    name, task = find_task(args.env)
    recording = args.train or args.steps is not None
    if recording + bool(args.import_d4rl) + bool(args.import_dqn_replay) != 1:
        ways = "--steps N and/or --train, --import-d4rl FILE, or --import-dqn-replay DIR"
        raise UserError(f"say what to do, one of: {ways}")
    policy = POLICIES / f"{name}-medium.safetensors"
    if args.train:
        train_policy(name, task, policy, args.seed)
        if args.steps is None:
            return
    about, flags = {"command": ""}, f"--env {name}"
    if args.import_d4rl:
        dataset_id, algorithm = f"d4rl/{name}/{args.quality}-v2", "D4RL, v2"
        flags = f"--import-d4rl {Path(args.import_d4rl).name} {flags} --quality {args.quality}"
        episodes, env, space = import_d4rl(args.import_d4rl, name, task, about)
    elif args.import_dqn_replay:
        dataset_id, algorithm = f"dqn-replay/{name}/logged-v0", "DQN replay"
        flags = f"--import-dqn-replay DIR {flags}"
        episodes, env, space = import_dqn_replay(args.import_dqn_replay, name, task, about)
    else:
        flags += f" --steps {args.steps} --seed {args.seed}"
        flags += " --random" * args.random + " --bundle" * args.bundle
        if args.random:
            policy, dataset_id = None, f"lamo/{name}/random-v0"
            algorithm = "uniformly random actions"
        elif policy.is_file():
            dataset_id = task.bundled if args.bundle else task.recorded
            algorithm = f"{RECIPES[name].algorithm} (Stable-Baselines3), stopped at medium skill, "
            algorithm += "actions sampled"
            about["share"] = min(1.0, args.steps / task.full)  # it is the full set's beginning
        else:
            raise UserError(f"there is no policy {policy}: add --train or --random")
        episodes, env, space = record(name, task, policy, args.steps, args.seed)
    about["command"] = f"python -m experiments.collect {flags}"
    by, text = algorithm, f"{algorithm} data of {name}, imported with Minari {minari.__version__}."
    if recording:
        by, text = "this codebase", f"{env.spec.id}, recorded by experiments/collect.py."
    metadata = {"dataset_id": dataset_id, "author": {f"the authors of {by}"}}
    metadata |= {"algorithm_name": algorithm, "description": text}
    home = BUNDLED if args.bundle else Path(minari.storage.get_dataset_path(""))
    write_dataset(home / dataset_id, episodes, env, space, task, about, metadata)
    part = f" --ratio {about['share']:g}" if about.get("share", 1) < 1 else ""
    print(f"next: python train.py --env {name} --dataset {dataset_id}{part}")


if __name__ == "__main__":
    run_command(main)
