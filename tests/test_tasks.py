"""tasks.py: the table, games and datasets without a row, and environments that recordings name."""

import importlib.util
import json
import sys
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec, WrapperSpec
from gymnasium.spaces.utils import flatten as gymnasium_flatten
from gymnasium.spaces.utils import unflatten
from minari.data_collector import EpisodeBuffer

import evaluate
import tasks
import train
from data import choose_scale, choose_targets, find_dataset, load_trajectories, read_dataset
from environments import make_vector_env
from experiments import collect
from plumbing import UserError, run_command
from spaces import flatten, shrink
from tasks import (
    TASKS,
    Task,
    find_environment,
    find_task,
    kitchen_rewards,
    make_env,
    normalised_score,
    pack,
    task_of_dataset,
    unpack,
)

GAMES = ("breakout", "qbert", "pong")


def test_every_row_is_complete_and_its_environment_can_be_made():
    for name in TASKS:
        key, task = find_task(name)
        assert key == name
        env = gym.make(task.env_id, **task.env_kwargs)
        env.reset(seed=0)
        env.close()
        assert task.scale > 0
        assert task.expert > task.random
        assert task.dataset
        assert len(task.targets) >= 1


def test_any_atari_game_goes_by_its_name():
    for name in ("spaceinvaders", "space_invaders", "SpaceInvaders", "ALE/SpaceInvaders-v5"):
        key, task = find_task(name)
        assert key == "spaceinvaders"
        assert task.env_id == "ale_py:ALE/SpaceInvaders-v5"
        assert task.dataset == "atari/spaceinvaders/expert-v0"
        assert (task.context, task.lora_rank, task.batch, task.scale) == (30, 32, 128, None)
    for game in GAMES:
        assert find_task(f"ALE/{game.capitalize()}-v5") == (game, TASKS[game])
    assert find_task("Hopper") == ("hopper", TASKS["hopper"])
    minaris = ("tictactoe3d", "videocube", "kingkong")  # as Minari spells some of them
    assert all(find_task(game)[1].env_id.lower() == f"ale_py:ale/{game}-v5" for game in minaris)


def test_a_dataset_of_a_row_brings_the_row_along():
    assert task_of_dataset("mujoco/walker2d/expert-v0") == ("walker2d", TASKS["walker2d"])
    assert task_of_dataset("lamo/reacher2d/medium-v0")[0] == "reacher2d"
    name, task = task_of_dataset("atari/seaquest/expert-v0")
    assert (name, task.env_id) == ("seaquest", "ale_py:ALE/Seaquest-v5")
    name, task = task_of_dataset("someone/else-v0")
    assert (name, task.env_id, task.scale, task.targets) == ("someone/else-v0", None, None, None)


@pytest.mark.parametrize(
    ("name", "package"), [("kitchen-mixed", "gymnasium_robotics"), ("pong", "ale_py")]
)
def test_a_missing_package_is_named_with_the_command(monkeypatch, name, package):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == package else real(n))
    with pytest.raises(UserError, match="pip install " + package.replace("_", "-")):
        find_task(name)


def test_an_environment_survives_packing(hopper):
    again = unpack(json.loads(json.dumps(pack(hopper))))
    assert again == hopper
    a, b = (make_vector_env(e, 2).reset(seed=[1, 2])[0] for e in (hopper, again))
    np.testing.assert_array_equal(a, b)


def test_scores_without_references_are_returns(hopper):
    from dataclasses import replace

    assert normalised_score(replace(hopper, random=None, expert=None), 12.5) == 12.5


@pytest.mark.parametrize(
    ("returns", "scale", "targets"),
    [
        ([3600.0, 100.0], 1000, [3600, 3250]),
        ([21.0, -21.0], 10, [21, 16.8]),
        ([-1500.0, -120.0, -130.0], 1000, [-120, -122]),
        ([0.5, 0.25], 0.1, [0.5, 0.475]),
        ([0.0, 0.0], 1, [0]),
        ([1.0, 1.0], 1, [1]),
    ],
)
def test_scale_and_targets_come_from_the_returns(returns, scale, targets):
    assert choose_scale(np.array(returns)) == pytest.approx(scale)
    assert choose_targets(np.array(returns)) == pytest.approx(targets)


# --- datasets that no row knows ------------------------------------------------------------------


def record(env, dataset_id, episodes, **how):
    """Random episodes of an environment, as anyone's script might record them."""
    env.action_space.seed(0)
    buffers = []
    for seed in range(episodes):
        observations, actions, rewards, _ = collect.play_episode(
            env, lambda _: env.action_space.sample(), seed
        )
        ends = np.arange(len(rewards)) == len(rewards) - 1
        buffers.append(
            EpisodeBuffer(
                None,
                seed,
                None,
                np.array(observations),
                np.array(actions),
                rewards,
                ends,
                np.zeros_like(ends),
            )
        )
    return minari.create_dataset_from_buffers(dataset_id, buffers, env=env.spec, **how)


def command(monkeypatch, capsys, main, *arguments):
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    run_command(main)
    return capsys.readouterr().out


SHORT = ["--steps", 4, "--batch", 4, "--eval-every", 4, "--episodes", 1, "--lm-length", 16]


def train_and_evaluate(monkeypatch, capsys, tmp_path, *arguments):
    """One short training; evaluate.py gives its evaluation again. Returns (config, printed)."""
    out = tmp_path / "runs"
    printed = command(monkeypatch, capsys, train.main, *arguments, *SHORT, "--out", out)
    (folder,) = out.iterdir()
    again = command(monkeypatch, capsys, evaluate.main, folder / "ckpt.pt", "--json")
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert json.loads(again)["results"] == rows[-1]["evaluation"]
    return json.loads((folder / "config.json").read_text()), printed


def test_numbers_with_other_bounds_and_no_references(monkeypatch, capsys, tmp_path):
    """Pendulum: torque in [-2, 2], returns below zero."""
    made = record(gym.make("Pendulum-v1"), "test/pendulum-v0", 3)
    config, printed = train_and_evaluate(
        monkeypatch, capsys, tmp_path, "--dataset", "test/pendulum-v0"
    )
    settings = config["settings"]
    returns = [e.rewards.sum() for e in made.iterate_episodes()]
    assert settings["env"] == "test/pendulum-v0"
    assert settings["targets"][0] == pytest.approx(max(returns), rel=1e-3)
    assert 1 <= max(np.abs(returns)) / settings["scale"] < 10
    assert settings["max_ep_len"] == 200
    for name in ("targets", "scale", "max_ep_len", "environment"):
        assert config["chosen"][name] in printed
    assert "scores are plain returns" in printed
    flat = load_trajectories(made, gym.make("Pendulum-v1").action_space)
    assert 0.9 < flat.act.abs().max() <= 1  # of torques up to 2


def test_choices_by_minaris_collector_with_references(monkeypatch, capsys, tmp_path):
    """CartPole, through DataCollector; its reference returns make the scores."""
    pytest.importorskip("jax")  # DataCollector needs it: pip install "minari[create]"
    env = minari.DataCollector(gym.make("CartPole-v1"))
    for seed in range(5):
        env.reset(seed=seed)
        env.action_space.seed(seed)
        done = False
        while not done:
            _, _, terminated, truncated, _ = env.step(env.action_space.sample())
            done = terminated or truncated
    env.create_dataset("test/cartpole-v0", ref_min_score=20.0, ref_max_score=500.0)
    config, printed = train_and_evaluate(
        monkeypatch, capsys, tmp_path, "--dataset", "test/cartpole-v0", "--train", "new"
    )
    mean = config["data"]["return_mean"]
    assert config["data"]["score"] == pytest.approx(100 * (mean - 20) / 480)
    assert "CartPole-v1, as test/cartpole-v0 records it" in printed


def test_a_dataset_that_does_not_say_its_environment(monkeypatch, tmp_path):
    episodes = [
        EpisodeBuffer(
            observations=np.zeros((3, 11), np.float32),
            rewards=[0.0, 1.0],
            actions=np.zeros((2, 3), np.float32),
            terminations=[False, True],
            truncations=[False, False],
        )
    ]
    spaces = dict(
        observation_space=gym.spaces.Box(-1, 1, (11,)), action_space=gym.spaces.Box(-1, 1, (3,))
    )
    minari.create_dataset_from_buffers("test/nowhere-v0", episodes, ref_min_score=0.0, **spaces)
    dataset, _, _ = find_dataset("test/nowhere-v0", TASKS["hopper"], 1.0, "test/nowhere-v0")
    with pytest.raises(UserError, match="does not say its environment"):
        find_environment(task_of_dataset("test/nowhere-v0")[1], dataset)
    environment, note = find_environment(TASKS["hopper"], dataset)
    assert environment.spec.id == "Hopper-v5"
    assert "the task's" in note
    with pytest.raises(UserError, match="observations do not fit"):
        find_environment(TASKS["walker2d"], dataset)


def test_data_of_another_environment_or_other_bounds_are_refused():
    made = record(gym.make("Pendulum-v1"), "test/swing-v0", 1)
    with pytest.raises(UserError, match="was recorded in Pendulum-v1, which is not Hopper-v5"):
        find_environment(TASKS["hopper"], made)
    halved = gym.spaces.Box(-1, 1, (1,))
    made = record(gym.make("Pendulum-v1"), "test/halved-v0", 1, action_space=halved)
    with pytest.raises(UserError, match="actions do not fit"):
        find_environment(task_of_dataset("test/halved-v0")[1], made)


class Bare(gym.Env):
    """An environment without a word about rendering, as many a first one is."""

    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), 1.0, True, False, {}


class Shown(Bare):
    """One that opens a window if nobody asks it not to."""

    def __init__(self, render_mode="human"):
        self.render_mode = render_mode


@pytest.fixture
def trusted(monkeypatch):
    """This module is one whose environments may be made."""
    monkeypatch.setattr(tasks, "NAMED", set())
    tasks.trust(__name__)


def test_an_environment_that_shows_itself_is_asked_not_to(trusted):
    assert make_env(EnvSpec("Shown-v0", entry_point=f"{__name__}:Shown")).render_mode is None


def test_an_environment_need_not_know_how_to_render(trusted):
    spec = EnvSpec("Bare-v0", entry_point=f"{__name__}:Bare")
    assert isinstance(make_env(spec).unwrapped, Bare)


def test_an_environment_is_never_made_for_a_screen():
    env = gym.make("Pendulum-v1", render_mode="rgb_array")
    environment, _ = find_environment(Task(), record(env, "test/drawn-v0", 1))
    envs = make_vector_env(environment, 1)
    assert envs.envs[0].render_mode is None


@pytest.mark.parametrize(
    ("entry_point", "says"),
    [
        ("os:system", "in the module os; importing it runs its code"),
        ("builtins:print", "--env-module builtins"),
        ("gymnasium:make", "is not an environment"),
        ("gymnasium.wrappers:RecordVideo", "would write videos where its maker says"),
    ],
)
def test_what_a_file_names_as_environment_must_be_one(tmp_path, entry_point, says):
    marker = tmp_path / "executed"
    spec = EnvSpec("Harmless-v0", entry_point, kwargs={"command": f"touch {marker}"})
    with pytest.raises(UserError, match=says):
        make_env(spec)
    spec = EnvSpec("Pendulum-v1", gym.spec("Pendulum-v1").entry_point)
    spec.additional_wrappers = (WrapperSpec("Harmless", entry_point, {"command": "true"}),)
    with pytest.raises(UserError, match=says):
        make_env(spec)
    assert not marker.exists()


def test_a_module_is_imported_only_if_the_user_names_it(tmp_path, monkeypatch):
    marker = tmp_path / "imported"
    code = f"""
import pathlib, gymnasium as gym
pathlib.Path({str(marker)!r}).touch()
class Room(gym.Env):
    observation_space, action_space = gym.spaces.Box(0, 1, (2,)), gym.spaces.Discrete(2)
"""
    (tmp_path / "rooms_of_mine.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(tasks, "NAMED", set())
    spec = EnvSpec("Room-v0", "rooms_of_mine:Room")
    with pytest.raises(UserError, match="add --env-module rooms_of_mine"):
        make_env(spec)
    assert not marker.exists()
    tasks.trust("rooms_of_mine")
    assert make_env(spec).unwrapped.action_space.n == 2
    for wrong in ("no_such_module", "no_such_module.inside", "rooms_of_mine.inside"):
        with pytest.raises(UserError, match="there is no such module; install it"):
            tasks.trust(wrong)


# --- kitchen and Atari ---------------------------------------------------------------------------


@pytest.fixture
def minari_home(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


@pytest.fixture
def kitchen(minari_home):
    """A dataset as Minari's: sub-tasks stay on the list when done, and do not end an episode."""
    flags = dict(remove_task_when_completed=False, terminate_on_tasks_completed=False)
    tasks = ["microwave", "kettle", "light switch", "slide cabinet"]
    env = gym.make(
        "gymnasium_robotics:FrankaKitchen-v1",
        tasks_to_complete=tasks,
        max_episode_steps=60,
        **flags,
    )
    env.action_space.seed(0)
    buffers = []
    for seed in range(2):
        observations, actions, rewards, _ = collect.play_episode(
            env, lambda _: env.action_space.sample(), seed
        )
        empty = gym.vector.utils.create_empty_array(env.observation_space, len(observations))
        observations = gym.vector.utils.concatenate(env.observation_space, observations, empty)
        ends = np.arange(60) == 59
        buffers.append(
            EpisodeBuffer(
                seed=seed,
                observations=observations,
                actions=np.array(actions),
                rewards=rewards,
                terminations=np.zeros_like(ends),
                truncations=ends,
            )
        )
    minari.create_dataset_from_buffers("test/kitchen-v0", buffers, env=env.spec)
    return read_dataset(minari_home / "test/kitchen-v0")


def test_kitchen_is_flattened_alike_in_data_and_environment(kitchen):
    environment, note = find_environment(TASKS["kitchen-complete"], kitchen)
    kwargs = environment.spec.kwargs
    assert kwargs["tasks_to_complete"] == ["microwave", "kettle", "light switch", "slide cabinet"]
    assert kwargs["remove_task_when_completed"] is kwargs["terminate_on_tasks_completed"] is True
    assert environment.spec.max_episode_steps == 280
    assert "tasks_to_complete" in note
    episode = next(kitchen.iterate_episodes())
    space = environment.observation_space
    flat = flatten(space, episode.observations)  # (T + 1, O)
    env = gym.make(environment.spec)
    observation, _ = env.reset(seed=0)
    for t in range(40):  # the environment, replayed, shows what the data hold
        live = flatten(space, observation)
        np.testing.assert_array_equal(live, flat[t])
        np.testing.assert_array_equal(live, gymnasium_flatten(space, observation))
        back = unflatten(space, flat[t])
        np.testing.assert_array_equal(back["observation"], observation["observation"])
        for key, value in observation["achieved_goal"].items():
            np.testing.assert_array_equal(back["achieved_goal"][key], value)
        observation, *_ = env.step(episode.actions[t])
    positions = np.concatenate([*episode.observations["achieved_goal"].values()], axis=1)
    assert np.ptp(flat, axis=0).max() > 0.1
    assert len(positions) == 61  # the environment changes the object it showed: copied


def test_a_kitchen_return_is_the_number_of_sub_tasks_done(kitchen):
    """kitchen_rewards against the environment itself, asked step by step with its flags on."""
    episode = next(kitchen.iterate_episodes())
    observations = {
        k: {n: v.copy() for n, v in episode.observations[k].items()}
        for k in ("achieved_goal", "desired_goal")
    }
    achieved, desired = observations["achieved_goal"], observations["desired_goal"]
    for name, start, end in (
        ("kettle", 5, 20),
        ("kettle", 30, 61),
        ("microwave", 5, 6),
        ("light switch", 60, 61),
        ("slide cabinet", 0, 1),
    ):
        achieved[name][start:end] = desired[name][start:end] + 0.01
    env = gym.make("gymnasium_robotics:FrankaKitchen-v1", tasks_to_complete=list(desired)).unwrapped
    env.reset(seed=0)
    expected = []
    for t in range(1, 61):
        now = {name: values[t] for name, values in achieved.items()}
        expected.append(env.compute_reward(now, {k: v[t] for k, v in desired.items()}, {}))
        for done in env.step_task_completions:  # as its step() does
            env.tasks_to_complete.remove(done)
    rewards = kitchen_rewards(observations)
    assert rewards.tolist() == expected
    assert rewards.sum() == 3  # not the one that was done at the start and undone
    assert rewards[4] == 2
    flat = load_trajectories(kitchen, kitchen.action_space, rewards=lambda _: expected)
    assert flat.returns.tolist() == [3, 3]


def test_atari_frames_are_the_same_in_data_and_environment(
    minari_home, monkeypatch, capsys, tmp_path
):
    command(monkeypatch, capsys, collect.main, "--env", "breakout", "--random", "--steps", 100)
    dataset = read_dataset(minari_home / "lamo/breakout/random-v0")
    environment, _ = find_environment(TASKS["breakout"], dataset)
    flat = load_trajectories(dataset, environment.action_space)
    episode = next(dataset.iterate_episodes())
    env = gym.make(environment.spec)
    observation, _ = env.reset(seed=0)
    for t in range(60):
        assert torch.equal(shrink(observation), flat.obs[t])
        assert flat.act[t] == episode.actions[t]
        observation, reward, *_ = env.step(episode.actions[t])
        assert reward == episode.rewards[t]
    shown = []  # what a policy sees in a rollout, which may run under autocast

    class Watch(torch.nn.Module):
        def observe(self, rtg, obs, timestep):
            shown.append(obs[0])
            return torch.zeros(len(rtg), 1, 2, 4)

        def remember(self, act, timestep):
            return torch.zeros(len(act), 1, 1, 4)

        def act(self, tokens):
            return tokens[:, -1]

    settings = dict(episode_limit=20, context=5, scale=1.0, mode="normal", dtype="bf16")
    evaluate.rollout(Watch(), environment, settings, (torch.zeros(0),) * 2, [1.0], 1, seed=3)
    env.reset(seed=3)
    assert torch.equal(shown[0][-1], shrink(env.reset(seed=3)[0]))
    assert not shown[0][:3].any()  # black before the start
    assert torch.equal(shown[6][:-1], shown[5][1:])
    arguments = ["--env", "breakout", "--dataset", "lamo/breakout/random-v0"]
    config, printed = train_and_evaluate(
        monkeypatch, capsys, tmp_path, *arguments, "--episode-limit", 30, "--context", 5
    )
    assert (
        " cut at 30 steps, before the end" in printed
    )  # a return that is not whole is never silent
    assert config["settings"]["lora_rank"] == 32
    assert Path(tmp_path / "runs").is_dir()
