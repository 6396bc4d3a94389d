"""Other people's offline data as episodes: D4RL's HDF5 files, and the DQN-replay Atari logs.

Neither format has episodes: both are one long run of transitions with marks where an episode ends.
What belongs to no whole episode, behind the last mark and, in DQN-replay, before the first, is left
out and counted. DQN-replay (Agarwal et al. 2020, arXiv 1907.04543) is the replay buffer of
Dopamine's DQN, written down each time it was full.
"""

import gzip
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
from tqdm import tqdm

from tasks import FRAME
from utils import UserError, choose, reading

D4RL_KEYS = ("observations", "actions", "rewards", "terminals", "timeouts")
D4RL_QUALITIES = ("random", "medium", "expert", "medium-replay", "medium-expert")
ANT_SEEN = 27  # of D4RL's 111 numbers in an Ant observation; the rest, contact forces, are all zero
DQN_KEYS = ("observation", "action", "reward", "terminal")
PADDING = 3  # blank transitions before each episode in Dopamine's replay buffer: its stack less one
AT_A_TIME = 4096  # transitions of a DQN-replay file in memory


def import_d4rl(path, name, task, quality, about):
    """D4RL's file of a task, as what collect.write_dataset takes: episodes, environment, space.

    Adds to `about` how many transitions belong to no whole episode. Raises UserError.
    """
    from minari.data_collector import EpisodeBuffer

    if not (task.minari or "").startswith("mujoco/"):
        raise UserError(f"D4RL's HDF5 files are of the MuJoCo tasks, not of {name}")
    choose("quality", quality, D4RL_QUALITIES)
    with reading(path, "a D4RL file, hopper_medium-v2.hdf5 say"), h5py.File(path) as file:
        observations, actions, rewards, terminals, timeouts = (file[key][()] for key in D4RL_KEYS)
        following = file["next_observations"][()] if "next_observations" in file else None
    kwargs = {}
    if name == "ant" and observations.shape[1] == 111:
        if observations[:, ANT_SEEN:].any():
            raise UserError(f"{path} has contact forces, so it is not one of D4RL's v2 files")
        kwargs, observations = (
            {"include_cfrc_ext_in_observation": False},
            observations[:, :ANT_SEEN],
        )
    env, width = gym.make(task.env_id, **kwargs), observations.shape[1]
    if env.observation_space.shape != (width,) or env.action_space.shape != actions.shape[1:]:
        raise UserError(f"{path} has observations of {width} numbers, so it is not of {name}")
    ends = np.flatnonzero(terminals.astype(bool) | timeouts.astype(bool)) + 1
    about["left_out"] = int(len(rewards) - ends[-1:].sum())

    def episodes():
        starts = [0, *ends[:-1]]
        for start, end in tqdm(list(zip(starts, ends, strict=True)), name, unit="episode"):
            # no file says what came after a timeout: without it, the last observation stands twice
            last = observations[end - 1] if following is None else following[end - 1, :width]
            final = np.arange(start, end) == end - 1
            terminated = bool(terminals[end - 1])
            yield EpisodeBuffer(
                observations=np.concatenate([observations[start:end], last[None]]),
                actions=actions[start:end],
                rewards=rewards[start:end].astype(np.float64),
                terminations=final & terminated,
                truncations=final & (not terminated),
            )

    return episodes(), env, gym.spaces.Box(-np.inf, np.inf, (width,), observations.dtype)


def read_rows(path):
    """A gzipped .npy file, AT_A_TIME rows of it at a time. Raises UserError for a damaged one."""
    with reading(path, "one of DQN-replay's gzipped arrays"), gzip.open(path) as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        for at in range(0, shape[0], AT_A_TIME):
            part = (min(AT_A_TIME, shape[0] - at), *shape[1:])
            raw = file.read(int(np.prod(part)) * dtype.itemsize)
            yield np.frombuffer(raw, dtype).reshape(part)
        if file.read(1):  # reading the end also checks gzip's checksum
            raise ValueError("it holds more than its header says")


def dqn_episodes(checkpoints, n_actions, about):
    """Whole episodes of DQN-replay's checkpoints: dictionaries of DQN_KEYS, (T, ..) each.

    checkpoints: a list of {key: Path}. One episode and one part of a file are in memory at a time.
    A checkpoint begins and ends within an episode. Both pieces are left out, and their transitions
    are added to about["left_out"]. Raises UserError for files that do not belong together.
    """
    for files in checkpoints:
        kept = []  # pieces of the episode that is being read
        parts = zip(*(read_rows(files[key]) for key in DQN_KEYS), strict=True)
        for arrays in tqdm(parts, files["observation"].name, unit="part"):
            part = dict(zip(DQN_KEYS, arrays, strict=True))
            N = len(part["observation"])
            if part["observation"].shape[1:] != (FRAME, FRAME) or any(
                part[key].shape != (N,) for key in DQN_KEYS[1:]
            ):
                raise UserError(f"{files['observation']} and its like have unexpected shapes")
            if not 0 <= part["action"].min() <= part["action"].max() < n_actions:
                raise UserError(f"{files['action']} has actions that the game has not")
            begin = 0
            for end in np.flatnonzero(part["terminal"]) + 1:
                pieces = [*kept, {key: values[begin:end] for key, values in part.items()}]
                whole = {key: np.concatenate([piece[key] for piece in pieces]) for key in DQN_KEYS}
                kept, begin, T = [], end, len(whole["reward"])
                # without blank transitions before it, an episode was not logged from its start
                if T < PADDING or any(values[:PADDING].any() for values in whole.values()):
                    about["left_out"] += T
                elif T > PADDING:
                    yield {key: values[PADDING:] for key, values in whole.items()}
            kept.append({key: values[begin:].copy() for key, values in part.items()})
        about["left_out"] += sum(len(piece["reward"]) for piece in kept)


def import_dqn_replay(folder, name, task, about):
    """A game's DQN-replay folder as what collect.write_dataset takes: episodes, environment, space.

    Frames are 84 x 84 and grey already, each the maximum of two of the game's, and rewards are
    clipped to [-1, 1]: both as Dopamine stored them. Adds to `about`. Raises UserError.
    """
    from minari.data_collector import EpisodeBuffer

    if not (task.minari or "").startswith("atari/"):
        raise UserError(f"DQN-replay is of Atari games, and {name} is none")
    found = Path(folder).glob("$store$_observation_ckpt.*.gz")
    numbers = sorted(int(n) for n in (file.name.split(".")[-2] for file in found) if n.isdecimal())
    if not numbers:
        raise UserError(f"{folder} has no $store$_observation_ckpt.N.gz, as DQN-replay names them")
    files = [{k: Path(folder) / f"$store$_{k}_ckpt.{i}.gz" for k in DQN_KEYS} for i in numbers]
    env = gym.make(task.env_id)  # 4 frames an action, repeated with probability 0.25: as logged
    about |= {"checkpoints": len(files), "left_out": 0, "rewards": "clipped to [-1, 1]"}

    def episodes():
        for episode in dqn_episodes(files, env.action_space.n, about):
            frames, final = episode["observation"], np.arange(len(episode["reward"]))
            final = final == final[-1]
            yield EpisodeBuffer(
                # the log ends with the last action: what it led to is not in it
                observations=np.concatenate([frames, frames[-1:]]),
                actions=episode["action"].astype(np.int64),
                rewards=episode["reward"].astype(np.float64),
                terminations=final,
                truncations=np.zeros_like(final),
            )

    return episodes(), env, gym.spaces.Box(0, 255, (FRAME, FRAME), np.uint8)
