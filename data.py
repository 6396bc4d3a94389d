"""Data: a Minari dataset, found or fetched -> flat tensors (windows.Trajectories)."""

import io
import math
import os
import re
import shutil
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from files import check_arrow, check_hdf5, check_memory, folder_aside, locked, parse_json, read_json
from plumbing import UserError, first_line, network_available
from spaces import (
    FRAME,
    encode_actions,
    flatten,
    is_picture,
    observation_shape,
    read_space,
    shapes_of,
    shrink,
)
from windows import Trajectories

BUNDLED = Path(__file__).parent / "assets" / "minari"  # datasets that come with the project
PICTURES_AT_A_TIME = 256  # made small together
ROWS_AT_A_TIME = 1 << 16  # transitions normalised together
MADE_HERE = {  # by experiments/collect.py: the first part of an id, and the flag
    "lamo": "--steps N (and --random, if it is a random policy's)",
    "d4rl": "--import-d4rl FILE.hdf5",
    "dqn-replay": "--import-dqn-replay FOLDER",
}
GPU_SHARE = 0.6  # of a GPU's free memory that frames may take; else they stay on the CPU


# --- where a dataset is --------------------------------------------------------------------------


def find_dataset(env, task, ratio, name="auto", quality="medium"):
    """The Minari dataset to train on: found, fetched, or the bundled one.

    env: the task's name; task: its row of tasks.TASKS; ratio: the share of the full dataset wanted,
    in (0, 1]; name: a Minari id or a folder, which is found, fetched or an error, or "auto": in
    this order the task's dataset in Minari's folder, its download, the set that
    experiments/collect.py records, and the bundled part of that; quality: which one of the task's
    datasets, where it has several.
    Returns (MinariDataset, share, note): share is how much of a full dataset it holds (its
    about.json may say so), note one line that says what was taken and why.
    Raises UserError, naming the command that would help, if there is none or it is too small.
    """
    if not name:
        raise UserError("--dataset is empty; give a Minari id or a dataset's folder")
    local = Path(os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets")
    shown = str(local).replace(str(Path.home()), "~", 1)  # in what is printed and kept
    asked = name != "auto"
    wanted = name if asked else task.dataset.format(quality=quality)
    ours = quality == "medium" or "{quality}" not in (task.dataset or "")  # what recorded sets are
    record = f"python -m experiments.collect --env {env} --steps {task.full}"

    def taken(folder, note):
        share = share_of(folder)
        if ratio > share:
            full = f", or record a full one: {record}" if task.recorded else ""
            if folder == local / str(task.recorded):
                full = f", or delete {folder} and record a full one: {record}"
            raise UserError(
                f"--ratio {ratio:g} asks for more than the {share:g} of a full dataset that is "
                f"here ({note}); use --ratio {share:g}{full}"
            )
        return read_dataset(folder), share, note

    if asked:
        for folder in (Path(name), local / name, BUNDLED / name):
            if is_dataset(folder):
                where = name if folder == Path(name) else f"{name} in {folder}"
                return taken(folder, f"{where}, as asked")
        check_no_part(Path(name))
        if Path(name).is_absolute():
            raise UserError(f"there is no folder {name}; give a dataset's folder, or a Minari id")
    elif is_dataset(local / wanted):
        return taken(local / wanted, f"{wanted} in {shown}")
    ours_alone = wanted.partition("/")[0] in MADE_HERE
    if ours_alone:
        why = f"{wanted} is not in {shown}, and on no server"
    elif not re.fullmatch(r"(?!\.)[\w.-]+(/(?!\.)[\w.-]+)*", wanted):
        why = f"{wanted} is no folder of a dataset, and no id of one"
    elif network_available():
        try:
            folder = download_dataset(wanted, local)
        except Exception as error:  # the hub's, Minari's and the disk's errors alike
            why = f"{wanted} could not be downloaded ({first_line(error)})"
        else:
            return taken(folder, f"{wanted}, downloaded to {shown}")
    else:
        why = f"{wanted} is not in {shown} and there is no network"
    bundled = not asked and ours and task.bundled and is_dataset(BUNDLED / task.bundled)
    recorded = not asked and ours and task.recorded and is_dataset(local / task.recorded)
    if bundled and recorded and share_of(local / task.recorded) < ratio:
        recorded = share_of(BUNDLED / task.bundled) < ratio  # then the error says what to record
    if recorded:
        return taken(local / task.recorded, f"{task.recorded} in {shown}, since {why}")
    if bundled:
        return taken(BUNDLED / task.bundled, f"the bundled {task.bundled}, since {why}")
    if ours_alone:
        how = MADE_HERE[wanted.partition("/")[0]]
        raise UserError(f"{why}; make it: python -m experiments.collect --env NAME {how}")
    raise UserError(
        f"{why}; run `minari download {wanted}` where there is a network and copy it to "
        f"{local / wanted}, or give the folder of another: --dataset FOLDER"
    )


def is_dataset(folder):
    """Whether a folder holds a Minari dataset whole: its metadata and something it describes."""
    data = folder / "data"
    return (data / "metadata.json").is_file() and len(list(data.iterdir())) > 1


def share_of(folder):
    """The share of a full dataset that a folder holds, in (0, 1]. Raises UserError if it is odd."""
    if not (folder / "about.json").is_file():
        return 1.0
    try:
        share = float(read_json(folder / "about.json").get("share", 1.0))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder / 'about.json'} does not tell a share") from error
    if not 0 < share <= 1:
        raise UserError(f"{folder / 'about.json'} tells a share of {share:g}, not in (0, 1]")
    return share


def check_no_part(path):
    """Raises UserError for a path that exists but is not a dataset's whole folder."""
    if (path / "metadata.json").is_file():
        raise UserError(f"{path} is the inside of a dataset; give the folder above: {path.parent}")
    if path.is_file():
        raise UserError(f"{path} is a file; give the dataset's folder, the one with data/ in it")
    if path.is_dir():
        lacks = "data/metadata.json"
        if (path / lacks).is_file():
            lacks = "everything in data/ but metadata.json"
        raise UserError(f"{path} is no whole Minari dataset: it lacks {lacks}")


def read_dataset(folder):
    """The MinariDataset in a folder. Raises UserError for one that is damaged or says too much."""
    import minari

    data = folder / "data"
    try:
        metadata = read_json(data / "metadata.json")
        for kind in ("observation_space", "action_space"):
            if kind not in metadata:  # Minari would make the environment, whatever that does
                raise UserError(f"{data / 'metadata.json'} does not tell its {kind}")
        for kind in ("env_spec", "eval_env_spec"):
            parse_json(metadata.get(kind) or "{}")  # for the size of its numbers
        told = {kind: read_space(metadata[f"{kind}_space"]) for kind in ("observation", "action")}
        if metadata["data_format"] == "hdf5":
            check_hdf5(data / "main_data.hdf5")
            with h5py.File(data / "main_data.hdf5") as file:
                there = len(file)
        elif metadata["data_format"] in ("arrow", "parquet"):
            shapes = {f"{kind}s": shapes_of(space) for kind, space in told.items()}
            check_arrow(data, metadata["data_format"], shapes)
            there = sum(path.is_dir() for path in data.iterdir())
        else:
            raise UserError(f"{folder} is of no format that is known: hdf5, arrow or parquet")
        if int(metadata["total_episodes"]) > there:
            raise UserError(f"{folder} holds {there} episodes, not {metadata['total_episodes']}")
        dataset = minari.MinariDataset(data)
        dataset.spec, dataset.env_spec  # noqa: B018  (made when first asked for: may be damaged)
        return dataset
    except UserError:
        raise
    except Exception as error:  # Minari raises many kinds
        raise UserError(f"{folder} is no readable Minari dataset: {first_line(error)}") from error


@contextmanager
def minari_folder(folder):
    """Within this, Minari reads and writes in `folder`; afterwards where it did before."""
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    try:
        yield
    finally:
        del os.environ["MINARI_DATASETS_PATH"]
        if before is not None:
            os.environ["MINARI_DATASETS_PATH"] = before


def download_dataset(name, local):
    """Download a Minari dataset into folder `local`, whole or not at all. Returns where it is."""
    import minari

    with locked(local / name):
        if is_dataset(local / name):  # another process was faster
            return local / name
        with folder_aside(local / name) as aside:
            with minari_folder(aside):  # Minari itself downloads in place
                minari.download_dataset(name)
            shutil.rmtree(local / name, ignore_errors=True)  # what an interrupted one left
            os.rename(Path(aside) / name, local / name)
    return local / name


# --- from a dataset to tensors --------------------------------------------------------------------


def decode(picture, shape):
    """A JPEG's bytes as pixels. Raises UserError, before it decodes it, if shape is another."""
    image = Image.open(io.BytesIO(picture), formats=["JPEG"])
    if image.size != (shape[1], shape[0]):
        raise UserError(f"a picture is {image.size} wide and high, not as {shape} says")
    return np.asarray(image)


def read_frames(shape, pictures):
    """Pictures of an episode -> frames (T + 1, 84, 84) uint8, a few pictures in memory at a time.

    shape: (H, W[, 1 or 3]) of a picture; pictures: (T + 1, *shape) bytes, or T + 1 rows of a JPEG's
    bytes; an array or an HDF5 dataset. Raises UserError for pictures of another size.
    """
    jpeg = pictures.ndim < 3
    if not jpeg and pictures.shape[1:] != shape:
        raise UserError(f"pictures are of {pictures.shape[1:]}, not of {shape} as it says")
    frames = np.empty((len(pictures), FRAME, FRAME), np.uint8)
    for i in range(0, len(pictures), PICTURES_AT_A_TIME):
        if jpeg:  # one at a time: many may be one place of the file
            ends = min(i + PICTURES_AT_A_TIME, len(pictures))
            part = np.stack([decode(pictures[k], shape) for k in range(i, ends)])
        else:
            part = pictures[i : i + PICTURES_AT_A_TIME]
        frames[i : i + PICTURES_AT_A_TIME] = shrink(part)
    return frames


@contextmanager
def readable(dataset):
    """What goes wrong within this while a Minari dataset is read becomes a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # h5py, pyarrow and Pillow raise many kinds
        what = f"{dataset.spec.data_path} is no readable Minari dataset"
        raise UserError(f"{what}: {first_line(error)}") from error


def read_episodes(dataset, indices, rewards=None):
    """Episodes of a Minari dataset, by index, one after another.

    rewards: a function of an episode's observations, as recorded, that replaces its rewards.
    Yields observations (T + 1, O) or (T + 1, 84, 84), actions, rewards (T,), and whether the last
    step ended the episode (True) or it was cut there. Raises UserError for a damaged file.
    """
    space = dataset.observation_space
    with readable(dataset):
        if is_picture(space) and dataset.storage.FORMAT == "hdf5":
            # not through Minari, which would hold all of an episode's pictures: gigabytes
            with h5py.File(Path(dataset.spec.data_path) / "main_data.hdf5") as file:
                for i in indices.tolist():
                    episode = file[f"episode_{i}"]
                    frames = read_frames(space.shape, episode["observations"])
                    ended = bool(episode["terminations"][-1:].any())
                    yield frames, episode["actions"][()], episode["rewards"][()], ended
        else:
            read = partial(read_frames, space.shape)
            if not is_picture(space):
                read = partial(flatten, space)
            for episode in dataset.iterate_episodes(indices):
                earned = rewards(episode.observations) if rewards else episode.rewards
                ended = bool(episode.terminations[-1:].any())
                yield read(episode.observations), episode.actions, earned, ended


def returns_to_go(rewards, delayed=False):
    """Sum of rewards from each step to the end: (T,) -> (T,). Delayed: all reward comes last."""
    if delayed:
        return np.full_like(rewards, rewards.sum())
    return rewards[::-1].cumsum()[::-1].copy()


def choose_scale(returns):
    """What to divide returns by where no task says: a power of ten; the largest becomes 1 to 10."""
    largest = np.abs(returns).max()
    return float(10.0 ** np.floor(np.log10(largest))) if largest > 0 else 1.0


def choose_targets(returns):
    """Target returns where no task says: the best of the data's, and their 90th percentile."""
    chosen = [float(f"{x:.4g}") for x in (returns.max(), np.percentile(returns, 90))]
    return chosen if chosen[0] != chosen[1] else chosen[:1]


def choose_home(obs, device):
    """Where trajectories live: on the device, or on the CPU if their frames would fill a GPU."""
    if torch.device(device).type == "cuda" and obs.dtype == np.uint8:
        free, _ = torch.cuda.mem_get_info(device)
        if obs.nbytes > GPU_SHARE * free:
            return "cpu"
    return device


def load_trajectories(
    dataset,
    action_space,
    scale=None,
    ratio=1.0,
    mode="normal",
    seed=0,
    device="cpu",
    rewards=None,
):
    """Read episodes of a Minari dataset into flat tensors, on the device or where choose_home says.

    dataset: minari.MinariDataset; action_space: the environment's, whose bounds are where actions
    become -1 and 1; scale: what returns-to-go are divided by, None for choose_scale; ratio: share
    of this dataset's episodes to keep, int(ratio * E) and at least one, drawn without replacement
    by the seed; mode "normal" or "delayed", where an episode's whole reward comes at its last step,
    the paper's sparse variant; rewards: as in read_episodes.
    Raises UserError if shapes differ, values are not finite, or an episode is empty.
    """
    what, space = f"dataset {dataset.spec.dataset_id}", dataset.observation_space
    E = dataset.total_episodes
    if E == 0:
        raise UserError(f"{what} holds no episode")
    keep = max(1, int(ratio * E + 1e-9))  # 1e-9: 0.29 * 100 is 28.999999999999996
    chosen = dataset.episode_indices[np.random.default_rng(seed).choice(E, keep, replace=False)]
    chosen = np.sort(chosen)
    with readable(dataset):
        lengths = [int(m["total_steps"]) for m in dataset.storage.get_episode_metadata(chosen)]
    N, frames = sum(lengths), is_picture(space)
    if min(lengths) < 0:
        raise UserError(f"{what}: an episode says it has {min(lengths)} steps")
    # all memory at once: a million frames are 7 GB, and there must be no second copy of them
    row = math.prod(observation_shape(space)) * (1 if frames else 4)
    check_memory((N + keep) * (row + 64), f"{what}: its {N:,} steps")  # 64: of the smaller tensors
    obs = np.empty((N, *observation_shape(space)), np.uint8 if frames else np.float32)
    last_obs = np.empty((keep, *obs.shape[1:]), obs.dtype)
    act, rtg, reward, timestep, end, terminated, returns = [], [], [], [], [], [], []
    n = 0
    episodes = zip(chosen, lengths, read_episodes(dataset, chosen, rewards), strict=True)
    for i, T, (o, a, r, ended) in tqdm(episodes, "reading", keep, delay=2, leave=False):
        if np.size(r) == 0:
            raise UserError(f"{what}: episode {i} is empty")
        shapes = [np.shape(r), o.shape, np.shape(a)]
        expected = [(T,), (T + 1, *obs.shape[1:]), (T, *action_space.shape)]
        if shapes != expected:
            found, wanted = ", ".join(map(str, shapes)), ", ".join(map(str, expected))
            kinds = "rewards, observations and actions"
            raise UserError(f"{what}: episode {i} has {kinds} {found}; expected {wanted}")
        if wrong := {np.asarray(x).dtype.kind for x in (r, o, a)} - set("fiub"):
            raise UserError(f"{what}: episode {i} has values that are no numbers ({min(wrong)})")
        r = np.asarray(r, np.float64)
        for kind, values in (("observation", o), ("action", a), ("reward", r)):
            with np.errstate(over="ignore"):  # what is beyond 32 bits becomes infinite
                if not np.isfinite(np.asarray(values, np.float32)).all():
                    raise UserError(f"{what}: episode {i} has a NaN or infinite {kind}")
        obs[n : n + T] = o[:T]
        last_obs[len(returns)] = o[T]  # has no action
        try:
            act.append(encode_actions(action_space, a))
        except UserError as error:
            raise UserError(f"{what}: episode {i}'s actions: {error}") from error
        rtg.append(returns_to_go(r, mode == "delayed"))
        reward.append(r if mode == "normal" else np.append(np.zeros(T - 1), r.sum()))
        terminated.append(np.append(np.zeros(T - 1, bool), ended))
        n += T
        timestep.append(np.arange(T))
        end.append(np.full(T, n))
        returns.append(r.sum())

    returns = np.array(returns)
    mean = std = np.zeros(0)
    if not frames:
        mean, std = obs.mean(0, np.float64), obs.std(0, np.float64) + 1e-6
        for i in range(0, N, ROWS_AT_A_TIME):
            obs[i : i + ROWS_AT_A_TIME] = (obs[i : i + ROWS_AT_A_TIME] - mean) / std
        last_obs = (last_obs - mean) / std
    scale = scale or choose_scale(returns)
    if not np.abs(returns / scale).max() < np.finfo(np.float32).max:
        raise UserError(f"{what}: returns reach {np.abs(returns).max():g}, too much for 32 bits")
    home = choose_home(obs, device)

    def tensor(x, dtype=None):
        return torch.as_tensor(x).to(home, dtype)

    return Trajectories(
        obs=tensor(obs),
        act=tensor(np.concatenate(act)),
        rtg=tensor(np.concatenate(rtg) / scale, torch.float32)[:, None],
        timestep=tensor(np.concatenate(timestep), torch.int64),
        end=tensor(np.concatenate(end), torch.int64),
        obs_mean=torch.as_tensor(mean).to(device, torch.float32),
        obs_std=torch.as_tensor(std).to(device, torch.float32),
        scale=scale,
        returns=returns,
        lengths=np.array(lengths),
        dataset_id=dataset.spec.dataset_id,
        reward=tensor(np.concatenate(reward), torch.float32),
        terminated=tensor(np.concatenate(terminated)),
        last_obs=tensor(last_obs, None if frames else torch.float32),
    )
