"""Write a Minari dataset, whole or not at all, with no more than an episode in memory.

Minari's own API writes it, from a generator of episodes, into a folder aside; there the file is
compressed, and then the folder is renamed. about.json, beside Minari's files, says how the dataset
was made, its statistics, and what share of a full dataset it is (see data.find_dataset).
"""

import os
import warnings
from importlib.metadata import version
from pathlib import Path

import h5py
import numpy as np

from data import minari_folder
from files import folder_aside, locked, write_atomically, write_json
from plumbing import UserError


def dataset_folder(dataset_id):
    """Where a dataset of this id goes in Minari's folder. Raises UserError if it is taken."""
    import minari

    folder = Path(minari.storage.get_dataset_path(dataset_id))
    check_free(folder)
    return folder


def check_free(folder):
    """Raises UserError if there is something in a dataset's place already."""
    if folder.exists():
        raise UserError(f"{folder} exists already; delete it first if you want to make it again")


def compress(path):
    """Rewrite an HDF5 file with its datasets gzipped; Minari reads it as before."""

    def copy_to(target):
        def copy(name, item):
            if isinstance(item, h5py.Dataset):
                squeezed = {"compression": "gzip", "shuffle": True} if item.shape else {}
                new = target.create_dataset(name, data=item[()], dtype=item.dtype, **squeezed)
            else:
                new = target.require_group(name)
            for key, value in item.attrs.items():
                new.attrs[key] = value

        return copy

    def write(file):
        with h5py.File(path, "r") as source, h5py.File(file, "w") as target:
            source.visititems(copy_to(target))
            for key, value in source.attrs.items():
                target.attrs[key] = value

    write_atomically(path, write)


def write_dataset(folder, dataset_id, episodes, env_spec, spaces, reference, about, **metadata):
    """Write episodes as the Minari dataset `dataset_id` into `folder`, which must not exist.

    episodes: an iterable of minari's EpisodeBuffer, taken one at a time; env_spec: gymnasium's, of
    the environment to evaluate in; spaces: observation and action space of the data; reference:
    mean returns of a random policy and of an expert, or (None, None); about: what about.json is to
    say besides the statistics; metadata: algorithm_name, author, description and so on, for Minari.
    Returns what about.json says. Raises UserError for no episodes, or where nothing can be written.
    """
    import minari

    check_free(folder)
    returns, lengths = [], []

    def counted():
        for episode in episodes:
            returns.append(float(np.sum(episode.rewards)))
            lengths.append(len(episode.rewards))
            yield episode
        if not returns:
            raise UserError(f"no whole episode for {dataset_id}")

    module = env_spec.entry_point.partition(".")[0]
    engine = {"ale_py": "ale-py", "gymnasium_robotics": "gymnasium-robotics"}.get(module, "mujoco")
    versions = {p: version(p) for p in ("minari", "gymnasium", "numpy", engine)}
    random, expert = reference
    try:
        with (
            locked(folder),
            folder_aside(folder) as aside,
            minari_folder(aside),
            warnings.catch_warnings(),
        ):
            check_free(folder)  # another process may have been writing it until now
            warnings.simplefilter("ignore")  # Minari misses an address to write to
            minari.create_dataset_from_buffers(
                dataset_id,
                counted(),
                env=env_spec,
                eval_env=env_spec,
                observation_space=spaces[0],
                action_space=spaces[1],
                ref_min_score=random,
                ref_max_score=expert,
                requirements=[f"{p}=={versions[p]}" for p in ("gymnasium", engine)],
                jpeg_encoding=False,  # what is learnt from is what the environment shows
                **metadata,
            )
            made = Path(aside) / dataset_id
            compress(made / "data" / "main_data.hdf5")
            about = about | statistics(np.array(returns), np.array(lengths), reference, versions)
            write_json(made / "about.json", about)
            os.rename(made, folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    return about


def statistics(returns, lengths, reference, versions):
    """What about.json says of the episodes themselves."""
    random, expert = reference
    scored = expert is not None
    return {
        "episodes": len(lengths),
        "steps": int(lengths.sum()),
        "return_mean": float(returns.mean()),
        "return_std": float(returns.std()),
        "return_min": float(returns.min()),
        "return_max": float(returns.max()),
        "length_mean": float(lengths.mean()),
        "score": 100 * (returns.mean() - random) / (expert - random) if scored else None,
        "versions": versions,
    }
