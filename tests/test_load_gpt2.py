"""load_gpt2.py: weights in and out, and logits, loss and gradients equal to transformers'."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    ImageGPTConfig,
    ImageGPTForCausalImageModeling,
)

from experiments.pretrain import save_gpt2
from load_gpt2 import WEIGHTS, fingerprint, load_gpt2, make_gpt
from model import GPT, GPTConfig
from utils import UserError, is_cached

SIZES = dict(n_layer=2, n_head=3, n_embd=48, vocab_size=101, n_positions=64)
SMALL = GPTConfig(2, 3, 48, 101, 64)
refused = partial(pytest.raises, UserError)


def randomised(model, std=0.02):
    """A model whose every number differs: biases and norms too, which start as 0 and 1."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * std)
    return model.eval()


@pytest.mark.parametrize("kind", ["safetensors", "bin", "a file alone", "gpt2's size"])
def test_logits_loss_and_gradients_equal_transformers(tmp_path, kind):
    sizes = dict(n_layer=2) if kind == "gpt2's size" else SIZES  # transformers' defaults: gpt2's
    theirs, name = randomised(GPT2LMHeadModel(GPT2Config(**sizes))), tmp_path
    theirs.save_pretrained(tmp_path)
    if kind == "bin":
        views = {k: x.t().contiguous().t() for k, x in theirs.state_dict().items() if x.dim() == 2}
        torch.save(theirs.state_dict() | views, tmp_path / "pytorch_model.bin")
        (tmp_path / WEIGHTS).unlink()
    elif kind == "a file alone":
        name = tmp_path / WEIGHTS
    elif kind == "gpt2's size":
        (tmp_path / "config.json").unlink()  # its width tells its heads
    ours = load_gpt2(str(name)).eval()
    tokens = torch.randint(theirs.config.vocab_size, (2, 33))
    expected = theirs(tokens[:, :-1]).logits
    assert (ours(tokens[:, :-1]) - expected).abs().max() < 1e-4
    loss = ours(tokens[:, :-1], tokens[:, 1:])
    expected_loss = F.cross_entropy(expected.flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(loss.item() - expected_loss.item()) < 1e-4
    expected_loss.backward()
    loss.backward()
    gradients = {k.removeprefix("transformer."): p.grad for k, p in theirs.named_parameters()}
    assert {name for name, _ in ours.named_parameters()} == set(gradients)
    for name, parameter in ours.named_parameters():
        gradient = (
            gradients[name].t()
            if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
            else gradients[name]
        )
        assert (parameter.grad - gradient).abs().max() < 1e-4, name


@pytest.mark.parametrize(
    "options",
    [
        {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
        {"scale_attn_weights": False},
        {"activation_function": "relu", "layer_norm_epsilon": 1e-3},
        {"activation_function": "gelu", "n_inner": 192},
        {"activation_function": "gelu_fast"},
    ],
)
def test_options_that_change_the_function_are_honoured(options, tmp_path):
    config = GPT2Config(**SIZES, **options, initializer_range=0.2, attn_implementation="eager")
    theirs = randomised(GPT2LMHeadModel(config))
    theirs.save_pretrained(tmp_path)
    tokens = torch.randint(101, (2, 33))
    ours = load_gpt2(str(tmp_path)).eval()
    assert (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-4
    save_gpt2(ours, tmp_path / "again.safetensors", {})
    again = load_gpt2(str(tmp_path / "again.safetensors")).eval()
    assert torch.equal(again(tokens), ours(tokens))


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("activation_function", "tanh", "tanh"),
        ("n_inner", 50, "n_inner"),
        ("add_cross_attention", True, "add_cross_attention"),
        ("tie_word_embeddings", False, "tied"),
    ],
)
def test_options_that_cannot_be_honoured_are_named(option, value, says, tmp_path):
    GPT2LMHeadModel(GPT2Config(**SIZES, **{option: value})).save_pretrained(tmp_path)
    with refused(match=says):
        load_gpt2(str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_weights_are_read_by_us_and_by_transformers(tmp_path, dtype):
    gpt = randomised(GPT(SMALL))
    save_gpt2(gpt, tmp_path / WEIGHTS, {"origin": "a test"}, dtype)
    again = load_gpt2(str(tmp_path / WEIGHTS), dropout=gpt.config.dropout).eval()
    assert again.config == gpt.config
    assert (fingerprint(again) == fingerprint(gpt)) == (dtype == torch.float32)
    GPT2Config(**SIZES).save_pretrained(tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = torch.randint(101, (2, 20))
    assert (theirs(tokens).logits - again(tokens)).abs().max() < 1e-5


def test_shuffled_weights_are_the_same_numbers_elsewhere():
    plain, shuffled, again = (
        make_gpt("mini", True, 0.1, seed, on)[0] for seed, on in ((1, False), (1, True), (2, True))
    )
    for name, x in plain.state_dict().items():
        y, z = shuffled.state_dict()[name], again.state_dict()[name]
        assert torch.equal(x, y) == (x.dim() == 1)
        assert torch.equal(y, z) == (x.dim() == 1)
        assert torch.equal(x.flatten().sort().values, y.flatten().sort().values)


def test_random_weights_are_the_seeds_and_nothing_else():
    once, base = make_gpt("dt", False, 0.1, 3)
    twice, _ = make_gpt("dt", False, 0.1, 3)
    _, other = make_gpt("dt", False, 0.1, 4)
    assert fingerprint(once) == fingerprint(twice) == base["sha256"] != other["sha256"]
    assert (once.config.n_layer, once.config.n_head, once.config.n_embd) == (3, 1, 128)
    assert once.h[0].mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.05)
    shape, (mini, base) = make_gpt("mini", False, 0.3, 0)[0], make_gpt("mini", True, 0.3, 0)
    assert shape.config == mini.config
    assert base["sha256"] == fingerprint(load_gpt2("mini")) != fingerprint(shape)


def test_golden_logits_of_the_real_gpt2(shared):
    golden = json.loads(shared("gpt2/golden_logits.json").read_text())
    if not is_cached("openai-community/gpt2", [WEIGHTS]):
        pytest.skip("OpenAI's gpt2 weights are not in the Hugging Face cache")
    gpt = load_gpt2("gpt2").eval()
    for case in golden:
        logits = gpt(torch.tensor([case["token_ids"]]))[0, -1]
        for token, value in case["top"]:
            assert abs(logits[token].item() - value) < 1e-2
        assert abs(logits.mean().item() - case["logits_mean"]) < 1e-2


def test_imagegpts_blocks_equal_transformers(tmp_path):
    config = ImageGPTConfig(n_layer=3, n_head=4, n_embd=48, vocab_size=65, n_positions=64)
    theirs = randomised(ImageGPTForCausalImageModeling(config), 0.05)
    theirs.save_pretrained(tmp_path)
    ours = load_gpt2(str(tmp_path)).eval()
    assert ours.config.visual
    pixels = torch.randint(64, (2, 33))
    expected = theirs.transformer(input_ids=pixels).last_hidden_state
    found = ours.blocks(ours.wte(pixels) + ours.wpe.weight[:33])
    assert torch.allclose(found, expected, atol=1e-4)
    save_gpt2(ours, tmp_path / "again.safetensors", {})  # and our own file says what it is
    again = load_gpt2(str(tmp_path / "again.safetensors"))
    assert again.config == replace(ours.config, dropout=again.config.dropout)
    assert fingerprint(again) == fingerprint(ours)


# --- where weights are found, and what is refused ------------------------------------------------


def test_a_name_of_the_hub_is_read_from_its_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert not is_cached("distilbert/distilgpt2", [WEIGHTS])
    with refused(match="hf download distilbert/distilgpt2 model.safetensors"):
        load_gpt2("distilgpt2")
    repository, gpt = tmp_path / "models--distilbert--distilgpt2", GPT(SMALL)
    save_gpt2(gpt, repository / "snapshots" / "abc" / WEIGHTS, {})
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    assert is_cached("distilbert/distilgpt2", [WEIGHTS])
    assert fingerprint(load_gpt2("distilgpt2")) == fingerprint(gpt)


def test_masks_and_a_tied_head_in_a_file_are_checked_not_loaded(tmp_path):
    gpt, path = GPT(SMALL), tmp_path / WEIGHTS
    save_gpt2(gpt, path, {})
    tensors = load_file(path)
    for i in range(2):  # as the hub's openai-community/gpt2 has them
        tensors[f"h.{i}.attn.bias"] = torch.ones(64, 64).tril()[None, None]
        tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    (tmp_path / "config.json").write_text('{"n_head": 3}')
    save_file(tensors, path)
    assert fingerprint(load_gpt2(str(path))) == fingerprint(gpt)
    tensors["lm_head.weight"] += 1  # an untied head would be lost
    save_file(tensors, path)
    with refused(match=f"{path}.*lm_head"):
        load_gpt2(str(path))


C_FC = "h.1.mlp.c_fc.weight"
SPOILT = {  # what the error names: a change of the tensors
    "h.1.mlp.c_fc.bias": lambda t: t.pop("h.1.mlp.c_fc.bias"),
    "wte.weight": lambda t: t.pop("wte.weight"),
    "h.0.": lambda t: [t.pop(name) for name in list(t) if name.startswith("h.0.")],
    C_FC: lambda t: t.update({C_FC: t[C_FC].t().contiguous()}),
    "h.1.mlp.c_gate.weight": lambda t: t.update({"h.1.mlp.c_gate.weight": torch.zeros(2)}),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_weights_file_that_does_not_fit_is_refused(tmp_path, name):
    path, config = tmp_path / WEIGHTS, {"config": '{"n_head": 3}'}
    save_gpt2(GPT(SMALL), path, {})
    tensors = load_file(path)
    SPOILT[name](tensors)
    save_file(tensors, path, config)
    with refused(match=f"{path}.*{name}"):
        load_gpt2(str(path))


def test_the_number_of_heads_must_be_known(tmp_path):
    path = tmp_path / WEIGHTS
    save_gpt2(GPT(SMALL), path, {"config": "{}"})
    with refused(match=f"{path}.*config.json"):
        load_gpt2(str(path))
