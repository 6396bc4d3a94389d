"""Other people's offline data -> Minari: D4RL's HDF5 files, and the DQN-replay Atari logs.

Neither format has episodes: both are one long run of transitions with marks where an episode ends.
What is no whole episode, behind the last mark and, in DQN-replay, before the first, is left out,
which is said. DQN-replay (Agarwal et al. 2020, arXiv 1907.04543) is the replay buffer of Dopamine's
DQN, written down each time it was full.
"""

import gzip
import zlib
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
from tqdm import tqdm

from evaluate import LONGEST_EPISODE
from experiments.write_dataset import dataset_folder, write_dataset
from files import check_hdf5, check_memory, check_regular
from plumbing import UserError, choose, counted, first_line
from spaces import FRAME

D4RL_KEYS = ("observations", "actions", "rewards", "terminals", "timeouts")
D4RL_DIMENSIONS = dict(zip(D4RL_KEYS, (2, 2, 1, 1, 1), strict=True)) | {"next_observations": 2}
D4RL_QUALITIES = ("random", "medium", "expert", "medium-replay", "medium-expert")
DQN_KINDS = {"observation": "u", "action": "iu", "reward": "f", "terminal": "biu"}  # NumPy's kinds
PADDING = 3  # blank transitions before each episode in Dopamine's replay buffer: its stack less one
ANT_SEEN = 27  # of D4RL's 111 numbers in an Ant observation; the rest, contact forces, are all zero
AT_A_TIME = 4096  # transitions of a DQN-replay file in memory


# --- D4RL ----------------------------------------------------------------------------------------


def read_d4rl(path):
    """The arrays of a D4RL file, checked: a dictionary of D4RL_KEYS, and next_observations or None.

    Raises UserError for what is no such file, or where lengths or shapes do not agree.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no file {path}; give D4RL's, hopper_medium-v2.hdf5 say")
    try:
        check_hdf5(path)
        with h5py.File(path) as file:
            missing = [key for key in D4RL_KEYS if key not in file]
            if missing:
                raise UserError(
                    f"{path} lacks {', '.join(missing)}; it should hold {', '.join(D4RL_KEYS)}"
                )
            keys = [*D4RL_KEYS, *(key for key in ("next_observations",) if key in file)]
            for key in keys:
                numeric = isinstance(file[key], h5py.Dataset) and file[key].dtype.kind in "biuf"
                if not numeric or file[key].ndim != D4RL_DIMENSIONS[key]:
                    raise UserError(
                        f"{path}: {key} is {file[key]}, but expected {D4RL_DIMENSIONS[key]} "
                        "dimensions of numbers"
                    )
            check_memory(sum(file[key].nbytes for key in keys), path)
            arrays = {key: file[key][()] for key in keys}
    except (OSError, RuntimeError, KeyError, ValueError) as error:  # h5py's
        raise UserError(f"{path} is no readable HDF5 file: {first_line(error)}") from error
    N = len(arrays["rewards"])
    for key, array in arrays.items():
        if len(array) != N:
            raise UserError(f"{path}: {key} has {len(array)} rows, but rewards has {N}")
        if not np.isfinite(array).all():
            raise UserError(f"{path}: {key} holds NaN or infinite values")
    following = arrays.pop("next_observations", None)
    if following is not None and following.shape != arrays["observations"].shape:
        raise UserError(f"{path}: next_observations has another shape than observations")
    if not (arrays["terminals"].any() or arrays["timeouts"].any()):
        raise UserError(f"{path} marks no episode's end: terminals and timeouts are all false")
    return arrays, following


def import_d4rl(path, name, task, quality):
    """Write D4RL's file as the Minari dataset d4rl/<name>/<quality>-v2, cut at the marks."""
    from minari.data_collector import EpisodeBuffer

    if not str(task.dataset).startswith("mujoco/"):
        raise UserError(f"D4RL's HDF5 files are of the MuJoCo tasks, not of {name}")
    choose("quality", quality, D4RL_QUALITIES)
    dataset_id = f"d4rl/{name}/{quality}-v2"
    folder = dataset_folder(dataset_id)
    arrays, following = read_d4rl(path)
    kwargs, seen = {}, arrays["observations"].shape[1]
    if name == "ant" and seen == 111:
        if arrays["observations"][:, ANT_SEEN:].any():
            raise UserError(
                f"{path}: contact forces (columns {ANT_SEEN} on) are not all zero, as they are in "
                "D4RL's files; it is of another environment"
            )
        kwargs, seen = {"include_cfrc_ext_in_observation": False}, ANT_SEEN
    env = gym.make(task.env_id, **kwargs)
    for key, width, space in (
        ("observations", seen, env.observation_space),
        ("actions", arrays["actions"].shape[1], env.action_space),
    ):
        if space.shape != (width,):
            raise UserError(f"{path}: {key} are {width} wide, but {name}'s are {space.shape[0]}")
    ends = np.flatnonzero(arrays["terminals"].astype(bool) | arrays["timeouts"].astype(bool)) + 1
    starts = np.concatenate([[0], ends[:-1]])
    observations = arrays["observations"][:, :seen]

    def episodes():
        for start, end in tqdm(list(zip(starts, ends, strict=True)), dataset_id, unit="episode"):
            # no file says what came after a timeout: without it, the last observation stands twice
            last = observations[end - 1] if following is None else following[end - 1, :seen]
            T = end - start
            terminated = bool(arrays["terminals"][end - 1])
            final = np.arange(T) == T - 1
            yield EpisodeBuffer(
                observations=np.concatenate([observations[start:end], last[None]]),
                actions=arrays["actions"][start:end],
                rewards=arrays["rewards"][start:end].astype(np.float64),
                terminations=final & terminated,
                truncations=final & (not terminated),
            )

    low, high = -np.inf, np.inf
    spaces = gym.spaces.Box(low, high, (seen,), observations.dtype), env.action_space
    about = {
        "command": f"python -m experiments.collect --import-d4rl {Path(path).name} --env {name}"
    }
    about["command"] += f" --quality {quality}"
    about["left_out"] = int(len(observations) - ends[-1])
    finish(folder, dataset_id, episodes(), env.spec, spaces, task, about, name, "D4RL, v2")


# --- DQN replay ----------------------------------------------------------------------------------


def open_npy(path):
    """A gzipped .npy file, open behind its header: (file, shape, dtype). Raises UserError."""
    try:
        check_regular(path)
        file = gzip.GzipFile(path)
        if np.lib.format.read_magic(file) != (1, 0):  # others are for headers beyond 64 KiB
            raise ValueError("it is no plain array")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except Exception as error:  # gzip's, zlib's and NumPy's parser's own kinds
        raise UserError(f"{path} is no gzipped array: {first_line(error)}") from error
    if fortran or dtype.hasobject:
        raise UserError(f"{path} holds an array of a kind that DQN-replay has not")
    return file, shape, dtype


def read_part(path, file, dtype, shape):
    """The next rows of an open array: shape (rows, ..). Raises UserError where the file ends."""
    size = int(np.prod(shape)) * dtype.itemsize
    try:
        raw = file.read(size)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged: {first_line(error)}") from error
    if len(raw) != size:
        raise UserError(f"{path} ends early: it is truncated")
    return np.frombuffer(raw, dtype).reshape(shape)


def check_end(path, file):
    """Raises UserError unless an open array ends here; reading its end checks gzip's checksum."""
    try:
        more = file.read(1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged: {first_line(error)}") from error
    if more:
        raise UserError(f"{path} holds more than its header says")
    file.close()


def dqn_checkpoints(folder):
    """The checkpoints in a folder, in order: a list of {key: Path}. Raises UserError for none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    numbers = [f.name.split(".")[-2] for f in folder.glob("$store$_observation_ckpt.*.gz")]
    numbers = sorted({int(number) for number in numbers if number.isdecimal()})
    if not numbers:
        raise UserError(f"{folder} has no $store$_observation_ckpt.N.gz, as DQN-replay names them")
    found = [{k: folder / f"$store$_{k}_ckpt.{i}.gz" for k in DQN_KINDS} for i in numbers]
    for files in found:
        for file in files.values():
            if not file.is_file():
                raise UserError(f"{folder} lacks {file.name}")
    for before, after in pairwise(numbers):
        if after > before + 1:
            gap = f"no checkpoint between {before} and {after}"
            print(f"note: {folder} has {gap}; imported without")
    return found


def dqn_parts(files, n_actions):
    """One checkpoint's transitions, AT_A_TIME of them at a time: dictionaries of DQN_KINDS."""
    opened = {key: open_npy(path) for key, path in files.items()}
    N = opened["observation"][1][0] if opened["observation"][1] else 0
    for key, (_, shape, dtype) in opened.items():
        expected = (N, FRAME, FRAME) if key == "observation" else (N,)
        if shape != expected or dtype.kind not in DQN_KINDS[key] or N == 0:
            raise UserError(f"{files[key]} holds {dtype} {shape}, but expected {expected}")
    for at in tqdm(range(0, N, AT_A_TIME), files["observation"].name, unit="part"):
        rows = min(AT_A_TIME, N - at)
        part = {
            key: read_part(files[key], file, dtype, (rows, *shape[1:]))
            for key, (file, shape, dtype) in opened.items()
        }
        if part["action"].min() < 0 or part["action"].max() >= n_actions:
            raise UserError(f"{files['action']} has actions that the game has not")
        if not np.isfinite(part["reward"]).all():
            raise UserError(f"{files['reward']} has a NaN or infinite reward")
        yield part
    for key, (file, _, _) in opened.items():
        check_end(files[key], file)


def without_padding(episode):
    """An episode without the blank transitions that Dopamine puts before it.

    None if it has no such: then it was not logged from its start.
    """
    first = {key: values[:PADDING] for key, values in episode.items()}
    if len(first["reward"]) < PADDING or any(values.any() for values in first.values()):
        return None
    return {key: values[PADDING:] for key, values in episode.items()}


def dqn_episodes(checkpoints, n_actions, about):
    """Whole episodes of DQN-replay checkpoints: dictionaries of DQN_KINDS, (T, ..) each.

    One episode and one part are in memory at a time. A checkpoint begins and ends within an
    episode. Both pieces are left out, and their transitions are added to about["left_out"]. Raises
    UserError where no episode ends in LONGEST_EPISODE steps.
    """
    for files in checkpoints:
        kept = []  # pieces of the episode that is being read
        for part in dqn_parts(files, n_actions):
            begin = 0
            for end in np.flatnonzero(part["terminal"]) + 1:
                pieces = [*kept, {key: values[begin:end] for key, values in part.items()}]
                whole = {k: np.concatenate([piece[k] for piece in pieces]) for k in DQN_KINDS}
                kept, begin = [], end
                episode = without_padding(whole)
                if episode is None:
                    about["left_out"] += len(whole["reward"])
                elif len(episode["reward"]):
                    yield episode
            kept.append({key: values[begin:].copy() for key, values in part.items()})
            if sum(len(piece["reward"]) for piece in kept) > LONGEST_EPISODE:
                raise UserError(f"{files['terminal']}: no episode ends in {LONGEST_EPISODE} steps")
        about["left_out"] += sum(len(piece["reward"]) for piece in kept)


def import_dqn_replay(folder, name, task):
    """Write a game's DQN-replay files as the Minari dataset dqn-replay/<name>/logged-v0.

    The agent's frames are 84 x 84 and grey already, each the maximum of two of the game's, and its
    rewards are clipped to [-1, 1]: both as Dopamine stored them. Frames are written uncompressed
    first: that takes 7 GB of disk for each million, until the file is compressed at the end.
    """
    from minari.data_collector import EpisodeBuffer

    if not str(task.dataset).startswith("atari/"):
        raise UserError(f"DQN-replay is of Atari games, and {name} is none")
    dataset_id = f"dqn-replay/{name}/logged-v0"
    target = dataset_folder(dataset_id)
    checkpoints = dqn_checkpoints(folder)
    env = gym.make(task.env_id)  # 4 frames an action, repeated with probability 0.25: as logged
    about = {"command": f"python -m experiments.collect --import-dqn-replay DIR --env {name}"}
    about |= {"checkpoints": len(checkpoints), "left_out": 0, "rewards": "clipped to [-1, 1]"}

    def episodes():
        for episode in dqn_episodes(checkpoints, env.action_space.n, about):
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

    spaces = gym.spaces.Box(0, 255, (FRAME, FRAME), np.uint8), env.action_space
    finish(target, dataset_id, episodes(), env.spec, spaces, task, about, name, "DQN replay")
    print("its rewards are clipped to [-1, 1], as logged; evaluation counts the game's own points,")
    print("so returns and targets of the two are in different units: set --targets accordingly")


def finish(folder, dataset_id, episodes, spec, spaces, task, about, name, origin):
    """Write the dataset, then say what was written, what was left out, and what to type next."""
    about = write_dataset(
        folder,
        dataset_id,
        episodes,
        spec,
        spaces,
        (task.random, task.expert),
        about,
        algorithm_name=origin,
        author={f"the authors of {origin}"},
        description=f"{origin} data of {name}, imported with Minari {version('minari')}.",
    )
    size = f"{counted(about['episodes'], 'episode')}, {counted(about['steps'], 'step')}"
    print(f"wrote {folder}: {size}, ", end="")
    print(f"return {about['return_mean']:.1f} ± {about['return_std']:.1f}")
    print(f"left out: {about['left_out']} steps that belong to no whole episode")
    print(f"next: python train.py --env {name} --dataset {dataset_id}")
