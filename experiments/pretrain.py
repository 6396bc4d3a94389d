"""Language pre-training of a GPT from scratch: how the bundled mini LM was made.

    python -m experiments.pretrain --text TEXT [TEXT ...] --heldout TEXT --out mini-lm.safetensors
    torchrun --nproc_per_node=8 -m experiments.pretrain --size gpt2 ...
    python -m experiments.pretrain --resume mini-lm.state.pt

Random blocks, AdamW, linear warm-up, cosine decay. Quality on the held-out text is perplexity and
bits per byte, which compare across vocabularies. The result is an `--lm PATH` for train.py. Beside
it stand its log (.jsonl), a plot of that (.png) and, until the last step, the state (.state.pt).

The paper asks what of pre-training helps control (its Figure 7): a model stopped early takes fewer
`--steps`, and one of a random corpus learns with `--shuffle-words`, the same words in no order.
"""

import hashlib
import json
import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import tyro
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import train
from data import get_encoding, sample_text, tokenise
from load_gpt2 import CONV1D, LANGUAGE_MODELS, fingerprint
from model import GPT, GPTConfig, text_loss
from utils import StopSignals, UserError, choose, choose_device, run_command, write_atomically

LR = {"mini": 1.5e-3, "distilgpt2": 6e-4, "gpt2": 6e-4, "gpt2-medium": 3e-4}  # peaks; those of
LR |= {"gpt2-large": 2.5e-4, "gpt2-xl": 2e-4}  # GPT-2's sizes by Brown et al. 2020, table 2.1
FORMAT = "lamo-pretraining-4"  # what a .state.pt says it is


@dataclass
class Config:
    text: list[str] | None = None  # UTF-8 files to learn
    heldout: list[str] | None = None  # UTF-8 files to judge by, never trained on
    out: str | None = None  # where the weights go (.safetensors)
    resume: str | None = None  # go on from this .state.pt, with its settings
    size: str = "mini"  # mini, gpt2, gpt2-medium, gpt2-large, gpt2-xl or distilgpt2
    n_layer: int | None = None  # blocks; None here and in the next four: the size's
    n_head: int | None = None  # attention heads
    n_embd: int | None = None  # width
    vocab_size: int | None = None  # 257 for bytes, 50257 for GPT-2's BPE
    block_size: int | None = None  # tokens of a block; GPT-2's is 1024
    dropout: float = 0.0  # while pre-training
    shuffle_words: bool = False  # a random corpus: the words of each block in random order
    half: bool = False  # write the weights as bf16: half the file
    steps: int = 1800  # optimiser steps
    batch: int = 64  # blocks a step, over all processes
    micro_batch: int = 16  # blocks at a time: bounds memory, changes nothing else
    lr: float | None = None  # AdamW's peak learning rate; None: the size's
    weight_decay: float = 0.1  # on matrices only
    warmup: int = 100  # steps of linear warm-up; then a cosine down to a tenth
    clip: float = 1.0  # the gradient's norm is clipped here
    eval_every: int = 300  # steps between looks at the held-out text, and savings
    seed: int = 0  # of initialisation and sampling
    device: str | None = None  # cuda or cpu; None: cuda if there is one


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


def save_gpt2(gpt, path, about, dtype=torch.float32):
    """Write a GPT in the hub's layout, so that load_gpt2 and transformers both read it back. about:
    dictionary of strings kept in the header; dtype: of the written weights."""
    from safetensors.torch import save

    tensors = {
        key: (tensor.t() if key.endswith(CONV1D) else tensor).to(dtype).contiguous()
        for key, tensor in gpt.state_dict().items()
    }
    metadata = {"format": "pt", "config": json.dumps(asdict(gpt.config)), **about}
    write_atomically(path, lambda file: file.write(save(tensors, metadata)))


def plot(log, path):
    """Draw perplexity against step, of the text that is learnt and of the held-out one, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axis = figure.subplots()
    steps = [row["step"] for row in log]
    learnt, heldout = [math.exp(row["loss"]) for row in log], [row["perplexity"] for row in log]
    axis.plot(steps, learnt, "o-", color="#999999", markersize=3, label="text that is learnt")
    axis.plot(steps, heldout, "o-", color="#0072B2", markersize=4, label="held-out text")
    axis.set(xlabel="step", ylabel="perplexity per token", yscale="log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.set_title(f"{log[-1]['bits_per_byte']:.2f} bits per held-out byte at the end", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    write_atomically(path, partial(figure.savefig, format="png", dpi=150))


def main():
    c, saved = tyro.cli(Config, description=__doc__), None
    rank, world, device = train.join_processes(choose_device(c.device))
    if c.resume:
        path = c.resume
        if c != Config(resume=path, device=c.device):
            raise UserError("--resume goes on with the run's settings; only --device may change")
        saved = train.read_checkpoint(path, FORMAT)
        c = Config(**saved["settings"])
        c.out = path.removesuffix(".state.pt") + ".safetensors"  # the folder may have moved
    train.fill(c, vars(LANGUAGE_MODELS[choose("size", c.size, LR)][1]) | {"lr": LR[c.size]})
    train.check_ranges(c)
    if not (c.text and c.heldout and c.out and c.out.endswith(".safetensors")):
        raise UserError("--text, --heldout and --out FILE.safetensors are needed; see --help")
    if c.n_embd % c.n_head:
        raise UserError(f"--n-embd {c.n_embd} is not a multiple of --n-head {c.n_head}")
    for name in ("text", "heldout"):  # --resume may be called elsewhere
        setattr(c, name, [str(Path(path).absolute()) for path in getattr(c, name)])
    if c.batch % world:
        raise UserError(f"--batch {c.batch} cannot be shared by {world} processes")
    out, state_path = Path(c.out), Path(c.out).with_suffix(".state.pt")
    if state_path.exists() and not saved:
        raise UserError(f"{state_path} is unfinished: --resume it, or delete it to begin anew")
    encoding = get_encoding(c.vocab_size)
    both = [np.concatenate([tokenise(p, encoding) for p in paths]) for paths in (c.text, c.heldout)]
    tokens, heldout = both
    if len(tokens) <= c.block_size:
        raise UserError(f"--text is {len(tokens)} tokens, no more than --block-size {c.block_size}")
    n_bytes = sum(Path(path).stat().st_size for path in c.heldout)
    starts = word_starts(encoding) if c.shuffle_words else None
    texts = [hashlib.sha256(x.data).hexdigest() for x in both]
    tokens = torch.from_numpy(tokens)

    torch.manual_seed(c.seed)
    shape = GPTConfig(c.n_layer, c.n_head, c.n_embd, c.vocab_size, c.block_size, c.dropout)
    gpt = GPT(shape).to(device)
    matrices = [p for p in gpt.parameters() if p.dim() == 2]
    others = [p for p in gpt.parameters() if p.dim() != 2]
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, c.lr, (0.9, 0.95), weight_decay=c.weight_decay)
    rngs = [torch.Generator().manual_seed(c.seed), torch.default_generator]  # blocks, dropout
    if device.type == "cuda":
        rngs.append(torch.cuda.default_generators[device.index or 0])

    log, step, summed = [], 0, torch.zeros((), device=device)  # the loss since the log's last row
    if saved:
        if saved["texts"] != texts:
            raise UserError(f"the texts are not those that {path} was begun with")
        gpt.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        for rng, state in zip(rngs, saved["rngs"], strict=False):  # the device may be another
            rng.set_state(state)
        log, step = saved["log"], saved["step"]
        summed += saved["summed"].to(device)
    if rank == 0:
        size = sum(p.numel() for p in gpt.parameters())
        print(f"{size:,} parameters, {len(tokens):,} tokens, {device}, {world} process(es)")
    else:
        torch.manual_seed(c.seed + 1_000_003 * rank + step)  # other dropout in each process
    autocast = torch.autocast(device.type, torch.bfloat16, train.choose_dtype(device) == "bf16")
    model = DistributedDataParallel(gpt) if world > 1 else gpt
    share = c.batch // world  # blocks of this process
    stop, stopping = StopSignals(), 0
    left = range(step + 1, c.steps + 1)
    bar = tqdm(left, "pre-training", c.steps, initial=step, disable=rank > 0)
    for step in bar:
        cosine = 0.55 + 0.45 * math.cos(math.pi * step / c.steps)
        for group in optimiser.param_groups:
            group["lr"] = c.lr * min(step / max(1, c.warmup), cosine)
        x, y = sample_text(tokens, c.batch, c.block_size, rngs[0])
        if c.shuffle_words:
            block = shuffle_words(torch.cat([x, y[:, -1:]], 1), starts, rngs[0])
            x, y = block[:, :-1], block[:, 1:]
        mine = slice(rank * share, (rank + 1) * share)  # all draw the same blocks, and take some
        parts = [z[mine].to(device).split(c.micro_batch) for z in (x, y)]
        for i, (x, y) in enumerate(zip(*parts, strict=True)):
            last = i + 1 == len(parts[0])  # only then are gradients averaged over processes
            with nullcontext() if last or world == 1 else model.no_sync():
                with autocast:
                    loss = model(x, y) * (len(x) / share)
                loss.backward()
            summed += loss.detach()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), c.clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        n_summed = (step - 1) % c.eval_every + 1
        if rank == 0 and step % 25 == 0:
            bar.set_postfix(loss=f"{summed.item() / n_summed:.3f}")

        looking = step % c.eval_every == 0 or step == c.steps
        if world == 1 or looking or step % 10 == 0:
            stopping = max(train.gather(stop.number))  # all processes stop after the same step
        if world > 1 and (looking or stopping):
            dist.all_reduce(summed.div_(world))
        if rank == 0 and looking:
            with autocast:
                loss = text_loss(gpt, heldout)
            mean = summed.item() / n_summed
            if not (loss < 100 and mean < 100):  # NaN is not either
                raise UserError(f"the loss is {loss:.3g} by step {step}; lower --lr")
            row = {"step": step, "loss": mean, "lr": group["lr"], "perplexity": math.exp(loss)}
            row["bits_per_byte"] = loss * len(heldout) / n_bytes / math.log(2)  # loss is in nats
            log.append(row)
            quality = f"perplexity {math.exp(loss):.2f}, {row['bits_per_byte']:.3f} bits per byte"
            bar.write(f"step {step}: held-out {quality}")
            about = {"steps": f"{step} of {c.steps}", "log": json.dumps(log)}
            about["word_order"] = "random in each block" if c.shuffle_words else "the text's"
            about["learnt"] = json.dumps([Path(path).name for path in c.text])
            about["heldout"] = json.dumps([Path(path).name for path in c.heldout])
            save_gpt2(gpt, out, about, torch.bfloat16 if c.half else torch.float32)
            rows = [json.dumps(row).encode() + b"\n" for row in log]
            write_atomically(out.with_suffix(".jsonl"), lambda f, rows=rows: f.writelines(rows))
        if step % c.eval_every == 0:
            summed.zero_()
        if rank == 0 and (looking or stopping):
            state = {"format": FORMAT, "settings": dict(vars(c)), "step": step, "texts": texts}
            state |= {"model": gpt.state_dict(), "optimiser": optimiser.state_dict()}
            state |= {"summed": summed, "log": log, "rngs": [rng.get_state() for rng in rngs]}
            train.save_checkpoint(state_path, state)
        if stopping:
            break
    if rank == 0 and step == c.steps:
        plot(log, out.with_suffix(".png"))
        state_path.unlink(missing_ok=True)
        print(f"wrote {out}, SHA-256 of its weights {fingerprint(gpt)}")
    elif rank == 0:
        print(f"stopped after step {step}; --resume {state_path} goes on")
    del model  # DDP's keeps the group alive
    if world > 1:
        dist.destroy_process_group()
    if step < c.steps:
        raise SystemExit(128 + stopping)


if __name__ == "__main__":
    run_command(main)
