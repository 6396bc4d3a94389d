"""The tasks: for each, its dataset, environment, prompts (target returns) and reference scores.

Targets, context, learning rate and weight decay are LaMo's (arXiv 2310.20587). Random and expert
returns are D4RL's (arXiv 2004.07219) for MuJoCo and Kitchen; for Atari they are those the paper
scores with. To add a task, add a row. What has no row still trains: an Atari game by its name, and
any other Minari dataset by --dataset. What a row leaves None then comes from the dataset.
"""

import importlib.util
import math
import site
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from inspect import signature
from pathlib import Path

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec, load_env_creator

from files import parse_json
from plumbing import UserError, choose, first_line, is_number, printable
from spaces import action_size, check_fit, observation_shape, read_space

GOAL_DISTANCE = 0.3  # below this a kitchen's sub-task is complete (gymnasium-robotics)
QUALITIES = ("simple", "medium", "expert")  # of Minari's MuJoCo datasets


@dataclass(frozen=True)
class Task:
    dataset: str | None = None  # Minari id, {quality} in it to be filled in; None: --dataset's
    env_id: str | None = None  # Gymnasium id (package:id); None: what the dataset was recorded in
    env_kwargs: dict = field(default_factory=dict)  # for gymnasium.make, where no dataset says them
    evaluated: dict = field(default_factory=dict)  # for gymnasium.make, whatever a dataset says
    rewards: Callable | None = None  # observations of an episode -> its rewards; None: as recorded
    scale: float | None = None  # returns-to-go are divided by this before the model sees them
    targets: tuple[float, ...] | None = None  # returns asked for in evaluation, undivided
    random: float | None = None  # mean return of a random policy: score 0
    expert: float | None = None  # mean return of an expert: score 100; None: scores are returns
    context: int = 20  # K, environment steps the model sees
    max_ep_len: int | None = None  # rows of the time embedding
    embed: str = "mlp"  # LaMo's embedding of return, state and action: "linear" or "mlp"
    lr: float = 1e-4  # AdamW learning rate
    weight_decay: float = 1e-5
    batch: int = 64  # windows a step
    lora_rank: int = 16
    recorded: str | None = None  # id of what experiments/collect.py records with a policy from here
    full: int = 1_000_000  # environment steps of a full recording
    bundled: str | None = None  # id of what comes with the project, in assets/minari


def mujoco(name, env_id, targets, random, expert, **other):
    """A row of the MuJoCo tasks, which differ in little."""
    row = Task(
        dataset=f"mujoco/{name}/{{quality}}-v0",
        env_id=env_id,
        scale=1000,
        targets=targets,
        random=random,
        expert=expert,
        max_ep_len=1000,
        recorded=f"lamo/{name}/medium-v0",
        bundled=f"lamo/{name}/medium-1pct-v0",
    )
    return replace(row, **other)


def kitchen_rewards(observations):
    """Rewards of a kitchen episode: how many sub-tasks each step completes for the first time.

    Recorded rewards count what is complete at each step, which adds up to hundreds. A return then
    is the number of sub-tasks done, as the paper's targets and scores have it. observations: nested
    dictionary of arrays (T + 1, ..); returns (T,). A sub-task is done where achieved and desired
    goal are less than GOAL_DISTANCE apart, as in gymnasium-robotics.
    """
    achieved, desired = observations["achieved_goal"], observations["desired_goal"]
    distance = [np.linalg.norm(achieved[key] - desired[key], axis=-1)[1:] for key in desired]
    complete = np.stack(distance) < GOAL_DISTANCE  # (sub-tasks, T)
    first = complete & (complete.cumsum(1) == 1)
    return first.sum(0).astype(np.float64)


KITCHEN = Task(
    # recorded with both off, so that a sub-task done pays at every step and nothing ends an episode
    evaluated={
        "remove_task_when_completed": True,
        "terminate_on_tasks_completed": True,
        "max_episode_steps": 280,
    },
    rewards=kitchen_rewards,
    env_id="gymnasium_robotics:FrankaKitchen-v1",
    scale=1,
    targets=(4, 5),
    random=0,
    expert=4,
    max_ep_len=280,
)
ATARI = Task(context=30, max_ep_len=4096, lr=1e-3, batch=128, lora_rank=32)

TASKS = {
    "hopper": mujoco("hopper", "Hopper-v5", (3600, 1800), -20.3, 3234.3, embed="linear"),
    "halfcheetah": mujoco("halfcheetah", "HalfCheetah-v5", (12000, 8000), -280.2, 12135.0),
    "walker2d": mujoco("walker2d", "Walker2d-v5", (5000, 2500), 1.6, 4592.3),
    "ant": mujoco("ant", "Ant-v5", (6000, 3000), -325.6, 3879.7, recorded=None, bundled=None),
    "reacher2d": Task(
        dataset="lamo/reacher2d/medium-v0",
        env_id="reacher2d:lamo/Reacher2d-v0",
        scale=10,
        targets=(76, 40),
        random=0,
        expert=100,
        context=5,
        max_ep_len=100,
        recorded="lamo/reacher2d/medium-v0",
        full=5000,
        bundled="lamo/reacher2d/medium-v0",
    ),
    "kitchen-complete": replace(
        KITCHEN,
        dataset="D4RL/kitchen/complete-v2",
        env_kwargs={"tasks_to_complete": ["microwave", "kettle", "light switch", "slide cabinet"]},
    ),
    "kitchen-partial": replace(
        KITCHEN,
        dataset="D4RL/kitchen/partial-v2",
        env_kwargs={"tasks_to_complete": ["microwave", "kettle", "light switch", "slide cabinet"]},
    ),
    "kitchen-mixed": replace(
        KITCHEN,
        dataset="D4RL/kitchen/mixed-v2",
        env_kwargs={"tasks_to_complete": ["microwave", "kettle", "bottom burner", "light switch"]},
    ),
    "breakout": replace(
        ATARI,
        dataset="atari/breakout/expert-v0",
        env_id="ale_py:ALE/Breakout-v5",
        scale=1,
        targets=(90, 120),
        random=1.7,
        expert=31.8,
        weight_decay=1e-2,
    ),
    "qbert": replace(
        ATARI,
        dataset="atari/qbert/expert-v0",
        env_id="ale_py:ALE/Qbert-v5",
        scale=1,
        targets=(14000,),
        random=163.9,
        expert=13455.0,
    ),
    "pong": replace(
        ATARI,
        dataset="atari/pong/expert-v0",
        env_id="ale_py:ALE/Pong-v5",
        scale=1,
        targets=(10, 20),
        random=-20.7,
        expert=9.3,
        lr=3e-4,
        weight_decay=1e-1,
    ),
}


# --- from a name to a row ------------------------------------------------------------------------


def find_task(name):
    """(its name, `Task`) of a row of TASKS, however it is spelt, or of any other Atari game.

    Raises UserError listing the valid names, or if the package that the environment is in is not
    installed.
    """
    plain = name.removeprefix("ALE/").removesuffix("-v5").replace("_", "").lower()
    key = name if name in TASKS else plain
    task = TASKS.get(key)
    if task is None and plain in atari_games():
        # the games' scores differ a thousandfold, so scale and targets are left to the data
        env_id = f"ale_py:{atari_games()[plain]}"
        task = replace(ATARI, dataset=f"atari/{plain}/expert-v0", env_id=env_id)
    if task is None:
        missing = "" if atari_games() else " (once ale-py is there: pip install ale-py)"
        more = f" Other Atari games go by their names, spaceinvaders say{missing}; anything else"
        more += " is found from its data: --dataset instead of --env."
        choose("env", name, TASKS, more)
    package = task.env_id.partition(":")[0] if ":" in task.env_id else "gymnasium"
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{name} needs a package: pip install {package.replace('_', '-')}")
    return key, task


def atari_games():
    """Atari games as Minari writes them -> their Gymnasium ids; none without ale-py."""
    if importlib.util.find_spec("ale_py") is None:
        return {}
    import ale_py

    gym.register_envs(ale_py)
    ids = [name for name in gym.registry if name.startswith("ALE/") and name.endswith("-v5")]
    return {name.removeprefix("ALE/").removesuffix("-v5").lower(): name for name in ids}


def task_of_dataset(name):
    """(task's name, Task) that a dataset belongs to: a row's, or a bare Task for an unknown one."""
    for key, task in TASKS.items():
        qualities = [task.dataset.format(quality=q) for q in QUALITIES]
        if name in (*qualities, task.recorded, task.bundled):
            return find_task(key)
    game = name.removeprefix("atari/").partition("/")[0]
    if name.startswith("atari/") and game in atari_games():
        return game, replace(find_task(game)[1], dataset=name)
    path = Path(name)
    return ("/".join(path.parts[-2:]) if path.is_dir() else name), Task()


# --- environments --------------------------------------------------------------------------------

TRUSTED = {"gymnasium", "gymnasium_robotics", "ale_py", "minigrid", "reacher2d"}  # to be imported
NAMED = set()  # by the user: these may be set up with paths, too
LARGEST_ARGUMENT = 1_000_000  # whole number that a file may set an environment up with
MOST_SKIPPED = 1000  # frames or steps of physics within one step, over the wrappers too
LEAST_SCALE = 1e-6  # between a random and an expert return that scores are told by
MOST_LETTERS = 10_000  # of all arguments, with the numbers of their lists
MOST_WRAPPERS = 20  # around an environment
LARGEST_OF_WRAPPERS = 100_000  # likewise a wrapper: some make that many copies of an observation
PACKAGES = {  # modules of well-known environments, and what pip calls them
    "gymnasium_robotics": "gymnasium-robotics",
    "ale_py": "ale-py",
    "mujoco": "mujoco",
    "minigrid": "minigrid",
    "pygame": "'gymnasium[classic-control]'",
    "Box2D": "'gymnasium[box2d]'",
}


@dataclass(frozen=True)
class Environment:
    """What rollouts must know of an environment. A checkpoint carries it, see `pack`."""

    spec: EnvSpec
    observation_space: gym.Space  # of the data; the environment may show more than it
    action_space: gym.Space  # the environment's own
    random: float | None  # mean return of a random policy: score 0
    expert: float | None  # mean return of an expert: score 100; None: scores are plain returns


def find_environment(task, dataset):
    """The Environment of a task and a minari.MinariDataset, and one line on where it is from.

    The dataset's own record wins where it is of the task's environment, or the task names none: it
    says how the environment was set up. The task's reference returns win over the dataset's.
    Raises UserError if it cannot be made, or if it is not what the data come from.
    """
    name = dataset.spec.dataset_id
    recorded = dataset._eval_env_spec or dataset.env_spec  # Minari has no public name for the first
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
    spec, seen, done = env.spec, env.observation_space, env.action_space
    env.close()
    kwargs = {key: value for key, value in spec.kwargs.items() if key != "render_mode"}
    note += f" {kwargs}" if kwargs else ""
    check_fit(f"dataset {name}'s observations", dataset.observation_space, seen)
    check_fit(f"dataset {name}'s actions", dataset.action_space, done, bounds=True)
    try:
        observation_shape(dataset.observation_space), action_size(done)
    except UserError as error:
        raise UserError(f"dataset {name}: {error}") from error
    random, expert = task.random, task.expert
    if expert is None:
        metadata = dataset.storage.metadata
        random, expert = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    if not is_scale(random, expert):
        random = expert = None
        note += "; no reference returns, so scores are plain returns"
    return Environment(spec, dataset.observation_space, done, random, expert), note


def is_scale(random, expert):
    """Whether two mean returns are numbers so far apart that scores can be told by them."""
    return is_number(random) and is_number(expert) and abs(expert - random) >= LEAST_SCALE


def trust(module):
    """Let environments of a module be made, for the user names it: --env-module; or none.

    Raises UserError where there is no such module.
    """
    if not module:
        return
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        found = None
    if found is None:
        why = "install it, or put its folder on PYTHONPATH"
        raise UserError(f"--env-module {module}: there is no such module; {why}")
    NAMED.add(module)


def check_trusted(name, entry_point):
    """Raises UserError unless an entry point, "module:Class", may be imported and made."""
    if not isinstance(entry_point, str):  # registered in this process
        return
    module = entry_point.partition(":")[0]
    package = module.partition(".")[0]
    if {package, module} & NAMED:
        return
    # A folder of that name, here or in a dataset, is no package that was installed.
    found = importlib.util.find_spec(package) if package in TRUSTED else None
    ours = [
        sysconfig.get_path("purelib"),
        sysconfig.get_path("platlib"),
        site.getusersitepackages(),
    ]
    ours += [str(Path(__file__).parent / "reacher2d.py")]
    if found and not (found.origin and found.origin.startswith(tuple(ours))):
        why = f"{name} is in {package}, which is not installed, but found elsewhere"
        raise UserError(f"{why}; if you trust it, add --env-module {module}")
    if package not in TRUSTED:
        why = "importing it runs its code; if you trust it, add"
        raise UserError(f"{name} is in the module {module}; {why} --env-module {module}")
    if entry_point.endswith(":RecordVideo"):
        raise UserError(f"{name} would write videos where its maker says; take that wrapper out")


def check_arguments(spec):
    """Raises UserError for arguments that a stranger's environment may not be made with.

    They are what would take the memory or much time, and paths, for what they name would be read.
    """
    letters, skipped = 0, 1
    module = str(spec.entry_point).partition(":")[0]
    named = {module, module.partition(".")[0]} & NAMED

    def look(value, most):
        nonlocal letters, skipped
        letters += len(value) if isinstance(value, dict | list | tuple | str) else 1
        if letters > MOST_LETTERS:
            raise UserError(f"{spec.id} is recorded with more arguments than are read")
        if isinstance(value, dict | list | tuple):
            for key, part in value.items() if isinstance(value, dict) else enumerate(value):
                look(part, MOST_SKIPPED if "skip" in str(key) else most)
        elif isinstance(value, int) and abs(value) > most:
            raise UserError(f"{spec.id} is recorded with {value} among its arguments: too large")
        elif isinstance(value, int) and most == MOST_SKIPPED:
            skipped *= max(1, value)
        elif isinstance(value, str) and {"/", "\\"} & {*value} and not named:
            why = f"if you trust what is there, add --env-module {module}"
            raise UserError(f"{spec.id} is recorded with the path {printable(value)}; {why}")

    look(spec.kwargs, LARGEST_ARGUMENT)
    look([wrapper.kwargs for wrapper in spec.additional_wrappers], LARGEST_OF_WRAPPERS)
    together = 1  # each may make that many copies of what the one before it shows
    for wrapper in spec.additional_wrappers:
        numbers = [x for x in (wrapper.kwargs or {}).values() if isinstance(x, int) and x > 1]
        together *= math.prod(numbers)
    if skipped > MOST_SKIPPED:
        raise UserError(f"{spec.id} is recorded with steps of {skipped} frames: too many")
    if together > LARGEST_OF_WRAPPERS or len(spec.additional_wrappers) > MOST_WRAPPERS:
        raise UserError(f"{spec.id} is recorded with wrappers that make too much together")


def make_env(spec, render_mode=None, **kwargs):
    """One environment, of an EnvSpec or an id. It draws only what render_mode says, see Gymnasium.

    A spec may come from a stranger's file. So what it names must be an environment, its wrappers
    wrappers, and both in a module of TRUSTED, for importing a module runs it. Raises UserError,
    with what helps, where it cannot be made.
    """
    name = getattr(spec, "id", spec)
    try:
        if isinstance(spec, EnvSpec):
            parts = [(spec.entry_point, gym.Env)]
            parts += [(wrapper.entry_point, gym.Wrapper) for wrapper in spec.additional_wrappers]
            for entry_point, kind in parts:
                check_trusted(name, entry_point)
                made_by = load_env_creator(entry_point)
                if not (isinstance(made_by, type) and issubclass(made_by, kind)):
                    raise UserError(f"{name} is not an environment: it names {entry_point}")
            check_arguments(spec)
            known = signature(load_env_creator(spec.entry_point)).parameters.keys()
            if render_mode or "render_mode" in known | spec.kwargs.keys():  # not all know the word
                kwargs["render_mode"] = render_mode
        return gym.make(spec, **kwargs)
    except UserError:
        raise
    except ModuleNotFoundError as error:
        if error.name is None:  # gymnasium has raised it anew
            raise UserError(f"cannot make {name}: {first_line(error)}") from error
        module = error.name.partition(".")[0]
        if module in PACKAGES:
            raise UserError(f"{name} needs a package: pip install {PACKAGES[module]}") from error
        why = "install what it is in, or put its folder on PYTHONPATH"
        raise UserError(f"{name} needs the module {module}: {why}") from error
    except Exception as error:  # gymnasium's and the environment's own kinds
        raise UserError(f"cannot make {name}: {first_line(error)}") from error


def normalised_score(environment, episode_return):
    """100 * (return - random) / (expert - random), as D4RL and the paper; else the plain return."""
    random, expert = environment.random, environment.expert
    if expert is None:
        return episode_return
    return 100 * (episode_return - random) / (expert - random)


def pack(environment):
    """An Environment as text and numbers, for a checkpoint."""
    from minari.serialization import serialize_space

    return {
        "spec": environment.spec.to_json(),
        "observation_space": serialize_space(environment.observation_space),
        "action_space": serialize_space(environment.action_space),
        "random": environment.random,
        "expert": environment.expert,
    }


def unpack(packed):
    """The Environment that `pack` made text of. Raises what JSON, gymnasium and Minari do."""
    random, expert = packed["random"], packed["expert"]
    if not (random is expert is None or is_scale(random, expert)):
        raise ValueError("its random and its expert return are no numbers, or nearly the same")
    parse_json(packed["spec"])  # for the size of its numbers
    return Environment(
        EnvSpec.from_json(packed["spec"]),
        read_space(packed["observation_space"]),
        read_space(packed["action_space"]),
        packed["random"],
        packed["expert"],
    )
