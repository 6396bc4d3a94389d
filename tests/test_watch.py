"""Films and attention: what is drawn is what the environment draws, and what transformers attends.

Films of MuJoCo need EGL or OSMesa, and skip where a machine has neither; Atari's need nothing.
"""

from functools import partial
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from PIL import Image
from runs import SHORT, call
from transformers import GPT2Config, GPT2Model

import train
from evaluate import rollout
from experiments import watch
from load_gpt2 import load_gpt2
from utils import UserError

av = pytest.importorskip("av")
SETTINGS = {"context": 4, "scale": 1000.0, "mode": "normal", "dtype": "fp32", "episode_limit": 12}
STATS = torch.zeros(11), torch.ones(11)


@pytest.fixture
def gl(monkeypatch):
    """Skips where MuJoCo cannot be drawn."""
    monkeypatch.setenv("MUJOCO_GL", "")  # and afterwards as it was
    try:
        watch.choose_gl()
    except UserError as error:
        pytest.skip(str(error))


def frames_of(path):
    with av.open(str(path)) as file:
        rate = float(file.streams.video[0].average_rate)
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)], rate


def play(model, environment, stats=STATS, seed=7, **other):
    return partial(
        rollout, model, environment, SimpleNamespace(**SETTINGS | other), stats, seed=seed
    )


class Falls(torch.nn.Module):
    """A hopper's policy that pushes as its target says: episodes end at different steps."""

    def observe(self, rtg, obs, timestep):
        return rtg[:, :, None].expand(-1, -1, 2, 3)

    def remember(self, act, timestep):
        return act[:, :, None]

    def act(self, tokens):
        return tokens[:, -1]


def test_a_film_shows_what_the_environment_draws(hopper, gl, tmp_path):
    paths = tmp_path / "out.mp4", tmp_path / "out.gif"
    falls = play(Falls(), hopper, seed=3, episode_limit=0, mode="delayed")
    results = watch.film(falls, hopper, [1000.0, -500.0], *paths)
    lengths = [r["lengths"][0] for r in results]
    frames, rate = frames_of(paths[0])
    # hopper's 125 steps a second: every fourth in a video, every twelfth in a GIF, and the last
    assert (len(frames), rate) == (-(-max(lengths) // 4) + 1, 31.25)
    assert frames[0].shape == (480 + 60, 2 * 480, 3)
    gif = Image.open(paths[1])
    assert gif.n_frames == -(-max(lengths) // 12) + 1
    assert (gif.height, gif.info["duration"]) == (200, 100)  # milliseconds
    env = gym.make("Hopper-v5", render_mode="rgb_array", camera_name="track")
    env.reset(seed=3)
    expected = env.render().astype(float)
    env.close()
    early = int(np.argmin(lengths))
    after = -(-lengths[early] // 4) + 1  # the first frame drawn after its end
    panels = np.split(np.array([frames[0], frames[after], frames[-1]], float), 2, axis=2)
    for i, (first, middle, last) in enumerate(panels):
        assert np.abs(first[60:] - expected).mean() < 4  # H.264 is not exact
        assert np.abs(first[:60] - middle[:60]).max() > 50  # something is written, and it changes
        assert (np.abs(middle - last).mean() < 1.5) == (i == early)  # what has ended stands still


def test_the_command_draws_what_a_checkpoint_does(tmp_path):
    call(train.main, *SHORT, "--steps", 2, "--lm-coef", 0, "--out", tmp_path, "--name", "run")
    words = [tmp_path / "run/best.pt", "--attention", tmp_path / "out.png", "--at"]
    with pytest.raises(UserError, match="--at"):
        call(watch.main, *words, 10_000)
    call(watch.main, *words, 2)
    picture = np.asarray(Image.open(tmp_path / "out.png").convert("RGB"))
    assert picture.shape[1] > 150 * 4.5  # inches
    assert picture.min() < 100 < 250 < picture.max()


# --- attention -----------------------------------------------------------------------------------


def test_attention_is_that_of_transformers(tmp_path):
    sizes = dict(vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    theirs = GPT2Model(GPT2Config(**sizes, attn_implementation="eager")).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path)
    torch.nn.init.zeros_(theirs.wpe.weight)  # trajectories have no positions
    x = torch.randn(1, 12, 32)
    expected = theirs(inputs_embeds=x, output_attentions=True).attentions  # (1, H, T, T) a layer
    found = watch.attention_weights(load_gpt2(str(tmp_path)).eval(), x)
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=1e-4)
