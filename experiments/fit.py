"""How well policies fit the episodes they learnt from, and episodes that they never saw.

    python -m experiments.fit runs/<run> runs/<run> --json fit.json

Prints each run's action error (the action loss of training, without dropout) on windows of the
share of the dataset that --ratio and --seed drew, and on windows of the rest.
"""

from dataclasses import dataclass
from pathlib import Path

import minari
import numpy as np
import torch
import tyro

from data import find_dataset, load_trajectories, sample_windows
from model import Objective
from tasks import TASKS, Task
from train import Config, load_policy, read_checkpoint
from utils import UserError, choose_device, run_command, write_json

BATCH = 256  # windows at a time


@dataclass
class Arguments:
    runs: tyro.conf.Positional[list[str]]  # run folders, or checkpoints
    batches: int = 16  # of 256 windows, of each part
    device: str | None = None  # cuda or cpu (None: cuda if there is one)
    json: str | None = None  # write the rows to this file, too


@torch.no_grad()
def action_error(model, data, c, stats, batches):
    """The mean action loss over so many batches of windows of Trajectories, whose observations are
    normalised as the run's were: by stats, its mean and std, each (O,)."""
    if data.obs.dim() == 2:  # frames are not normalised
        data.obs = (data.obs * data.obs_std + data.obs_mean - stats[0]) / stats[1]
    objective, generator = Objective(model.eval()), torch.Generator(data.obs.device).manual_seed(0)
    losses, device = [], stats[0].device  # the model's; frames may be in the host's memory
    for _ in range(batches):
        window = [x.to(device) for x in sample_windows(data, BATCH, c.context, generator)]
        with torch.autocast(device.type, torch.bfloat16, c.dtype == "bf16"):
            losses.append(objective(window, window[-1].sum(), None)[0].item())
    return float(np.mean(losses))


def measure(path, device, batches):
    """A run's row: its settings that matter, "training" and "held_out" errors. Raises UserError."""
    saved = read_checkpoint(path)
    model, environment = load_policy(path, saved)
    c = Config(**saved["settings"])
    task = TASKS.get(c.env, Task())
    dataset, share, _ = find_dataset(c.env, task, c.ratio, saved["dataset"], c.quality)
    E, ratio = dataset.total_episodes, c.ratio / share
    # as data.load_trajectories draws them
    drawn = np.random.default_rng(c.seed).choice(E, max(1, int(ratio * E + 1e-9)), replace=False)
    if len(drawn) == E:
        raise UserError(f"{path} learnt from every episode of {saved['dataset']}; none is held out")
    stats = [saved[name].to(device) for name in ("obs_mean", "obs_std")]
    row = {"run": str(path), "env": c.env, "method": c.method, "ratio": c.ratio, "seed": c.seed}
    for part, episodes in (("training", drawn), ("held_out", np.delete(np.arange(E), drawn))):
        chosen = dataset.episode_indices[np.sort(episodes)]
        some = minari.MinariDataset(dataset.spec.data_path, episode_indices=chosen)
        how = {"mode": c.mode, "rewards": task.rewards, "device": device}
        data = load_trajectories(some, environment.action_space, c.scale, **how)
        row[part] = action_error(model.to(device), data, c, stats, batches)
    return row


def main():
    args = tyro.cli(Arguments, description=__doc__)
    device, rows, width = choose_device(args.device), [], max(map(len, args.runs))
    print(f"{'run':{width}} {'training':>10} {'held out':>10}")
    for path in args.runs:
        rows.append(row := measure(Path(path), device, args.batches))
        print(f"{path:{width}} {row['training']:10.5f} {row['held_out']:10.5f}", flush=True)
        if args.json:
            write_json(args.json, rows)


if __name__ == "__main__":
    run_command(main)
