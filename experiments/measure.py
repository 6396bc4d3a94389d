"""Measuring: seconds, operations, memory, and a table of them. Used by bench.py and growth.py.

Operations are the floor of the work: the products with the blocks' frozen matrices, forward and
backward to their inputs, and the language model's head. Attention, LoRA, embeddings, GELU and the
optimiser count as nothing. The ceiling is what the machine makes of those products alone.
"""

import os
import time
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F

from plumbing import give_back_memory

BATCH, CONTEXT = 64, 20  # windows a step and environment steps of each, the paper's on MuJoCo
CPU = torch.device("cpu")
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def seconds(work, repeats, device):
    """Median seconds of work(), called `repeats` times after 2, or a tenth as many, for warm-up."""
    found = []
    for _ in range(repeats + max(2, repeats // 10)):
        wait(device)
        since = time.perf_counter()
        work()
        wait(device)
        found.append(time.perf_counter() - since)
    return median(found[-repeats:])


def wait(device):
    """Until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forget_peak(device):
    """Start anew to watch the peak of memory."""
    give_back_memory()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif os.path.exists("/proc/self/clear_refs"):  # Linux
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # Linux: sets VmHWM to what is in use now


def peak(device):
    """MB at most since forget_peak: allocated on a GPU; on Linux, the whole process; else None."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if os.path.exists("/proc/self/status"):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) / 1e3 for line in file if line.startswith("VmHWM"))
    return None


def ceiling(config, device, dtype):
    """Floating-point operations a second of a block's four products, each at its own share.

    Over a step's 3 * BATCH * CONTEXT tokens, forward.
    """
    C, N = config.n_embd, 3 * BATCH * CONTEXT
    times = 100 if device.type == "cuda" else 1  # so that launching and waiting do not count
    total = 0.0
    for n_in, n_out in ((C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)):
        x = torch.randn(N, n_in, device=device, dtype=dtype)
        weight = torch.randn(n_out, n_in, device=device, dtype=dtype)
        total += seconds(partial(repeat, times, F.linear, x, weight), 30, device) / times
    return 2 * N * 12 * C * C / total


def repeat(times, work, *arguments):
    """Call work(*arguments) so often."""
    for _ in range(times):
        work(*arguments)


def block_operations(config, tokens, read):
    """Operations of the blocks' matrices, forward: `read` of `tokens` leave the last block."""
    every = 2 * 12 * config.n_embd**2  # c_attn 3, c_proj 1, the MLP 8; a multiply and an add
    last = 2 / 12 * tokens + 10 / 12 * read  # only K and V are needed of all
    return every * ((config.n_layer - 1) * tokens + last)


def step_operations(config, lm_tokens):
    """The floor of a training step: forward, and backward to the inputs."""
    actions = BATCH * CONTEXT
    forward = block_operations(config, 3 * actions, actions)
    forward += block_operations(config, lm_tokens, lm_tokens)
    forward += 2 * config.n_embd * config.vocab_size * lm_tokens
    unlearnt = 2 * 3 * config.n_embd**2 * lm_tokens  # nothing before a text's first c_attn learns
    return 2 * forward - unlearnt


class Table:
    """Rows, printed as they come."""

    def __init__(self):
        self.rows = []
        print(f"{'what':<60}{'ms':>10}{'tokens/s':>10}{'share':>8}{'ratio':>8}{'MB':>8}")

    def add(self, what, seconds, tokens=None, share=None, ratio=None, memory=None):
        """share: of the ceiling; ratio: to what the row's name says; memory: MB at the peak."""
        rate = None if tokens is None else tokens / seconds
        row = {"what": what, "ms": 1000 * seconds, "tokens_per_s": rate}
        self.rows.append(row | {"share_of_ceiling": share, "ratio": ratio, "peak_mb": memory})
        line = f"{what:<60}{1000 * seconds:10.3f}"
        for value, width, form in (
            (rate, 10, ".0f"),
            (share, 8, ".0%"),
            (ratio, 8, ".2f"),
            (memory, 8, ".0f"),
        ):
            line += f"{'' if value is None else format(value, form):>{width}}"
        print(line, flush=True)
