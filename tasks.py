"""The tasks: for each, its environment, dataset, prompts (target returns) and reference scores.

Targets, context, learning rate and weight decay are LaMo's (arXiv 2310.20587); random and expert
returns are D4RL's (arXiv 2004.07219). To add a task, add a row.
"""

from dataclasses import dataclass

from plumbing import choose


@dataclass(frozen=True)
class Task:
    env_id: str  # Gymnasium id
    dataset: str  # Minari id
    scale: float  # returns-to-go are divided by this before the model sees them
    targets: tuple[float, ...]  # returns asked for in evaluation, undivided
    context: int  # K, environment steps the model sees
    max_ep_len: int  # rows of the time embedding
    random: float  # mean return of a random policy: score 0
    expert: float  # mean return of an expert policy: score 100
    embed: str  # LaMo's embedding of return, state and action: "linear" or "mlp"
    lr: float  # AdamW learning rate
    weight_decay: float
    collected: str  # id of the dataset that `collect_command` records
    collect_command: str  # records the full dataset on this machine
    bundled: str  # part of it that comes with the project, in assets/minari


TASKS = {
    "hopper": Task(
        env_id="Hopper-v5",
        dataset="mujoco/hopper/medium-v0",
        scale=1000,
        targets=(3600, 1800),
        context=20,
        max_ep_len=1000,
        random=-20.3,
        expert=3234.3,
        embed="linear",
        lr=1e-4,
        weight_decay=1e-5,
        collected="lamo/hopper/medium-v0",
        collect_command="python -m experiments.collect --env hopper --steps 1000000",
        bundled="lamo/hopper/medium-1pct-v0",
    ),
}


def find_task(name):
    """The `Task` called `name`. Raises UserError listing the valid names."""
    return TASKS[choose("env", name, TASKS)]


def make_env(task):
    """One environment of a task."""
    import gymnasium as gym

    return gym.make(task.env_id)


def make_vector_env(task, n):
    """n environments stepped together; an ended one starts anew by itself at its next step."""
    from gymnasium.vector import SyncVectorEnv

    return SyncVectorEnv([lambda: make_env(task)] * n)


def normalised_score(task, episode_return):
    """100 * (return - random) / (expert - random), as D4RL and the paper report it."""
    return 100 * (episode_return - task.random) / (task.expert - task.random)
