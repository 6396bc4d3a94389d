"""What makes it fast changes no result: each short cut against the long way round."""

import shutil
from collections import deque

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import model as model_module
from evaluate import rollout
from lora import inject_lora, mark_trainable, round_frozen
from model import GPT, GPTConfig, LaMo, Objective, attend, dropout
from train import valid_steps
from windows import Trajectories, sample_windows

SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=50, block_size=32, dropout=0.0)


def strengthen(lamo):
    """Weights with which each token, and its time, matters for each action."""
    torch.nn.init.normal_(lamo.embed_time.weight)
    for block in lamo.gpt.h:
        for layer in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
            torch.nn.init.normal_(layer.weight, std=0.2)


def small_lamo(**kwargs):
    """A LaMo with LoRA whose factors are not zero."""
    torch.manual_seed(0)
    lamo = LaMo(GPT(SMALL), (11,), 3, max_ep_len=1000, **kwargs)
    inject_lora(lamo.gpt, rank=4, alpha=8, dropout=0.0)
    strengthen(lamo)
    for block in lamo.gpt.h:
        torch.nn.init.normal_(block.attn.c_attn.lora_B, std=0.1)
    mark_trainable(lamo, "lora")
    return lamo


def small_window(B=4, K=5):
    valid = torch.arange(K) < torch.randint(1, K + 1, (B, 1))
    return [
        torch.randn(B, K, 1),
        torch.randn(B, K, 11),
        torch.randn(B, K, 3),
        torch.randint(900, (B, 1)) + torch.arange(K),
        valid,
    ]


def small_text(B=2, L=16):
    tokens = torch.randint(50, (B, L + 1))
    return tokens[:, :-1], tokens[:, 1:]


@pytest.mark.parametrize("scale", [1, 3])
def test_attention_by_hand_is_as_exact_as_bf16_is(scale):
    q, k, v = (scale * torch.randn(4, 3, 60, 64) for _ in range(3))
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    rounded = attend(*(x.bfloat16() for x in (q, k, v)), 0.0)
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).norm() / exact.norm() < 0.02  # bf16 has 8 bits: 0.004 an operation


@pytest.mark.parametrize("T", [1, 7, 60])
def test_attention_by_hand_equals_pytorchs(T):
    q, k, v = (torch.randn(2, 3, T, 8, requires_grad=True) for _ in range(3))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    tiny = 1e-12  # with dropout, which here drops nothing, it is by hand in fp32, too
    assert (attend(q, k, v, tiny) - expected).abs().max() < 1e-5
    weight = torch.randn_like(expected)
    theirs = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    ours = torch.autograd.grad((attend(q, k, v, tiny) * weight).sum(), (q, k, v))
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 1e-5


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([0.05, 0.1, 0.5, 0.9]), st.integers(0, 10_000), st.booleans())
def test_dropout_drops_its_share_and_keeps_the_mean(p, seed, half):
    torch.manual_seed(seed)
    x = torch.ones(403, 101, dtype=torch.bfloat16 if half else torch.float32, requires_grad=True)
    y = dropout(x, p, training=True)
    y.sum().backward()
    assert torch.equal(x.grad, y)  # what was kept, scaled, is what the gradient passes
    assert torch.equal(y.unique(), torch.tensor([0, 1 / (1 - p)], dtype=x.dtype))
    n = x.numel()
    kept = (y > 0).float()
    assert abs(kept.mean().item() - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5
    for near in (kept[:, :-1] * kept[:, 1:], kept[:-1] * kept[1:]):  # neighbours, independent
        assert abs(near.mean().item() - (1 - p) ** 2) < 5 * (1 / n) ** 0.5
    torch.manual_seed(seed)
    assert torch.equal(dropout(x, p, training=True), y)
    assert dropout(x, p, training=False) is x


@pytest.mark.parametrize("read", [slice(1, None, 3), slice(-1, None), slice(None)])
def test_positions_that_are_not_read_need_not_be_made(read):
    gpt = GPT(SMALL)
    x = torch.randn(3, 12, 32)
    assert (gpt.blocks(x, read) - gpt.blocks(x)[:, read]).abs().max() < 1e-5


@pytest.mark.parametrize("rows", [1, 10, 1000])
@pytest.mark.parametrize("frozen", [True, False])
def test_the_language_loss_in_parts_equals_the_loss_at_once(monkeypatch, rows, frozen):
    monkeypatch.setattr(model_module, "LOSS_ROWS", rows)
    gpt = GPT(SMALL)
    gpt.wte.weight.requires_grad_(not frozen)
    tokens, targets = small_text(3, 17)
    logits, _ = gpt(tokens)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    _, loss = gpt(tokens, targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    trained = [p for p in gpt.parameters() if p.requires_grad]
    ours, theirs = torch.autograd.grad(loss, trained), torch.autograd.grad(expected, trained)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 1e-5


def test_frozen_matrices_in_bf16_change_nothing_but_lookups():
    lamo, window = small_lamo(), small_window()
    with torch.autocast("cpu", torch.bfloat16):
        before = lamo(*window[:4])
        round_frozen(lamo)
        assert torch.equal(lamo(*window[:4]), before)
    kinds = {name: p.dtype for name, p in lamo.named_parameters()}
    assert kinds["gpt.h.0.mlp.c_fc.weight"] == kinds["gpt.wte.weight"] == torch.bfloat16
    trained = [n for n, p in lamo.named_parameters() if p.requires_grad]
    assert all(kinds[n] == torch.float32 for n in [*trained, "gpt.wpe.weight", "gpt.ln_f.weight"])


def test_every_trained_parameter_gets_a_gradient():
    lamo = small_lamo()
    round_frozen(lamo)
    window = small_window()
    with torch.autocast("cpu", torch.bfloat16):
        action_loss, lm_loss, _ = Objective(lamo)(window, valid_steps(window[-1], 1), small_text())
    (action_loss + 0.1 * lm_loss).backward()
    for name, parameter in lamo.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_a_step_is_one_graph():
    lamo, window, text = small_lamo(), small_window(), small_text()
    for block in lamo.gpt.h:
        block.attn.c_attn.lora_dropout.p = block.drop.p = block.attn.dropout = 0.1
    whole = torch.compile(Objective(lamo), fullgraph=True, backend="aot_eager")
    losses = whole(window, valid_steps(window[-1], 1), text)  # raises where the graph breaks
    assert torch.isfinite(torch.stack(losses)).all()


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on a CPU needs g++")
def test_compiled_and_eager_agree():
    lamo, window, text = small_lamo(), small_window(), small_text()
    trained = [p for p in lamo.parameters() if p.requires_grad]
    found = []
    for objective in (Objective(lamo), torch.compile(Objective(lamo))):
        action_loss, lm_loss, _ = objective(window, valid_steps(window[-1], 1), text)
        gradients = torch.autograd.grad(action_loss + 0.1 * lm_loss, trained)
        found.append([action_loss, lm_loss, *gradients])
    for eager, compiled in zip(*found, strict=True):
        assert (eager - compiled).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["numbers", "choices", "frames"])
def test_remembered_tokens_act_as_whole_windows_do(kind):
    """observe, remember and act, step by step, against forward on the last K steps at each."""
    torch.manual_seed(1)
    n, T, K, frames = 3, 9, 4, kind == "frames"
    lamo = LaMo(GPT(SMALL), (84, 84) if frames else (11,), 3, kind != "numbers", max_ep_len=20)
    strengthen(lamo.eval())
    rtg, timestep = torch.randn(n, T, 1), torch.arange(T).expand(n, T)
    act = torch.randn(n, T, 3) if kind == "numbers" else torch.randint(3, (n, T))
    obs = torch.randn(n, T, 11)
    if frames:  # the state of step t is frames t to t + 3
        obs = torch.randint(256, (n, T + 3, 84, 84), dtype=torch.uint8)
    tokens = deque(maxlen=2 * K - 1)
    with torch.no_grad():
        for t in range(T):
            now, window = slice(t, t + 1), slice(max(0, t - K + 1), t + 1)
            seen = obs[:, t : t + 4] if frames else obs[:, now]
            tokens.append(lamo.observe(rtg[:, now], seen, timestep[:, now])[:, 0])
            ours = lamo.act(torch.cat(tuple(tokens), dim=1))
            tokens.append(lamo.remember(act[:, now], timestep[:, now])[:, 0])
            past = obs[:, window.start : t + 4] if frames else obs[:, window]
            whole = lamo(rtg[:, window], past, act[:, window], timestep[:, window])
            assert (ours - whole[:, -1]).abs().max() < 1e-5
            if t:  # and what was done, and when, is seen
                done, when = act[:, window], timestep[:, window]
                others = (
                    (done + 1 if kind == "numbers" else (done + 1) % 3, when),
                    (done, when + 1),
                )
                for other in others:
                    changed = lamo(rtg[:, window], past, *other)[:, -1]
                    assert (changed - whole[:, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("mode", ["normal", "delayed"])
def test_episodes_in_a_batch_equal_episodes_alone_from_whole_windows(hopper, mode):
    """The batch remembers its tokens; the slow way embeds a whole window at every step."""
    K, scale, targets, episodes = 4, 1000.0, [3600.0, 900.0], 3
    config = {"context": K, "scale": scale, "mode": mode, "dtype": "fp32", "episode_limit": 40}
    mean, std = torch.linspace(-0.1, 0.1, 11), torch.linspace(0.5, 2, 11)
    lamo = small_lamo(embed="mlp").eval()
    results = rollout(lamo, hopper, config, (mean, std), targets, episodes, seed=7)
    env = gym.make("Hopper-v5")
    for result in results:
        for episode in range(episodes):
            observation, _ = env.reset(seed=7 + episode)
            rtg, obs, act, earned, done = [result["target"] / scale], [], [], [], False
            while not done and len(earned) < 40:
                obs.append((torch.tensor(observation, dtype=torch.float32) - mean) / std)
                t = len(obs)
                window = [
                    torch.tensor(rtg[-K:], dtype=torch.float32)[None, :, None],
                    torch.stack(obs[-K:])[None],
                    torch.stack([*act, torch.zeros(3)][-K:])[None],
                    torch.arange(t)[None, -K:],
                ]
                with torch.no_grad():
                    action = lamo(*window)[0, -1].clamp(-1, 1)
                act.append(action)
                observation, reward, terminated, truncated, _ = env.step(action.numpy())
                earned.append(reward)
                rtg.append(rtg[-1] - (0 if mode == "delayed" else reward / scale))
                done = terminated or truncated
            assert result["lengths"][episode] == len(earned)
            assert result["returns"][episode] == pytest.approx(np.sum(earned), rel=1e-3, abs=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA, and LAMO_TEST_CUDA=1 set")
def test_a_step_waits_for_nothing_on_the_gpu():
    lamo = small_lamo().cuda()
    round_frozen(lamo)
    N, generator = 100, torch.Generator("cuda").manual_seed(0)
    data = Trajectories(
        obs=torch.randn(N, 11, device="cuda"),
        act=torch.randn(N, 3, device="cuda"),
        rtg=torch.randn(N, 1, device="cuda"),
        timestep=torch.arange(N, device="cuda"),
        end=torch.full((N,), N, device="cuda"),
        obs_mean=torch.zeros(11, device="cuda"),
        obs_std=torch.ones(11, device="cuda"),
        scale=1.0,
        returns=np.ones(1),
        lengths=np.array([N]),
    )
    trained = [p for p in lamo.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, fused=True)
    objective, text = Objective(lamo), [t.cuda() for t in small_text()]

    def step():
        window = sample_windows(data, 8, 5, generator)
        with torch.autocast("cuda", torch.bfloat16):
            action_loss, lm_loss, _ = objective(window, valid_steps(window[-1], 1), text)
        (action_loss + 0.1 * lm_loss).backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.25)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
