"""Look at a policy: its episodes as MP4 or GIF, and what its last action attends to.

    python evaluate.py runs/<run>/ckpt.pt --video out.mp4 --gif out.gif
    python evaluate.py runs/<run>/ckpt.pt --attention out.png

`Film` and `LastContext` are shown every step of an episode by evaluate.rollout, see its `watch`.
"""

import ctypes.util
import io
import os
import subprocess
import sys
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from files import check_writable, write_atomically
from plumbing import UserError, first_line
from run_folder import written
from tasks import make_env

VIDEO_RATE = 30  # frames a second at most; faster environments show every second, third, .. step
GIF_RATE, GIF_HEIGHT, GIF_COLOURS = 12.5, 240, 64  # of a GIF: small enough for a README
SMALLEST = 320  # pixels; smaller pictures (Atari) are enlarged by a whole number
INK, PAPER, DIM = (255, 255, 255), (24, 26, 32), (170, 174, 184)
APT = "sudo apt install libegl1 libgl1 (EGL), or libosmesa6 (OSMesa)"


# --- drawing without a screen --------------------------------------------------------------------


def choose_gl(environment):
    """Let MuJoCo draw off-screen by EGL or OSMesa, whichever works here; MUJOCO_GL's if it is set.

    environment: a tasks.Environment. Each is tried in a process of its own, since one that fails
    would spoil this one. Does nothing for environments that are not MuJoCo's. Raises UserError,
    with the command that helps, if neither works.
    """
    named = [environment.spec.entry_point, environment.spec.id]
    if not any("mujoco" in str(n) or "Kitchen" in str(n) or "reacher2d" in str(n) for n in named):
        return
    if asked := os.environ.get("MUJOCO_GL"):
        if asked not in ("egl", "osmesa", "glfw"):
            raise UserError(f"MUJOCO_GL is {asked}, but must be egl, osmesa or glfw")
        return
    for name in ("egl", "osmesa"):
        if ctypes.util.find_library({"egl": "EGL", "osmesa": "OSMesa"}[name]) is None:
            continue
        probe = f"from mujoco.{name} import GLContext; GLContext(64, 64).make_current()"
        clean = {k: v for k, v in os.environ.items() if k != "PYOPENGL_PLATFORM"}
        command = [sys.executable, "-c", probe]
        if subprocess.run(command, capture_output=True, env=clean).returncode == 0:
            os.environ["MUJOCO_GL"] = name
            return
    raise UserError(f"nothing here can draw MuJoCo without a screen; {APT}")


def follow(env):
    """Let MuJoCo's camera follow the body, which Gymnasium 1.4's own choice does not do.

    It takes the free camera, so a body that runs is soon out of the picture. Does nothing for
    environments without a camera of the name track.
    """
    renderer = getattr(env.unwrapped, "mujoco_renderer", None)
    if renderer is not None and renderer.camera_id == -1:
        import mujoco

        track = mujoco.mj_name2id(renderer.model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
        renderer.camera_id = track  # -1 again, if there is none


# --- films ---------------------------------------------------------------------------------------


class Film:
    """An episode under each target, side by side, the target and the running return above each.

    A `watch` of evaluate.rollout. sinks: Mp4 and Gif, each given the frames it wants.
    """

    def __init__(self, targets, fps, sinks):
        self.targets, self.fps, self.sinks = targets, fps, sinks
        self.step = 0
        self.panels = [None] * len(targets)

    def __call__(self, envs, acted, alive, returns, tokens):
        if self.step == 0:
            for env in envs.envs:
                follow(env)
        due = [sink for sink in self.sinks if self.step % sink.every(self.fps) == 0]
        ended = acted & ~alive
        if due or ended.any():
            try:
                pictures = envs.render()
            except Exception as error:  # the environment's own kinds, and OpenGL's
                raise UserError(f"the environment cannot be drawn: {first_line(error)}") from error
            for i in np.flatnonzero(acted):
                if not isinstance(pictures[i], np.ndarray) or pictures[i].ndim != 3:
                    raise UserError("the environment draws no pictures of colours")
                words = self.words(i, returns[i], ended[i])
                self.panels[i] = panel(pictures[i], *words)
        last = not alive.any()
        for sink in self.sinks if last else due:
            sink.add(np.concatenate(self.panels, axis=1))
        self.step += 1

    def words(self, i, episode_return, ended):
        """The two lines above an episode's picture."""
        asked = "" if self.targets[i] is None else f"target {written(self.targets[i])}   "
        state = f"ended at step {self.step}" if ended else f"step {self.step}"
        return f"{asked}return {episode_return:.1f}", state


def panel(picture, line, state):
    """A picture (H, W, 3) uint8 under two lines of text: (H', W', 3), both even."""
    factor = max(1, -(-SMALLEST // min(picture.shape[:2])))
    picture = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    height, width = picture.shape[:2]
    size = max(11, width // 24)
    strip = 3 * size + (height + 3 * size) % 2
    image = Image.new("RGB", (width + width % 2, height + strip), PAPER)
    image.paste(Image.fromarray(picture.astype(np.uint8)), (0, strip))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size)
    draw.text((size // 2, size // 4), line, INK, font)
    draw.text((size // 2, size // 4 + 1.3 * size), state, DIM, font)
    return np.asarray(image)


class Mp4:
    """Frames (H, W, 3) uint8 as H.264, encoded as they come; `save` writes them to the path."""

    def __init__(self, path, fps):
        import av

        self.path, self.frames = path, 0
        self.buffer = io.BytesIO()
        self.file = av.open(self.buffer, "w", format="mp4")
        self.rate = fps / self.every(fps)
        rate = Fraction(self.rate).limit_denominator(1000)
        self.stream = self.file.add_stream("libx264", rate=rate, options={"crf": "20"})
        self.stream.pix_fmt = "yuv420p"  # what every player knows

    def every(self, fps):
        return max(1, round(fps / VIDEO_RATE))

    def add(self, frame):
        from av import VideoFrame

        if self.frames == 0:
            self.stream.height, self.stream.width = frame.shape[:2]
        self.file.mux(self.stream.encode(VideoFrame.from_ndarray(frame, "rgb24")))
        self.frames += 1

    def save(self):
        self.file.mux(self.stream.encode())
        self.file.close()
        write_atomically(self.path, lambda file: file.write(self.buffer.getbuffer()))
        return f"{self.frames} frames of {self.stream.width}x{self.stream.height}"


class Gif:
    """Frames (H, W, 3) uint8 as a looping GIF of GIF_HEIGHT; `save` writes them to the path."""

    def __init__(self, path, fps):
        self.path, self.images = path, []
        self.rate = fps / self.every(fps)

    def every(self, fps):
        return max(1, round(fps / GIF_RATE))

    def add(self, frame):
        image = Image.fromarray(frame)
        size = (round(image.width * GIF_HEIGHT / image.height), GIF_HEIGHT)
        self.images.append(image.resize(size, Image.Resampling.LANCZOS))

    def save(self):
        some = self.images[:: -(-len(self.images) // 8)]  # the colours are those of up to 8 frames
        palette = Image.fromarray(np.concatenate([np.asarray(image) for image in some]))
        palette = palette.quantize(GIF_COLOURS, Image.Quantize.MAXCOVERAGE)
        plain = Image.Dither.NONE  # dots that change in every frame would not compress
        first, *others = [image.quantize(palette=palette, dither=plain) for image in self.images]
        pauses = [round(1000 / self.rate)] * len(others) + [1500]  # the last one can be read
        save = partial(
            first.save, format="GIF", save_all=True, append_images=others, duration=pauses, loop=0
        )
        write_atomically(self.path, save)
        return f"{len(self.images)} frames of {first.width}x{first.height}"


def film(play, environment, targets, seed, paths, said_to=None):
    """Play an episode under each target, write the films, and say so. Returns rollout's results.

    play: evaluate.rollout with a model, an environment, settings and statistics; paths: {Mp4: path,
    Gif: path or None}; said_to: stdout, or a stream. Raises UserError where nothing can be drawn.
    """
    for path in filter(None, paths.values()):
        check_writable(Path(path).parent, "a film in")
    choose_gl(environment)
    env = make_env(environment.spec)
    modes, fps = env.metadata.get("render_modes", []), env.metadata.get("render_fps", VIDEO_RATE)
    env.close()
    if "rgb_array" not in modes:
        raise UserError(f"{environment.spec.id} draws no pictures (it has no mode rgb_array)")
    sinks = [kind(path, fps) for kind, path in paths.items() if path]
    watch = Film(targets, fps, sinks)
    results = play(targets, 1, seed, progress=True, watch=watch, render_mode="rgb_array")
    for sink in sinks:
        shown = sink.save()
        what = f"{shown}, {sink.rate:g} a second, for {fps:g} steps"
        print(f"{sink.path}: {what}", file=said_to)
    return results


# --- attention -----------------------------------------------------------------------------------


class LastContext:
    """Keeps the tokens of the step `at`, of the first episode; a `watch` of evaluate.rollout."""

    def __init__(self, at):
        self.at, self.step, self.tokens = at, -1, None  # the first call is before any step

    def __call__(self, envs, acted, alive, returns, tokens):
        if self.step == self.at and acted[0]:
            self.tokens = torch.cat(tuple(tokens), dim=1)[:1]  # (1, 3K, C) ending in an action
        self.step += 1


@torch.no_grad()
def attention_weights(gpt, x):
    """How much each token attends to each: embedded tokens (1, T, C) -> (L, H, T, T).

    Each row sums to 1. Wants the model in evaluation mode and in the type of x.
    """
    weights = []
    for block in gpt.h:
        q, k, _ = block.attn.c_attn(block.ln_1(x))[0].chunk(3, dim=-1)  # (T, C) each
        q, k = (t.unflatten(-1, (gpt.config.n_head, -1)).transpose(0, 1) for t in (q, k))
        scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5  # (H, T, T)
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        weights.append(scores.masked_fill(future, -torch.inf).softmax(-1))
        x = block(x)
    return torch.stack(weights)


def map_attention(play, gpt, target, seed, at, path):
    """Play an episode under one target and draw what the action of step `at` attends to.

    play: as film's; gpt: the model's, on its device. Raises UserError for an episode that is over
    before that step.
    """
    watch = LastContext(at)
    (result,) = play([target], 1, seed, progress=True, watch=watch)
    if watch.tokens is None:
        raise UserError(f"--at {at}, but the episode ended after {result['lengths'][0]} steps")
    weights = attention_weights(gpt.float().eval(), watch.tokens.float())[:, :, -1].cpu()
    first = at + 1 - weights.shape[-1] // 3
    draw_attention(path, weights, first, f"attention of the action at step {at}, target {target:g}")
    print(f"{path}: {len(weights)} layers, {weights.shape[1]} heads, steps {first} to {at}")


def draw_attention(path, weights, first_step, heading):
    """The last token's attention (L, H, 3K) as PNG: a line for each layer and head.

    Columns are the tokens R, s and a of every step, from the environment's step first_step on.
    Needs matplotlib.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    layers, heads, n = weights.shape
    cell = max(0.11, 4.5 / n)  # inches
    size = (1.9 + n * cell, 1.3 + layers * (heads * cell + 0.08))
    figure = Figure(size, layout="constrained")
    axes = figure.subplots(layers, 1, sharex=True, squeeze=False)[:, 0]
    norm = PowerNorm(0.5, 0, float(weights.max()))  # so that small weights are seen
    for layer, axis in enumerate(axes):
        drawn = axis.imshow(weights[layer].numpy(), cmap="Blues", norm=norm, aspect="auto")
        axis.set_yticks(range(heads), range(heads), fontsize=7)
        axis.set_ylabel(f"layer {layer}\nhead", fontsize=8)
        axis.set_xticks(np.arange(0, n, 3) - 0.5, minor=True)
        axis.grid(which="minor", axis="x", color="#bbbbbb", linewidth=0.5)
        axis.tick_params(which="both", length=0, labelbottom=layer == layers - 1)
    every = 1 if 3 * cell > 0.3 else 5  # so that step numbers do not touch
    steps = [first_step + i // 3 for i in range(n)]
    under = [str(s) if i % 3 == 1 and s % every == 0 else "" for i, s in enumerate(steps)]
    names = [f"{'Rsa'[i % 3]}\n{under[i]}" for i in range(n)]
    axes[-1].set_xticks(range(n), names, fontsize=7)
    axes[-1].set_xlabel("token: return-to-go R, state s, action a; below, the environment's step")
    figure.suptitle(heading, fontsize=9)
    bar = figure.colorbar(drawn, ax=axes, aspect=30, shrink=0.9)
    bar.set_label("attention weight", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    write_atomically(path, partial(figure.savefig, format="png", dpi=150))
