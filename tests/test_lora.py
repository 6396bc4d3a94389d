"""lora.py against loralib, and what it promises of the frozen weights."""

import copy

import loralib
import pytest
import torch

from lora import LoRALinear, inject_lora, mark_trainable, merged, round_frozen
from model import GPT, GPTConfig, LaMo
from utils import UserError

TINY = GPTConfig(2, 2, 32, 50, 32)
EVERY = ("c_attn", "c_proj", "c_fc")  # linear layers that LoRA can update


def grown(gpt, targets, **kwargs):
    """A GPT in evaluation mode with LoRA; B starts at zero, which would hide everything."""
    inject_lora(gpt, targets, **kwargs)
    for layer in gpt.modules():
        if isinstance(layer, LoRALinear):
            torch.nn.init.normal_(layer.lora_B, std=0.1)
    return gpt.eval()


@pytest.mark.parametrize("splits", [1, 3])
def test_outputs_and_gradients_equal_loralib(splits):
    C, rank, alpha = 24, 4, 8
    linear = torch.nn.Linear(C, 3 * C)
    linear.splits = splits
    ours = LoRALinear(linear, rank, alpha, dropout=0.0)
    torch.nn.init.normal_(ours.lora_B)
    how = dict(r=rank, lora_alpha=alpha, merge_weights=False)
    if splits == 3:
        theirs = loralib.MergedLinear(C, 3 * C, enable_lora=[True] * 3, **how)
    else:
        theirs = loralib.Linear(C, 3 * C, **how)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 7, C)
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours(x_ours).square().sum().backward()
    theirs(x_theirs).square().sum().backward()
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)
    assert torch.allclose(x_ours.grad, x_theirs.grad, rtol=1e-4, atol=1e-4)
    for name in ("lora_A", "lora_B", "bias"):
        expected = getattr(theirs, name).grad
        assert torch.allclose(getattr(ours, name).grad, expected, rtol=1e-4, atol=1e-3), name


def test_only_the_layers_asked_for_get_lora_and_start_as_they_were():
    tokens = torch.randint(50, (2, 32))
    for targets in (["c_attn"], ["c_fc", "c_proj"], EVERY):
        gpt = GPT(TINY).eval()
        before = gpt(tokens)
        inject_lora(gpt, targets)
        assert torch.equal(gpt(tokens), before)
        for name, layer in gpt.named_modules():
            if isinstance(layer, torch.nn.Linear):
                expected = name.rpartition(".")[2] in targets
                assert isinstance(layer, LoRALinear) == expected, name
    with pytest.raises(UserError, match="c_gate"):
        inject_lora(GPT(TINY), ["c_attn", "c_gate"])


@pytest.mark.parametrize("targets", [["c_attn"], ["c_proj", "c_fc"], EVERY])
def test_merged_equals_unmerged_and_comes_back_bit_for_bit(targets):
    gpt = grown(GPT(TINY), targets, rank=4)
    tokens = torch.randint(50, (2, 32))
    before, state = gpt(tokens), copy.deepcopy(gpt.state_dict())
    with merged(gpt):
        found = gpt(tokens)
        for layer in gpt.modules():  # what is merged does not read the factors again
            if isinstance(layer, LoRALinear):
                layer.lora_B.data.neg_()
        assert torch.equal(gpt(tokens), found)
    assert 0 < (found - before).abs().max() < 1e-5
    gpt.load_state_dict(state)
    assert torch.equal(gpt(tokens), before)


@pytest.mark.parametrize("language", [True, False])
@pytest.mark.parametrize("train", ["lora", "new", "all"])
def test_what_is_trainable(train, language):
    gpt = GPT(TINY)
    inject_lora(gpt)
    lamo = LaMo(gpt, (4,), 2)
    mark_trainable(lamo, train, language)
    trained = {name for name, p in lamo.named_parameters() if p.requires_grad}
    of_gpt = {f"gpt.{name}" for name, _ in gpt.named_parameters()}
    assert {name for name, _ in lamo.named_parameters()} - of_gpt <= trained
    factors = {
        f"gpt.h.{i}.attn.c_attn.{name}" for i in range(2) for name in ("lora_A", "lora_B", "bias")
    }
    words = {"gpt.wte.weight", "gpt.wpe.weight"}
    everything = of_gpt if language else of_gpt - words
    assert trained & of_gpt == {"lora": factors, "new": set(), "all": everything}[train]


def test_frozen_matrices_in_bf16_change_nothing_but_lookups():
    lamo = LaMo(grown(GPT(TINY), ["c_attn"]), (11,), 3).eval()
    mark_trainable(lamo, "lora")
    window = torch.randn(4, 5, 1), torch.randn(4, 5, 11), torch.randn(4, 5, 3)
    timestep = torch.arange(5).expand(4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        before = lamo(*window, timestep)
        round_frozen(lamo)
        assert torch.equal(lamo(*window, timestep), before)
    kinds = {name: p.dtype for name, p in lamo.named_parameters()}
    assert kinds["gpt.h.0.mlp.c_fc.weight"] == kinds["gpt.wte.weight"] == torch.bfloat16
    trained = [name for name, p in lamo.named_parameters() if p.requires_grad]
    assert all(kinds[n] == torch.float32 for n in [*trained, "gpt.wpe.weight", "gpt.ln_f.weight"])
