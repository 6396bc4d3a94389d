"""Language pre-training of a GPT from scratch: how the bundled mini LM was made.

    python -m experiments.pretrain --text TEXT [TEXT ...] --heldout TEXT --out mini-lm.safetensors

A plain loop: random blocks, AdamW, linear warm-up, cosine decay. The vocabulary is 257 bytes unless
--vocab-size says otherwise, so the quality is told in bits per byte of the held-out text, which
compares across vocabularies. The result is an `--lm PATH` for train.py.

The paper asks what of pre-training helps control (its Figure 7): a model stopped early is fewer
`--steps`, and one of a random corpus learns with `--shuffle-words`, the same words in no order.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from load_gpt2 import fingerprint, save_gpt2
from model import GPT, GPTConfig, text_loss
from plumbing import (
    UserError,
    check_numbers,
    check_writable,
    choose_device,
    choose_dtype,
    parse_flags,
    run_command,
)
from text import check_text, get_encoding, sample_text, tokenise


@dataclass
class Config:
    text: list[str] = None  # UTF-8 files to learn
    heldout: list[str] = None  # UTF-8 files to judge by, never trained on
    out: str = None  # where the weights go (.safetensors)
    n_layer: int = 3  # blocks
    n_head: int = 3  # attention heads
    n_embd: int = 192  # width
    vocab_size: int = 257  # 257 for bytes, 50257 for GPT-2's BPE
    block_size: int = 256  # tokens of a block; GPT-2's is 1024
    dropout: float = 0.0  # while pre-training
    shuffle_words: bool = False  # a random corpus: the words of each block in random order
    half: bool = False  # write the weights as bf16: half the file
    steps: int = 1800  # optimiser steps
    batch: int = 64  # blocks a step
    micro_batch: int = 16  # blocks at a time: bounds memory, changes nothing else
    lr: float = 1.5e-3  # AdamW's peak learning rate
    weight_decay: float = 0.1  # on matrices only
    warmup: int = 100  # steps of linear warm-up; then a cosine down to a tenth
    clip: float = 1.0  # the gradient's norm is clipped here
    eval_every: int = 300  # steps between looks at the held-out text
    log_every: int = 25  # steps between printed lines
    seed: int = 0  # of initialisation and sampling
    device: str = "auto"  # cuda or cpu


def bits_per_byte(gpt, tokens, n_bytes):
    """Cross-entropy of a text in bits per UTF-8 byte: comparable between vocabularies."""
    return text_loss(gpt, tokens) * len(tokens) / n_bytes / math.log(2)


def word_starts(encoding):
    """Which tokens begin a word: (V,) bool, those that begin with white space, as GPT-2's do."""
    known = range(encoding.n_vocab - 1)  # the last one ends a text
    starts = [encoding.decode_single_token_bytes(token)[:1].isspace() for token in known]
    return torch.tensor([*starts, True])


def shuffle_words(tokens, starts, generator):
    """Each row's words in random order, each word's tokens together and in theirs: (b, L) int.

    starts: what word_starts returns. The tokens of a row stay the same, only their order is lost.
    """
    word = starts[tokens].long().cumsum(1)  # (b, L): which word of its row a token belongs to
    place = torch.rand(word.shape[0], word.shape[1] + 1, generator=generator).gather(1, word)
    return tokens.gather(1, place.argsort(dim=1, stable=True))


def main():
    c = Config(**parse_flags(Config, "python -m experiments.pretrain", __doc__))
    for name in ("text", "heldout", "out"):
        if getattr(c, name) is None:
            raise UserError(f"--{name} is missing; see --help")
    if not c.out.endswith(".safetensors"):
        raise UserError(f"--out is {c.out}, but must end in .safetensors")
    check_numbers(vars(c), may_be_zero=("dropout", "seed", "weight_decay"))
    check_writable(Path(c.out).parent, "--out")
    device = choose_device(c.device)
    if c.n_embd % c.n_head:
        raise UserError(f"--n-embd {c.n_embd} is not a multiple of --n-head {c.n_head}")
    torch.manual_seed(c.seed)
    generator = torch.Generator().manual_seed(c.seed)
    encoding = get_encoding(c.vocab_size)
    tokens = np.concatenate([tokenise(path, encoding) for path in c.text])
    heldout = np.concatenate([tokenise(path, encoding) for path in c.heldout])
    heldout_bytes = sum(Path(path).stat().st_size for path in c.heldout)
    starts = word_starts(encoding) if c.shuffle_words else None
    check_text(tokens, c.block_size)
    check_text(heldout, 1)

    config = GPTConfig(c.n_layer, c.n_head, c.n_embd, c.vocab_size, c.block_size, c.dropout)
    gpt = GPT(config).to(device)
    parameters = sum(p.numel() for p in gpt.parameters())
    print(f"{parameters / 1e6:.2f} M parameters, {len(tokens) / 1e6:.1f} M tokens to learn from")
    matrices = [p for p in gpt.parameters() if p.dim() == 2]
    others = [p for p in gpt.parameters() if p.dim() != 2]
    optimiser = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": c.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=c.lr,
        betas=(0.9, 0.95),
    )
    autocast = torch.autocast(device.type, torch.bfloat16, choose_dtype(device) == "bf16")
    log = []
    bar = tqdm(total=c.steps, desc="pre-training", mininterval=1)
    for step in range(1, c.steps + 1):
        cosine = 0.55 + 0.45 * math.cos(math.pi * step / c.steps)
        for group in optimiser.param_groups:
            group["lr"] = c.lr * min(step / c.warmup, cosine)
        x, y = sample_text(tokens, c.batch, c.block_size, generator)
        if c.shuffle_words:
            block = shuffle_words(torch.cat([x, y[:, -1:]], 1), starts, generator)
            x, y = block[:, :-1], block[:, 1:]
        x, y = x.to(device), y.to(device)
        mean_loss = 0.0
        for i in range(0, c.batch, c.micro_batch):
            part = slice(i, i + c.micro_batch)
            with autocast:
                loss = gpt(x[part], y[part])[1] * (len(x[part]) / c.batch)
            loss.backward()
            mean_loss += loss.item()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), c.clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        bar.update()
        if step % c.log_every == 0:
            bar.set_postfix(loss=f"{mean_loss:.3f}")
        if step % c.eval_every == 0 or step == c.steps:
            with autocast:
                log.append({"step": step, "loss": mean_loss})
                log[-1]["bits_per_byte"] = bits_per_byte(gpt, heldout, heldout_bytes)
            bar.write(f"step {step}: held-out {log[-1]['bits_per_byte']:.3f} bits per byte")
            about = {"steps": f"{step} of {c.steps}", "log": json.dumps(log)}
            about["word_order"] = "random in each block" if c.shuffle_words else "the text's"
            about["learnt"] = json.dumps([Path(path).name for path in c.text])
            about["heldout"] = json.dumps([Path(path).name for path in c.heldout])
            save_gpt2(gpt, c.out, about, torch.bfloat16 if c.half else torch.float32)
    bar.close()
    print(f"wrote {c.out}, SHA-256 of its weights {fingerprint(gpt)}")


if __name__ == "__main__":
    run_command(main)
