"""model.py and load_gpt2.py against transformers' GPT-2 and a slow left-padded LaMo."""

import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    ImageGPTConfig,
    ImageGPTForCausalImageModeling,
)

from load_gpt2 import find_config, fingerprint, is_cached, load_gpt2, main, save_gpt2
from model import GPT, GPTConfig, LaMo, text_loss
from plumbing import UserError

SMALL = dict(n_layer=3, n_head=4, n_embd=48, vocab_size=101, n_positions=64)
FULL = {}  # transformers' defaults are gpt2's own sizes


def their_gpt2(sizes):
    """transformers' GPT-2 with random weights, every one of them different from its neighbours."""
    model = GPT2LMHeadModel(GPT2Config(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, which start as 0 and 1
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.eval()


@pytest.mark.parametrize("sizes", [SMALL, FULL], ids=["small", "gpt2"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_logits_loss_and_gradients_equal_transformers(tmp_path, sizes, kind):
    theirs = their_gpt2(sizes)
    if kind == "safetensors":
        theirs.save_pretrained(tmp_path)
    else:
        theirs.config.save_pretrained(tmp_path)
        torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    ours = load_gpt2(str(tmp_path)).eval()

    tokens = torch.randint(theirs.config.vocab_size, (2, 33))
    expected = theirs(tokens[:, :-1]).logits
    logits, loss = ours(tokens[:, :-1])[0], ours(tokens[:, :-1], tokens[:, 1:])[1]
    assert (logits - expected).abs().max() < 1e-4

    expected_loss = F.cross_entropy(expected.flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(loss.item() - expected_loss.item()) < 1e-4
    expected_loss.backward()
    loss.backward()
    gradients = {k.removeprefix("transformer."): p.grad for k, p in theirs.named_parameters()}
    conv1d = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    names = [name for name, _ in ours.named_parameters()]
    assert set(names) == set(gradients)
    for name, parameter in ours.named_parameters():
        gradient = gradients[name].t() if name.endswith(conv1d) else gradients[name]
        assert (parameter.grad - gradient).abs().max() < 1e-4, name


def test_saved_weights_are_read_by_us_and_by_transformers(tmp_path):
    gpt = GPT(GPTConfig(2, 3, 48, 101, 64)).eval()
    save_gpt2(gpt, tmp_path / "model.safetensors", {"origin": "a test"})
    again = load_gpt2(str(tmp_path / "model.safetensors"))
    assert fingerprint(again) == fingerprint(gpt)
    assert again.config == gpt.config

    sizes = dict(n_layer=2, n_head=3, n_embd=48, vocab_size=101, n_positions=64)
    GPT2Config(**sizes).save_pretrained(tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    tokens = torch.randint(101, (2, 20))
    assert (theirs(tokens).logits - gpt(tokens)[0]).abs().max() < 1e-5


def test_published_sizes():
    counts = {"distilgpt2": 81_912_576, "gpt2": 124_439_808, "gpt2-medium": 354_823_168}
    counts |= {"gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}
    for name, count in counts.items():
        with torch.device("meta"):
            assert sum(p.numel() for p in GPT(find_config(name)).parameters()) == count, name


def test_masks_and_tied_head_in_a_file_are_checked_not_loaded(tmp_path):
    theirs = their_gpt2(SMALL)
    tensors = {k: v.clone() for k, v in theirs.transformer.state_dict().items()}
    for i in range(3):  # as the hub's openai-community/gpt2 has them
        tensors[f"h.{i}.attn.bias"] = torch.ones(64, 64).tril()[None, None]
        tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    theirs.config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    load_gpt2(str(tmp_path))

    tensors["lm_head.weight"] += 1  # an untied head would be lost: refuse
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"no use for: lm_head\.weight"):
        load_gpt2(str(tmp_path))


def missing(tensors, config):
    del tensors["h.1.mlp.c_fc.bias"]


def transposed(tensors, config):
    tensors["h.1.mlp.c_fc.weight"] = tensors["h.1.mlp.c_fc.weight"].t().contiguous()


def three_dimensional(tensors, config):
    tensors["h.1.mlp.c_fc.weight"] = tensors["h.1.mlp.c_fc.weight"][None]


def left_over(tensors, config):
    tensors["h.1.mlp.c_gate.weight"] = torch.zeros(2)


def flat_embedding(tensors, config):
    tensors["wte.weight"] = tensors["wte.weight"].flatten()


def no_positions(tensors, config):
    tensors["wpe.weight"] = torch.tensor(0.0)


def other_mask(tensors, config):
    tensors["h.0.attn.bias"] = torch.ones(3, 3).tril()


def no_layer_number(tensors, config):
    tensors["h.x.ln_1.weight"] = torch.ones(48)


def last_layer_gone(tensors, config):
    for name in [name for name in tensors if name.startswith("h.1.")]:
        del tensors[name]


def heads_that_do_not_divide(tensors, config):
    config["n_head"] = 5


def no_heads(tensors, config):
    config["n_head"] = 0


def unknown_heads(tensors, config):
    config.clear()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (missing, r"lacks the tensor h\.1\.mlp\.c_fc\.bias"),
        (transposed, r"h\.1\.mlp\.c_fc\.weight is \(192, 48\), expected \(48, 192\)"),
        (three_dimensional, r"h\.1\.mlp\.c_fc\.weight is \(1, 48, 192\), expected \(48, 192\)"),
        (left_over, r"no use for: h\.1\.mlp\.c_gate\.weight"),
        (flat_embedding, r"has no matrix wte\.weight"),
        (no_positions, r"has no matrix wpe\.weight"),
        (other_mask, r"no use for: h\.0\.attn\.bias \(3, 3\)"),
        (no_layer_number, "has n_layer 3, but .* says 2"),
        (last_layer_gone, "has n_layer 1, but .* says 2"),
        (heads_that_do_not_divide, "says n_head 5, which does not divide n_embd 48"),
        (no_heads, "says n_head 0"),
        (unknown_heads, "does not say its number of heads; put its config.json beside it"),
    ],
)
def test_a_weights_file_that_does_not_fit_is_refused(tmp_path, spoil, message):
    path = tmp_path / "model.safetensors"
    save_gpt2(GPT(GPTConfig(2, 3, 48, 101, 64)), path, {})
    tensors, config = load_file(path), {"n_head": 3, "n_layer": 2}
    spoil(tensors, config)
    save_file(tensors, path, {"config": json.dumps(config)})
    with pytest.raises(UserError, match=message) as caught:
        load_gpt2(str(path))
    assert "\n" not in str(caught.value)


def test_a_damaged_configuration_is_refused(tmp_path):
    their_gpt2(SMALL).save_pretrained(tmp_path)
    for content in ("{", "[1]", '"x"'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=r"config\.json is no JSON object"):
            load_gpt2(str(tmp_path))


def test_unreadable_weights_are_refused_in_one_line(tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    (tmp_path / "cut.bin").write_bytes(b"PK\x03\x04")
    torch.save({"wte.weight": print}, tmp_path / "code.bin")  # a pickled function: never loaded
    rng = random.Random(0)
    names = ["cut.safetensors", "cut.bin", "code.bin", "absent.bin"]
    for i in range(100):
        names.append(f"noise{i}.bin")
        (tmp_path / names[-1]).write_bytes(rng.randbytes(rng.randrange(40)))
    for name in names:
        with pytest.raises(UserError) as caught:
            load_gpt2(str(tmp_path / name))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="Did you mean gpt2-medium"):
        load_gpt2("gpt2-mediun")
    if not is_cached("gpt2"):
        with pytest.raises(UserError, match="hf download openai-community/gpt2"):
            load_gpt2("gpt2")


def test_run_as_a_script_it_shows_the_mini_lm(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["load_gpt2.py", "mini", "--tokens", "20"])
    main()
    printed = capsys.readouterr().out
    assert printed.startswith("mini: 1,433,472 parameters")
    perplexity = float(printed.split("perplexity ")[1].split()[0])
    assert perplexity < 20  # of 257 bytes: it knows English
    assert "Hello, my name is Tom." in printed


def test_golden_logits_of_the_real_gpt2(shared):
    golden = json.loads(shared("gpt2/golden_logits.json").read_text())
    if not is_cached("gpt2"):
        pytest.skip("OpenAI's gpt2 weights are not in the Hugging Face cache")
    gpt = load_gpt2("gpt2").eval()
    for case in golden:
        logits = gpt(torch.tensor([case["token_ids"]]))[0][0, -1]
        for token, value in case["top"]:
            assert abs(logits[token].item() - value) < 1e-2
        assert abs(logits.mean().item() - case["logits_mean"]) < 1e-2


def test_text_loss_is_the_mean_over_every_next_token():
    gpt = GPT(GPTConfig(2, 2, 32, 50, 16, dropout=0.5)).train()
    for n in (2, 10, 16, 17, 18, 100):
        tokens = np.random.default_rng(n).integers(50, size=n).astype(np.uint16)
        gpt.eval()
        losses = []
        for start in range(0, n - 1, 16):  # blocks of block_size inputs, one after another
            block = torch.tensor(tokens[start : start + 17].astype(int))
            logits = gpt(block[None, :-1])[0][0]
            losses += F.cross_entropy(logits, block[1:], reduction="none").tolist()
        gpt.train()
        assert math.isclose(text_loss(gpt, tokens, batch=2), sum(losses) / (n - 1), rel_tol=1e-5)
        assert gpt.training
    with pytest.raises(ValueError, match="at least 2 tokens"):
        text_loss(gpt, tokens[:1])


def test_generate_is_greedy_at_temperature_zero_and_seeded_otherwise():
    gpt = GPT(GPTConfig(2, 2, 32, 50, 8)).eval()
    prompt = torch.randint(50, (1, 5))
    out = gpt.generate(prompt, 10, temperature=0)
    for i in range(5, 15):  # past block_size too
        assert out[0, i] == gpt(out[:, max(0, i - 8) : i])[0][0, -1].argmax()
    once, twice = (
        gpt.generate(prompt, 10, top_k=5, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    )
    assert torch.equal(once, twice)
    with pytest.raises(ValueError, match="at least one token"):
        gpt.generate(prompt[:, :0], 1)


def test_more_tokens_than_positions_is_an_error():
    gpt = GPT(GPTConfig(1, 1, 8, 50, 8))
    with pytest.raises(ValueError, match="9 tokens, but the model knows 8"):
        gpt(torch.zeros(1, 9, dtype=torch.int64))


# --- LaMo ----------------------------------------------------------------------------------------


def reference_lamo(lamo, theirs, rtg, obs, act, timestep, context):
    """LaMo the slow way, for one window: padded on the left, masked, on transformers' GPT-2.

    rtg (n, 1), obs (n, O), act (n, A), timestep (n,), n <= context. Returns (n, A).
    """

    def embed(layer, x):
        if isinstance(layer, torch.nn.Linear):
            return x @ layer.weight.T + layer.bias
        h = x @ layer.fc1.weight.T + layer.fc1.bias
        erf_gelu = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
        return erf_gelu @ layer.fc2.weight.T + layer.fc2.bias + h

    n, C = len(timestep), lamo.gpt.config.n_embd
    tokens = []
    for t in range(n):
        for layer, x in (
            (lamo.embed_return, rtg),
            (lamo.embed_state, obs),
            (lamo.embed_action, act),
        ):
            token = embed(layer, x[t])
            token = (token - token.mean()) / torch.sqrt(token.var(unbiased=False) + 1e-5)
            token = token * lamo.embed_ln.weight + lamo.embed_ln.bias
            row = min(int(timestep[t]), len(lamo.embed_time.weight) - 1)
            tokens.append(token + lamo.embed_time.weight[row])
    padding = 3 * (context - n)
    x = torch.cat([torch.full((padding, C), 7.0), torch.stack(tokens)])[None]  # (1, 3K, C)
    mask = torch.tensor([[0] * padding + [1] * 3 * n])
    h = theirs(inputs_embeds=x, attention_mask=mask).last_hidden_state[0, padding:]  # (3n, C)
    h = h[1::3]
    if len(lamo.head) == 2:
        return torch.tanh(h @ lamo.head[0].weight.T + lamo.head[0].bias)
    h = h @ lamo.head[0].weight.T + lamo.head[0].bias
    h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
    return h @ lamo.head[2].weight.T + lamo.head[2].bias


@pytest.mark.parametrize("embed", ["linear", "mlp"])
def test_right_padding_equals_left_padding_with_a_mask(tmp_path, embed):
    K, T, obs_dim, act_dim = 5, 13, 4, 2
    sizes = dict(n_layer=2, n_head=2, n_embd=32, vocab_size=11, n_positions=64)
    theirs = GPT2Model(GPT2Config(**sizes)).eval()
    theirs.save_pretrained(tmp_path)
    lamo = LaMo(load_gpt2(str(tmp_path)), (obs_dim,), act_dim, embed=embed, max_ep_len=10).eval()
    theirs.wpe.weight.data.zero_()  # trajectory tokens carry no position embedding
    rtg, obs, act = torch.randn(T, 1), torch.randn(T, obs_dim), torch.randn(T, act_dim)
    timestep = torch.arange(T)  # beyond max_ep_len: clipped

    for start in range(T):  # windows at every place, the last ones shorter than K
        n = min(K, T - start)
        window = slice(start, start + n)
        expected = reference_lamo(
            lamo, theirs, rtg[window], obs[window], act[window], timestep[window], K
        )

        def padded(x, window=window, n=n):
            out = torch.full((1, K, *x.shape[1:]), 123.0 if x.is_floating_point() else 3)
            out[0, :n] = x[window]
            return out.to(x.dtype)

        actual = lamo(padded(rtg), padded(obs), padded(act), padded(timestep))[0, :n]
        assert (actual - expected).abs().max() < 1e-5


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 6), st.integers(0, 2), st.integers(0, 10_000))
def test_an_action_depends_on_the_past_only(step, what, seed):
    torch.manual_seed(seed)
    lamo = LaMo(GPT(GPTConfig(1, 2, 16, 11, 8)), (3,), 2, max_ep_len=20).eval()
    inputs = [torch.randn(1, 7, n) for n in (1, 3, 2)]
    timestep = torch.arange(7)[None]
    before = lamo(*inputs, timestep)
    inputs[what] = inputs[what].clone()
    inputs[what][:, step] += 1
    changed = (lamo(*inputs, timestep) - before).abs().amax(dim=(0, 2)) > 1e-7  # (7,)
    first = step + 1 if what == 2 else step  # a_t is read from step t + 1 on
    assert not changed[:first].any()
    assert changed[first:].all()


def test_imagegpts_blocks_equal_transformers(tmp_path):
    theirs = ImageGPTForCausalImageModeling(
        ImageGPTConfig(n_layer=3, n_head=4, n_embd=48, vocab_size=65, n_positions=64)
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
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
