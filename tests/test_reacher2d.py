"""Reacher2d: Gymnasium's checker, and physics, reward and observation against cases by hand."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env


@pytest.fixture
def env():
    return gym.make("reacher2d:lamo/Reacher2d-v0").unwrapped


def place(env, q, goal=(0.7, 0.0), velocity=(0.0, 0.0)):
    """Put the arm somewhere: joint angles in rad, goal in metres, velocities in rad/s."""
    env.reset(seed=0)
    env.data.qpos[:], env.data.qvel[:], env.goal = q, velocity, np.array(goal)


@pytest.mark.filterwarnings("ignore:.*Box observation space.*infinity.*")
def test_gymnasiums_checker_is_content(env):
    check_env(env, skip_render_check=True)


def test_an_episode_is_100_steps():
    env = gym.make("reacher2d:lamo/Reacher2d-v0")
    env.reset(seed=0)
    ends = [env.step(env.action_space.sample())[2:4] for _ in range(100)]
    assert ends == [(False, False)] * 99 + [(False, True)]


@pytest.mark.parametrize("q", [(0, 0), (np.pi / 2, 0), (0, np.pi / 2), (0.3, -1.2), (2, 2)])
def test_the_tip_and_the_observation_follow_from_the_angles(env, q):
    place(env, q, goal=(0.1, -0.8))
    q = np.array(q, float)
    for _ in range(3):  # at rest and without torque, it stays
        observation, *_ = env.step(np.zeros(2))
    tip = 0.6 * np.array([np.cos(q[0]), np.sin(q[0])])
    tip += 0.45 * np.array([np.cos(q.sum()), np.sin(q.sum())])
    goal = np.array([0.1, -0.8])
    expected = [*np.sin(q), *np.cos(q), 0, 0, *tip, *goal, *(tip - goal)]
    np.testing.assert_allclose(observation, expected, atol=1e-9)
    env.data.qvel[:] = 0.2, -0.3
    np.testing.assert_allclose(env.observe()[4:6], [0.15 * 0.2, 0.15 * -0.3])  # of a step to come


def test_reward_is_for_a_sum_of_distances_below_a_tenth(env):
    near = [(1.05, 0.0), (1.05 - 0.09, 0.0), (1.05 - 0.04, -0.05)]  # 1.05: of a stretched arm
    far = [(1.05 - 0.11, 0.0), (1.05 - 0.06, 0.06), (-1.0, 0.0)]  # the second is 0.085 away
    for goal in near + far:
        place(env, (0, 0), goal)
        assert env.step(np.zeros(2))[1] == (goal in near)


def test_torque_against_damping_gives_one_radian_a_second(env):
    """A torque of 1 N m on a joint damped by 1 N m s/rad; the free elbow straightens out."""
    place(env, (0, 1.0))
    for _ in range(400):
        env.step(np.array([1.0, 0.0]))
    np.testing.assert_allclose(env.data.qvel, [1.0, 0.0], atol=0.02)
    place(env, (0, 0))
    for _ in range(80):
        env.step(np.array([5.0, 0.0]))  # beyond the bound: as 1
    assert env.data.qvel[0] == pytest.approx(1.0, abs=0.02)


def test_starts_and_goals_are_spread_as_described(env):
    starts, goals = [], []
    for seed in range(2000):
        env.reset(seed=seed)
        starts.append(env.data.qpos.copy())
        goals.append(env.goal)
        assert not env.data.qvel.any()
    starts, radius = np.array(starts), np.linalg.norm(goals, axis=1)
    assert np.abs(starts).max() <= 2
    np.testing.assert_allclose(starts.std(0), 4 / np.sqrt(12), rtol=0.05)  # uniform in [-2, 2]
    assert radius.min() >= 0.5
    assert radius.max() <= 1.0
    # uniform over the ring's area: r^2 is uniform in [0.25, 1]
    np.testing.assert_allclose(np.mean(radius**2), 0.625, rtol=0.02)
    np.testing.assert_allclose(np.std(radius**2), 0.75 / np.sqrt(12), rtol=0.05)
    np.testing.assert_allclose(np.mean(goals, axis=0), 0, atol=0.05)
