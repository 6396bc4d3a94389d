"""Rollouts against one slow episode at a time, and the score by hand."""

from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch

from evaluate import final_result, rollout
from lora import inject_lora
from model import GPT, GPTConfig, LaMo
from tasks import Environment


def slow_action(model, steps, K):
    """The action after the last of `steps`, a list of (R, s, a), from a window of its own."""
    rtg, obs, act = [torch.stack(x)[None] for x in zip(*steps[-K:], strict=True)]
    return model(rtg, obs, act, torch.arange(len(steps))[None, -K:])[0, -1]


def make_policy(environment, K):
    """An untrained LaMo with LoRA that does something, and what it was trained with."""
    gpt = GPT(GPTConfig(2, 2, 16, vocab_size=257, block_size=8))
    model = LaMo(gpt, *environment.sizes(), embed="mlp", max_ep_len=500)
    inject_lora(gpt, rank=2, dropout=0.5)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean="ln" in name, std=0.3)
    c = SimpleNamespace(context=K, scale=10.0, mode="normal", dtype="fp32", episode_limit=0)
    c.sample = False
    return model, c


@torch.no_grad()
@pytest.mark.parametrize("mode", ["normal", "delayed"])
@pytest.mark.parametrize("name", ["Hopper-v5", "CartPole-v1"])
def test_a_rollout_is_slow_episodes_one_at_a_time(name, mode):
    env = gym.make(name)
    spaces, choice = (env.observation_space, env.action_space), name == "CartPole-v1"
    environment = Environment(env.spec, *spaces, None, None)
    model, c = make_policy(environment, K=4)
    c.mode, c.sample = mode, mode == "delayed"
    if choice and c.sample:
        model.head.weight *= 1e4  # logits so far apart that a draw is the largest
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


def test_choices_are_drawn_by_the_seed_where_asked_for():
    env = gym.make("CartPole-v1")
    environment = Environment(env.spec, env.observation_space, env.action_space, None, None)
    model, c = make_policy(environment, K=4)
    torch.nn.init.normal_(model.head.weight, std=0.01)  # both choices about as likely
    stats, lengths = (torch.zeros(4), torch.ones(4)), []
    for c.sample, seed in ((True, 7), (True, 7), (True, 8), (False, 7), (False, 8)):
        lengths.append(rollout(model, environment, c, stats, [50.0], 10, seed=seed)[0]["lengths"])
    assert lengths[0] == lengths[1] != lengths[2]
    assert max(lengths[3] + lengths[4]) < max(lengths[0])  # one side alone tips the pole over


def test_an_episode_limit_cuts_and_says_how_many(hopper):
    model, c = make_policy(hopper, K=4)
    stats = torch.zeros(11), torch.ones(11)
    whole = rollout(model, hopper, c, stats, [5.0], 4)[0]
    c.episode_limit = max(whole["lengths"]) - 1
    cut = rollout(model, hopper, c, stats, [5.0], 4)[0]
    assert cut["lengths"] == [min(length, c.episode_limit) for length in whole["lengths"]]
    assert cut["cut"] == sum(length > c.episode_limit for length in whole["lengths"]) > 0


def test_the_final_score_by_hand():
    """Of ten steps the last 20 % are those after step 8."""

    def at(step, *scores):
        both = zip((2, 1), scores, strict=True)
        rows = [{"target": t, "score": s, "return_mean": 10 * s, "cut": 1} for t, s in both]
        return {"step": step, "results": rows}

    told = final_result([at(2, 99, 0), at(8, 50, 50), at(9, 10, 30), at(10, 20, 2)], steps=10)
    assert (told["score"], told["target"], told["return_mean"]) == (16, 1, 160)
    assert [t["score"] for t in told["targets"]] == [15, 16]
    assert told["best_single_evaluation"] == 99
    assert (told["evaluations_averaged"], told["episodes_cut"]) == (2, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA, or LAMO_TEST_CUDA is not set")
def test_acting_as_a_cuda_graph_is_acting(hopper):
    """Windows full or not, and episodes that have ended carried along."""
    model, c = make_policy(hopper, K=4)
    model.head.requires_grad_(False)[-1].weight *= 0.02  # it falls late
    model.head[-1].bias *= 0.02
    found = []
    for device in ("cpu", "cuda"):  # on a CPU there is no graph
        stats = torch.zeros(11, device=device), torch.ones(11, device=device)
        found += [rollout(model.to(device), hopper, c, stats, [50.0, 5.0], 5)]
    for plain, graph in zip(*found, strict=True):
        assert plain["lengths"] == graph["lengths"]
        assert len({*plain["lengths"]}) > 1
        assert plain["returns"] == pytest.approx(graph["returns"], rel=1e-3)
