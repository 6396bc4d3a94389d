"""What an environment gives and takes, as the arrays a model reads and writes.

The same functions serve recorded data and live environments, so that the two cannot differ.
Observations become flat vectors or, if they are pictures, small grey frames. Actions become numbers
in [-1, 1] or, if they are choices, indices from 0. Leading dimensions (a batch, time) are kept.
"""

import json
import math
import re
from functools import cache

import gymnasium as gym
import numpy as np
import torch

from plumbing import UserError, printable

FRAME = 84  # rows and columns of a frame (Mnih et al. 2015, doi 10.1038/nature14236)
GREY = (299, 587, 114)  # red, green and blue in 1000 parts of luma (ITU-R BT.601)
SMALLEST_PICTURE = 32  # rows and columns; smaller arrays of bytes are no pictures (Minari's rule)
LONGEST_VECTOR = 10_000  # numbers of a flat observation; more is no vector by intention
MOST_NUMBERS = 1 << 24  # of one part of an observation, pictures too, that a file may describe


def read_space(text):
    """A gymnasium space from the JSON that Minari writes of it.

    Raises UserError for one of absurd size, before it is made, and what JSON, gymnasium and Minari
    raise for one that makes no sense.
    """
    from minari.serialization import deserialize_space

    told = json.loads(text) if isinstance(text, str) else text

    def check(part):
        for value in part.values() if isinstance(part, dict) else part:
            if isinstance(value, (dict, list)):
                check(value)
        if isinstance(part, dict) and "type" in part:
            kind = part.get("dtype", "int8")  # of any size, for numpy: "(1000000,)f8" is a number
            if not re.fullmatch(r"u?int(8|16|32|64)|float(16|32|64)|bool", str(kind)):
                raise UserError(f"a space of {printable(str(kind)[:40])} is not supported")
            shape = part.get("shape", [])
            n = part.get("n", 0)
            counts = n if isinstance(n, list) else [n]
            if any(type(size) is not int or size < 0 for size in [*shape, *counts]):
                raise UserError("a space whose sizes are no whole numbers is not supported")
            sizes = [math.prod(shape), *counts]
            if max(sizes) > MOST_NUMBERS:
                raise UserError(f"a space of {max(sizes)} numbers or choices is not supported")
            picture = kind == "uint8" and len(shape) == 3 and min(shape[:2]) >= SMALLEST_PICTURE
            if picture and shape[2] not in (1, 3):  # Minari would take them for JPEG's bytes
                raise UserError(f"pictures of {shape[2]} colours are not supported: 1 or 3 are")

    check(told)
    return deserialize_space(told)


def shapes_of(space):
    """A space's shape as a list; of one with parts a dictionary, of each part's; None of others."""
    if isinstance(space, gym.spaces.Dict):
        return {name: shapes_of(part) for name, part in space.items()}
    if isinstance(space, gym.spaces.Tuple):
        return {str(i): shapes_of(part) for i, part in enumerate(space)}
    return None if space.shape is None else list(space.shape)


# --- observations --------------------------------------------------------------------------------


def is_picture(space):
    """Whether observations are pictures: bytes (H, W), (H, W, 1) or (H, W, 3)."""
    return (
        isinstance(space, gym.spaces.Box)
        and space.dtype == np.uint8
        and (len(space.shape) == 2 or (len(space.shape) == 3 and space.shape[2] in (1, 3)))
        and min(space.shape[:2]) >= SMALLEST_PICTURE
    )


def observation_shape(space):
    """Shape of an observation as the model reads it: (O,) numbers, or (84, 84) bytes of a picture.

    Raises UserError for a space that is neither a picture nor a vector of sensible length.
    """
    if is_picture(space):
        return (FRAME, FRAME)
    size = flat_size(space)
    if size > LONGEST_VECTOR:
        raise UserError(
            f"observations {space} are {size} numbers; pictures must be bytes of shape (H, W), "
            f"(H, W, 1) or (H, W, 3), and vectors at most {LONGEST_VECTOR} long"
        )
    return (size,)


def flat_size(space):
    """Numbers in a flat observation. Raises UserError for a space that has no flat form."""
    if isinstance(space, gym.spaces.Dict):
        return sum(flat_size(part) for part in space.spaces.values())
    if isinstance(space, gym.spaces.Tuple):
        return sum(flat_size(part) for part in space.spaces)
    if isinstance(space, gym.spaces.Discrete):
        return int(space.n)
    if isinstance(space, (gym.spaces.Box, gym.spaces.MultiBinary)):
        return math.prod(space.shape)
    raise UserError(f"observations with {space} in them cannot be learnt from")


def flatten(space, values):
    """Observations (..,) of a space -> (.., O): dictionaries by key in the space's order.

    A choice becomes one-hot. For a single observation it is gymnasium.spaces.flatten. What `values`
    holds beyond the space is left out. Raises UserError where a part is missing.
    """
    if isinstance(space, gym.spaces.Dict):
        missing = [key for key in space.spaces if key not in values]
        if missing:
            raise UserError(f"observations lack {missing[0]!r}; they have {', '.join(values)}")
        parts = [flatten(part, values[key]) for key, part in space.spaces.items()]
        return np.concatenate(parts, axis=-1)
    if isinstance(space, gym.spaces.Tuple):
        parts = [flatten(part, v) for part, v in zip(space.spaces, values, strict=True)]
        return np.concatenate(parts, axis=-1)
    values = np.asarray(values)
    if isinstance(space, gym.spaces.Discrete):
        return (chosen(space, values)[..., None] == np.arange(space.n)).astype(np.float32)
    return values.reshape(*values.shape[: values.ndim - len(space.shape)], -1)


@cache
def area_weights(size):
    """How much of each of `size` pixels falls into each of FRAME: (FRAME, size) whole numbers.

    A row sums to size / gcd(size, FRAME). Being whole, they make the averages below exact in fp32,
    so that a frame comes out the same whatever else is in its batch, and on any device.
    """
    ours = torch.arange(FRAME)[:, None] * size  # where each one starts, in pixels of both sizes
    theirs = torch.arange(size) * FRAME
    overlap = torch.minimum(ours + size, theirs + FRAME) - torch.maximum(ours, theirs)
    return (overlap.clamp(min=0) // math.gcd(size, FRAME)).float()


def shrink(pictures):
    """Pictures (.., H, W), (.., H, W, 1) or (.., H, W, 3) -> grey frames (.., 84, 84), all uint8.

    pictures: array or tensor. Colours are weighed by GREY, pixels averaged by area. Pictures that
    are grey and 84 x 84 already stay as they are. Always in fp32, whatever autocast is around it.
    """
    x = torch.as_tensor(pictures)
    with torch.autocast(x.device.type, enabled=False):
        if x.shape[-1] in (1, 3):  # colour, or a channel of its own
            grey = torch.tensor(GREY, dtype=torch.float32)
            x = (x.float() @ grey / 1000).round() if x.shape[-1] == 3 else x[..., 0]
        if x.shape[-2:] == (FRAME, FRAME):
            return x.to(torch.uint8)
        rows, columns = area_weights(x.shape[-2]), area_weights(x.shape[-1])
        x = rows @ x.float() @ columns.T  # (.., 84, 84)
        return (x / (rows[0].sum() * columns[0].sum())).round().to(torch.uint8)


def check_fit(what, ours, theirs, bounds=False):
    """Raises UserError unless data of space `ours` can come from an environment's space `theirs`.

    A dictionary may hold less than the environment shows, and pictures, where they are all that is
    seen, may differ in size. bounds: whether a Box must have the same, as actions must.
    """
    fits = type(ours) is type(theirs)
    if fits and isinstance(ours, gym.spaces.Dict):
        for key, part in ours.spaces.items():
            check_fit(f"{what}, {key!r},", part, theirs.spaces.get(key))
            if is_picture(part):
                raise UserError(f"{what}, {key!r}, are pictures in a dictionary: not supported")
    elif fits and isinstance(ours, gym.spaces.Tuple):
        fits = len(ours.spaces) == len(theirs.spaces)
        for i, part in enumerate(ours.spaces if fits else ()):
            check_fit(f"{what}, {i},", part, theirs.spaces[i])
    elif fits and isinstance(ours, gym.spaces.Discrete):
        fits = (ours.n, ours.start) == (theirs.n, theirs.start)
    elif fits and not (is_picture(ours) and is_picture(theirs)):
        fits = ours.shape == theirs.shape and is_picture(ours) == is_picture(theirs)
        if fits and bounds and isinstance(ours, gym.spaces.Box):
            fits = np.allclose(ours.low, theirs.low) and np.allclose(ours.high, theirs.high)
    if not fits:
        raise UserError(f"{what} do not fit: they are {ours}, the environment's are {theirs}")


def chosen(space, values):
    """Values of a Discrete as indices from 0. Raises UserError for one that the space has not."""
    index = np.asarray(values).astype(np.int64) - space.start
    if index.size and not 0 <= index.min() <= index.max() < space.n:
        raise UserError(f"there are values outside of {space}")
    return index


# --- actions -------------------------------------------------------------------------------------


def is_choice(space):
    """Whether an action is one of n, rather than numbers."""
    return isinstance(space, gym.spaces.Discrete)


def action_size(space):
    """A, numbers in an action, or n, its choices. Raises UserError for any other kind of space."""
    size = None
    if is_choice(space):
        size = int(space.n)
    elif isinstance(space, gym.spaces.Box) and np.issubdtype(space.dtype, np.floating):
        size = math.prod(space.shape)
    if size is not None and size <= LONGEST_VECTOR:
        return size
    if size is not None:
        raise UserError(f"actions {space} are {size}, more than the {LONGEST_VECTOR} supported")
    raise UserError(f"actions {space} are neither numbers (Box) nor one choice (Discrete)")


def bounds(space):
    """Middle and half-width of a Box of actions, each (A,); 0 and 1 where it has no bounds."""
    low, high = (np.asarray(b, np.float64).ravel() for b in (space.low, space.high))
    bounded = np.isfinite(low) & np.isfinite(high) & (low < high)
    low, high = np.where(bounded, low, -1.0), np.where(bounded, high, 1.0)
    return (low + high) / 2, (high - low) / 2


def encode_actions(space, values):
    """Recorded actions as the model reads them.

    Of a Box: (.., A) float32, -1 and 1 at its bounds. Of a Discrete: (..,) int64 from 0.
    """
    values = np.asarray(values)
    if is_choice(space):
        return chosen(space, values)
    middle, half = bounds(space)
    values = values.reshape(*values.shape[: values.ndim - len(space.shape)], -1)
    return ((values - middle) / half).astype(np.float32)


def decode_actions(space, actions):
    """What the model chose -> actions of the environment, within its bounds: encode's inverse."""
    if is_choice(space):
        return actions + space.start
    middle, half = bounds(space)
    lead = actions.shape[:-1]
    values = (actions.astype(np.float64) * half + middle).reshape(*lead, *space.shape)
    return values.clip(space.low, space.high).astype(space.dtype)
