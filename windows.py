"""Windows: trajectories as flat tensors -> batches of steps in a row.

All transitions of all episodes stand end to end in a few tensors on the training device, and each
transition knows where its episode ends. A batch of windows is then one tensor of indices: no Python
per sample. Drawing a window's first step uniformly over transitions is what the Decision
Transformer does in two draws, an episode in proportion to its length, then a place in it.

Observations that are pictures are kept once each, as bytes. A state is then STACK frames in a row,
and neighbouring states share all but one of them, so a window of K states is K + STACK - 1 frames.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

STACK = 4  # frames in a state, where observations are pictures (Mnih et al. 2015)


@dataclass
class Trajectories:
    """N transitions of E episodes, end to end, on one device."""

    obs: torch.Tensor  # (N, O) float32, (observation - obs_mean) / obs_std; or (N, 84, 84) uint8
    act: torch.Tensor  # (N, A) float32, in [-1, 1] where the environment has bounds; or (N,) int64
    rtg: torch.Tensor  # (N, 1) float32, sum of rewards from here to the episode's end, / scale
    timestep: torch.Tensor  # (N,) int64, 0 at an episode's start
    end: torch.Tensor  # (N,) int64, index one past the last transition of the same episode
    obs_mean: torch.Tensor  # (O,) of the transitions in use; (0,) where obs are frames
    obs_std: torch.Tensor  # (O,) likewise, + 1e-6
    scale: float  # what returns-to-go were divided by
    returns: np.ndarray  # (E,) undiscounted, undivided
    lengths: np.ndarray  # (E,) transitions
    dataset_id: str = ""  # Minari's, of where they are from
    # what experiments/baselines.py reads besides, and windows do not
    reward: torch.Tensor | None = None  # (N,) float32, undivided
    terminated: torch.Tensor | None = None  # (N,) bool, an end that was no cut: nothing follows
    last_obs: torch.Tensor | None = None  # (E, O) or (E, 84, 84), after an episode's last action

    def __len__(self):
        return len(self.act)

    def digest(self):
        """SHA-256 that tells these transitions from others: of all numbers, and a few frames."""
        digest = hashlib.sha256()
        frames = self.obs.dim() == 3
        obs = self.obs[:: max(1, len(self) // 1000)] if frames else self.obs
        for tensor in (obs, self.act, self.rtg, self.end):
            digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()


def sample_windows(data, batch, context, generator):
    """A batch of windows of up to `context` consecutive steps, each within one episode.

    The first step is uniform over all transitions. A window that meets its episode's end is padded
    on the right with repeats of the last step. generator: a torch.Generator on the data's device.
    Returns rtg (B, K, 1), obs (B, K, O), act (B, K, A) or (B, K), timestep (B, K) and valid (B, K)
    bool. Where obs are frames they are (B, K + STACK - 1, 84, 84), the state of step k being frames
    k to k + STACK - 1, black where they would be from before the episode.
    """
    device = data.obs.device
    start = torch.randint(len(data), (batch,), generator=generator, device=device)
    index = start[:, None] + torch.arange(context, device=device)  # (B, K)
    end = data.end[start][:, None]  # (B, 1)
    valid = index < end
    index = torch.minimum(index, end - 1)
    if data.obs.dim() == 2:
        obs = data.obs[index]
    else:
        before = start[:, None] - torch.arange(STACK - 1, 0, -1, device=device)  # (B, 3)
        first = (start - data.timestep[start])[:, None]  # (B, 1), where the episode begins
        obs = data.obs[torch.cat([before.clamp(min=first), index], dim=1)]  # (B, K + 3, 84, 84)
        obs[:, : STACK - 1][before < first] = 0
    return data.rtg[index], obs, data.act[index], data.timestep[index], valid


def valid_steps(valid, world):
    """How many steps the action loss is a mean over: valid (B, K) bool -> scalar tensor.

    Under DDP it is the mean over processes: gradients are averaged between them, and only so is
    that average the gradient of the joined batch, whose windows are not equally long.
    """
    count = valid.sum().float()
    if world > 1:
        dist.all_reduce(count)
        count /= world
    return count


def describe_window(window):
    """What a batch of windows holds, as plain numbers: for a step that went wrong."""
    numbers = {"windows": len(window[-1]), "steps": int(window[-1].sum())}
    for name, x in zip(("rtg", "obs", "act", "timestep"), window, strict=False):
        finite = x[x.isfinite()].float()
        numbers[name] = {"not_finite": x.numel() - finite.numel()}
        if finite.numel():
            numbers[name] |= {"min": finite.min().item(), "max": finite.max().item()}
            numbers[name] |= {"mean": finite.mean().item()}
    return numbers


def ahead(make):
    """Yield make() again and again, each made in a thread while the one before is in use."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(make)
        while True:
            made, following = following.result(), thread.submit(make)
            yield made
