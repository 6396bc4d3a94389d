"""Make a Minari dataset: train a behaviour policy to medium skill, then record its episodes.

    python -m experiments.collect --env hopper --train              # the policy, about an hour
    python -m experiments.collect --env hopper --steps 1000000      # the full medium set
    python -m experiments.collect --env hopper --steps 10000 --bundle     # the part that is shipped

D4RL (Fu et al. 2020, arXiv 2004.07219) calls "medium" the data of a Soft Actor-Critic policy
stopped at about a third of expert skill, its actions sampled. So here: Stable-Baselines3's SAC is
stopped at the first look at which its score lies in MEDIUM and its returns spread by MIN_SPREAD, as
D4RL's do. The spread matters: where all episodes end alike, nothing can be learnt about what a
higher return-to-go asks for, and every target is out of distribution.

The policy is kept as plain tensors (0.3 MB) in assets/policies, so that anyone can record the same
behaviour without training. With one seed, a shorter recording is the beginning of a longer one.
"""

import json
import warnings
from importlib.metadata import version
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import torch
from tqdm import tqdm

from data import BUNDLED, minari_folder
from plumbing import Parser, UserError, run_command, write_atomically, write_json
from tasks import TASKS, find_task, make_env, normalised_score

POLICIES = BUNDLED.parent / "policies"
FULL = 1_000_000  # environment steps of a full medium set, as D4RL's

MEDIUM = (100 / 3, 50)  # normalised score at which training stops: a third to a half of expert
MIN_SPREAD = 0.25  # standard deviation of returns over their mean (D4RL's hopper-medium: 0.27)
LOOK_EVERY = 1000  # environment steps between two looks at the score
LOOK_EPISODES = 20  # episodes of a look
SURE_EPISODES = 100  # episodes of the second look that decides
LEARNING_STARTS = 10_000  # random steps before the first update (RL Baselines3 Zoo's for Hopper)
MAX_STEPS = 1_000_000  # give up here


def policy_path(env):
    """Where the behaviour policy of a task is kept."""
    return POLICIES / f"{env}-medium.safetensors"


def sample_action(policy, obs, rng):
    """An action of SAC's squashed Gaussian actor, tanh(mu + std * noise), as SB3 samples it.

    policy: the actor's tensors as NumPy arrays; obs (O,); returns (A,) float32 in (-1, 1).
    """
    obs = obs.astype(np.float32)
    h = np.maximum(policy["latent_pi.0.weight"] @ obs + policy["latent_pi.0.bias"], 0)  # (256,)
    h = np.maximum(policy["latent_pi.2.weight"] @ h + policy["latent_pi.2.bias"], 0)  # (256,)
    mu = policy["mu.weight"] @ h + policy["mu.bias"]  # (A,)
    log_std = policy["log_std.weight"] @ h + policy["log_std.bias"]  # (A,)
    noise = rng.standard_normal(len(mu))
    return np.tanh(mu + np.exp(log_std.clip(-20, 2)) * noise).astype(np.float32)


def play_episode(env, policy, seed, rng):
    """One episode from environment seed `seed`: observations (T + 1, O), actions, rewards, done."""
    observation, _ = env.reset(seed=seed)
    observations, actions, rewards, terminated, truncated = [observation], [], [], False, False
    while not (terminated or truncated):
        actions.append(sample_action(policy, observation, rng))
        observation, reward, terminated, truncated, _ = env.step(actions[-1])
        observations.append(observation)
        rewards.append(reward)
    return np.array(observations), np.array(actions), np.array(rewards), terminated


def play(env, policy, episodes, seed):
    """Returns and lengths of some episodes, each (episodes,)."""
    rng = np.random.default_rng(seed)
    rewards = [play_episode(env, policy, seed + i, rng)[2] for i in range(episodes)]
    return np.array([r.sum() for r in rewards]), np.array([len(r) for r in rewards])


def train_policy(name, task, seed):
    """Train SAC until its score lies in MEDIUM and write the actor to policy_path(name)."""
    from safetensors.torch import save

    try:
        from stable_baselines3 import SAC
        from stable_baselines3.common.callbacks import BaseCallback
    except ImportError as error:
        raise UserError("--train needs pip install -r requirements-experiments.txt") from error

    torch.set_num_threads(1)  # batches this small gain nothing from more
    look_env = make_env(task)
    sac = SAC("MlpPolicy", make_env(task), learning_starts=LEARNING_STARTS, seed=seed)
    found = {}

    class StopAtMedium(BaseCallback):
        def _on_step(self):
            step = self.num_timesteps
            if step % LOOK_EVERY or step <= LEARNING_STARTS:
                return True
            policy = {k: v.detach().numpy() for k, v in sac.actor.state_dict().items()}
            for episodes, first_seed in ((LOOK_EPISODES, 10_000), (SURE_EPISODES, 20_000)):
                returns, lengths = play(look_env, policy, episodes, seed=first_seed)
                score = normalised_score(task, returns.mean())
                print(
                    f"step {step}: {episodes} episodes, return {returns.mean():.0f} ± "
                    f"{returns.std():.0f}, length {lengths.mean():.0f}, score {score:.1f}",
                    flush=True,
                )
                spread = returns.std() / returns.mean()
                if not MEDIUM[0] <= score <= MEDIUM[1] or spread < MIN_SPREAD:
                    return True
            found.update(steps=step, return_mean=f"{returns.mean():.1f}", score=f"{score:.1f}")
            found.update(return_std=f"{returns.std():.1f}")
            return False

    sac.learn(MAX_STEPS, callback=StopAtMedium())
    if not found:
        raise UserError(f"no policy of medium skill within {MAX_STEPS} steps; try another --seed")
    about = {k: str(v) for k, v in found.items()} | {"env": task.env_id, "seed": str(seed)}
    about |= {"algorithm": f"SAC, stable_baselines3 {version('stable_baselines3')}"}
    about |= {"mujoco": version("mujoco"), "torch": torch.__version__}
    actor = {k: v.detach().clone() for k, v in sac.actor.state_dict().items()}
    write_atomically(policy_path(name), lambda file: file.write(save(actor, about)))
    print(f"wrote {policy_path(name)}: {about}")


def compress(path):
    """Rewrite an HDF5 file with its datasets gzipped; Minari reads it as before."""

    def copy_to(target):
        def copy(name, item):
            if isinstance(item, h5py.Dataset):
                squeezed = {"compression": "gzip", "shuffle": True} if item.shape else {}
                new = target.create_dataset(name, data=item[()], dtype=item.dtype, **squeezed)
            else:
                new = target.require_group(name)
            for key, value in item.attrs.items():
                new.attrs[key] = value

        return copy

    def write(file):
        with h5py.File(path, "r") as source, h5py.File(file, "w") as target:
            source.visititems(copy_to(target))
            for key, value in source.attrs.items():
                target.attrs[key] = value

    write_atomically(path, write)


def record(name, task, steps, seed, bundle):
    """Record whole episodes, at least `steps` steps of them, through Minari."""
    import minari
    from minari.data_collector import EpisodeBuffer
    from safetensors.numpy import load_file

    if not policy_path(name).is_file():
        raise UserError(f"there is no policy {policy_path(name)}; train it first: add --train")
    policy = load_file(policy_path(name))
    dataset_id = task.bundled if bundle else task.collected
    folder = BUNDLED / dataset_id if bundle else Path(minari.storage.get_dataset_path(dataset_id))
    if folder.exists():
        raise UserError(f"{folder} exists already; delete it first if you want to record it again")

    env, rng = make_env(task), np.random.default_rng(seed)
    episodes, returns, lengths = [], [], []
    with tqdm(total=steps, unit="step", unit_scale=True, desc=dataset_id) as bar:
        while sum(lengths) < steps:
            i = len(episodes)
            observations, actions, rewards, terminated = play_episode(env, policy, seed + i, rng)
            T = len(rewards)
            ends = np.arange(T) == T - 1
            episodes.append(
                EpisodeBuffer(
                    id=i,
                    seed=seed + i,
                    observations=observations.astype(np.float32),  # what training reads: half size
                    actions=actions,
                    rewards=rewards,
                    terminations=ends & terminated,
                    truncations=ends & (not terminated),
                )
            )
            returns.append(rewards.sum())
            lengths.append(T)
            bar.update(min(T, steps - bar.n))
    low, high = env.observation_space.low, env.observation_space.high
    with minari_folder(folder.parents[dataset_id.count("/")]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Minari misses an address to write to
        minari.create_dataset_from_buffers(
            dataset_id,
            episodes,
            env=env,
            eval_env=task.env_id,
            observation_space=gym.spaces.Box(low.astype(np.float32), high.astype(np.float32)),
            algorithm_name="SAC (Stable-Baselines3), stopped at medium skill, actions sampled",
            author={"the authors of this codebase"},
            description=f"Medium {task.env_id} data, recorded by experiments/collect.py.",
            ref_min_score=task.random,
            ref_max_score=task.expert,
            requirements=[f"mujoco=={version('mujoco')}", f"gymnasium=={version('gymnasium')}"],
        )
    compress(folder / "data" / "main_data.hdf5")
    returns = np.array(returns)
    about = {
        "command": f"python -m experiments.collect --env {name} --steps {steps} --seed {seed}"
        + (" --bundle" if bundle else ""),
        "share": steps / FULL,
        "episodes": len(lengths),
        "steps": sum(lengths),
        "return_mean": returns.mean(),
        "return_std": returns.std(),
        "return_min": returns.min(),
        "return_max": returns.max(),
        "length_mean": float(np.mean(lengths)),
        "score": normalised_score(task, returns.mean()),
        "versions": {p: version(p) for p in ("minari", "gymnasium", "mujoco", "numpy")},
    }
    write_json(folder / "about.json", about)
    print(f"wrote {folder}\n{json.dumps(about, indent=1)}")


def main():
    parser = Parser(prog="python -m experiments.collect", description=__doc__)
    parser.add_argument("--env", required=True, help=f"task: {', '.join(TASKS)}")
    parser.add_argument("--train", action="store_true", help="train the behaviour policy")
    parser.add_argument("--steps", type=int, help="record at least this many environment steps")
    parser.add_argument("--seed", type=int, default=0, help="of policy or recording (default 0)")
    parser.add_argument("--bundle", action="store_true", help="record into assets/minari")
    args = parser.parse_args()
    task = find_task(args.env)
    if not args.train and args.steps is None:
        raise UserError("nothing to do: add --train, --steps N or both")
    if args.steps is not None and args.steps < 1:
        raise UserError(f"--steps is {args.steps}, but must be at least 1")
    if args.train:
        train_policy(args.env, task, args.seed)
    if args.steps is not None:
        record(args.env, task, args.steps, args.seed, args.bundle)


if __name__ == "__main__":
    run_command(main)
