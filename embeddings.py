"""From return, state and action to tokens: the three kinds of embedding, and the head back.

`linear` is the Decision Transformer's, `mlp` is LaMo's, and `tokens` is what the paper tried in the
manner of RT-2 (Brohan et al. 2023, arXiv 2307.15818): every number falls into one of BINS bins, and
each bin is looked up, starting from the word embeddings of the bin's number.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from windows import STACK

BINS = 512  # the paper's
MU, LARGEST = 100, 1e5  # numbers up to LARGEST have bins, those around 0 the narrowest
SPAN = math.log(MU * LARGEST + 1)
ZERO = {50257: 15, 257: 48}  # of each vocabulary, the token "0"; those of the other digits follow


class ResidualMLP(nn.Module):
    """LaMo's embedding: fc2(GELU(fc1 x)) + fc1 x. The residual is the authors' code's."""

    def __init__(self, n_in, n_embd):
        super().__init__()
        self.fc1 = nn.Linear(n_in, n_embd)
        self.fc2 = nn.Linear(n_embd, n_embd)

    def forward(self, x):
        h = self.fc1(x)
        return self.fc2(F.gelu(h)) + h


def to_bins(x):
    """Which bin each number falls into: int64, 0 to BINS - 1. Numbers beyond LARGEST: the last.

    Bins are equally wide after mu-law companding, as in Gato (Reed et al. 2022, arXiv 2205.06175,
    section 2.1): normalised states, actions and returns of any size then share them.
    """
    squashed = x.sign() * (x.abs() * MU + 1).log() / SPAN  # -1 to 1
    return ((squashed + 1) / 2 * BINS).long().clamp(0, BINS - 1)


def from_bins(bins):
    """The number in the middle of each bin, undoing to_bins: float32."""
    squashed = (bins + 0.5) / BINS * 2 - 1
    return squashed.sign() * ((squashed.abs() * SPAN).exp() - 1) / MU


class TokenEmbedding(nn.Module):
    """Numbers, each looked up as a token: (.., n_in) -> (.., C), the mean over the n_in numbers.

    Every dimension has a table of its own, or the mean would not tell which number was whose. A
    bin's row starts as the mean embedding of the three digits of its number, "000" to "511".
    wte (V, C): the language model's word embeddings. Raises ValueError for an unknown vocabulary.
    """

    def __init__(self, n_in, wte):
        super().__init__()
        if len(wte) not in ZERO:
            raise ValueError(f"no digits are known in a vocabulary of {len(wte)}")
        number = torch.arange(BINS)
        digits = torch.stack([number // 100, number // 10 % 10, number % 10], dim=1)  # (BINS, 3)
        rows = wte.detach()[ZERO[len(wte)] + digits].mean(1)  # (BINS, C)
        self.table = nn.Embedding.from_pretrained(rows.repeat(n_in, 1), freeze=False)
        self.register_buffer("first", torch.arange(n_in) * BINS, persistent=False)

    def forward(self, x):
        tokens = to_bins(x.float()) + self.first  # (.., n_in)
        found = F.embedding_bag(tokens.flatten(0, -2), self.table.weight, mode="mean")
        return found.view(*x.shape[:-1], -1)


def embed_numbers(embed, n_in, wte):
    """An embedding of vectors, by its name: (.., n_in) -> (.., C). wte (V, C): word embeddings.

    Raises ValueError for an unknown name, and as TokenEmbedding does.
    """
    if embed == "linear":
        return nn.Linear(n_in, wte.shape[1])
    if embed == "mlp":
        return ResidualMLP(n_in, wte.shape[1])
    if embed == "tokens":
        return TokenEmbedding(n_in, wte)
    raise ValueError(f"embed is {embed!r}, but must be 'linear', 'mlp' or 'tokens'")


class FrameEncoder(nn.Module):
    """States of frames: (B, K + STACK - 1, 84, 84) bytes -> (B, K, C).

    The convolutions of Mnih et al. (2015), as Decision Transformer and LaMo have them for Atari.
    For `tokens` the same as for `linear`: pixels are no numbers to be looked up.
    """

    def __init__(self, n_embd, embed):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(STACK, 32, 8, stride=4),
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=1),
            nn.ReLU(),
            nn.Flatten(),  # 64 x 7 x 7
            nn.Linear(3136, n_embd),
        )
        self.mlp = ResidualMLP(n_embd, n_embd) if embed == "mlp" else nn.Identity()

    def forward(self, frames):
        states = frames.unfold(1, STACK, 1).permute(0, 1, 4, 2, 3)  # (B, K, STACK, 84, 84), a view
        x = self.conv(states.flatten(0, 1).float() / 255)  # (B K, C)
        return self.mlp(x).unflatten(0, states.shape[:2])  # (B, K, C)


def action_head(embed, n_embd, n_act, discrete):
    """Hidden state over s_t (.., C) -> action or logits (.., n_act).

    Actions in numbers are bounded by tanh for `linear` only; logits never are.
    """
    if embed == "linear":
        linear = nn.Linear(n_embd, n_act)
        return linear if discrete else nn.Sequential(linear, nn.Tanh())
    return nn.Sequential(nn.Linear(n_embd, n_embd), nn.GELU(), nn.Linear(n_embd, n_act))
