"""lora.py against loralib, and what it promises of the frozen weights."""

import copy

import loralib
import pytest
import torch

from checkpoint import build_model
from load_gpt2 import find_config
from lora import LoRALinear, inject_lora, mark_trainable, merged
from model import GPT, GPTConfig, LaMo

TINY = GPTConfig(2, 2, 32, 50, 32)


def random_lora(C=24, rank=4, alpha=8, dropout=0.0):
    layer = LoRALinear(torch.nn.Linear(C, 3 * C), rank, alpha, dropout)
    torch.nn.init.normal_(layer.lora_B)  # it starts at zero, which would hide everything
    return layer


def test_outputs_and_gradients_equal_loralib():
    C, rank, alpha = 24, 4, 8
    ours = random_lora(C, rank, alpha)
    theirs = loralib.MergedLinear(
        C, 3 * C, r=rank, lora_alpha=alpha, enable_lora=[True] * 3, merge_weights=False
    )
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


def test_q_k_and_v_have_factors_of_their_own():
    layer = random_lora()
    x = torch.randn(3, 24)
    before = layer(x)
    with torch.no_grad():
        layer.lora_A[4:8] += 1  # K's
    changed = (layer(x) - before).abs().amax(0) > 1e-6  # (3C,)
    assert changed[24:48].all()
    assert not changed[:24].any()
    assert not changed[48:].any()


def test_merged_equals_unmerged_and_comes_back_bit_for_bit():
    gpt = GPT(TINY).eval()
    inject_lora(gpt, rank=4)
    for block in gpt.h:
        torch.nn.init.normal_(block.attn.c_attn.lora_B, std=0.1)
    tokens = torch.randint(50, (2, 32))
    weights = [block.attn.c_attn.weight.clone() for block in gpt.h]
    before = gpt(tokens)[0]
    with merged(gpt), merged(gpt):  # twice is once
        assert not torch.equal(gpt.h[0].attn.c_attn.weight, weights[0])
        assert (gpt(tokens)[0] - before).abs().max() < 1e-5
    for block, weight in zip(gpt.h, weights, strict=True):
        assert torch.equal(block.attn.c_attn.weight, weight)
    assert torch.equal(gpt(tokens)[0], before)


def test_injected_model_starts_as_the_original():
    gpt = GPT(TINY).eval()
    tokens = torch.randint(50, (2, 32))
    before = gpt(tokens)[0]
    inject_lora(gpt)
    assert torch.equal(gpt(tokens)[0], before)


def test_trainable_share_of_gpt2_small():
    with torch.device("meta"):
        gpt = GPT(find_config("gpt2"))
        inject_lora(gpt)
        lamo = LaMo(gpt, (11,), 3)
        mark_trainable(lamo, "lora")
    trained = sum(p.numel() for p in gpt.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in gpt.parameters() if not p.requires_grad)
    assert 0.0070 < trained / frozen < 0.0075
    assert trained == 12 * (3 * 16 * 768 + 3 * 768 * 16 + 3 * 768)  # A, B and c_attn's bias


@pytest.mark.parametrize(
    ("train", "language", "expected"),
    [
        ("lora", True, {"lora_A", "lora_B", "c_attn.bias"}),
        ("new", True, set()),
        ("all", True, {"wte.weight", "wpe.weight", "ln_f.bias", "c_proj.weight"}),
        ("all", False, {"ln_f.bias", "c_proj.weight"}),
    ],
)
def test_what_is_trainable(train, language, expected):
    gpt = GPT(TINY)
    if train == "lora":
        inject_lora(gpt)
    lamo = LaMo(gpt, (4,), 2)
    mark_trainable(lamo, train, language)
    outside = {n for n, p in lamo.named_parameters() if not n.startswith("gpt.")}
    trained = {n for n, p in lamo.named_parameters() if p.requires_grad}
    assert outside <= trained
    inside = trained - outside
    if train == "all":
        unread = set() if language else {"gpt.wte.weight", "gpt.wpe.weight"}
        assert inside == {n for n, _ in lamo.named_parameters()} - outside - unread
    for name in expected:
        assert any(n.endswith(name) for n in inside)
    if train == "lora":
        assert len(inside) == 3 * TINY.n_layer
    if train == "new":
        assert not inside
    with pytest.raises(ValueError, match="must be 'lora', 'new' or 'all'"):
        mark_trainable(lamo, "some")


def test_training_changes_no_frozen_tensor():
    torch.manual_seed(0)
    gpt = GPT(TINY)
    inject_lora(gpt, rank=4)
    lamo = LaMo(gpt, (4,), 2)
    mark_trainable(lamo, "lora")
    before = copy.deepcopy(lamo.state_dict())
    trainable = [p for p in lamo.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trainable, lr=1e-2, weight_decay=0.1)
    for _ in range(5):
        act = torch.randn(8, 6, 2)
        predicted = lamo(
            torch.randn(8, 6, 1), torch.randn(8, 6, 4), act, torch.arange(6).expand(8, 6)
        )
        tokens = torch.randint(50, (2, 17))
        loss = (predicted - act).square().mean() + gpt(tokens[:, :-1], tokens[:, 1:])[1]
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        with merged(lamo):
            lamo(torch.randn(1, 6, 1), torch.randn(1, 6, 4), act[:1], torch.arange(6)[None])
    trained = {n for n, p in lamo.named_parameters() if p.requires_grad}
    for name, tensor in lamo.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in trained), name


def test_a_seed_fixes_the_new_weights_whatever_the_base_is(boxes):
    settings = dict(seed=3, lm="dt", pretrained=False, train="lora", embed="mlp", max_ep_len=10)
    settings |= dict(dropout=0.1, lora_rank=4, lora_alpha=8, lora_dropout=0.1, lm_coef=0.0)
    once, base = build_model(settings, boxes(4, 2))
    twice, _ = build_model(settings, boxes(4, 2))
    other, other_base = build_model(settings | {"seed": 4}, boxes(4, 2))
    for (name, a), b in zip(once.state_dict().items(), twice.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert base["sha256"] != other_base["sha256"]
    assert not torch.equal(once.embed_state.fc1.weight, other.embed_state.fc1.weight)
