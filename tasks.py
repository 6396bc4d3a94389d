"""The tasks: environment, dataset, target returns, reference scores; and what environments give
and take, as the arrays that a model reads and writes.

Targets, context, learning rate and weight decay are LaMo's (arXiv 2310.20587). Random and expert
returns are D4RL's (arXiv 2004.07219) for MuJoCo and Kitchen; for Atari they are those the paper
scores with. To add a task, add a row. What has no row still trains: an Atari game by its name, and
any other Minari dataset by --dataset. What a row leaves None then comes from the dataset.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from minari.serialization import deserialize_space, serialize_space

from utils import UserError, choose

STACK = 4  # frames in a state, where observations are pictures (Mnih et al. 2015)
FRAME = 84  # rows and columns of a frame (Mnih et al. 2015, doi 10.1038/nature14236)
SMALLEST_PICTURE = 32  # rows and columns; smaller arrays count as vectors, as in Minari
LONGEST_VECTOR = 10_000  # numbers of a flat array; a longer one of two sides or more is refused
REPLAYED = 1000  # steps of an episode that are done again at most, to compare environment and data
STATISTICS = ("NormalizeObservation", "NormalizeReward")  # wrappers whose state no dataset holds
GOAL_DISTANCE = 0.3  # below this a kitchen's sub-task is complete (gymnasium-robotics)
QUALITIES = ("simple", "medium", "expert")  # of Minari's MuJoCo datasets


@dataclass(frozen=True)
class Task:
    minari: str = ""  # dataset's Minari id, {quality} is filled in; "": only --dataset's
    env_id: str | None = None  # Gymnasium id (package:id); None: what the dataset was recorded in
    env_kwargs: dict = field(default_factory=dict)  # for gymnasium.make, where no dataset says them
    evaluated: dict = field(default_factory=dict)  # for gymnasium.make, whatever a dataset says
    rewards: Callable | None = None  # observations of an episode -> its rewards; None: as recorded
    scale: float | None = None  # returns-to-go are divided by this before the model sees them
    targets: tuple[float, ...] | None = None  # undivided; the short preset takes the first two
    random: float | None = None  # mean return of a random policy: score 0
    expert: float | None = None  # mean return of an expert: score 100; None: scores are returns
    context: int = 20  # K, environment steps the model sees
    max_ep_len: int | None = None  # rows of the time embedding
    embed: str = "mlp"  # of return, state and action: a row of model.EMBEDDINGS
    lr: float = 1e-4  # AdamW learning rate
    weight_decay: float = 1e-5
    batch: int = 64  # windows a step
    eps: float = 1e-6  # AdamW's
    clip: float = 0.25  # of the gradient's norm
    lora_rank: int = 16
    lora_dropout: float = 0.1
    lora_bias: bool = True  # biases of layers with LoRA are trained
    recorded: str | None = None  # id of what experiments/collect.py records with a policy from here
    full: int = 1_000_000  # environment steps of a full recording
    bundled: str | None = None  # id of what comes with the project, in assets/minari


def mujoco(robot, targets, random, expert, ours=True, **row):
    """A row of the MuJoCo tasks. ours: whether a policy to record it with is in assets/."""
    name = robot.lower()
    if ours:
        row |= {"recorded": f"lamo/{name}/medium-v0", "bundled": f"lamo/{name}/medium-1pct-v0"}
    row |= {"scale": 1000, "targets": targets, "max_ep_len": 1000}
    minari = f"mujoco/{name}/{{quality}}-v0"
    return Task(minari, f"{robot}-v5", random=random, expert=expert, **row)


def kitchen(which, *subtasks):
    """A row of the Kitchen tasks, by the four sub-tasks that the arm is to complete."""
    # the data were recorded with both off, so that a sub-task done pays at every step
    once = {"remove_task_when_completed": True, "terminate_on_tasks_completed": True}
    row = {"scale": 1, "targets": (4, 5, 3, 2, 1), "random": 0, "expert": 4, "max_ep_len": 280}
    row |= {"evaluated": once | {"max_episode_steps": 280}, "rewards": kitchen_rewards}
    row["env_kwargs"] = {"tasks_to_complete": list(subtasks)}
    return Task(f"D4RL/kitchen/{which}-v2", "gymnasium_robotics:FrankaKitchen-v1", **row)


def kitchen_rewards(observations):
    """Rewards of a kitchen episode: how many sub-tasks each step completes for the first time.

    Recorded rewards count what is complete at each step, which adds up to hundreds. A return then
    is the number of sub-tasks done, as the paper's targets and scores have it. observations: nested
    dictionary of arrays (T + 1, ..); returns (T,).
    """
    achieved, desired = observations["achieved_goal"], observations["desired_goal"]
    distance = [np.linalg.norm(achieved[key] - desired[key], axis=-1)[1:] for key in desired]
    complete = np.stack(distance) < GOAL_DISTANCE  # (sub-tasks, T)
    first = complete & (complete.cumsum(1) == 1)
    return first.sum(0).astype(np.float64)


def atari(game, targets=None, random=None, expert=None, lr=1e-3, **row):
    """A row of the Atari tasks, by Gymnasium's name of the game."""
    row |= {"context": 30, "max_ep_len": 4096, "batch": 128, "lr": lr, "eps": 1e-8, "clip": 1.0}
    row |= {"lora_rank": 32, "lora_dropout": 0.0, "lora_bias": False}
    row |= {"targets": targets, "random": random, "expert": expert}
    return Task(f"atari/{game.lower()}/expert-v0", f"ale_py:ALE/{game}-v5", **row)


REACHER2D = {"scale": 10, "targets": (76, 40), "random": 0, "expert": 100, "context": 5}
REACHER2D |= {"recorded": "lamo/reacher2d/medium-v0", "bundled": "lamo/reacher2d/medium-v0"}
REACHER2D |= {"max_ep_len": 100, "full": 5000}

TASKS = {
    "hopper": mujoco("Hopper", (3600, 1800, 2600, 2200), -20.3, 3234.3, embed="linear"),
    "halfcheetah": mujoco("HalfCheetah", (12000, 8000, 6000, 4500), -280.2, 12135.0),
    "walker2d": mujoco("Walker2d", (5000, 2500, 4000, 3000), 1.6, 4592.3),
    "ant": mujoco("Ant", (6000, 3000), -325.6, 3879.7, ours=False),
    "reacher2d": Task("lamo/reacher2d/medium-v0", "reacher2d:lamo/Reacher2d-v0", **REACHER2D),
    "kitchen-complete": kitchen("complete", "microwave", "kettle", "light switch", "slide cabinet"),
    "kitchen-partial": kitchen("partial", "microwave", "kettle", "light switch", "slide cabinet"),
    "kitchen-mixed": kitchen("mixed", "microwave", "kettle", "bottom burner", "light switch"),
    "breakout": atari("Breakout", (90, 120), 1.7, 31.8, scale=1, weight_decay=1e-2),
    "qbert": atari("Qbert", (14000,), 163.9, 13455.0, scale=1),
    "pong": atari("Pong", (10, 20), -20.7, 9.3, 3e-4, scale=1, weight_decay=1e-1),
}


# --- from a name to a row ------------------------------------------------------------------------


def find_task(name):
    """(its name, `Task`) of a row of TASKS, however it is spelt, or of any other Atari game."""
    plain = name.removeprefix("ALE/").removesuffix("-v5").replace("_", "").lower()
    key = name if name in TASKS else plain
    if key in TASKS:
        return key, TASKS[key]
    if plain in atari_games():  # scores differ a thousandfold: scale and targets are the data's
        return plain, atari(atari_games()[plain])
    choose("env", name, TASKS, ", any Atari game, or --dataset ID instead of --env")


def atari_games():
    """Atari games in lower case, as Minari has them -> Gymnasium's names."""
    import ale_py

    gym.register_envs(ale_py)
    games = [id[4:-3] for id in gym.registry if id.startswith("ALE/") and id.endswith("-v5")]
    return {game.lower(): game for game in games}


def task_of_dataset(name):
    """(task's name, Task) that a dataset belongs to: a row's, or a bare Task for an unknown one."""
    for key, task in TASKS.items():
        ids = [task.minari.format(quality=quality) for quality in QUALITIES]
        if {name, "/".join(Path(name).parts[-3:])} & {*ids, task.recorded, task.bundled}:
            return key, task
    game = name.removeprefix("atari/").partition("/")[0]
    if name.startswith("atari/") and game in atari_games():
        return game, replace(find_task(game)[1], minari=name)
    return ("/".join(Path(name).parts[-2:]) if Path(name).is_dir() else name), Task()


# --- environments --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Environment:
    """What rollouts must know of an environment. A checkpoint carries it, see `pack`."""

    spec: EnvSpec
    observation_space: gym.Space  # of the data; the environment may show more than it
    action_space: gym.Space  # the environment's own
    random: float | None  # mean return of a random policy: score 0
    expert: float | None  # mean return of an expert: score 100; None: scores are plain returns

    def score(self, episode_return):
        """100 (return - random) / (expert - random), as D4RL and the paper; else the return."""
        if self.expert is None:
            return episode_return
        return 100 * (episode_return - self.random) / (self.expert - self.random)

    def sizes(self):
        """LaMo's arguments of that name: obs_shape, n_act, discrete."""
        shape = observation_shape(self.observation_space)
        return shape, action_size(self.action_space), is_choice(self.action_space)


def make_env(spec, render_mode=None, **kwargs):
    """One environment, of an EnvSpec or an id, that draws only what render_mode says."""
    if isinstance(spec, EnvSpec):
        spec = copy.deepcopy(spec)
        spec.kwargs.pop("render_mode", None)  # the recording's
    if render_mode:  # not all environments know the word
        kwargs["render_mode"] = render_mode
    return gym.make(spec, **kwargs)


def find_environment(task, dataset):
    """The Environment of a task and a minari.MinariDataset, and one line on where it is from. The
    dataset's own record wins where it is of the task's environment, or the task names none: it
    says how the environment was set up. Raises UserError if the data are not of this one."""
    name = dataset.spec.dataset_id
    specs = dataset._eval_env_spec, dataset.env_spec  # Minari has no public name for the first
    for wrapper in [wrapper for spec in specs if spec for wrapper in spec.additional_wrappers]:
        if wrapper.name in STATISTICS:
            what = f"dataset {name} was recorded under {wrapper.name}, whose state it does not hold"
            raise UserError(f"{what}; record it without, since observations are normalised here")
    recorded = specs[0] or specs[1]
    if recorded is None and task.env_id is None:
        raise UserError(f"dataset {name} does not say its environment; name a task: --env NAME")
    ours = task.env_id.rpartition(":")[2] if task.env_id else recorded.id
    if recorded is not None and recorded.id.rpartition("-v")[0] != ours.rpartition("-v")[0]:
        raise UserError(f"dataset {name} was recorded in {recorded.id}, which is not {ours}")
    if recorded is not None and recorded.id == ours:
        env, note = make_env(recorded, **task.evaluated), f"{ours}, as {name} records it"
    else:
        env = make_env(task.env_id, **task.env_kwargs, **task.evaluated)
        note = f"{ours}, the task's; {name} records {recorded.id if recorded else 'none'}"
    note += f" {env.spec.kwargs}" if env.spec.kwargs else ""
    random, expert = task.random, task.expert
    if expert is None:
        metadata = dataset.storage.metadata
        random, expert = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    if random is None or expert is None or random == expert:
        random = expert = None
        note += "; no reference returns, so scores are plain returns"
    for what in ("observation_space", "action_space"):
        data, own = getattr(dataset, what), getattr(env, what)
        if not fits(data, own):
            raise UserError(f"dataset {name}'s {what} is {data}, but that of {ours} is {own}")
    env.close()
    spaces_used = dataset.observation_space, env.action_space
    return Environment(env.spec, *spaces_used, random, expert), note


def replay(environment, dataset, longest, task):
    """Do the actions of a dataset's first episode again, from its seed, and compare; longest: steps
    of the longest episode in use. Returns the Environment, its limit raised if the data's episodes
    are longer, and a line on what was found."""
    spec, note = copy.deepcopy(environment.spec), ""
    if spec.max_episode_steps and spec.max_episode_steps < longest and not task.evaluated:
        note = f"limit {longest} steps, as the data's longest, not {spec.max_episode_steps}; "
        spec.max_episode_steps = longest
    environment, index = replace(environment, spec=spec), dataset.episode_indices[:1]
    space = environment.observation_space
    seed = next(iter(dataset.storage.get_episode_metadata(index))).get("seed")
    if seed is None or is_picture(space):
        return environment, note + "not compared: no seed is recorded, or observations are pictures"
    env, episode, again = make_env(spec), dataset[0], 0.0
    first, seen = flatten(space, env.reset(seed=int(seed))[0]), episode.observations
    alike = np.allclose(first, flatten(space, seen)[0], atol=1e-3)
    earned = (task.rewards(seen) if task.rewards else episode.rewards)[:REPLAYED].sum()
    for action in episode.actions[:REPLAYED]:
        _, reward, terminated, truncated, _ = env.step(action)
        again += reward
        if terminated or truncated:
            break
    env.close()
    if alike and abs(again - earned) <= 0.01 * max(1.0, abs(earned)):
        return environment, f"{note}episode 0 of the data, replayed, earns the same"
    what = f"{'' if alike else 'begins otherwise and '}earns {again:.2f}, not {earned:.2f}"
    return environment, f"{note}CAREFUL: episode 0 of the data, replayed, {what} as recorded"


def fits(data, own):
    """Whether data of a space can come from an environment's own space, which may hold more keys in
    a dictionary, and pictures of another size."""
    if isinstance(data, spaces.Dict) and isinstance(own, spaces.Dict):
        return all(key in own.spaces and fits(part, own[key]) for key, part in data.items())
    if isinstance(data, spaces.Tuple) and isinstance(own, spaces.Tuple):
        return len(data) == len(own) and all(map(fits, data, own))
    if is_picture(data) and is_picture(own):
        return True
    same = type(data) is type(own) and data.shape == own.shape
    return same and getattr(data, "n", None) == getattr(own, "n", None)


def pack(environment):
    """An Environment as a dictionary of text and numbers, for a checkpoint."""
    packed = dict(vars(environment), spec=environment.spec.to_json())
    for space in ("observation_space", "action_space"):
        packed[space] = serialize_space(packed[space])
    return packed


def unpack(packed):
    """The Environment that `pack` made text of."""
    packed = dict(packed, spec=EnvSpec.from_json(packed["spec"]))
    for space in ("observation_space", "action_space"):
        packed[space] = deserialize_space(packed[space])
    return Environment(**packed)


# --- observations and actions as arrays -----------------------------------------------------------


def is_picture(space):
    """Whether observations are pictures: bytes (H, W), (H, W, 1 or 3) or (1 or 3, H, W)."""
    if not isinstance(space, spaces.Box) or space.dtype != np.uint8:
        return False
    sizes = [n for n in space.shape if n >= SMALLEST_PICTURE]
    layouts = sizes, [*sizes, 1], [*sizes, 3], [1, *sizes], [3, *sizes]
    return len(sizes) == 2 and list(space.shape) in layouts


@cache
def area_weights(size):
    """How much of each of `size` pixels falls into each of FRAME: (FRAME, size) whole numbers, with
    which the sums below are exact in fp32."""
    edges = torch.arange(FRAME + 1)[:, None] * size  # of ours, in parts of a pixel
    covered = (torch.arange(size + 1) * FRAME).clamp(edges[:-1], edges[1:])  # (FRAME, size + 1)
    return (covered.diff() // math.gcd(size, FRAME)).float()


def shrink(pictures):
    """Pictures (n, H, W), (n, H, W, 1 or 3) or (n, 1 or 3, H, W) -> frames (n, 84, 84), bytes: luma
    (ITU-R BT.601), pixels averaged by area."""
    x = torch.as_tensor(pictures)
    if x.dim() == 4 and x.shape[1] in (1, 3):
        x = x.movedim(1, -1)
    if x.shape[-1] == 3:
        x = (x.float() @ torch.tensor([299.0, 587.0, 114.0]) / 1000).round()
    x = (x[..., 0] if x.shape[-1] == 1 else x).float()
    rows, columns = area_weights(x.shape[-2]), area_weights(x.shape[-1])
    mean = rows @ x @ columns.T / (rows[0].sum() * columns[0].sum())  # (n, 84, 84)
    return mean.round().to(torch.uint8).numpy()


def flatten(space, values):
    """Observations (..,) of a space -> (.., O): dictionaries by key in the space's order. A choice
    becomes one-hot. For a single observation it is gymnasium.spaces.flatten. What `values` holds
    beyond the space is left out."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        named = space.items() if isinstance(space, spaces.Dict) else enumerate(space)
        return np.concatenate([flatten(part, values[key]) for key, part in named], axis=-1)
    values = np.asarray(values)
    if isinstance(space, spaces.Discrete):
        return (values[..., None] == space.start + np.arange(space.n)).astype(np.float32)
    if not isinstance(space, spaces.Box | spaces.MultiBinary):
        raise UserError(f"observations with {space} in them cannot be learnt from")
    large = sum(n >= SMALLEST_PICTURE for n in space.shape) > 1  # two sides or more
    if large and (space.dtype == np.uint8 or math.prod(space.shape) > LONGEST_VECTOR):
        what = "bytes (H, W), (H, W, 1 or 3) or (1 or 3, H, W), and nothing beside them"
        raise UserError(f"observations {space} are no vector; pictures must be {what}")
    return values.reshape(*values.shape[: values.ndim - len(space.shape)], -1)


def observation_shape(space):
    """Shape of an observation as the model reads it: (O,), or (4, 84, 84) where it is pictures."""
    if is_picture(space):
        return (STACK, FRAME, FRAME)
    return flatten(space, space.sample()).shape


def is_choice(space):
    """Whether an action is one of n, rather than numbers."""
    return isinstance(space, spaces.Discrete)


def action_size(space):
    """A, numbers in an action, or n, its choices. Raises UserError for other kinds of space."""
    if is_choice(space):
        return int(space.n)
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
        return math.prod(space.shape)
    raise UserError(f"actions {space} are neither numbers (Box) nor one choice (Discrete)")


def bounds(space):
    """Middle and half-width of a Box of actions, each (A,); 0 and 1 where it has no bounds."""
    low, high = (np.asarray(b, np.float64).ravel() for b in (space.low, space.high))
    bounded = np.isfinite(low) & np.isfinite(high) & (low < high)
    low, high = np.where(bounded, low, -1.0), np.where(bounded, high, 1.0)
    return (low + high) / 2, (high - low) / 2


def encode_actions(space, values):
    """Actions (n, ..) as the model reads them: numbers (n, A) float32, -1 and 1 at the bounds of
    the space, or choices (n,) int64 from 0."""
    if is_choice(space):
        return np.asarray(values, np.int64) - space.start
    middle, half = bounds(space)
    return ((np.reshape(values, (len(values), -1)) - middle) / half).astype(np.float32)


def decode_actions(space, actions):
    """What the model chose -> actions of the environment, within its bounds: encode's inverse."""
    if is_choice(space):
        return actions + space.start
    middle, half = bounds(space)
    values = (actions.astype(np.float64) * half + middle).reshape(-1, *space.shape)
    return values.clip(space.low, space.high).astype(space.dtype)
