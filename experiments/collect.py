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
from dataclasses import dataclass
from importlib.metadata import version

import gymnasium as gym
import numpy as np
import torch
from tqdm import tqdm

from data import BUNDLED
from experiments.import_data import D4RL_QUALITIES, import_d4rl, import_dqn_replay
from experiments.write_dataset import check_free, dataset_folder, write_dataset
from files import write_atomically
from plumbing import Parser, UserError, choose, run_command
from tasks import TASKS, find_task

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
    "reacher2d": Recipe(
        "PPO", 34, 38, look_every=10_000, look_episodes=100
    ),  # the paper's: about 36
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
    from safetensors.torch import save

    try:
        import stable_baselines3
        from stable_baselines3.common.callbacks import BaseCallback
    except ImportError as error:
        raise UserError("--train needs pip install -r requirements-experiments.txt") from error

    recipe = RECIPES[name]
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


# --- recording -----------------------------------------------------------------------------------


def record(name, task, steps, seed, random, bundle):
    """Record whole episodes, at least `steps` steps of them, as a Minari dataset.

    random: act uniformly at random instead of by the task's policy.
    """
    from gymnasium.vector.utils import concatenate, create_empty_array
    from minari.data_collector import EpisodeBuffer
    from safetensors.numpy import load_file

    if random:
        dataset_id, algorithm = f"lamo/{name}/random-v0", "uniformly random actions"
    elif policy_path(name).is_file():
        dataset_id = task.bundled if bundle else task.recorded
        policy = load_file(policy_path(name))
        algorithm = f"{RECIPES[name].algorithm} (Stable-Baselines3), stopped at medium skill, "
        algorithm += "actions sampled"
    else:
        ways = "add --train, or --random" if name in RECIPES else "add --random"
        raise UserError(f"there is no policy {policy_path(name)}: {ways}")
    folder = BUNDLED / dataset_id if bundle else dataset_folder(dataset_id)
    check_free(folder)

    env, rng = gym.make(task.env_id, **task.env_kwargs), np.random.default_rng(seed)
    env.action_space.seed(seed)
    act = (
        (lambda obs: env.action_space.sample())
        if random
        else (lambda obs: sample_action(policy, obs, rng))
    )
    space = env.observation_space
    if isinstance(space, gym.spaces.Box) and space.dtype == np.float64:
        low, high = space.low.astype(np.float32), space.high.astype(np.float32)
        space = gym.spaces.Box(low, high)  # what training reads: half the size

    def episodes():
        done = 0
        with tqdm(total=steps, unit="step", unit_scale=True, desc=dataset_id) as bar:
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
                bar.update(min(T, steps - bar.n))
                done += T
                if done >= steps:
                    return

    command = f"python -m experiments.collect --env {name} --steps {steps} --seed {seed}"
    command += " --random" * random + " --bundle" * bundle
    # a share counts only where there is a full set that this is a part of
    about = {"command": command} | ({} if random else {"share": min(1.0, steps / task.full)})
    about = write_dataset(
        folder,
        dataset_id,
        episodes(),
        env.spec,
        (space, env.action_space),
        (task.random, task.expert),
        about,
        algorithm_name=algorithm,
        author={"the authors of this codebase"},
        description=f"{env.spec.id}, recorded by experiments/collect.py.",
    )
    print(f"wrote {folder}\n{json.dumps(about, indent=1)}")
    if random:
        print(f"next: python train.py --env {name} --dataset {dataset_id}")


# --- the command ---------------------------------------------------------------------------------


def main():
    parser = Parser(prog="python -m experiments.collect", description=__doc__)
    add = parser.add_argument
    add("--env", required=True, help=f"task: {', '.join(TASKS)}, or an Atari game")
    add("--train", action="store_true", help=f"train the policy: {', '.join(RECIPES)}")
    add("--steps", type=int, help="record at least this many environment steps, whole episodes")
    add("--random", action="store_true", help="record random actions, for any task")
    add("--seed", type=int, default=0, help="of policy or recording (default 0)")
    add("--bundle", action="store_true", help="record into assets/minari")
    add("--import-d4rl", metavar="FILE", help="D4RL's v2 HDF5 file of a MuJoCo task")
    add("--quality", help="what to call it (default medium): " + ", ".join(D4RL_QUALITIES))
    add("--import-dqn-replay", metavar="DIR", help="folder of DQN-replay's gzipped arrays")
    args = parser.parse_args()
    name, task = find_task(args.env)
    importing = args.import_d4rl or args.import_dqn_replay
    recording = args.train or args.steps is not None
    if args.train:
        choose("recipe", name, RECIPES)
    if args.train and args.random:
        raise UserError("--train makes a policy and --random does without one; give one of them")
    if importing and recording:
        raise UserError("an import takes the whole file: --steps and --train do not go with it")
    if bool(args.import_d4rl) + bool(args.import_dqn_replay) + recording != 1:
        raise UserError(
            "say what to do: --steps N and/or --train, --import-d4rl FILE or "
            "--import-dqn-replay DIR"
        )
    if importing and (args.random or args.bundle or args.seed):
        raise UserError("--random, --bundle and --seed are for recording, not for importing")
    if args.quality and not args.import_d4rl:
        raise UserError("--quality names what --import-d4rl makes; recording has one quality")
    if args.import_d4rl:
        import_d4rl(args.import_d4rl, name, task, args.quality or "medium")
    if args.import_dqn_replay:
        import_dqn_replay(args.import_dqn_replay, name, task)
    if args.steps is not None and args.steps < 1:
        raise UserError(f"--steps is {args.steps}, but must be at least 1")
    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}, but must be 0 or more")
    if args.train:
        train_policy(name, task, args.seed)
    if args.steps is not None:
        record(name, task, args.steps, args.seed, args.random, args.bundle)


if __name__ == "__main__":
    run_command(main)
