"""LoRA on GPT-2's attention (Hu et al. 2022, arXiv 2106.09685), as LaMo uses it.

Each of Q, K and V gets its own low-rank update. For one of them, with x a row vector,

    q = x W_q^T + b_q + (alpha / rank) dropout(x) A_q^T B_q^T       A_q (r, C), B_q (C, r)

B starts at zero, so an injected model starts as the pre-trained one. W stays frozen; A, B and the
bias of c_attn are trained, as in the authors' code.
"""

import math
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Dropout


class LoRALinear(nn.Linear):
    """nn.Linear (C -> 3C) with a low-rank update on each third of its output.

    The factors of Q, K and V are stacked: lora_A (3r, C), lora_B (3C, r), loralib's layout.
    """

    def __init__(self, linear, rank, alpha, dropout):
        """Take over the weight and bias of `linear`; nothing is copied."""
        C = linear.in_features
        if linear.out_features != 3 * C:
            raise ValueError(f"expected a C -> 3C layer, got {C} -> {linear.out_features}")
        super().__init__(C, 3 * C, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.rank, self.scaling = rank, alpha / rank
        self.lora_dropout = Dropout(dropout)
        self.lora_A = nn.Parameter(self.weight.new_empty(3 * rank, C, dtype=torch.float32))
        self.lora_B = nn.Parameter(self.weight.new_zeros(3 * C, rank, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as loralib's MergedLinear
        self.frozen_weight = None  # W itself while merged
        self.train(linear.training)

    def forward(self, x):
        """(.., C) -> (.., 3C)."""
        lead, x = x.shape[:-1], x.flatten(0, -2).to(self.weight.dtype)  # (N, C)
        y = F.linear(x, self.weight, self.bias)  # (N, 3C)
        if self.frozen_weight is None:
            low = F.linear(self.lora_dropout(x), self.lora_A)  # (N, 3r)
            B = torch.block_diag(*self.lora_B.chunk(3))  # (3C, 3r): Q, K and V in one product
            y.addmm_(low.to(y.dtype), B.T.to(y.dtype), alpha=self.scaling)
        return y.view(*lead, -1)

    @torch.no_grad()
    def merge(self):
        """Add the update to the weight: one matrix product instead of three, the same output.

        In fp32, that is. A weight in bf16 has no room for an update below half its last digit.
        """
        if self.frozen_weight is not None:
            return
        A, B = self.lora_A.view(3, self.rank, -1), self.lora_B.view(3, -1, self.rank)
        update = self.scaling * torch.bmm(B, A).flatten(0, 1)  # (3C, C)
        self.frozen_weight = self.weight.data
        self.weight.data = (self.weight.data.float() + update).to(self.weight.dtype)

    @torch.no_grad()
    def unmerge(self):
        """Put W back, bit for bit: it was kept, since subtracting the update would round."""
        if self.frozen_weight is not None:
            self.weight.data, self.frozen_weight = self.frozen_weight, None


def inject_lora(gpt, rank=16, alpha=32, dropout=0.1):
    """Put LoRA into c_attn of every block, in place. Defaults are the paper's."""
    for block in gpt.h:
        block.attn.c_attn = LoRALinear(block.attn.c_attn, rank, alpha, dropout)


def mark_trainable(lamo, train, language=True):
    """Freeze and unfreeze, in place.

    train "lora": LoRA's factors, c_attn's bias and everything outside the GPT (the trajectory
    embeddings, embed_ln, the time embedding, the head); "new": only what is outside the GPT (the
    paper's frozen ablation); "all": everything, but wte and wpe only if there is a language loss,
    for no other reads them. Raises ValueError for another word.
    """
    if train not in ("lora", "new", "all"):
        raise ValueError(f"train is {train!r}, but must be 'lora', 'new' or 'all'")
    for name, parameter in lamo.named_parameters():
        if not name.startswith("gpt."):
            trained = True
        elif train == "lora":
            trained = name.endswith(("lora_A", "lora_B", "c_attn.bias"))
        else:
            unread = name in ("gpt.wte.weight", "gpt.wpe.weight") and not language
            trained = train == "all" and not unread
        parameter.requires_grad_(trained)


def round_frozen(model):
    """Keep frozen matrices as bf16, in place: half the memory, and no cast at each use.

    Under bf16 autocast nothing else changes, which rounds a matrix so whenever it multiplies. Only
    wte is also looked up in, so a text's embeddings are rounded, too; wpe stays as it is.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and parameter.dim() == 2 and not name.endswith("wpe.weight"):
            parameter.data = parameter.data.bfloat16()


@contextmanager
def merged(model):
    """Within this, every LoRA layer of `model` is merged; afterwards the frozen W is back."""
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    for layer in layers:
        layer.merge()
    try:
        yield
    finally:
        for layer in layers:
            layer.unmerge()
