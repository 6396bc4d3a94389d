"""evaluate.py: rollouts against one slow episode at a time, the score, and the command."""

import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from evaluate import final_result, rollout, talk
from load_gpt2 import make_gpt
from lora import inject_lora
from model import GPT, GPTConfig, LaMo
from tasks import Environment


def slow_action(model, steps, K):
    """The action after the last of `steps`, a list of (R, s, a), all at K - 1 of a window that is
    padded on the left with noise and masked, as the paper's code has it."""
    n, C, H = len(steps[-K:]), model.gpt.config.n_embd, model.gpt.config.n_head
    tokens = torch.randn(3 * K, C)
    for i, (rtg, obs, act) in enumerate(steps[-K:], start=K - n):
        time = model.embed_time.weight[len(steps) - K + i]
        parts = [model.embed_return(rtg), model.embed_state(obs), model.embed_action(act)]
        for j, part in enumerate(parts):
            tokens[3 * i + j] = model.embed_ln(part) + time
    mask = torch.ones(3 * K, 3 * K).tril().bool() & (torch.arange(3 * K) >= 3 * (K - n))
    x = tokens
    for block in model.gpt.h:
        q, k, v = block.attn.c_attn(block.ln_1(x)).split(C, dim=-1)
        heads = []
        for h in range(H):
            part = slice(h * C // H, (h + 1) * C // H)
            scores = q[:, part] @ k[:, part].T / math.sqrt(C // H)
            heads.append(scores.masked_fill(~mask, -1e9).softmax(-1) @ v[:, part])
        x = x + block.attn.c_proj(torch.cat(heads, dim=-1))
        h = block.mlp.c_fc(block.ln_2(x))
        x = x + block.mlp.c_proj(F.gelu(h, approximate="tanh"))
    return model.head(model.gpt.ln_f(x)[-2])


def make_policy(environment, K):
    """An untrained LaMo with LoRA that does something, and what it was trained with."""
    gpt = GPT(GPTConfig(2, 2, 16, vocab_size=257, block_size=8))
    model = LaMo(gpt, *environment.sizes(), embed="mlp", max_ep_len=500)
    inject_lora(gpt, rank=2, dropout=0.5)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean="ln" in name, std=0.3)
    c = SimpleNamespace(context=K, scale=10.0, mode="normal", dtype="fp32", episode_limit=0)
    return model, c


@torch.no_grad()
@pytest.mark.parametrize("mode", ["normal", "delayed"])
@pytest.mark.parametrize("name", ["Hopper-v5", "CartPole-v1"])
def test_a_rollout_is_slow_episodes_one_at_a_time(name, mode):
    env = gym.make(name)
    spaces, choice = (env.observation_space, env.action_space), name == "CartPole-v1"
    environment = Environment(env.spec, *spaces, None, None)
    model, c = make_policy(environment, K=4)
    c.mode = mode
    if choice:
        model.head[-1].weight *= 1e4  # logits so far apart that a draw is the largest
    n_obs, n_act, _ = environment.sizes()
    mean, std = torch.linspace(-0.1, 0.1, *n_obs), torch.linspace(0.5, 2, *n_obs)
    results = rollout(model, environment, c, (mean, std), [50.0, 5.0], 2, seed=7)
    assert [r["target"] for r in results] == [50.0, 5.0]
    model.eval()
    for result in results:
        for episode in range(2):
            seen, _ = env.reset(seed=7 + episode)
            steps, total, over, rtg = [], 0.0, False, result["target"] / c.scale
            while not over:
                obs = (torch.tensor(seen, dtype=torch.float32) - mean) / std
                nothing = torch.tensor(0) if choice else torch.zeros(n_act)  # not known yet
                steps.append((torch.tensor([rtg], dtype=torch.float32), obs, nothing))
                chosen = slow_action(model, steps, c.context)
                chosen = chosen.argmax() if choice else chosen.clamp(-1, 1)
                steps[-1] = (*steps[-1][:2], chosen)
                seen, reward, terminated, truncated, _ = env.step(chosen.numpy())
                total, over = total + reward, terminated or truncated
                rtg -= 0 if mode == "delayed" else reward / c.scale
            assert result["lengths"][episode] == len(steps) > c.context
            assert result["returns"][episode] == pytest.approx(total, rel=1e-3)
        assert result["score"] == result["return_mean"] == pytest.approx(np.mean(result["returns"]))
        assert result["cut"] == 0


def test_an_episode_limit_cuts_and_says_how_many(hopper):
    model, c = make_policy(hopper, K=4)
    stats = torch.zeros(11), torch.ones(11)
    whole = rollout(model, hopper, c, stats, [5.0], 4)[0]
    c.episode_limit = max(whole["lengths"]) - 1
    cut = rollout(model, hopper, c, stats, [5.0], 4)[0]
    assert cut["lengths"] == [min(length, c.episode_limit) for length in whole["lengths"]]
    assert cut["cut"] == sum(length > c.episode_limit for length in whole["lengths"]) > 0


def test_the_final_score_by_hand():
    """Ten steps, an evaluation after each second: late are those after steps 10 and not 8."""

    def at(step, *scores):
        results = zip((2, 1), scores, strict=True)
        return {
            "step": step,
            "results": [
                {"target": t, "score": s, "return_mean": 10 * s, "cut": 1} for t, s in results
            ],
        }

    told = final_result([at(2, 99, 0), at(8, 50, 50), at(9, 10, 30), at(10, 20, 2)], steps=10)
    assert (told["score"], told["target"], told["return_mean"]) == (16, 1, 160)
    assert [t["score"] for t in told["targets"]] == [15, 16]
    assert told["best_single_evaluation"] == 99
    assert (told["evaluations_averaged"], told["episodes_cut"]) == (2, 4)


@given(
    st.lists(st.lists(st.floats(-50, 150), min_size=2, max_size=2), min_size=1, max_size=12),
    st.integers(1, 50),
)
def test_the_final_score_follows_the_protocol(scores, every):
    """For each target the mean over the last 20 % of the steps; the best target's is the run's."""
    evaluations = [
        {
            "step": (i + 1) * every,
            "results": [
                {"target": t, "score": s, "return_mean": s, "cut": 0} for t, s in enumerate(row)
            ],
        }
        for i, row in enumerate(scores)
    ]
    told = final_result(evaluations, every * len(scores))
    late = np.array(scores)[np.arange(1, len(scores) + 1) * 5 > 4 * len(scores)]
    assert told["score"] == pytest.approx(late.mean(0).max())
    assert told["best_single_evaluation"] == np.max(scores)


def test_scores_are_0_for_random_and_100_for_an_expert(hopper):
    assert (hopper.score(-20.3), hopper.score(3234.3)) == (0, 100)
    assert hopper.score(1607.0) == pytest.approx(50)


def test_a_language_model_goes_on_with_a_prompt():
    """The mini LM has learnt English from bytes; a random one has not."""
    from data import get_encoding

    encoding = get_encoding(257)
    tokens = np.array(encoding.encode_ordinary("The list is sorted, and then it is returned. " * 9))
    prompt, perplexity = "The ", {}
    for pretrained in (True, False):
        gpt, _ = make_gpt("mini", pretrained, dropout=0.1, seed=0)
        said, perplexity[pretrained] = talk(gpt, prompt, 12, tokens, encoding, "fp32")
        assert said.startswith(prompt)
        assert len(encoding.encode_ordinary(said)) >= len(prompt) + 12
        logits = gpt(torch.tensor(tokens[:256])[None])[0, :-1]
        expected = F.cross_entropy(logits, torch.tensor(tokens[1:256]))
        block = talk(gpt, prompt, 0, tokens[:256], encoding, "fp32")
        assert block == (prompt, pytest.approx(math.exp(expected.item()), rel=1e-4))
    assert perplexity[True] < 20 < perplexity[False]
