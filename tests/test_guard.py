"""An environment that fails ends its own episode, and the others play on as if nothing were."""

import json

import gymnasium as gym
import numpy as np
import pytest
import torch

from environments import wrong_with
from evaluate import rollout
from tasks import Environment

SETTINGS = {"context": 2, "scale": 1.0, "mode": "normal", "dtype": "fp32", "episode_limit": 0}
STATS = torch.zeros(2), torch.ones(2)


class Fragile(gym.Env):
    """Ten steps of reward 1. What its seed says goes wrong: see `HOW`, by seed."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), float)
    action_space = gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.how, self.made = HOW.get(seed), seed % 5
        self.t = 0
        if self.how == "reset":
            raise OSError("no such simulator")
        return np.full(2, np.nan if self.how == "reset to NaN" else 0.0), {}

    def step(self, action):
        self.t += 1
        observation, reward = np.full(2, float(self.t)), 1.0
        if self.t == 4:
            if self.how == "raise":
                raise RuntimeError("the physics exploded\nin two lines")
            if self.how == "reward":
                reward = float("nan")
            if self.how == "observation":
                observation[1] = np.inf
            if self.how == "a large observation":
                observation[1] = 1e300
            if self.how == "a large reward":
                reward = 1e300
            if self.how == "shape":
                observation = np.zeros(3)
            if self.how == "nothing":
                observation = None
            if self.how == "no reward":
                reward = None
        over = self.t == 10 and self.how != "no end"
        info = {"failed": False, "contacts": np.zeros(self.made)}  # of other shapes in each
        return observation, reward, False, over, None if self.how == "no info" else info

    def close(self):
        raise RuntimeError("the window is gone already")


HOW = {51: "raise", 52: "reward", 53: "observation", 54: "reset", 55: "reset to NaN"}
HOW |= {56: "a large observation", 57: "a large reward", 60: "no end"}
HOW |= {70: "shape", 71: "nothing", 72: "no reward", 73: "no info"}
gym.register("test/Fragile-v0", entry_point="tests.test_guard:Fragile")


class Still(torch.nn.Module):
    def observe(self, rtg, obs, timestep):
        assert torch.isfinite(obs).all()
        return torch.zeros(len(rtg), 1, 2, 4)

    def remember(self, act, timestep):
        return torch.zeros(len(act), 1, 1, 4)

    def act(self, tokens):
        return tokens[:, -1, :1]


@pytest.fixture
def fragile(monkeypatch):
    spec = gym.spec("test/Fragile-v0")
    monkeypatch.setattr(spec, "entry_point", Fragile)  # wherever this file is imported from
    monkeypatch.setattr("tasks.load_env_creator", lambda entry: entry)
    return Environment(spec, Fragile.observation_space, Fragile.action_space, None, None)


def test_an_episode_without_an_end_is_cut(fragile, monkeypatch):
    monkeypatch.setattr("evaluate.LONGEST_EPISODE", 25)
    (result,) = rollout(Still(), fragile, SETTINGS, STATS, [1.0], 2, seed=59)
    assert (result["lengths"], result["returns"], result["cut"]) == ([10, 25], [10.0, 25.0], 1)


def test_a_failing_episode_ends_alone_and_is_named(fragile):
    first, second = rollout(Still(), fragile, SETTINGS, STATS, [1.0, 2.0], 9, seed=50)
    for result in (first, second):
        assert result["returns"] == [10.0, 3.0, 3.0, 3.0, 0.0, 0.0, 3.0, 3.0, 10.0]
        assert result["lengths"] == [10, 4, 4, 4, 1, 1, 4, 4, 10]
        assert result["failed"] == [
            "episode 4, step 0: reset raised OSError: no such simulator",
            "episode 5, step 0: reset gave an observation that is not finite",
            "episode 1, step 3: raised RuntimeError: the physics exploded",
            "episode 2, step 3: gave a reward (nan) that is not finite",
            "episode 3, step 3: gave an observation that is not finite",
            "episode 6, step 3: gave an observation that is not finite",
            "episode 7, step 3: gave a reward (1e+300) that is not finite",
        ]
        assert result["cut"] == 0
        assert json.loads(json.dumps(result)) == result


def test_what_no_space_describes_ends_its_episode_too(fragile):
    (result,) = rollout(Still(), fragile, SETTINGS, STATS, [1.0], 5, seed=70)
    assert result["returns"] == [3.0, 3.0, 3.0, 0.0, 10.0]
    first, *others = result["failed"]
    assert first.startswith("episode 3, step 0: raised ")  # by Gymnasium's own checker
    assert others[:2] == [
        "episode 0, step 3: gave an observation that is float64 (3,), not float64 (2,)",
        "episode 1, step 3: gave an observation that is object (), not float64 (2,)",
    ]
    (third,) = others[2:]
    assert third.startswith("episode 2, step 3: raised TypeError: ")


def test_sound_episodes_are_told_as_such(fragile):
    (result,) = rollout(Still(), fragile, SETTINGS, STATS, [1.0], 3, seed=0)
    assert result["returns"] == [10.0] * 3
    assert result["failed"] == []


def test_an_ended_episode_is_not_begun_anew(fragile, monkeypatch):
    resets, really = [], Fragile.reset

    def reset(self, **how):
        resets.append(how)
        return really(self, **how)

    monkeypatch.setattr(Fragile, "reset", reset)
    (result,) = rollout(Still(), fragile, SETTINGS, STATS, [1.0], 4, seed=50)
    assert result["lengths"] == [10, 4, 4, 4]  # the first goes on after the others' ends
    assert len(resets) == 4


def test_a_stop_is_no_failure_of_the_environment(fragile, monkeypatch):
    def interrupted(self, action):
        raise KeyboardInterrupt

    monkeypatch.setattr(Fragile, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rollout(Still(), fragile, SETTINGS, STATS, [1.0], 1)


def box(*shape, dtype=np.float64):
    return gym.spaces.Box(0, 1, shape, dtype)


def nested(part):
    return gym.spaces.Dict(a=box(2), b=gym.spaces.Tuple([box(1), gym.spaces.Dict(c=part)]))


@pytest.mark.parametrize(
    ("space", "observation", "wrong"),
    [
        (box(3), np.zeros(3), None),
        (box(3), [0, 0, 7], None),  # out of its bounds, as many are
        (box(3), np.zeros((1, 3)), "float64 (1, 3), not float64 (3,)"),
        (box(2), np.array([0.0, np.nan]), "not finite"),
        (box(1), np.array([1e300]), "not finite"),  # in the 32 bits that a model reads
        (box(4, 4, dtype=np.uint8), np.zeros((4, 4), np.uint8), None),
        (gym.spaces.Discrete(9), 7, None),
        (gym.spaces.Discrete(9), 9, "9, not in Discrete(9)"),
        (gym.spaces.Discrete(9, start=1), np.int64(0), "0, not in Discrete(9, start=1)"),
        (gym.spaces.Discrete(9), 2.5, "2.5, not in Discrete(9)"),
        (gym.spaces.Discrete(9), float("inf"), "not finite"),
        (nested(box(1)), {"a": np.zeros(2), "b": (np.zeros(1), {"c": [np.inf]})}, "not finite"),
        (nested(box(1)), {"a": np.zeros(2), "b": (np.zeros(1),)}, "of 1 parts, not 2"),
        (gym.spaces.Sequence(box(2)), ([0.0, 1.0], [2.0]), None),
        (nested(gym.spaces.Text(9)), {"a": np.zeros(2), "b": ([0.0], {"c": "words"})}, None),
    ],
)
def test_every_number_is_looked_at(space, observation, wrong):
    assert wrong_with(space, observation) == wrong


def test_a_run_counts_them(fragile):
    import run_folder

    results = rollout(Still(), fragile, SETTINGS, STATS, [1.0], 6, seed=50)
    evaluations = [{"step": 1, "results": results}, {"step": 10, "results": results}]
    assert run_folder.final_result(evaluations, 10)["episodes_failed"] == 10
