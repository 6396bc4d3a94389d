"""spaces.py against Gymnasium's own flattening, OpenCV's area average, and by round trips."""

import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces as gs
from hypothesis import given
from hypothesis import strategies as st

from plumbing import UserError
from spaces import (
    action_size,
    check_fit,
    decode_actions,
    encode_actions,
    flat_size,
    flatten,
    is_picture,
    observation_shape,
    shrink,
)

NESTED = gs.Dict(
    {
        "observation": gs.Box(-1, 1, (3,)),
        "goal": gs.Dict({"kettle": gs.Box(-1, 1, (2, 2)), "burner": gs.Discrete(4, start=2)}),
        "pair": gs.Tuple((gs.MultiBinary(3), gs.Box(-5, 5, ()))),
    }
)


@pytest.mark.parametrize(
    "space",
    [NESTED, gs.Box(-1, 1, (2, 3)), gs.Discrete(5), gs.MultiBinary(4), gs.Discrete(3, start=-1)],
)
def test_flattening_is_gymnasiums_and_keeps_leading_dimensions(space):
    space.seed(0)
    samples = [space.sample() for _ in range(6)]
    expected = np.stack([gs.flatten(space, sample) for sample in samples])
    np.testing.assert_allclose(flatten(space, samples[0]), expected[0])
    batch = gym.vector.utils.concatenate(
        space, samples, gym.vector.utils.create_empty_array(space, 6)
    )
    np.testing.assert_allclose(flatten(space, batch), expected)  # a vector environment's form
    assert expected.shape[1] == flat_size(space)
    back = [gs.unflatten(space, row) for row in flatten(space, batch).astype(np.float64)]
    for sample, again in zip(samples, back, strict=True):
        np.testing.assert_allclose(gs.flatten(space, sample), gs.flatten(space, again))


def test_what_the_data_do_not_have_is_left_out_and_what_is_missing_is_said():
    part = gs.Dict({"observation": NESTED["observation"]})
    NESTED.seed(1)
    sample = NESTED.sample()
    np.testing.assert_array_equal(flatten(part, sample), sample["observation"])
    with pytest.raises(UserError, match="lack 'pair'"):
        flatten(NESTED, {k: v for k, v in sample.items() if k != "pair"})
    check_fit("data", part, NESTED)
    with pytest.raises(UserError, match="'observation', do not fit"):
        check_fit("data", gs.Dict({"observation": gs.Box(-1, 1, (4,))}), NESTED)
    with pytest.raises(UserError, match="'other', do not fit"):
        check_fit("data", gs.Dict({"other": gs.Discrete(2)}), NESTED)
    with pytest.raises(UserError, match="do not fit: they are Discrete"):
        check_fit("data", gs.Discrete(3), gs.Discrete(3, start=1))


def test_spaces_without_a_form_are_refused():
    for space in (gs.Text(5), gs.Graph(gs.Box(0, 1), None), gs.Dict({"say": gs.Text(3)})):
        with pytest.raises(UserError, match="cannot be learnt from"):
            observation_shape(space)
    with pytest.raises(UserError, match="pictures must be bytes of shape"):
        observation_shape(gs.Box(0, 255, (4, 84, 84), np.uint8))  # a stack is no picture
    for space in (gs.MultiDiscrete([2, 3]), gs.Dict({}), gs.Box(0, 5, (2,), np.int64)):
        with pytest.raises(UserError, match="neither numbers"):
            action_size(space)


# --- pictures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(210, 160), (96, 96), (240, 256), (84, 160), (64, 48)])
def test_frames_are_the_area_average_of_luma(size):
    """OpenCV's INTER_AREA, which Gymnasium's AtariPreprocessing uses, agrees but for rounding."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (7, 9, 3), np.uint8)
    picture = cv2.resize(small, size[::-1], interpolation=cv2.INTER_CUBIC)
    luma = picture.astype(np.float64) @ [0.299, 0.587, 0.114]
    ours = shrink(picture)
    assert ours.dtype == torch.uint8
    assert ours.shape == (84, 84)
    # by definition: every pixel cut into 84 x 84 parts, the parts averaged in blocks
    exact = np.repeat(luma, 84, axis=0).reshape(84, size[0], size[1]).mean(1)
    exact = np.repeat(exact, 84, axis=1).reshape(84, 84, size[1]).mean(2)
    assert np.abs(ours.numpy() - exact).max() <= 1.01  # half for each of the two roundings
    if min(size) >= 84:  # smaller pictures OpenCV enlarges by another rule
        theirs = cv2.resize(luma.round().astype(np.uint8), (84, 84), interpolation=cv2.INTER_AREA)
        assert np.abs(ours.numpy().astype(int) - theirs).max() <= 1


def test_a_frame_is_the_same_alone_and_in_any_batch():
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (40, 210, 160, 3), np.uint8)
    together = shrink(pictures)
    assert torch.equal(together, torch.stack([shrink(p) for p in pictures]))
    assert torch.equal(shrink(pictures.reshape(8, 5, 210, 160, 3)), together.view(8, 5, 84, 84))
    grey = pictures[..., :1]
    assert torch.equal(shrink(grey), shrink(grey[..., 0]))
    done = together.numpy()
    assert torch.equal(shrink(done), together)  # small and grey already


def test_what_counts_as_a_picture():
    assert is_picture(gs.Box(0, 255, (210, 160, 3), np.uint8))
    assert is_picture(gs.Box(0, 255, (84, 84), np.uint8))
    assert not is_picture(gs.Box(0, 255, (128,), np.uint8))  # Atari's memory
    assert not is_picture(gs.Box(0, 255, (7, 7, 3), np.uint8))  # MiniGrid's view
    assert not is_picture(gs.Box(0, 1, (84, 84, 3), np.float32))
    assert observation_shape(gs.Box(0, 255, (128,), np.uint8)) == (128,)
    assert observation_shape(gs.Box(0, 255, (7, 7, 3), np.uint8)) == (147,)


# --- actions -------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.floats(-20, 20, width=32), st.floats(0.125, 20, width=32)), min_size=1),
    st.integers(0, 1000),
)
def test_actions_are_scaled_to_their_bounds_and_back(intervals, seed):
    low = np.array([a for a, _ in intervals], np.float32)
    high = np.array([a + w for a, w in intervals], np.float32)
    space = gs.Box(low, high)
    space.seed(seed)
    actions = np.stack([space.sample() for _ in range(4)])
    encoded = encode_actions(space, actions)
    assert encoded.dtype == np.float32
    assert np.abs(encoded).max() <= 1 + 1e-5
    np.testing.assert_allclose(encode_actions(space, low), -1, atol=1e-5)
    np.testing.assert_allclose(encode_actions(space, high), 1, atol=1e-5)
    back = decode_actions(space, encoded)
    assert back.dtype == space.dtype
    np.testing.assert_allclose(back, actions, rtol=1e-4, atol=1e-4)
    outside = decode_actions(space, encoded + 3)
    assert all(space.contains(action) for action in outside)


def test_actions_without_bounds_shaped_or_chosen():
    unbounded = gs.Box(-np.inf, np.inf, (2,))
    actions = np.array([[3.0, -70.0]], np.float32)
    np.testing.assert_array_equal(encode_actions(unbounded, actions), actions)
    np.testing.assert_array_equal(decode_actions(unbounded, actions), actions)
    shaped = gs.Box(-2, 2, (2, 3))
    assert encode_actions(shaped, np.ones((5, 2, 3))).shape == (5, 6)
    assert decode_actions(shaped, np.zeros((5, 6), np.float32)).shape == (5, 2, 3)
    choice = gs.Discrete(3, start=2)
    encoded = encode_actions(choice, np.array([2, 4, 3]))
    assert encoded.tolist() == [0, 2, 1]
    assert decode_actions(choice, encoded).tolist() == [2, 4, 3]
    assert (action_size(choice), action_size(shaped)) == (3, 6)
    unit = gs.Box(-1, 1, (3,))  # MuJoCo's: nothing changes, to the last bit
    unit.seed(0)
    sample = unit.sample()
    np.testing.assert_array_equal(encode_actions(unit, sample), sample)
