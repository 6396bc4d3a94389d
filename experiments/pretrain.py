"""Language pre-training of a GPT from scratch: how the bundled mini LM was made.

    python -m experiments.pretrain --text TEXT [TEXT ...] --heldout TEXT --out mini-lm.safetensors
    torchrun --nproc_per_node=8 -m experiments.pretrain --size gpt2 ...
    python -m experiments.pretrain --resume mini-lm.state.pt

A plain loop: random blocks, AdamW, linear warm-up, cosine decay. The vocabulary is 257 bytes unless
the size is one of GPT-2's, so the quality is told in bits per byte of the held-out text as well as
in perplexity, for only the first compares across vocabularies. The result is an `--lm PATH` for
train.py; beside it stand its log (.jsonl), a picture of that (.png), and, until the last step is
done, what --resume goes on from (.state.pt).

The paper asks what of pre-training helps control (its Figure 7): a model stopped early is fewer
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
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from checkpoint import check_finite
from files import (
    check_memory,
    check_writable,
    clear_unfinished,
    load_tensors,
    save_tensors,
    write_atomically,
)
from load_gpt2 import HUB, MINI_CONFIG, fingerprint, read_config, save_gpt2
from model import GPT, GPTConfig, text_loss
from plumbing import (
    StopSignals,
    UserError,
    agree,
    check_numbers,
    check_package,
    choose,
    choose_device,
    choose_dtype,
    is_number,
    join_processes,
    leave_processes,
    parse_flags,
    run_command,
)
from resume import check_kinds, load_optimiser
from text import check_text, get_encoding, sample_text, tokenise

SIZES = {"mini": MINI_CONFIG} | {name: config for name, (_, config) in HUB.items()}
LR = {"mini": 1.5e-3, "distilgpt2": 6e-4, "gpt2": 6e-4, "gpt2-medium": 3e-4}  # peaks; those of
LR |= {"gpt2-large": 2.5e-4, "gpt2-xl": 2e-4}  # GPT-2's sizes by Brown et al. 2020, table 2.1
STOP_EVERY = 10  # steps after which several processes look whether to stop
FORMAT = "lamo-pretraining-2"  # what a .state.pt says it is
SAVED = {"settings": dict, "step": int, "model": dict, "optimiser": dict, "texts": dict}
SAVED |= {"generator": torch.Tensor, "dropout": torch.Tensor, "summed": torch.Tensor}
SAVED |= {"steps_summed": int, "log": list, "dropout_cuda": object}  # what is in it, and its kind
SHAPE = ("n_layer", "n_head", "n_embd", "vocab_size")  # settings that are seen in the weights
MOST_TEXTS = 1000  # files
LARGEST = 1e15  # of the log's numbers
ROW = {"step", "loss", "lr", "perplexity", "bits_per_byte"}  # of the log: numbers


@dataclass
class Config:
    text: list[str] = None  # UTF-8 files to learn
    heldout: list[str] = None  # UTF-8 files to judge by, never trained on
    out: str = None  # where the weights go (.safetensors)
    resume: str = ""  # go on from this .state.pt, with its settings: no other flag but --device
    size: str = "mini"  # mini, gpt2, gpt2-medium, gpt2-large, gpt2-xl or distilgpt2
    n_layer: int = "auto"  # blocks; this and the next four: the size's
    n_head: int = "auto"  # attention heads
    n_embd: int = "auto"  # width
    vocab_size: int = "auto"  # 257 for bytes, 50257 for GPT-2's BPE
    block_size: int = "auto"  # tokens of a block; GPT-2's is 1024
    dropout: float = 0.0  # while pre-training
    shuffle_words: bool = False  # a random corpus: the words of each block in random order
    half: bool = False  # write the weights as bf16: half the file
    steps: int = 1800  # optimiser steps
    batch: int = 64  # blocks a step, over all processes
    micro_batch: int = 16  # blocks at a time: bounds memory, changes nothing else
    lr: float = "auto"  # AdamW's peak learning rate; auto: the size's
    weight_decay: float = 0.1  # on matrices only
    warmup: int = 100  # steps of linear warm-up; then a cosine down to a tenth
    clip: float = 1.0  # the gradient's norm is clipped here
    eval_every: int = 300  # steps between looks at the held-out text, and savings
    log_every: int = 25  # steps between figures on the bar
    seed: int = 0  # of initialisation and sampling
    device: str = "auto"  # cuda or cpu


def bits_per_byte(loss, n_tokens, n_bytes):
    """A text's mean cross-entropy in nats a token, as bits a UTF-8 byte: one for any vocabulary."""
    return loss * n_tokens / n_bytes / math.log(2)


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


# --- before training -----------------------------------------------------------------------------


def resolve(typed):
    """Settings from what was typed, every one filled in. Raises UserError for what cannot be."""
    settings = asdict(Config()) | typed
    for name in ("text", "heldout", "out"):
        if settings[name] is None:
            raise UserError(f"--{name} is missing; see --help")
    if not settings["out"].endswith(".safetensors"):
        raise UserError(f"--out is {settings['out']}, but must end in .safetensors")
    shape = asdict(SIZES[choose("size", settings["size"], SIZES)])
    shape |= {"lr": LR[settings["size"]], "dropout": settings["dropout"]}
    settings |= {k: v for k, v in shape.items() if k in settings and k not in typed}
    check_numbers(settings, may_be_zero=("dropout", "seed", "weight_decay"))
    check_writable(Path(settings["out"]).parent, "--out")
    settings["out"] = str(Path(settings["out"]).absolute())  # --resume may be called elsewhere
    for name in ("text", "heldout"):
        settings[name] = [str(Path(path).absolute()) for path in settings[name]]
    if len(settings["text"] + settings["heldout"]) > MOST_TEXTS:
        raise UserError(f"--text and --heldout name more than {MOST_TEXTS} files; join some")
    blocks = settings["batch"] * settings["block_size"]
    check_memory(3 * 8 * blocks, f"--batch {settings['batch']}")  # as int64, and two copies
    if settings["n_embd"] % settings["n_head"]:
        wrong = f"--n-embd {settings['n_embd']} is not a multiple of"
        raise UserError(f"{wrong} --n-head {settings['n_head']}")
    return settings


def read_state(path):
    """What --resume goes on from: the dictionary that save_state wrote. Raises UserError."""
    try:
        state = load_tensors(path)
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}; a run removes it when it is done") from error
    except Exception as error:  # torch.load has many kinds
        raise UserError(f"{path} is damaged, or not a .state.pt of pretrain's") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or SAVED.keys() - state:
        raise UserError(f"{path} is not a .state.pt of pretrain's ({FORMAT})")
    rows = state["log"] if isinstance(state["log"], list) else [None]
    sound = all(isinstance(state[name], kind) for name, kind in SAVED.items())
    sound = sound and all(isinstance(row, dict) and row.keys() == ROW for row in rows)
    if not sound or not all(is_number(x) and x < LARGEST for row in rows for x in row.values()):
        raise UserError(f"{path} is damaged: what is in it is of other kinds")
    settings = state["settings"]
    if settings.keys() != asdict(Config()).keys():
        raise UserError(f"{path} is another version's: its settings are not today's")
    check_kinds(settings, Config, path)
    # Beside the state, wherever it says: a stranger's would write where it likes.
    settings["out"] = str(Path(path).absolute()).removesuffix(".state.pt") + ".safetensors"
    state["settings"] = resolve(settings)
    if not 0 <= state["step"] <= settings["steps"] or state["steps_summed"] < 0:
        raise UserError(f"{path} is damaged: its step")
    if not state["log"] and state["step"] >= min(settings["eval_every"], settings["steps"]):
        raise UserError(f"{path} is damaged: its log")
    summed = state["summed"]
    if summed.shape or summed.dtype != torch.float32 or not summed.isfinite():
        raise UserError(f"{path} is damaged: its losses")
    tensors, said = state["model"], {name: settings[name] for name in SHAPE}
    if not all(torch.is_tensor(tensor) for tensor in tensors.values()):
        raise UserError(f"{path} is damaged: its weights")
    found = read_config(Path(path), tensors, {"config": json.dumps(said)})  # before one is made
    if found.block_size != settings["block_size"]:
        raise UserError(f"{path} is damaged: its block_size")
    return state


def digest(tokens):
    """SHA-256 of a text's tokens."""
    return hashlib.sha256(np.ascontiguousarray(tokens).data).hexdigest()


def beside(out, ending):
    """The path of a file that belongs to the weights `out`."""
    return Path(out.removesuffix(".safetensors") + ending)


def plot(log, path):
    """Draw perplexity against step, of the text that is learnt and of the held-out one, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axis = figure.subplots()
    steps = [row["step"] for row in log]
    learnt = [math.exp(min(row["loss"], 100)) for row in log]
    axis.plot(steps, learnt, "o-", color="#999999", markersize=3, label="text that is learnt")
    heldout = [row["perplexity"] for row in log]
    axis.plot(steps, heldout, "o-", color="#0072B2", markersize=4, label="held-out text")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.set_xlabel("step")
    axis.set_ylabel("perplexity per token")
    axis.set_title(f"{log[-1]['bits_per_byte']:.2f} bits per held-out byte at the end", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    write_atomically(path, partial(figure.savefig, format="png", dpi=150))


# --- training ------------------------------------------------------------------------------------


def main():
    typed = parse_flags(Config, "python -m experiments.pretrain", __doc__)
    rank, world, device = join_processes(choose_device(typed.pop("device", "auto")))
    state = None
    if "resume" in typed:
        path = typed.pop("resume")
        for name in typed:
            raise UserError(f"--{name.replace('_', '-')} is as it was; --resume takes none but it")
        state = read_state(path)
    c = Config(**(state["settings"] if state else resolve(typed)))
    check_package("matplotlib", "the picture")
    if c.batch % world:
        raise UserError(f"--batch {c.batch} cannot be shared by {world} processes")
    torch.manual_seed(c.seed)
    generator = torch.Generator().manual_seed(c.seed)
    encoding = get_encoding(c.vocab_size)
    if rank > 0:
        dist.barrier()  # the first process tokenises, the others read what it wrote
    size = sum(Path(path).stat().st_size for path in [*c.text, *c.heldout] if Path(path).is_file())
    check_memory(3 * size, "the texts")  # two bytes a token, and one more copy
    tokens = np.concatenate([tokenise(path, encoding) for path in c.text])
    heldout = np.concatenate([tokenise(path, encoding) for path in c.heldout])
    if rank == 0 and world > 1:
        dist.barrier()
    heldout_bytes = sum(Path(path).stat().st_size for path in c.heldout)
    starts = word_starts(encoding) if c.shuffle_words else None
    check_text(tokens, c.block_size, ("--text", "--block-size"))
    check_text(heldout, 1, ("--heldout", "--block-size"))
    texts = {"learnt": digest(tokens), "heldout": digest(heldout)}
    if state and state["texts"] != texts:
        raise UserError(f"the texts are not those that {path} was begun with; begin anew")

    shape = GPTConfig(c.n_layer, c.n_head, c.n_embd, c.vocab_size, c.block_size, c.dropout)
    gpt = GPT(shape).to(device)
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
    log, done = [], 0
    if rank == 0:
        for ending in (".safetensors", ".jsonl", ".state.pt", ".png"):
            clear_unfinished(beside(c.out, ending))
    if state:  # nothing but the blocks and dropout is random
        try:
            gpt.load_state_dict(state["model"])
            load_optimiser(optimiser, state["optimiser"])
            generator.set_state(state["generator"])
            summed, steps_summed = state["summed"].to(device), state["steps_summed"]
            torch.set_rng_state(state["dropout"])
            if device.type == "cuda" and state["dropout_cuda"] is not None:
                torch.cuda.set_rng_state(state["dropout_cuda"], device)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise UserError(f"{path} does not fit its own settings; it is damaged") from error
        log, done = state["log"], state["step"]
    if rank > 0:
        torch.manual_seed(c.seed + 1_000_003 * rank + done)  # other dropout in each process
    if rank == 0:
        parameters = sum(p.numel() for p in gpt.parameters())
        print(
            f"{parameters / 1e6:.2f} M parameters, {len(tokens) / 1e6:.1f} M tokens to learn from"
        )
        print(f"{device}, {world} processes, {len(heldout) / 1e6:.2f} M held-out tokens")
        if state:
            print(f"going on from step {done} of {c.steps}")
    model = DistributedDataParallel(gpt) if world > 1 else gpt
    autocast = torch.autocast(device.type, torch.bfloat16, choose_dtype(device) == "bf16")
    share = c.batch // world  # blocks of this process
    if not state:
        summed, steps_summed = torch.zeros((), device=device), 0
    bar = tqdm(total=c.steps, initial=done, desc="pre-training", mininterval=1, disable=rank > 0)
    stop = StopSignals()
    step, stopping = done, 0
    for step in range(done + 1, c.steps + 1):
        cosine = 0.55 + 0.45 * math.cos(math.pi * step / c.steps)
        for group in optimiser.param_groups:
            group["lr"] = c.lr * min(step / c.warmup, cosine)
        x, y = sample_text(tokens, c.batch, c.block_size, generator)
        if c.shuffle_words:
            block = shuffle_words(torch.cat([x, y[:, -1:]], 1), starts, generator)
            x, y = block[:, :-1], block[:, 1:]
        mine = slice(rank * share, (rank + 1) * share)  # all draw the same blocks, and take some
        x, y = x[mine].to(device), y[mine].to(device)
        for i in range(0, share, c.micro_batch):
            part = slice(i, i + c.micro_batch)
            last = i + c.micro_batch >= share  # only then are gradients averaged over processes
            with nullcontext() if last or world == 1 else model.no_sync():
                with autocast:
                    loss = model(x[part], y[part])[1] * (len(x[part]) / share)
                loss.backward()
            summed += loss.detach()
        steps_summed += 1
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), c.clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        bar.update()
        if rank == 0 and step % c.log_every == 0:
            bar.set_postfix(loss=f"{summed.item() / steps_summed:.3f}")
        looking = step % c.eval_every == 0 or step == c.steps
        if looking and world > 1:
            dist.all_reduce(summed)
            summed /= world
        if rank == 0 and looking:
            with autocast:
                loss = text_loss(gpt, heldout)
            mean = summed.item() / steps_summed
            if not math.isfinite(loss + mean) or loss > 100:
                raise UserError(f"the loss is {loss:.3g} by step {step}, beyond help; lower --lr")
            row = {"step": step, "loss": mean, "lr": group["lr"]}
            row["perplexity"] = math.exp(loss)
            row["bits_per_byte"] = bits_per_byte(loss, len(heldout), heldout_bytes)
            log.append(row)
            quality = (
                f"perplexity {row['perplexity']:.2f}, {row['bits_per_byte']:.3f} bits per byte"
            )
            bar.write(f"step {step}: held-out {quality}")
            about = {"steps": f"{step} of {c.steps}", "log": json.dumps(log)}
            about["word_order"] = "random in each block" if c.shuffle_words else "the text's"
            about["learnt"] = json.dumps([Path(path).name for path in c.text])
            about["heldout"] = json.dumps([Path(path).name for path in c.heldout])
            save_gpt2(gpt, c.out, about, torch.bfloat16 if c.half else torch.float32)
            rows = "".join(json.dumps(row) + "\n" for row in log)
            write_atomically(beside(c.out, ".jsonl"), lambda file, t=rows: file.write(t.encode()))
        if step % c.eval_every == 0:
            summed, steps_summed = torch.zeros_like(summed), 0
        # Processes stop after the same step, before torchrun's patience of 30 s is over.
        if world == 1 or looking or step % STOP_EVERY == 0:
            stopping = agree(stop.number, device)
        if rank == 0 and (looking or stopping):
            state = {
                "format": FORMAT,
                "settings": asdict(c),
                "step": step,
                "model": gpt.state_dict(),
                "optimiser": optimiser.state_dict(),
                "generator": generator.get_state(),
                "dropout": torch.get_rng_state(),
                "dropout_cuda": None,
                "summed": summed,
                "steps_summed": steps_summed,
                "texts": texts,
                "log": log,
            }
            if device.type == "cuda":
                state["dropout_cuda"] = torch.cuda.get_rng_state(device)
            check_finite(state["model"], step)
            save_tensors(beside(c.out, ".state.pt"), state)
        if stopping:
            break
    stop.restore()
    bar.close()
    if step < c.steps:
        del model
        leave_processes()
        if rank == 0:
            resume = f"python -m experiments.pretrain --resume {beside(c.out, '.state.pt')}"
            print(f"stopped after step {step}; go on with: {resume}")
        raise SystemExit(128 + stopping)
    if rank == 0:
        plot(log, beside(c.out, ".png"))
        beside(c.out, ".state.pt").unlink(missing_ok=True)
        print(f"wrote {c.out}, SHA-256 of its weights {fingerprint(gpt)}")
        print(f"      {beside(c.out, '.jsonl')} and {beside(c.out, '.png')}: the held-out quality")
    del model
    leave_processes()


if __name__ == "__main__":
    run_command(main)
