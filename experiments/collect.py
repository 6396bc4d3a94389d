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

A policy is kept as plain tensors (under 0.5 MB) in assets/policies, so that anyone can record the
same behaviour without training. With one seed, a shorter recording is the beginning of a longer.
"""

import copy
import json
import os
import tempfile
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import torch
import tyro
from tqdm import tqdm

from data import BUNDLED
from experiments.import_data import import_d4rl, import_dqn_replay
from tasks import find_task
from utils import UserError, choose, run_command, write_atomically, write_json

POLICIES = BUNDLED.parent / "policies"
SURE_EPISODES = 100  # episodes of a second look, which decides
MAX_STEPS = 1_000_000  # give up here


@dataclass(frozen=True)
class Recipe:
    """When training of a behaviour policy stops."""

    algorithm: str  # SAC or PPO
    lowest: float  # normalised score, at least
    highest: float  # and at most
    least_spread: float = 0.0  # standard deviation of returns over their mean, at least
    look_every: int = 1000  # environment steps between two looks at the score
    look_episodes: int = 20  # episodes of a look
    learning_starts: int = 10_000  # SAC: random steps before the first update (RL Zoo's for Hopper)


RECIPES = {
    "hopper": Recipe("SAC", 100 / 3, 50, least_spread=0.25),  # D4RL's medium: 0.27
    "halfcheetah": Recipe("SAC", 100 / 3, 50),  # never falls, so its returns hardly spread
    "walker2d": Recipe("SAC", 100 / 3, 50, least_spread=0.25),  # D4RL's medium: 0.38
    # the paper's mean return is about 36
    "reacher2d": Recipe("PPO", 34, 38, look_every=10_000, look_episodes=100),
}


# --- policies ------------------------------------------------------------------------------------


def policy_path(env):
    """Where the behaviour policy of a task is kept."""
    return POLICIES / f"{env}-medium.safetensors"


def sample_action(policy, obs, rng):
    """A sampled action of an SB3 actor, as Stable-Baselines3 samples it.

    policy: the actor's tensors as NumPy arrays, of SAC (a Gaussian squashed by tanh) or PPO (a
    Gaussian cut at the bounds); obs (O,); returns (A,) float32 in [-1, 1].
    """
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
    """One episode from environment seed `seed`, its actions from act(observation).

    Returns (observations, T + 1 of them; actions, T; rewards (T,); whether it terminated).
    """
    observation, _ = env.reset(seed=seed)
    # copies, for some environments (FrankaKitchen) show the same object again, changed
    observations, actions, rewards = [copy.deepcopy(observation)], [], []
    terminated = truncated = False
    while not (terminated or truncated):
        actions.append(act(observation))
        observation, reward, terminated, truncated, _ = env.step(actions[-1])
        observations.append(copy.deepcopy(observation))
        rewards.append(reward)
    return observations, actions, np.array(rewards, np.float64), terminated


def play(env, policy, episodes, seed):
    """Returns and lengths of some episodes of a policy, each (episodes,)."""
    rng = np.random.default_rng(seed)

    def act(obs):
        return sample_action(policy, obs, rng)

    rewards = [play_episode(env, act, seed + i)[2] for i in range(episodes)]
    return np.array([r.sum() for r in rewards]), np.array([len(r) for r in rewards])


def train_policy(name, task, seed):
    """Train a policy until its recipe is content and write the actor to policy_path(name)."""
    import stable_baselines3
    from safetensors.torch import save
    from stable_baselines3.common.callbacks import BaseCallback

    recipe = RECIPES[choose("recipe", name, RECIPES)]
    torch.set_num_threads(1)  # batches this small gain nothing from more
    env, look_env = gym.make(task.env_id), gym.make(task.env_id)
    own = {"learning_starts": recipe.learning_starts} if recipe.algorithm == "SAC" else {}
    learner = getattr(stable_baselines3, recipe.algorithm)(
        "MlpPolicy", env, seed=seed, device="cpu", **own
    )
    found = {}

    def tensors():  # of the actor alone: PPO's has the critic's beside it
        parts = learner.actor if recipe.algorithm == "SAC" else learner.policy
        unused = ("value_net", "mlp_extractor.value_net")
        state = {k: v for k, v in parts.state_dict().items() if not k.startswith(unused)}
        return {k: v.detach().clone() for k, v in state.items()}

    class StopAtMedium(BaseCallback):
        def _on_step(self):
            step = self.num_timesteps
            if step % recipe.look_every or step <= own.get("learning_starts", 0):
                return True
            policy = {k: v.numpy() for k, v in tensors().items()}
            for episodes, first_seed in ((recipe.look_episodes, 10_000), (SURE_EPISODES, 20_000)):
                returns, lengths = play(look_env, policy, episodes, seed=first_seed)
                score = 100 * (returns.mean() - task.random) / (task.expert - task.random)
                print(
                    f"step {step}: {episodes} episodes, return {returns.mean():.0f} ± "
                    f"{returns.std():.0f}, length {lengths.mean():.0f}, score {score:.1f}",
                    flush=True,
                )
                spread = returns.std() / max(returns.mean(), 1e-9)
                if not recipe.lowest <= score <= recipe.highest or spread < recipe.least_spread:
                    return True
            found.update(steps=step, return_mean=f"{returns.mean():.1f}", score=f"{score:.1f}")
            found.update(return_std=f"{returns.std():.1f}")
            return False

    learner.learn(MAX_STEPS, callback=StopAtMedium())
    if not found:
        raise UserError(f"no policy of medium skill within {MAX_STEPS} steps; try another --seed")
    about = {k: str(v) for k, v in found.items()} | {"env": env.spec.id, "seed": str(seed)}
    about |= {"algorithm": f"{recipe.algorithm}, stable_baselines3 {version('stable_baselines3')}"}
    about |= {"mujoco": version("mujoco"), "torch": torch.__version__}
    actor = tensors()
    write_atomically(policy_path(name), lambda file: file.write(save(actor, about)))
    print(f"wrote {policy_path(name)}: {about}")


# --- datasets ------------------------------------------------------------------------------------


def compress(path):
    """Rewrite an HDF5 file with its datasets gzipped; Minari reads it as before."""
    small = path.with_suffix(".tmp")
    with h5py.File(path) as source, h5py.File(small, "w") as target:

        def copy_item(name, item):
            if isinstance(item, h5py.Dataset):
                squeezed = {"compression": "gzip", "shuffle": True} if item.shape else {}
                new = target.create_dataset(name, data=item[()], dtype=item.dtype, **squeezed)
            else:
                new = target.require_group(name)
            new.attrs.update(item.attrs)

        source.visititems(copy_item)
        target.attrs.update(source.attrs)
    os.replace(small, path)


def write_dataset(folder, dataset_id, episodes, env, space, task, about, **metadata):
    """Write episodes as the Minari dataset `dataset_id` into `folder`, whole or not at all.

    folder: it must not exist; episodes: an iterable of minari's EpisodeBuffer, taken one at a time;
    env: the environment to evaluate in; space: of the data's observations; about: what about.json
    says besides the statistics; metadata: algorithm_name, author and so on, for Minari. Minari
    writes uncompressed first: 7 GB of disk for a million frames. Raises UserError.
    """
    import minari

    if folder.exists():
        raise UserError(f"{folder} exists already; delete it first if you want to make it again")
    returns, lengths = [], []

    def counted():
        for episode in episodes:
            returns.append(float(np.sum(episode.rewards)))
            lengths.append(len(episode.rewards))
            yield episode
        if not returns:
            raise UserError(f"no whole episode for {dataset_id}")

    module = env.spec.entry_point.partition(".")[0]
    engine = {"ale_py": "ale-py", "gymnasium_robotics": "gymnasium-robotics"}.get(module, "mujoco")
    versions = {p: version(p) for p in ("minari", "gymnasium", "numpy", engine)}
    home = str(minari.storage.get_dataset_path(""))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as aside,
            warnings.catch_warnings(action="ignore"),  # Minari misses an address to write to
        ):
            os.environ["MINARI_DATASETS_PATH"] = aside  # where Minari writes
            minari.create_dataset_from_buffers(
                dataset_id,
                counted(),
                env=env.spec,
                eval_env=env.spec,
                observation_space=space,
                action_space=env.action_space,
                ref_min_score=task.random,
                ref_max_score=task.expert,
                requirements=[f"{p}=={versions[p]}" for p in ("gymnasium", engine)],
                jpeg_encoding=False,  # what is learnt from is what the environment shows
                **metadata,
            )
            made = Path(aside) / dataset_id
            compress(made / "data" / "main_data.hdf5")
            mean, score = np.mean(returns), None
            if task.expert is not None:
                score = 100 * (mean - task.random) / (task.expert - task.random)
            about |= {"episodes": len(lengths), "steps": sum(lengths), "return_mean": mean}
            about |= {"return_std": np.std(returns), "return_min": min(returns)}
            about |= {"return_max": max(returns), "length_mean": np.mean(lengths)}
            about |= {"score": score, "versions": versions}
            write_json(made / "about.json", about)
            os.rename(made, folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        os.environ["MINARI_DATASETS_PATH"] = home
    print(f"wrote {folder}\n{json.dumps(about, indent=1)}")


def record(name, task, steps, seed, random):
    """Play whole episodes, at least `steps` steps of them: what write_dataset takes, episodes,
    environment, space; random: act uniformly at random instead of by the task's policy."""
    from gymnasium.vector.utils import concatenate, create_empty_array
    from minari.data_collector import EpisodeBuffer
    from safetensors.numpy import load_file

    env, rng = gym.make(task.env_id, **task.env_kwargs), np.random.default_rng(seed)
    if not random and not policy_path(name).is_file():
        ways = "add --train, or --random" if name in RECIPES else "add --random"
        raise UserError(f"there is no policy {policy_path(name)}: {ways}")
    policy = None if random else load_file(policy_path(name))
    env.action_space.seed(seed)
    space = env.observation_space
    if isinstance(space, gym.spaces.Box) and space.dtype == np.float64:
        low, high = space.low.astype(np.float32), space.high.astype(np.float32)
        space = gym.spaces.Box(low, high)  # what training reads: half the size

    def act(obs):
        return env.action_space.sample() if random else sample_action(policy, obs, rng)

    def episodes():
        with tqdm(total=steps, unit="step", unit_scale=True, desc=name) as bar:
            for i in range(steps):  # an episode has a step at least
                observations, actions, rewards, terminated = play_episode(env, act, seed + i)
                T = len(rewards)
                ends = np.arange(T) == T - 1
                rows = create_empty_array(space, T + 1)
                yield EpisodeBuffer(
                    id=i,
                    seed=seed + i,
                    observations=concatenate(space, observations, rows),
                    actions=np.array(actions),
                    rewards=rewards,
                    terminations=ends & terminated,
                    truncations=ends & (not terminated),
                )
                bar.update(T)
                if bar.n >= steps:
                    return

    return episodes(), env, space


# --- the command ---------------------------------------------------------------------------------


@dataclass
class Arguments:
    env: str  # task: a row of tasks.TASKS, or an Atari game
    steps: int | None = None  # record at least this many environment steps, whole episodes
    train: bool = False  # train the policy first: hopper, halfcheetah, walker2d or reacher2d
    random: bool = False  # record random actions, for any task
    seed: int = 0  # of policy or recording
    bundle: bool = False  # record into assets/minari
    import_d4rl: str | None = None  # D4RL's v2 HDF5 file of a MuJoCo task
    quality: str = "medium"  # of D4RL's file: random, medium, expert, medium-replay, medium-expert
    import_dqn_replay: str | None = None  # folder of DQN-replay's gzipped arrays


def main():
    import minari

    args = tyro.cli(Arguments, description=__doc__)
    name, task = find_task(args.env)
    recording = args.train or args.steps is not None
    if recording + bool(args.import_d4rl) + bool(args.import_dqn_replay) != 1:
        ways = "--steps N and/or --train, --import-d4rl FILE, or --import-dqn-replay DIR"
        raise UserError(f"say what to do, one of: {ways}")
    if args.train:
        train_policy(name, task, args.seed)
        if args.steps is None:
            return
    about = {"command": "python -m experiments.collect "}
    if args.import_d4rl:
        dataset_id, origin = f"d4rl/{name}/{args.quality}-v2", "D4RL, v2"
        what = f"--import-d4rl {Path(args.import_d4rl).name} --env {name} --quality {args.quality}"
        made = import_d4rl(args.import_d4rl, name, task, args.quality, about)
    elif args.import_dqn_replay:
        dataset_id, origin = f"dqn-replay/{name}/logged-v0", "DQN replay"
        what = f"--import-dqn-replay DIR --env {name}"
        made = import_dqn_replay(args.import_dqn_replay, name, task, about)
        print("rewards are clipped to [-1, 1], as logged, but evaluation counts the game's points,")
        print("so give train.py the --targets in the data's units")
    else:
        dataset_id = task.bundled if args.bundle else task.recorded
        dataset_id = f"lamo/{name}/random-v0" if args.random else dataset_id
        made = record(name, task, args.steps, args.seed, args.random)
        what = f"--env {name} --steps {args.steps} --seed {args.seed}"
        what += " --random" * args.random + " --bundle" * args.bundle
        if not args.random:  # a share counts where there is a full set that this is a part of
            about["share"] = min(1.0, args.steps / task.full)
    about["command"] += what
    if recording:
        algorithm = "uniformly random actions"
        if not args.random:
            algorithm = f"{RECIPES[name].algorithm} (Stable-Baselines3), stopped at medium skill, "
            algorithm += "actions sampled"
        metadata = {"algorithm_name": algorithm, "author": {"the authors of this codebase"}}
        metadata["description"] = f"{made[1].spec.id}, recorded by experiments/collect.py."
    else:
        metadata = {"algorithm_name": origin, "author": {f"the authors of {origin}"}}
        made_with = f"imported with Minari {version('minari')}"
        metadata["description"] = f"{origin} data of {name}, {made_with}."
    path = (
        BUNDLED / dataset_id if args.bundle else Path(minari.storage.get_dataset_path(dataset_id))
    )
    write_dataset(path, dataset_id, *made, task, about, **metadata)
    print(f"next: python train.py --env {name} --dataset {dataset_id}")


if __name__ == "__main__":
    run_command(main)
