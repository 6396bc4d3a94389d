"""Environments as rollouts use them: many stepped together, each of which fails alone.

An environment may be anybody's: one that raises, or gives what is no observation, ends its own
episode, and the others go on.
"""

from contextlib import suppress

import gymnasium as gym
import numpy as np
import psutil

from files import check_memory
from plumbing import first_line
from spaces import check_fit
from tasks import make_env

LARGEST_REWARD = 1e30  # a sum of them, divided by any scale, still fits into 32 bits


class Guard(gym.Wrapper):
    """An environment whose failures end its own episode, and no other's.

    Where it raises, or gives an observation of another shape than its space's, or one or a reward
    that is not finite in the 32 bits that a model reads, the episode ends with what it has earned,
    and info["lamo_failed"] says why. Its own info is left out: nothing here reads it, and that of
    several environments may not go together. After its one episode it rests: a vector environment
    would begin another, which nobody looks at.
    """

    over = False

    def reset(self, **how):
        if self.over:
            return self.last, {}
        self.failed = None
        try:
            self.last, _ = self.env.reset(**how)
            self.failed = wrong_with(self.observation_space, self.last)
            if self.failed is None:
                return self.last, {}
            self.failed = f"reset gave an observation that is {self.failed}"
        except Exception as error:  # the environment's own kinds
            self.failed = f"reset raised {type(error).__name__}: {first_line(error)}"
        self.observation_space.seed(0)
        self.last = self.observation_space.sample()  # of the right shape
        return self.last, {}

    def step(self, action):
        if self.over:
            return self.last, 0.0, True, False, {}
        if self.failed is None:
            try:
                observation, reward, terminated, truncated, _ = self.env.step(action)
                reward, ends = float(reward), (bool(terminated), bool(truncated))
                wrong = wrong_with(self.observation_space, observation)
                if wrong is None and abs(reward) < LARGEST_REWARD:  # NaN is not, either
                    self.last, self.over = observation, any(ends)
                    return observation, reward, *ends, {}
                what = (
                    f"an observation that is {wrong}"
                    if wrong
                    else f"a reward ({reward}) that is not finite"
                )
                self.failed = f"gave {what}"
            except Exception as error:
                self.failed = f"raised {type(error).__name__}: {first_line(error)}"
        self.over = True
        return self.last, 0.0, True, False, {"lamo_failed": self.failed}

    def close(self):
        with suppress(Exception):  # of the environment's own kinds; its episodes are over
            self.env.close()


def wrong_with(space, observation):
    """What is wrong with an observation, however it is nested, as words, or None: it is sound."""
    if isinstance(space, gym.spaces.Dict):
        parts = [wrong_with(part, observation[key]) for key, part in space.spaces.items()]
        return next((wrong for wrong in parts if wrong), None)
    if isinstance(space, gym.spaces.Tuple):
        if len(observation) != len(space.spaces):
            return f"of {len(observation)} parts, not {len(space.spaces)}"
        return next((w for w in map(wrong_with, space.spaces, observation) if w), None)
    if space.shape is None:  # a graph, a text: nothing here reads it
        return None
    values = np.asarray(observation)
    if values.shape != space.shape or values.dtype.kind not in "biuf":
        return f"{values.dtype} {values.shape}, not {space.dtype} {space.shape}"
    if isinstance(space, gym.spaces.Discrete) and np.isfinite(values):
        return None if space.contains(values) else f"{values}, not in {space}"
    with np.errstate(over="ignore"):  # what is beyond 32 bits becomes infinite
        if values.dtype.kind == "f" and not np.isfinite(values.astype(np.float32)).all():
            return "not finite"
    return None


def make_vector_env(environment, n, render_mode=None):
    """n environments stepped together, an episode each; see Guard.

    Raises UserError if they would not fit into memory, by what those made so far have taken.
    """
    made = [Guard(make_env(environment.spec, render_mode=render_mode))]  # loads its libraries too
    before = psutil.Process().memory_info().rss
    while len(made) < n:
        made.append(Guard(make_env(environment.spec, render_mode=render_mode)))
        more = len(made) - 1
        if more & (more - 1) == 0:  # 1, 2, 4, ...: one alone may lie in memory freed before
            grown = psutil.Process().memory_info().rss - before
            check_memory((n - len(made)) * grown // more, f"{n} times {environment.spec.id}")
    envs = gym.vector.SyncVectorEnv([lambda env=env: env for env in made])
    seen, done = envs.single_observation_space, envs.single_action_space
    check_fit("what the policy sees", environment.observation_space, seen)
    check_fit("what the policy does", environment.action_space, done, bounds=True)
    return envs
