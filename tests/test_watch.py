"""Films and attention: what is drawn is what the environment draws, and what transformers attends.

Films of MuJoCo need EGL or OSMesa, and skip where a machine has neither; Atari's need nothing.
"""

import os
import subprocess
import sys

import av
import gymnasium as gym
import numpy as np
import pytest
import torch
from PIL import Image

from evaluate import rollout
from model import GPT, GPTConfig, LaMo
from plumbing import UserError
from tasks import Environment, find_task
from watch import Film, Gif, LastContext, Mp4, attention_weights, choose_gl, draw_attention, film

SETTINGS = {"context": 4, "scale": 1000.0, "mode": "normal", "dtype": "fp32", "episode_limit": 12}
STATS = torch.zeros(11), torch.ones(11)
TINY = GPTConfig(n_layer=2, n_head=4, n_embd=32, vocab_size=50, block_size=32, dropout=0.0)


@pytest.fixture
def lamo():
    return LaMo(GPT(TINY), (11,), 3)


@pytest.fixture
def drawing(hopper):
    """Skips where MuJoCo cannot be drawn."""
    try:
        choose_gl(hopper)
    except UserError as error:
        pytest.skip(str(error))
    yield hopper
    os.environ.pop("MUJOCO_GL", None)


def frames_of(path):
    with av.open(str(path)) as file:
        rate = float(file.streams.video[0].average_rate)
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)], rate


def play(model, environment, settings=SETTINGS, stats=STATS):
    def bound(targets, episodes, seed, progress=False, **other):
        return rollout(model, environment, settings, stats, targets, episodes, seed, **other)

    return bound


def test_a_film_has_the_frames_and_the_size_it_should(lamo, drawing, tmp_path, capsys):
    paths = {Mp4: str(tmp_path / "out.mp4"), Gif: str(tmp_path / "out.gif")}
    results = film(play(lamo, drawing), drawing, [3600.0, 1800.0, 900.0], 7, paths)
    assert [r["target"] for r in results] == [3600.0, 1800.0, 900.0]
    # hopper's 125 steps a second: every fourth in a video, every tenth in a GIF; the reset is one
    frames, rate = frames_of(tmp_path / "out.mp4")
    assert len(frames) == len([0, 4, 8, 12])
    assert rate == 31.25
    assert frames[0].shape == (480 + 60, 3 * 480, 3)
    gif = Image.open(tmp_path / "out.gif")
    assert gif.n_frames == len([0, 10])
    assert gif.size == (640, 240)
    assert gif.info["duration"] == 80  # milliseconds
    assert "out.mp4: 4 frames of 1440x540, 31.25 a second, for 125 steps" in capsys.readouterr().out
    # below the words is what the environment shows
    env = gym.make("Hopper-v5", render_mode="rgb_array", camera_name="track")
    env.reset(seed=7)
    expected = env.render().astype(float)
    for i in range(3):
        shown = frames[0][60:, 480 * i : 480 * (i + 1)].astype(float)
        assert np.abs(shown - expected).mean() < 4  # H.264 is not exact
        words = frames[0][:60, 480 * i : 480 * (i + 1)]
        assert words.max() > 200  # something is written
        assert (
            np.abs(words[:, :240].astype(int) - frames[3][:60, 480 * i : 480 * i + 240]).max() > 50
        )
    assert np.abs(frames[0][:60, :480].astype(int) - frames[0][:60, 480:960]).max() > 50
    env.close()


def test_an_ended_episode_stands_still_and_says_so(drawing, tmp_path):
    class Falls(torch.nn.Module):
        """Pushes as its target says: the episodes end at different steps."""

        def observe(self, rtg, obs, timestep):
            return rtg[:, :, None].expand(-1, -1, 2, 3)

        def remember(self, act, timestep):
            return act[:, :, None]

        def act(self, tokens):
            return tokens[:, -1]

    asked = []

    class Notes(Film):
        def words(self, i, episode_return, ended):
            asked.append((i, self.step, bool(ended)))
            return super().words(i, episode_return, ended)

    settings = SETTINGS | {"episode_limit": 0, "mode": "delayed"}
    sink = Mp4(str(tmp_path / "out.mp4"), 125)
    watch = Notes([1000.0, -500.0], 125, [sink])
    first, second = play(Falls(), drawing, settings)(
        [1000.0, -500.0], 1, 3, watch=watch, render_mode="rgb_array"
    )
    sink.save()
    lengths = [first["lengths"][0], second["lengths"][0]]
    assert lengths[0] != lengths[1]
    assert max(lengths) < 1000
    for i in (0, 1):
        assert [step for j, step, ended in asked if j == i and ended] == [lengths[i]]
        assert max(step for j, step, _ in asked if j == i) == lengths[i]
    frames, _ = frames_of(tmp_path / "out.mp4")
    early = min((0, 1), key=lambda i: lengths[i])
    after = -(-lengths[early] // 4) + 1  # the first frame drawn after its end
    still = [f[:, 480 * early : 480 * (early + 1)].astype(float) for f in frames[after:]]
    assert len(still) > 1
    assert np.abs(still[0] - still[-1]).mean() < 1.5


def test_atari_is_drawn_without_opengl(tmp_path, monkeypatch):
    _, task = find_task("pong")
    env = gym.make(task.env_id)
    pong = Environment(env.spec, env.observation_space, env.action_space, -20.7, 9.3)
    monkeypatch.setattr("subprocess.run", None)  # no probe for OpenGL
    model = LaMo(GPT(TINY), (84, 84), 6, discrete=True)
    settings = SETTINGS | {"scale": 1.0, "episode_limit": 6}
    stats = torch.zeros(0), torch.zeros(0)
    film(play(model, pong, settings, stats), pong, [20.0], 1, {Mp4: str(tmp_path / "out.mp4")})
    frames, _ = frames_of(tmp_path / "out.mp4")
    assert frames[0].shape[1] == 2 * 160  # enlarged
    env.reset(seed=1)
    picture = frames[0][-2 * 210 :].astype(float)
    expected = env.unwrapped.ale.getScreenRGB().repeat(2, 0).repeat(2, 1)
    assert np.abs(picture - expected).mean() < 4


def test_what_cannot_be_drawn_is_one_line(hopper, lamo, tmp_path, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "vulkan")
    with pytest.raises(UserError, match="must be egl, osmesa or glfw"):
        choose_gl(hopper)
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    with pytest.raises(UserError, match="apt install libegl1"):
        choose_gl(hopper)
    spec = gym.spec("FrozenLake-v1")
    blind = gym.make(spec)
    monkeypatch.setitem(type(blind.unwrapped).metadata, "render_modes", ["ansi"])
    lake = Environment(spec, blind.observation_space, blind.action_space, None, None)
    with pytest.raises(UserError, match="draws no pictures"):
        film(None, lake, [1.0], 0, {Mp4: str(tmp_path / "out.mp4")})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not a folder that can be written to"):
        film(None, hopper, [1.0], 0, {Gif: str(tmp_path / "file" / "out.gif")})


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--video out.avi", "must end in .mp4"),
        ("--gif out.mp4", "must end in .gif"),
        ("--video out.mp4 --episodes 3", "one episode is filmed"),
        ("--attention out.png --gif out.gif", "makes its picture and nothing else"),
        ("--at 3", "--at is for --attention"),
        ("--prompt Hello --video out.mp4", "--video is for acting"),
    ],
)
def test_flags_that_do_not_go_together_are_one_line(flags, says):
    command = [sys.executable, "evaluate.py", "ckpt.pt", *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


# --- attention -----------------------------------------------------------------------------------


def test_attention_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=4, attn_implementation="eager"
    )
    theirs = transformers.GPT2Model(config).eval()
    torch.nn.init.zeros_(theirs.wpe.weight)  # trajectories have no positions
    ours = GPT(TINY).eval()
    for name, parameter in ours.named_parameters():
        if name not in ("wte.weight", "wpe.weight"):
            torch.nn.init.normal_(parameter, std=0.3)
            value = parameter.data.T if "c_" in name and parameter.dim() == 2 else parameter.data
            theirs.get_parameter(name).data.copy_(value)
    x = torch.randn(1, 12, 32)
    expected = theirs(inputs_embeds=x, output_attentions=True).attentions  # (1, H, T, T) a layer
    found = attention_weights(ours, x)
    assert found.shape == (2, 4, 12, 12)
    for layer in range(2):
        torch.testing.assert_close(found[layer], expected[layer][0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("at", [0, 2, 3, 9])
def test_the_context_ends_in_the_action_that_was_taken(hopper, lamo, at):
    watch = LastContext(at)
    play(lamo, hopper)([3600.0, 1800.0], 2, 7, watch=watch)
    steps = min(at + 1, 4)
    assert watch.tokens.shape == (1, 3 * steps, 32)
    with torch.no_grad():
        action = lamo.act(watch.tokens[:, :-1]).clamp(-1, 1)
        taken = lamo.remember(action[:, None], torch.tensor([[at]]))[0, 0]
    torch.testing.assert_close(watch.tokens[0, -1:], taken, atol=1e-5, rtol=1e-4)


def test_the_picture_of_attention_is_as_large_as_its_tokens_need(tmp_path):
    pytest.importorskip("matplotlib")
    for heads, tokens in ((4, 60), (12, 6)):
        weights = torch.rand(3, heads, tokens).softmax(-1)
        draw_attention(str(tmp_path / "out.png"), weights, 5, "attention")
        picture = np.asarray(Image.open(tmp_path / "out.png").convert("RGB"))
        assert picture.shape[1] > 150 * 4.5
        assert picture.min() < 100 < 250 < picture.max()
