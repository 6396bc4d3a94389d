"""tasks.py: the table, environments and datasets together, and arrays there and back."""

import copy
import itertools
import json
from functools import partial
from types import SimpleNamespace

import cv2
import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from gymnasium import spaces as gs
from gymnasium.vector.utils import concatenate, create_empty_array
from hypothesis import given
from hypothesis import strategies as st
from minari.data_collector import EpisodeBuffer

import tasks
from data import find_dataset, load_trajectories
from evaluate import rollout
from model import GPT, GPTConfig, LaMo
from tasks import TASKS, Task, find_environment, find_task, flatten, make_env, replay, shrink
from utils import UserError

refused = partial(pytest.raises, UserError)
VERSION = itertools.count()  # a new name for each dataset
DESIGN = """
hopper | Hopper-v5 | mujoco/hopper/medium-v0 | 1000 | 3600, 1800, 2600, 2200 | 20 | 1000 | -20.3 | 3234.3 | linear | 1e-4, 1e-5
halfcheetah | HalfCheetah-v5 | mujoco/halfcheetah/medium-v0 | 1000 | 12000, 8000, 6000, 4500 | 20 | 1000 | -280.2 | 12135.0 | mlp | 1e-4, 1e-5
walker2d | Walker2d-v5 | mujoco/walker2d/medium-v0 | 1000 | 5000, 2500, 4000, 3000 | 20 | 1000 | 1.6 | 4592.3 | mlp | 1e-4, 1e-5
ant | Ant-v5 | mujoco/ant/medium-v0 | 1000 | 6000, 3000 | 20 | 1000 | -325.6 | 3879.7 | mlp | 1e-4, 1e-5
reacher2d | lamo/Reacher2d-v0 | lamo/reacher2d/medium-v0 | 10 | 76, 40 | 5 | 100 | 0 | 100 | mlp | 1e-4, 1e-5
kitchen-complete | FrankaKitchen-v1 | D4RL/kitchen/complete-v2 | 1 | 4, 5, 3, 2, 1 | 20 | 280 | 0 | 4 | mlp | 1e-4, 1e-5
kitchen-partial | FrankaKitchen-v1 | D4RL/kitchen/partial-v2 | 1 | 4, 5, 3, 2, 1 | 20 | 280 | 0 | 4 | mlp | 1e-4, 1e-5
kitchen-mixed | FrankaKitchen-v1 | D4RL/kitchen/mixed-v2 | 1 | 4, 5, 3, 2, 1 | 20 | 280 | 0 | 4 | mlp | 1e-4, 1e-5
breakout | ALE/Breakout-v5 | atari/breakout/expert-v0 | 1 | 90, 120 | 30 | 4096 | 1.7 | 31.8 | mlp | 1e-3, 1e-2
qbert | ALE/Qbert-v5 | atari/qbert/expert-v0 | 1 | 14000 | 30 | 4096 | 163.9 | 13455.0 | mlp | 1e-3, 1e-5
pong | ALE/Pong-v5 | atari/pong/expert-v0 | 1 | 10, 20 | 30 | 4096 | -20.7 | 9.3 | mlp | 3e-4, 1e-1
"""  # noqa: E501  (from the paper, its code, D4RL and Minari)


def record(env, name=None, **how):
    """A dataset of a random episode of an environment, as anyone's script might record it."""
    env.action_space.seed(0)
    seen, actions, rewards, over = [copy.deepcopy(env.reset(seed=0)[0])], [], [], False
    while not over:
        actions.append(env.action_space.sample())
        observation, reward, terminated, truncated, _ = env.step(actions[-1])
        seen.append(copy.deepcopy(observation))
        rewards.append(reward)
        over = terminated or truncated
    space, ends = env.observation_space, np.arange(len(rewards)) == len(rewards) - 1
    seen = concatenate(space, seen, create_empty_array(space, len(seen)))
    ends = dict(terminations=ends & terminated, truncations=ends & truncated)
    ends |= dict(observations=seen, actions=np.array(actions), rewards=rewards)
    buffer = EpisodeBuffer(seed=0, **ends)
    name = name or f"test/recorded-v{next(VERSION)}"
    return minari.create_dataset_from_buffers(name, [buffer], env=env.spec, **how)


# --- the table -----------------------------------------------------------------------------------


def test_the_table_is_the_designs():
    rows = [[cell.strip() for cell in row.split("|")] for row in DESIGN.strip().splitlines()]
    assert [row[0] for row in rows] == list(TASKS)
    for name, env, dataset, scale, targets, K, longest, random, expert, embed, rates in rows:
        key, task = find_task(name)
        assert key == name
        assert task.env_id.rpartition(":")[2] == env
        assert task.minari.format(quality="medium") == dataset
        numbers = [task.scale, task.context, task.max_ep_len, task.random, task.expert]
        assert numbers == [float(x) for x in (scale, K, longest, random, expert)]
        assert list(task.targets) == [float(x) for x in targets.split(",")]
        assert [task.lr, task.weight_decay] == [float(x) for x in rates.split(",")]
        assert task.embed == embed
        atari = env.startswith("ALE/")
        assert (task.batch, task.lora_rank) == ((128, 32) if atari else (64, 16))
        assert (task.eps, task.clip) == ((1e-8, 1.0) if atari else (1e-6, 0.25))
        assert (task.lora_dropout, task.lora_bias) == ((0, False) if atari else (0.1, True))
        env = gym.make(task.env_id, **task.env_kwargs)
        env.reset(seed=0)
        env.close()


def test_any_atari_game_goes_by_its_name():
    for name in ("spaceinvaders", "space_invaders", "SpaceInvaders", "ALE/SpaceInvaders-v5"):
        key, task = find_task(name)
        assert (key, task.env_id) == ("spaceinvaders", "ale_py:ALE/SpaceInvaders-v5")
        assert task.minari == "atari/spaceinvaders/expert-v0"
        assert (task.context, task.lora_rank, task.scale, task.targets) == (30, 32, None, None)
    assert find_task("ALE/Qbert-v5") == ("qbert", TASKS["qbert"])
    with refused(match="hopper"):
        find_task("hoper")


def test_a_dataset_of_a_row_brings_the_row_along(monkeypatch):
    rows = {"without a dataset of its own": Task(env_id="Ant-v5"), **TASKS}
    monkeypatch.setattr(tasks, "TASKS", rows)
    for name in ("mujoco/walker2d/expert-v0", "lamo/walker2d/medium-1pct-v0"):
        assert tasks.task_of_dataset(name) == ("walker2d", TASKS["walker2d"])
    assert tasks.task_of_dataset("D4RL/kitchen/mixed-v2")[0] == "kitchen-mixed"
    name, task = tasks.task_of_dataset("atari/seaquest/expert-v0")
    assert (name, task.env_id) == ("seaquest", "ale_py:ALE/Seaquest-v5")
    assert tasks.task_of_dataset("someone/else-v0") == ("someone/else-v0", Task())


# --- environments --------------------------------------------------------------------------------


def test_an_environment_survives_packing(hopper, kitchen):
    for environment in (hopper, find_environment(TASKS["kitchen-complete"], kitchen)[0]):
        again = tasks.unpack(json.loads(json.dumps(tasks.pack(environment))))
        assert again == environment
        seen = [make_env(e.spec).reset(seed=1)[0] for e in (environment, again)]
        seen = [flatten(environment.observation_space, x) for x in seen]
        np.testing.assert_array_equal(*seen)


def test_a_dataset_without_a_row_brings_its_own_environment():
    made = record(gym.make("Pendulum-v1", g=5.0))
    environment, _ = find_environment(Task(), made)
    assert environment.spec.kwargs["g"] == 5.0
    assert environment.score(-100.0) == -100  # no references: plain returns
    assert environment.sizes() == ((3,), 1, False)
    flat = load_trajectories(made, environment.action_space)
    assert 0.9 < flat.act.abs().max() <= 1  # of torques up to 2
    made = record(gym.make("CartPole-v1"), ref_min_score=20.0, ref_max_score=500.0)
    environment, _ = find_environment(Task(), made)
    assert environment.score(260.0) == 50
    assert environment.sizes() == ((4,), 2, True)


def test_an_episode_replayed_tells_whether_the_environment_is_the_datas():
    env = gym.make("Pendulum-v1")
    made = record(env)
    environment, _ = find_environment(Task(), made)
    same, note = replay(environment, made, 200, Task())
    assert same == environment
    assert "CAREFUL" not in note
    heavier = gym.make("Pendulum-v1", g=15.0).spec
    _, note = replay(tasks.replace(environment, spec=heavier), made, 200, Task())
    returns = made[0].rewards.sum()
    assert f"{returns:.2f}" in note.partition("CAREFUL")[2]
    env.spec.max_episode_steps = 100  # a record that is wrong: the episode has 200 steps
    made = record(env)
    environment, _ = find_environment(Task(), made)
    assert environment.spec.max_episode_steps == 100
    longer, note = replay(environment, made, 200, Task())
    assert longer.spec.max_episode_steps == 200
    assert "100" in note


@pytest.mark.parametrize("wrapper", ["NormalizeObservation", "NormalizeReward"])
def test_data_recorded_under_running_statistics_are_refused(wrapper):
    made = record(getattr(gym.wrappers, wrapper)(gym.make("Pendulum-v1")))
    with refused(match=wrapper):
        find_environment(Task(), made)


def anonymous(size, action_space):
    """A dataset, of vectors, that does not say where it was recorded."""
    how = dict(observation_space=gs.Box(-1, 1, (size,)), action_space=action_space)
    step = dict(rewards=[1.0], terminations=[True], truncations=[False])
    step |= dict(observations=np.zeros((2, size)), actions=np.array([action_space.sample()]))
    name = f"test/anonymous-v{next(VERSION)}"
    return minari.create_dataset_from_buffers(name, [EpisodeBuffer(**step)], **how)


def test_data_that_do_not_fit_the_environment_are_refused():
    with refused(match="Pendulum-v1.*Hopper-v5"):
        find_environment(TASKS["hopper"], record(gym.make("Pendulum-v1")))
    made = anonymous(11, gs.Box(-1, 1, (3,)))
    with refused(match=f"{made.spec.dataset_id}.*--env"):
        find_environment(Task(), made)
    assert find_environment(TASKS["hopper"], made)[0].spec.id == "Hopper-v5"
    for size, action_space, word in (
        (12, gs.Box(-1, 1, (3,)), "observation_space"),
        (11, gs.Box(-1, 1, (6,)), "action_space"),
        (11, gs.Discrete(3), "action_space"),
    ):
        made = anonymous(size, action_space)
        with refused(match=f"{made.spec.dataset_id}.*{word}"):
            find_environment(TASKS["hopper"], made)


def test_an_environment_draws_only_what_it_is_asked_for():
    recorded = gym.make("Pendulum-v1", render_mode="rgb_array").spec
    assert make_env(recorded).render_mode is None
    assert make_env(recorded, "rgb_array").render_mode == "rgb_array"


# --- kitchen and Atari ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kitchen():
    """A dataset as Minari's: sub-tasks stay on the list when done, and do not end an episode."""
    flags = dict(remove_task_when_completed=False, terminate_on_tasks_completed=False)
    todo = ["microwave", "kettle", "light switch", "slide cabinet"]
    name = "gymnasium_robotics:FrankaKitchen-v1"
    return record(gym.make(name, tasks_to_complete=todo, max_episode_steps=40, **flags))


def test_kitchen_is_flattened_alike_in_data_and_environment(kitchen):
    environment, _ = find_environment(TASKS["kitchen-complete"], kitchen)
    kwargs = environment.spec.kwargs
    assert kwargs["tasks_to_complete"] == ["microwave", "kettle", "light switch", "slide cabinet"]
    assert kwargs["remove_task_when_completed"] is kwargs["terminate_on_tasks_completed"] is True
    assert environment.spec.max_episode_steps == 280
    episode, space = next(kitchen.iterate_episodes()), environment.observation_space
    flat, env = flatten(space, episode.observations), make_env(environment.spec)  # (T + 1, O)
    observation, _ = env.reset(seed=0)
    for t in range(40):  # the environment, replayed, shows what the data hold
        live = flatten(space, observation)
        np.testing.assert_array_equal(live, flat[t])
        np.testing.assert_array_equal(live, gs.flatten(space, observation))
        observation, *_ = env.step(episode.actions[t])


def test_a_kitchen_return_is_the_number_of_sub_tasks_done(kitchen):
    """kitchen_rewards against the environment itself, asked step by step with its flags on."""
    seen = next(kitchen.iterate_episodes()).observations
    desired = seen["desired_goal"]
    achieved = {name: values.copy() for name, values in seen["achieved_goal"].items()}
    times = [("kettle", 5, 20), ("kettle", 30, 41), ("microwave", 5, 6)]
    times += [("light switch", 40, 41), ("slide cabinet", 0, 1)]
    for name, start, end in times:
        achieved[name][start:end] = desired[name][start:end] + 0.01
    env = gym.make("gymnasium_robotics:FrankaKitchen-v1", tasks_to_complete=list(desired)).unwrapped
    env.reset(seed=0)
    expected = []
    for t in range(1, 41):
        now, goal = ({k: v[t] for k, v in goals.items()} for goals in (achieved, desired))
        expected.append(env.compute_reward(now, goal, {}))
        for done in env.step_task_completions:  # as its step() does
            env.tasks_to_complete.remove(done)
    rewards = tasks.kitchen_rewards({"achieved_goal": achieved, "desired_goal": desired})
    assert rewards.tolist() == expected
    assert rewards.sum() == 3  # not the one that was done at the start and undone
    assert rewards[4] == 2
    flat = load_trajectories(kitchen, kitchen.action_space, rewards=lambda _: expected)
    assert flat.returns.tolist() == [3]


def test_atari_frames_are_the_same_in_data_environment_and_rollout():
    env = gym.make("ale_py:ALE/Breakout-v5", max_episode_steps=40)
    made = record(env, "test/breakout-v0", jpeg_encoding=False)
    dataset, _, _ = find_dataset("breakout", TASKS["breakout"], 1.0, "test/breakout-v0")
    environment, _ = find_environment(TASKS["breakout"], dataset)
    assert environment.sizes() == ((4, 84, 84), 4, True)
    flat = load_trajectories(dataset, environment.action_space)
    episode, env = next(made.iterate_episodes()), make_env(environment.spec)
    observation, _ = env.reset(seed=0)
    for t in range(40):
        assert torch.equal(torch.as_tensor(shrink(observation[None])[0]), flat.obs[t])
        assert flat.act[t] == episode.actions[t]
        observation, reward, *_ = env.step(episode.actions[t])
        assert reward == episode.rewards[t]
    c = SimpleNamespace(episode_limit=10, context=5, scale=1.0, mode="normal", dtype="fp32")
    c.sample = True
    lamo, shown = LaMo(GPT(GPTConfig(1, 1, 8)), *environment.sizes()), []
    lamo.embed_state.register_forward_pre_hook(lambda _, seen: shown.append(seen[0][0]))
    rollout(lamo, environment, c, (torch.zeros(0), torch.zeros(0)), [1.0], 1, seed=3)
    states = torch.stack(shown)  # (T, 4, 84, 84)
    first = shrink(env.reset(seed=3)[0][None])
    assert torch.equal(states[0, -1], torch.as_tensor(first[0]))
    assert not states[0, :-1].any()  # black before the start
    assert torch.equal(states[1:, :-1], states[:-1, 1:])


# --- observations and actions as arrays ----------------------------------------------------------

NESTED = gs.Dict(
    {
        "observation": gs.Box(-1, 1, (3,)),
        "goal": gs.Dict({"kettle": gs.Box(-1, 1, (2, 2)), "burner": gs.Discrete(4, start=2)}),
        "pair": gs.Tuple((gs.MultiBinary(3), gs.Box(-5, 5, ()))),
    }
)


@pytest.mark.parametrize(
    "space", [NESTED, gs.Box(-1, 1, (2, 3)), gs.MultiBinary(4), gs.Discrete(3, start=-1)]
)
def test_flattening_is_gymnasiums_and_keeps_leading_dimensions(space):
    space.seed(0)
    samples = [space.sample() for _ in range(6)]
    expected = np.stack([gs.flatten(space, sample) for sample in samples])
    np.testing.assert_allclose(flatten(space, samples[0]), expected[0])
    batch = concatenate(space, samples, create_empty_array(space, 6))
    np.testing.assert_allclose(flatten(space, batch), expected)
    assert tasks.observation_shape(space) == expected.shape[1:]


def test_data_may_hold_less_than_the_environment_shows():
    part, sample = gs.Dict({"observation": NESTED["observation"]}), NESTED.sample()
    np.testing.assert_array_equal(flatten(part, sample), sample["observation"])
    assert tasks.fits(part, NESTED)
    assert tasks.fits(gs.Box(0, 255, (84, 84), np.uint8), gs.Box(0, 255, (210, 160, 3), np.uint8))
    assert not tasks.fits(gs.Dict({"observation": gs.Box(-1, 1, (4,))}), NESTED)
    assert not tasks.fits(gs.Dict({"other": gs.Discrete(2)}), NESTED)
    assert not tasks.fits(gs.Discrete(3), gs.Discrete(4))
    assert not tasks.fits(gs.Box(-1, 1, (3,)), gs.Discrete(3))


def test_what_counts_as_a_picture_and_what_cannot_be_learnt_from():
    def box(*shape, dtype=np.uint8):
        return gs.Box(0, 1, shape, dtype)

    assert tasks.is_picture(box(210, 160, 3))
    for shape in ((84, 84), (1, 84, 84), (3, 48, 64), (96, 96, 1)):
        assert tasks.is_picture(box(*shape))
    for shape in ((128,), (7, 7, 3)):  # Atari's memory, and MiniGrid's view
        assert not tasks.is_picture(box(*shape))
        assert tasks.observation_shape(box(*shape)) == (np.prod(shape),)
    assert not tasks.is_picture(box(84, 84, 3, dtype=np.float32))
    beside = gs.Dict({"image": box(48, 48, 3), "speed": gs.Box(-1, 1, (2,))})
    for space in (gs.Text(5), gs.Dict({"say": gs.Text(3)}), box(4, 84, 84), box(48, 48, 4), beside):
        with refused():
            tasks.observation_shape(space)
    for space in (gs.MultiDiscrete([2, 3]), gs.Dict({}), gs.Box(0, 5, (2,), np.int64)):
        with refused():
            tasks.action_size(space)


@pytest.mark.parametrize("size", [(210, 160), (96, 96), (240, 256), (84, 84)])
def test_frames_are_the_area_average_of_luma(size):
    """OpenCV's INTER_AREA, which Gymnasium's AtariPreprocessing uses, agrees but for rounding."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (3, *size, 3), np.uint8)
    pictures[1:] = np.repeat(np.repeat(pictures[1:, ::6, ::6], 6, 1), 6, 2)[:, : size[0], : size[1]]
    frames = shrink(pictures)
    assert (frames.shape, frames.dtype) == ((3, 84, 84), np.uint8)
    for picture, frame in zip(pictures, frames, strict=True):
        grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
        theirs = cv2.resize(grey, (84, 84), interpolation=cv2.INTER_AREA)
        assert np.abs(frame.astype(int) - theirs).max() <= 2
        np.testing.assert_array_equal(shrink(picture[None])[0], frame)  # alone as in a batch
    np.testing.assert_array_equal(shrink(frames), frames)  # small and grey already
    np.testing.assert_array_equal(shrink(frames[..., None]), frames)
    np.testing.assert_array_equal(shrink(frames[:, None]), frames)
    np.testing.assert_array_equal(shrink(np.moveaxis(pictures, -1, 1)), shrink(pictures))


@given(
    st.lists(st.tuples(st.floats(-20, 20, width=32), st.floats(0.125, 20, width=32)), min_size=1),
    st.integers(0, 1000),
)
def test_actions_are_scaled_to_their_bounds_and_back(intervals, seed):
    low = np.array([a for a, _ in intervals], np.float32)
    high = np.array([a + w for a, w in intervals], np.float32)
    space = gs.Box(low, high, seed=seed)
    actions = np.stack([space.sample() for _ in range(4)])
    encoded = tasks.encode_actions(space, actions)
    assert encoded.dtype == np.float32
    ends = tasks.encode_actions(space, np.stack([low, high]))
    np.testing.assert_allclose(ends, [-np.ones(len(low)), np.ones(len(low))], atol=1e-5)
    back = tasks.decode_actions(space, encoded)
    assert back.dtype == space.dtype
    np.testing.assert_allclose(back, actions, rtol=1e-4, atol=1e-4)
    assert all(space.contains(action) for action in tasks.decode_actions(space, encoded + 3))


def test_actions_come_back_in_their_shape():
    shaped, choice = gs.Box(-2, 2, (2, 3), seed=0), gs.Discrete(3, start=2, seed=0)
    unit, free = gs.Box(-1, 1, (3,), seed=0), gs.Box(-np.inf, np.inf, (2,), seed=0)
    for space, size in ((shaped, 6), (choice, 3), (unit, 3), (free, 2)):
        actions = np.stack([space.sample() for _ in range(9)])
        encoded = tasks.encode_actions(space, actions)
        assert tasks.action_size(space) == size
        if space is choice:
            assert set(encoded.tolist()) == {0, 1, 2}
        else:
            assert encoded.shape == (9, size)
        if space in (unit, free):  # MuJoCo's bounds, or none: nothing changes
            np.testing.assert_array_equal(encoded, actions)
        np.testing.assert_allclose(tasks.decode_actions(space, encoded), actions, atol=1e-6)
