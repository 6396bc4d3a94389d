"""Look at a policy: its episodes as MP4 or GIF, and what an action attends to.

    python -m experiments.watch runs/<run>/best.pt --video out.mp4 --gif out.gif
    python -m experiments.watch runs/<run>/best.pt --attention out.png

`Film` and `LastContext` are called after every step of an episode, see `watch` of evaluate.rollout.
"""

import io
import os
import subprocess
import sys
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw, ImageFont

from evaluate import SEED, print_table, rollout
from tasks import make_env
from train import load_policy, read_checkpoint
from utils import UserError, choose_device, reason, run_command, write_atomically

VIDEO_RATE = 30  # frames a second at most; faster environments show every second, third, .. step
GIF_RATE, GIF_HEIGHT, GIF_COLOURS = 12.5, 240, 64  # of a GIF: small enough for a README
SMALLEST = 320  # pixels; smaller pictures (Atari) are enlarged by a whole number
INK, PAPER, DIM = (255, 255, 255), (24, 26, 32), (170, 174, 184)


def choose_gl():
    """Let MuJoCo draw off-screen by EGL or OSMesa, whichever works here. Raises UserError."""
    for name in ("egl", "osmesa"):  # each in a process of its own: a failure would spoil this one
        probe = f"from mujoco.{name} import GLContext; GLContext(64, 64).make_current()"
        if subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode == 0:
            os.environ["MUJOCO_GL"] = name
            return
    raise UserError("nothing here can draw MuJoCo: sudo apt install libegl1 libgl1 (or libosmesa6)")


def follow(env):
    """Let MuJoCo's camera follow the body, if it has one that can; Gymnasium's own stands still."""
    renderer = getattr(env.unwrapped, "mujoco_renderer", None)
    if renderer is not None and renderer.camera_id == -1:
        import mujoco

        camera = mujoco.mjtObj.mjOBJ_CAMERA
        renderer.camera_id = mujoco.mj_name2id(renderer.model, camera, "track")  # or -1 again


class Film:
    """An episode under each target, side by side, the target and the running return above each.

    sinks: Mp4 and Gif, each given every so many frames.
    """

    render_mode = "rgb_array"

    def __init__(self, targets, sinks):
        self.targets, self.sinks = targets, sinks
        self.step, self.panels = 0, [None] * len(targets)

    def __call__(self, envs, acted, alive, returns, tokens):
        due = [sink for sink in self.sinks if self.step % sink.every == 0]
        ended = acted & ~alive
        for i in np.flatnonzero(acted if due else ended):
            if self.step == 0:
                follow(envs[i])
            asked = "" if self.targets[i] is None else f"target {self.targets[i]:g}   "
            state = f"ended at step {self.step}" if ended[i] else f"step {self.step}"
            self.panels[i] = panel(envs[i].render(), f"{asked}return {returns[i]:.1f}", state)
        for sink in due if alive.any() else self.sinks:
            sink.add(np.concatenate(self.panels, axis=1))
        self.step += 1


def panel(picture, line, state):
    """A picture (H, W, 3) uint8 under two lines of text: (H', W', 3), both even."""
    factor = max(1, -(-SMALLEST // min(picture.shape[:2])))
    picture = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    height, width = picture.shape[:2]
    size = max(11, width // 24)
    strip = 3 * size + (height + 3 * size) % 2
    image = Image.new("RGB", (width + width % 2, height + strip), PAPER)
    image.paste(Image.fromarray(picture), (0, strip))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size)
    draw.text((size // 2, size // 4), line, INK, font)
    draw.text((size // 2, size // 4 + 1.3 * size), state, DIM, font)
    return np.asarray(image)


class Mp4:
    """Frames (H, W, 3) uint8 as H.264, encoded as they come; `save` writes them to the path."""

    def __init__(self, path, fps):
        import av

        self.path, self.every, self.buffer = path, max(1, round(fps / VIDEO_RATE)), io.BytesIO()
        self.file = av.open(self.buffer, "w", format="mp4")
        rate = Fraction(fps / self.every).limit_denominator(1000)
        self.stream = self.file.add_stream("libx264", rate=rate, options={"crf": "20"})
        self.stream.pix_fmt = "yuv420p"  # what every player knows

    def add(self, frame):
        from av import VideoFrame

        if not self.stream.codec_context.is_open:
            self.stream.height, self.stream.width = frame.shape[:2]
        self.file.mux(self.stream.encode(VideoFrame.from_ndarray(frame, "rgb24")))

    def save(self):
        self.file.mux(self.stream.encode())
        self.file.close()
        write_atomically(self.path, lambda file: file.write(self.buffer.getbuffer()))


class Gif:
    """Frames (H, W, 3) uint8 as a looping GIF of GIF_HEIGHT; `save` writes them to the path."""

    def __init__(self, path, fps):
        self.path, self.every, self.images = path, max(1, round(fps / GIF_RATE)), []
        self.pause = round(1000 * self.every / fps)  # milliseconds

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
        pauses = [self.pause] * len(others) + [1500]  # the last one can be read
        how = {"save_all": True, "append_images": others, "duration": pauses, "loop": 0}
        write_atomically(self.path, partial(first.save, format="GIF", **how))


def film(play, environment, targets, video=None, gif=None):
    """Write a film, to the paths video and gif, of an episode under each target. Returns rollout's
    results. play: rollout, but for targets, episodes and watch. Raises UserError."""
    env = make_env(environment.spec)
    env.close()
    if "rgb_array" not in env.metadata.get("render_modes", []):
        raise UserError(f"{environment.spec.id} draws no pictures (it has no mode rgb_array)")
    if "mujoco" in sys.modules and "MUJOCO_GL" not in os.environ:  # the environment imported it
        choose_gl()
    fps = env.metadata.get("render_fps", VIDEO_RATE)
    sinks = [kind(path, fps) for kind, path in ((Mp4, video), (Gif, gif)) if path]
    try:
        results = play(targets=targets, episodes=1, watch=Film(targets, sinks))
    except gym.error.DependencyNotInstalled as error:
        raise UserError(f"{environment.spec.id} cannot be drawn: {reason(error)}") from error
    for sink in sinks:
        sink.save()
        print(f"wrote {sink.path}: every {sink.every}. step, of {fps:g} a second")
    return results


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


def draw_attention(path, gpt, x, at):
    """What the action of step `at` attends to, as PNG: a line for each layer and head.

    x: what LastContext keeps, (1, 3K, C). Columns are the tokens R, s and a of every step.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    weights = attention_weights(gpt.float().eval(), x.float())[:, :, -1].cpu()
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
        axis.tick_params(length=0, labelbottom=layer == layers - 1)
    every = 1 if 3 * cell > 0.3 else 5  # so that step numbers do not touch
    steps = [at + 1 - (n - i + 2) // 3 for i in range(n)]
    under = [str(s) if i % 3 == 1 and s % every == 0 else "" for i, s in enumerate(steps)]
    axes[-1].set_xticks(range(n), [f"{'Rsa'[i % 3]}\n{under[i]}" for i in range(n)], fontsize=7)
    axes[-1].set_xlabel("return-to-go R, state s, action a; below, the environment's step")
    figure.suptitle(f"attention of the action at step {at}", fontsize=9)
    figure.colorbar(drawn, ax=axes, aspect=30, shrink=0.9).set_label("attention weight", fontsize=8)
    write_atomically(path, partial(figure.savefig, format="png", dpi=150))
    print(f"wrote {path}: {layers} layers, {heads} heads, steps {steps[0]} to {at}")


@dataclass
class Arguments:
    checkpoint: tyro.conf.Positional[str]  # ckpt.pt or best.pt of a run
    video: str | None = None  # film an episode under each target (.mp4)
    gif: str | None = None  # the same, smaller and slower
    attention: str | None = None  # draw what an action attends to, under the first target (.png)
    at: int | None = None  # with --attention: that action's step (default: the first full context)
    targets: list[float] | None = None  # target returns (default: the run's)
    episode_limit: int | None = None  # cut episodes here; 0 does not (default: the run's)
    seed: int = SEED  # environment seed of the episode
    lm: str | None = None  # where the language model's weights are (default: as in training)
    device: str | None = None  # cuda or cpu (default: cuda if there is one)


def main():
    args = tyro.cli(Arguments, description=__doc__)
    if not (args.video or args.gif or args.attention):
        raise UserError("say what to make: --video MP4, --gif GIF or --attention PNG")
    checkpoint = read_checkpoint(args.checkpoint)
    for name in ("lm", "targets", "episode_limit"):
        if getattr(args, name) is not None:
            checkpoint["settings"][name] = getattr(args, name)
    device, c = choose_device(args.device), SimpleNamespace(**checkpoint["settings"])
    model, environment = load_policy(args.checkpoint, checkpoint)
    model.to(device)
    stats = checkpoint["obs_mean"].to(device), checkpoint["obs_std"].to(device)
    play = partial(rollout, model, environment, c, stats, seed=args.seed, progress=True)
    if args.video or args.gif:
        print_table(film(play, environment, c.targets, args.video, args.gif))
    if args.attention:
        at = c.context - 1 if args.at is None else args.at
        watch = LastContext(at)
        (result,) = play(targets=c.targets[:1], episodes=1, watch=watch)
        if watch.tokens is None:
            raise UserError(f"--at {at}, but the episode ended after {result['lengths'][0]} steps")
        draw_attention(args.attention, model.gpt, watch.tokens, at)


if __name__ == "__main__":
    run_command(main)
