"""LoRA (Hu et al. 2022, arXiv 2106.09685) on any linear layer of a GPT, by its name.

On c_attn each of Q, K and V gets a low-rank update of its own. For one of them, x a row vector,

    q = x W_q^T + b_q + (alpha / rank) dropout(x) A_q^T B_q^T       A_q (r, C), B_q (C, r)

B starts at zero. W stays frozen. A, B and the bias are trained, for Atari A and B alone, as in the
authors' code.
"""

import math
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from utils import UserError


class LoRALinear(nn.Linear):
    """nn.Linear (n_in -> n_out) with a low-rank update on each part of its output. The layer says
    by its attribute `splits` how many equal parts there are (c_attn: 3), else it is one. Their
    factors are stacked: lora_A (splits r, n_in), lora_B (n_out, r), loralib's layout."""

    def __init__(self, linear, rank, alpha, dropout):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.splits = getattr(linear, "splits", 1)
        self.scaling = alpha / rank
        self.lora_dropout = nn.Dropout(dropout)
        new = {"dtype": torch.float32, "device": self.weight.device}
        self.lora_A = nn.Parameter(torch.empty(self.splits * rank, self.in_features, **new))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, **new))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as loralib's MergedLinear

    def forward(self, x):
        """(.., n_in) -> (.., n_out)."""
        lead, x = x.shape[:-1], x.flatten(0, -2).to(self.weight.dtype)  # (N, n_in)
        low = F.linear(self.lora_dropout(x), self.lora_A)  # (N, splits r)
        B = torch.block_diag(*self.lora_B.chunk(self.splits))  # (n_out, splits r): one product
        y = F.linear(x, self.weight, self.bias)  # (N, n_out)
        return y.addmm_(low.to(y.dtype), B.T.to(y.dtype), alpha=self.scaling).view(*lead, -1)


def inject_lora(gpt, targets=("c_attn",), rank=16, alpha=32, dropout=0.1):
    """Put LoRA into every linear layer of these names, in place. Raises UserError for others."""
    linear = [name for name, layer in gpt.named_modules() if isinstance(layer, nn.Linear)]
    names = sorted({name.rpartition(".")[2] for name in linear})
    if not set(targets) <= set(names):
        raise UserError(f"--lora-targets {' '.join(targets)}: choose from {', '.join(names)}")
    for name in linear:
        parent, _, own = name.rpartition(".")
        if own in targets:
            layer = LoRALinear(gpt.get_submodule(name), rank, alpha, dropout)
            setattr(gpt.get_submodule(parent), own, layer)


def mark_trainable(lamo, train, language=True, bias=True):
    """Freeze and unfreeze, in place. train "new": only what is outside the GPT (the trajectory
    embeddings, embed_ln, the time embedding, the head), the paper's frozen ablation; "lora": LoRA's
    factors and, with bias, the biases beside them, too; "all": everything, but wte, wpe and lm_head
    only for a language loss, since nothing else reads them."""
    lamo.requires_grad_(True)
    for name, parameter in lamo.gpt.named_parameters():
        read = language or name not in ("wte.weight", "wpe.weight", "lm_head.weight")
        parameter.requires_grad_(train == "all" and read)
    for layer in lamo.modules():
        if train == "lora" and isinstance(layer, LoRALinear):
            layer.requires_grad_(True).weight.requires_grad_(False)
            if layer.bias is not None:
                layer.bias.requires_grad_(bias)


def round_frozen(model):
    """Store frozen matrices in bf16, in place: autocast would round them at each use. This rounds
    wte too, which is also looked up in; wpe stays in fp32."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and parameter.dim() == 2 and not name.endswith("wpe.weight"):
            parameter.data = parameter.data.bfloat16()


@contextmanager
def merged(model):
    """Within this, each LoRA layer is one product with W + (alpha / rank) B A, the same output in
    fp32. In bf16 it is not: an update below half of a weight's last digit would be lost."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoRALinear)]
    for layer in layers:
        with torch.no_grad():
            A, B = layer.lora_A.chunk(layer.splits), layer.lora_B.chunk(layer.splits)
            update = torch.cat([b @ a for a, b in zip(A, B, strict=True)])  # (n_out, n_in)
            weight = layer.weight + layer.scaling * update
        layer.forward = partial(F.linear, weight=weight, bias=layer.bias)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own is found again
