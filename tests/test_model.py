"""model.py: GPT, the embeddings, LaMo and its losses, each against a slow way to compute it.

That GPT is GPT-2, by transformers' own, is in test_load_gpt2.py.
"""

import math
from collections import deque

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DecisionTransformerConfig, DecisionTransformerModel, GPT2Config, GPT2Model

import model
from data import STACK, get_encoding
from load_gpt2 import CONV1D, LANGUAGE_MODELS, load_gpt2
from lora import inject_lora, mark_trainable, round_frozen
from model import GPT, FrameEncoder, GPTConfig, LaMo, Objective, TokenEmbedding, attend, text_loss

SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=257, block_size=32, dropout=0.0)


def strengthen(lamo):
    """Weights with which each token, and its time, matters for each action."""
    for name, parameter in lamo.named_parameters():
        if name.startswith("gpt.h.") and parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    torch.nn.init.normal_(lamo.embed_time.weight)
    return lamo


def small_lamo():
    """A LaMo with LoRA whose factors are not zero."""
    lamo = LaMo(GPT(SMALL), (11,), 3)
    inject_lora(lamo.gpt, rank=4, alpha=8, dropout=0.0)
    mark_trainable(lamo, "lora")
    return strengthen(lamo)


def small_window(B=4, K=5):
    valid = torch.arange(K) < torch.randint(1, K + 1, (B, 1))
    timestep = torch.randint(900, (B, 1)) + torch.arange(K)
    return [torch.randn(B, K, 1), torch.randn(B, K, 11), torch.randn(B, K, 3), timestep, valid]


def small_text(B=2, L=16):
    tokens = torch.randint(257, (B, L + 1))
    return tokens[:, :-1], tokens[:, 1:]


# --- GPT -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("T", [1, 60])
def test_bf16_attention_by_hand_equals_pytorchs(T, scale):
    q, k, v = (scale * torch.randn(2, 3, T, 64) for _ in range(3))
    weight, found = torch.randn_like(q), []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        y = (
            attend(*inputs, 0.0)
            if dtype == torch.bfloat16
            else F.scaled_dot_product_attention(*inputs, is_causal=True)
        )
        assert y.dtype == dtype
        found.append([y, *torch.autograd.grad((y * weight).sum(), inputs)])
    for exact, rounded in zip(*found, strict=True):
        error = (rounded - exact).norm() / exact.norm().clamp(min=1e-3)
        assert error < 0.02 * scale  # bf16 has 8 bits: 0.004 an operation


@pytest.mark.parametrize("read", [slice(1, None, 3), slice(-1, None), slice(None)])
def test_positions_that_are_not_read_need_not_be_computed(read):
    gpt = GPT(SMALL)
    x = torch.randn(3, 12, 32)
    assert (gpt.blocks(x, read) - gpt.blocks(x)[:, read]).abs().max() < 1e-5


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 100), st.booleans())
def test_text_loss_is_the_mean_over_every_next_token(n, training):
    gpt = GPT(GPTConfig(2, 2, 32, 50, 16, dropout=0.5)).eval()
    tokens = np.random.default_rng(n).integers(50, size=n).astype(np.uint16)
    losses = []
    for start in range(0, n - 1, 16):  # blocks of block_size inputs, one after another
        block = torch.tensor(tokens[start : start + 17].astype(int))
        losses += F.cross_entropy(gpt(block[None, :-1])[0], block[1:], reduction="none").tolist()
    gpt.train(training)
    assert text_loss(gpt, tokens) == pytest.approx(sum(losses) / (n - 1), rel=1e-5)
    assert gpt.training == training


def test_generate_is_greedy_at_temperature_zero_and_seeded_otherwise():
    gpt = GPT(GPTConfig(2, 2, 32, 50, 8)).eval()
    prompt = torch.randint(50, (2, 5))
    out = gpt.generate(prompt, 10, temperature=0)
    assert torch.equal(out[:, :5], prompt)
    for i in range(5, 15):  # past block_size, too
        assert torch.equal(out[:, i], gpt(out[:, max(0, i - 8) : i])[:, -1].argmax(-1))
    assert torch.equal(gpt.generate(prompt, 10, top_k=1), out)
    once, twice, other = (
        gpt.generate(prompt, 10, generator=torch.Generator().manual_seed(s)) for s in (3, 3, 4)
    )
    assert torch.equal(once, twice)
    assert not torch.equal(once, other)


# --- numbers as tokens ---------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.floats(-2 * model.LARGEST, 2 * model.LARGEST, width=32))
def test_a_number_lies_between_the_edges_of_its_bin(x):
    def edge(i):  # mu-law, undone
        y = 2 * i / model.BINS - 1
        return math.copysign(
            math.expm1(abs(y) * math.log1p(model.MU * model.LARGEST)) / model.MU, y
        )

    bin = model.to_bins(torch.tensor(x)).item()
    near = 1e-5 + 1e-4 * abs(x)  # fp32
    assert 0 <= bin < model.BINS
    assert bin == 0 or edge(bin) <= x + near
    assert bin == model.BINS - 1 or x - near <= edge(bin + 1)


@pytest.mark.parametrize("vocab_size", [257, 50257])
def test_a_row_begins_as_the_tokens_of_its_digits(vocab_size, request, monkeypatch):
    if vocab_size == 50257:
        folder = request.getfixturevalue("shared")("tiktoken")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
    encoding = get_encoding(vocab_size)
    wte = torch.randn(vocab_size, 8)
    rows = TokenEmbedding(3, wte).table.weight
    for bin in (0, 7, 42, 307, 511):
        tokens = [token for digit in f"{bin:03d}" for token in encoding.encode(digit)]
        assert len(tokens) == 3
        for dimension in range(3):
            assert torch.allclose(
                rows[dimension * model.BINS + bin], wte[tokens].mean(0), atol=1e-6
            )


def test_a_vector_is_the_mean_of_its_numbers_rows():
    embedding = TokenEmbedding(3, torch.randn(257, 8))
    torch.nn.init.normal_(embedding.table.weight)
    x = torch.randn(2, 5, 3) * 10
    found = embedding(x)
    assert found.shape == (2, 5, 8)
    for b, t in np.ndindex(2, 5):
        rows = [
            embedding.table.weight[d * model.BINS + model.to_bins(x[b, t, d])] for d in range(3)
        ]
        assert torch.allclose(found[b, t], torch.stack(rows).mean(0), atol=1e-6)
    found[0, 0].sum().backward()  # and each dimension learns only in its own rows
    touched = embedding.table.weight.grad.abs().sum(1).nonzero()[:, 0]
    assert (touched // model.BINS).tolist() == [0, 1, 2]


# --- LaMo ----------------------------------------------------------------------------------------


def reference_lamo(lamo, theirs, rtg, obs, act, timestep, context):
    """LaMo the slow way, for one window: padded on the left, masked, on transformers' GPT-2.

    rtg (n, 1), obs (n, O), act (n, A) or (n,), timestep (n,), n <= context. Returns (n, n_act).
    """

    def gelu(h):
        return 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))

    def embed(layer, x):
        if isinstance(layer, torch.nn.Embedding):
            return layer.weight[x]
        if isinstance(layer, torch.nn.Sequential):  # a choice, under mlp
            return embed(layer[1], embed(layer[0], x))
        if isinstance(layer, torch.nn.Linear):
            return x @ layer.weight.T + layer.bias
        h = x @ layer.fc1.weight.T + layer.fc1.bias
        return gelu(h) @ layer.fc2.weight.T + layer.fc2.bias + h

    n, C, tokens = len(timestep), lamo.gpt.config.n_embd, []
    layers = (lamo.embed_return, lamo.embed_state, lamo.embed_action)
    for t in range(n):
        for layer, x in zip(layers, (rtg, obs, act), strict=True):
            token = embed(layer, x[t])
            token = (token - token.mean()) / torch.sqrt(token.var(unbiased=False) + 1e-5)
            token = token * lamo.embed_ln.weight + lamo.embed_ln.bias
            row = min(int(timestep[t]), len(lamo.embed_time.weight) - 1)
            tokens.append(token + lamo.embed_time.weight[row])
    padding = 3 * (context - n)
    x = torch.cat([torch.full((padding, C), 7.0), torch.stack(tokens)])[None]  # (1, 3K, C)
    mask = torch.tensor([[0] * padding + [1] * 3 * n])
    h = theirs(inputs_embeds=x, attention_mask=mask).last_hidden_state[0, padding:]  # (3n, C)
    h, head = h[1::3], lamo.head  # over s_t
    if isinstance(head, torch.nn.Linear):
        return embed(head, h)
    if len(head) == 2:
        return torch.tanh(embed(head[0], h))
    return embed(head[2], gelu(embed(head[0], h)))


def test_dt_is_transformers_decision_transformer():
    """With ReLU, on shared weights, at a time whose embedding is zero: LaMo's code adds it after
    embed_ln, theirs before."""
    sizes = LANGUAGE_MODELS["dt"][1]
    widths = dict(state_dim=11, act_dim=3, hidden_size=128, n_layer=3, n_head=1, vocab_size=257)
    widths |= dict(bos_token_id=0, eos_token_id=0, max_ep_len=90)
    config = DecisionTransformerConfig(**widths, activation_function="relu")
    theirs = DecisionTransformerModel(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    theirs.encoder.wpe.weight.data.zero_()
    theirs.embed_timestep.weight.data.zero_()
    ours = LaMo(GPT(sizes), (11,), 3, embed="linear", max_ep_len=90).eval()
    names = dict(embed_timestep="embed_time", predict_action="head", encoder="gpt")
    state = {}
    for name, tensor in theirs.state_dict().items():
        part, _, rest = name.partition(".")
        turned = tensor.t() if part == "encoder" and name.endswith(CONV1D) else tensor
        state[f"{names.get(part, part)}.{rest}"] = turned
    missing, _ = ours.load_state_dict(state, strict=False)
    assert missing == []
    rtg, obs, act, timestep, _ = small_window()
    timestep = timestep % 90
    expected = theirs(states=obs, actions=act, returns_to_go=rtg, timesteps=timestep).action_preds
    assert (ours(rtg, obs, act, timestep) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("embed", ["linear", "mlp"])
def test_right_padding_equals_left_padding_with_a_mask(tmp_path, embed, discrete):
    K, T = 5, 13
    sizes = dict(n_layer=2, n_head=2, n_embd=32, vocab_size=11, n_positions=64)
    theirs = GPT2Model(GPT2Config(**sizes)).eval()
    theirs.save_pretrained(tmp_path)
    lamo = LaMo(load_gpt2(str(tmp_path)), (4,), 3, discrete, embed, max_ep_len=10).eval()
    torch.nn.init.normal_(lamo.embed_ln.weight)
    theirs.wpe.weight.data.zero_()  # trajectory tokens carry no position embedding
    act = torch.randint(3, (T,)) if discrete else torch.randn(T, 3)
    steps = [torch.randn(T, 1), torch.randn(T, 4), act, torch.arange(T)]  # T > max_ep_len: clipped
    for start in range(T):  # windows at every place, the last ones shorter than K
        n = min(K, T - start)
        window = [x[start : start + n] for x in steps]
        expected = reference_lamo(lamo, theirs, *window, K)
        padding = [torch.full((K - n, *x.shape[1:]), 2, dtype=x.dtype) for x in window]
        padded = [torch.cat(pair)[None] for pair in zip(window, padding, strict=True)]
        assert (lamo(*padded)[0, :n] - expected).abs().max() < 1e-5


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 6), st.integers(0, 2), st.integers(0, 10_000))
def test_an_action_depends_on_the_past_only(step, what, seed):
    torch.manual_seed(seed)
    lamo = LaMo(GPT(GPTConfig(1, 2, 16, 11, 8)), (3,), 2, max_ep_len=20).eval()
    inputs, timestep = [torch.randn(1, 7, n) for n in (1, 3, 2)], torch.arange(7)[None]
    before = lamo(*inputs, timestep)
    inputs[what] = inputs[what].clone()
    inputs[what][:, step] += 1
    changed = (lamo(*inputs, timestep) - before).abs().amax(dim=(0, 2)) > 1e-7  # (7,)
    first = step + 1 if what == 2 else step  # a_t is read from step t + 1 on
    assert not changed[:first].any()
    assert changed[first:].all()


@pytest.mark.parametrize("kind", ["numbers", "choices", "frames"])
def test_remembered_tokens_act_as_whole_windows_do(kind):
    """observe, remember and act, step by step, against forward on the last K steps at each."""
    n, T, K, frames = 3, 9, 4, kind == "frames"
    shape = (STACK, 84, 84) if frames else (11,)
    lamo = strengthen(LaMo(GPT(SMALL), shape, 3, kind != "numbers", max_ep_len=20).eval())
    rtg, timestep = torch.randn(n, T, 1), torch.arange(T).expand(n, T)
    act = torch.randn(n, T, 3) if kind == "numbers" else torch.randint(3, (n, T))
    obs = torch.randn(n, T, 11)
    if frames:  # the state of step t is frames t to t + 3
        obs = torch.randint(256, (n, T + STACK - 1, 84, 84), dtype=torch.uint8)
    tokens, more = deque(maxlen=2 * K - 1), STACK - 1 if frames else 0
    with torch.no_grad():
        for t in range(T):
            now, window = slice(t, t + 1), slice(max(0, t - K + 1), t + 1)
            seen = obs[:, t : t + 1 + more]
            tokens.append(lamo.observe(rtg[:, now], seen, timestep[:, now])[:, 0])
            ours = lamo.act(torch.cat(tuple(tokens), dim=1))
            tokens.append(lamo.remember(act[:, now], timestep[:, now])[:, 0])
            past = obs[:, window.start : t + 1 + more]
            whole = lamo(rtg[:, window], past, act[:, window], timestep[:, window])
            assert (ours - whole[:, -1]).abs().max() < 1e-5


@pytest.mark.parametrize("embed", ["mlp", "linear"])
def test_the_states_of_overlapping_frames_are_read_one_stack_at_a_time(embed):
    encoder = FrameEncoder(STACK, 16, embed)
    frames = torch.randint(0, 256, (2, 6 + STACK - 1, 84, 84), dtype=torch.uint8)
    together = encoder(frames)
    assert together.shape == (2, 6, 16)
    for k in range(6):
        stack = frames[:, k : k + STACK].float() / 255  # (2, STACK, 84, 84)
        assert torch.allclose(together[:, k], encoder.mlp(encoder.conv(stack)), atol=1e-5)


# --- the losses of a step ------------------------------------------------------------------------


@pytest.mark.parametrize("discrete", [False, True])
def test_losses_equal_a_loop_over_valid_steps(discrete):
    lamo = LaMo(GPT(SMALL), (11,), 3, discrete)
    window, (tokens, targets) = small_window(), small_text()
    if discrete:
        window[2] = torch.randint(3, window[2].shape[:2])
    count = window[-1].sum()
    centres = F.normalize(torch.randn(7, 32), dim=-1)
    losses = Objective(lamo, centres)(window, count, (tokens, targets))
    action_loss, lm_loss, similarity = losses
    predicted, errors = lamo(*window[:4]), []
    for b, k in window[-1].nonzero().tolist():
        p, a = predicted[b, k], window[2][b, k]
        errors.append(-p.log_softmax(-1)[a] if discrete else (p - a).square().mean())
    assert action_loss.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)
    found = lamo.gpt(tokens).log_softmax(-1).gather(-1, targets[..., None])
    assert lm_loss.item() == pytest.approx(-found.mean().item(), rel=1e-5)
    nearest = []  # Wiki-RL: each valid token's largest cosine with a centre
    for b, k in window[-1].nonzero().tolist():
        layers = (lamo.embed_return, lamo.embed_state, lamo.embed_action)
        for layer, x in zip(layers, window[:3], strict=True):
            token = lamo.embed_ln(layer(x[b, k]))
            nearest.append(max(F.cosine_similarity(token, c, dim=0) for c in centres))
    assert similarity.item() == pytest.approx(torch.stack(nearest).mean().item(), rel=1e-4)
    half, _, none = Objective(lamo)(window, 2 * count, None)  # count: of all processes together
    assert half.item() == pytest.approx(action_loss.item() / 2, rel=1e-5)
    assert none == 0


def test_without_text_no_language_work_is_done():
    lamo, window = LaMo(GPT(SMALL), (11,), 3), small_window()

    def refuse(*_):
        raise AssertionError("the words are read")

    for words in (lamo.gpt, lamo.gpt.wte, lamo.gpt.wpe):
        words.register_forward_pre_hook(refuse)
    losses = Objective(lamo)(window, window[-1].sum(), None)
    assert losses[1] == 0
    sum(losses).backward()
    assert lamo.gpt.wte.weight.grad is lamo.gpt.wpe.weight.grad is None


def test_every_trained_parameter_gets_a_gradient():
    lamo, window = small_lamo(), small_window()
    round_frozen(lamo)
    with torch.autocast("cpu", torch.bfloat16):
        action_loss, lm_loss, _ = Objective(lamo)(window, window[-1].sum(), small_text())
    (action_loss + 0.1 * lm_loss).backward()
    for name, parameter in lamo.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_a_step_is_one_graph_for_torch_compile():
    lamo, window, text = small_lamo(), small_window(), small_text()
    whole = torch.compile(Objective(lamo), fullgraph=True, backend="eager")  # raises at a break
    expected = torch.stack(Objective(lamo)(window, window[-1].sum(), text))
    assert torch.allclose(torch.stack(whole(window, window[-1].sum(), text)), expected)
