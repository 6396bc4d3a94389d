"""Look at a policy: its episodes as MP4 or GIF, and what an action attends to.

    python -m experiments.watch runs/<run>/best.pt --video out.mp4 --gif out.gif
    python -m experiments.watch runs/<run>/best.pt --attention out.png

A film shows an episode under each target return, side by side.
"""

import io
import os
import subprocess
import sys
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import gymnasium as gym
import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw, ImageFont

from evaluate import SEED, print_table, rollout
from tasks import make_env
from train import Config, load_policy, read_checkpoint
from utils import UserError, choose_device, reason, run_command, write_atomically


@dataclass
class Arguments:
    checkpoint: tyro.conf.Positional[str]  # ckpt.pt or best.pt of a run
    video: str | None = None  # film an episode under each target (.mp4)
    gif: str | None = None  # the same, smaller and with fewer frames
    attention: str | None = None  # what an action token attends to, under the first target (.png)
    at: int | None = None  # with --attention: that action's step (None: the first full context)
    targets: list[float] | None = None  # target returns (None: the run's)
    episode_limit: int | None = None  # cut episodes here; 0 does not (None: the run's)
    seed: int = SEED  # environment seed of the episode
    lm: str | None = None  # where the language model's weights are (None: as in training)
    device: str | None = None  # cuda or cpu (None: cuda if there is one)


VIDEO_RATE = 30  # frames a second at most; faster environments show every second, third, .. step
GIF_RATE, GIF_HEIGHT, GIF_COLOURS = 10, 200, 32  # of a GIF: small enough for a README
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


class Film:
    """The `watch` of evaluate.rollout that films an episode under each target for Mp4 and Gif."""

    def __init__(self, targets, sinks):
        self.targets, self.sinks, self.render_mode = targets, sinks, "rgb_array"
        self.step, self.panels = 0, [None] * len(targets)

    def __call__(self, envs, acted, alive, returns, tokens):
        due = [sink for sink in self.sinks if self.step % sink.every == 0]
        ended = acted & ~alive
        for i in np.flatnonzero(acted if due else ended):
            renderer = getattr(envs[i].unwrapped, "mujoco_renderer", None)
            if renderer and renderer.camera_id == -1:  # Gymnasium's own, which stands still
                names = [renderer.model.camera(k).name for k in range(renderer.model.ncam)]
                renderer.camera_id = names.index("track") if "track" in names else -1
            line = f"target {self.targets[i]:g}   return {returns[i]:.1f}"
            state = f"ended at step {self.step}" if ended[i] else f"step {self.step}"
            self.panels[i] = panel(envs[i].render(), line, state)
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
        self.picture = av.VideoFrame.from_ndarray
        self.file = av.open(self.buffer, "w", format="mp4")
        rate = Fraction(fps / self.every).limit_denominator(1000)
        self.stream = self.file.add_stream("libx264", rate=rate, options={"crf": "20"})
        self.stream.pix_fmt = "yuv420p"  # what every player knows

    def add(self, frame):
        if not self.stream.codec_context.is_open:
            self.stream.height, self.stream.width = frame.shape[:2]
        self.file.mux(self.stream.encode(self.picture(frame, "rgb24")))

    def save(self):
        self.file.mux(self.stream.encode())
        self.file.close()
        write_atomically(self.path, lambda file: file.write(self.buffer.getbuffer()))


class Gif:
    """Frames (H, W, 3) uint8 as a looping GIF, GIF_HEIGHT high; `save` writes them to the path."""

    def __init__(self, path, fps):
        self.path, self.every, self.images = path, max(1, round(fps / GIF_RATE)), []
        self.pause = 10 * round(100 * self.every / fps)  # milliseconds; a GIF counts in tens

    def add(self, frame):
        size = round(frame.shape[1] * GIF_HEIGHT / frame.shape[0]), GIF_HEIGHT
        self.images.append(Image.fromarray(frame).resize(size, Image.Resampling.BOX))

    def save(self):
        some = [np.asarray(image) for image in self.images[:: -(-len(self.images) // 8)]]
        palette = Image.fromarray(np.concatenate(some))  # the colours are those of up to 8 frames
        palette = palette.quantize(GIF_COLOURS, Image.Quantize.MAXCOVERAGE)
        plain = Image.Dither.NONE  # dots that change in every frame would not compress
        first, *others = [image.quantize(palette=palette, dither=plain) for image in self.images]
        pauses = [self.pause] * len(others) + [1500]  # the last one can be read
        how = {"save_all": True, "append_images": others, "duration": pauses, "loop": 0}
        write_atomically(self.path, partial(first.save, format="GIF", **how))


def film(play, environment, targets, video=None, gif=None):
    """Film an episode under each target, to the paths video and gif. Returns rollout's results.
    play: rollout, but for targets, episodes and watch. Raises UserError if nothing is drawn."""
    metadata = make_env(environment.spec).metadata
    if "rgb_array" not in metadata["render_modes"]:
        raise UserError(f"{environment.spec.id} draws no pictures (it has no mode rgb_array)")
    if "mujoco" in sys.modules and "MUJOCO_GL" not in os.environ:  # the environment imported it
        choose_gl()
    fps = metadata.get("render_fps", VIDEO_RATE)
    sinks = [kind(path, fps) for kind, path in ((Mp4, video), (Gif, gif)) if path]
    try:
        results = play(targets=targets, episodes=1, watch=Film(targets, sinks))
    except gym.error.DependencyNotInstalled as error:
        raise UserError(f"{environment.spec.id} cannot be drawn: {reason(error)}") from error
    for sink in sinks:
        sink.save()
        print(f"wrote {sink.path}: one frame in {sink.every} steps, {fps:g} steps a second")
    return results


@torch.no_grad()
def attention_weights(gpt, x):
    """How much each token attends to each: embedded tokens (1, T, C) -> (L, H, T, T), each row with
    the sum 1. The model is in evaluation mode and in the type of x."""
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
    """What the action of step `at` attends to, as PNG: a line a layer and head, a column a token.
    x: the tokens R, s and a of the last K steps, (1, 3K, C), ending in that action."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    weights = attention_weights(gpt.float().eval(), x.float())[:, :, -1].cpu()
    layers, heads, n = weights.shape
    cell = max(0.11, 4.5 / n)  # inches
    figure = Figure((1.9 + n * cell, 1.3 + layers * (heads * cell + 0.08)), layout="constrained")
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
    figure.suptitle(f"attention of the action token of step {at}", fontsize=9)
    figure.colorbar(drawn, ax=axes, aspect=30, shrink=0.9).set_label("attention weight", fontsize=8)
    write_atomically(path, partial(figure.savefig, format="png", dpi=150))
    print(f"wrote {path}: {layers} layers, {heads} heads, steps {steps[0]} to {at}")


def main():
    args = tyro.cli(Arguments, description=__doc__)
    if not (args.video or args.gif or args.attention):
        raise UserError("say what to make: --video MP4, --gif GIF or --attention PNG")
    checkpoint = read_checkpoint(args.checkpoint)
    given = {name: getattr(args, name) for name in ("lm", "targets", "episode_limit")}
    checkpoint["settings"] |= {name: x for name, x in given.items() if x is not None}
    model, environment = load_policy(args.checkpoint, checkpoint)
    device, c = choose_device(args.device), Config(**checkpoint["settings"])
    if args.attention and "c_attn" not in model.gpt.lora_targets:
        raise UserError("--attention draws GPT-2s only, and this is a LLaMA; --gif draws both")
    stats = checkpoint["obs_mean"].to(device), checkpoint["obs_std"].to(device)
    play = partial(rollout, model.to(device), environment, c, stats, seed=args.seed)
    if args.video or args.gif:
        print_table(film(play, environment, c.targets, args.video, args.gif))
    if args.attention:
        at = c.context - 1 if args.at is None else args.at
        c.episode_limit, seen = at + 1, []  # it stops after the step, and its tokens are the last
        (result,) = play(targets=c.targets[:1], episodes=1, watch=lambda *now: seen.append(now[-1]))
        if (T := result["lengths"][0]) <= at:
            raise UserError(f"--at {at}, but the episode ended after {T} steps")
        draw_attention(args.attention, model.gpt, torch.cat(tuple(seen[-1]), dim=1), at)


if __name__ == "__main__":
    run_command(main)
