"""wiki_rl.py: the fading weight, the clusters, and the term of the loss computed directly."""

import math
import sys

import numpy as np
import pytest
import torch

import wiki_rl
from model import GPT, GPTConfig, LaMo, Objective
from train import valid_steps
from wiki_rl import fading, find_centres


def test_the_pull_fades():
    assert fading(0) == pytest.approx(1 / (1 + math.exp(-5)))
    assert fading(2500) == 0.5
    assert fading(5000) == pytest.approx(1 / (1 + math.exp(5)))
    assert fading(10**7) < 1e-9


def test_few_words_are_their_own_clusters():
    wte = torch.randn(257, 8)
    centres, note = find_centres(wte)
    assert "257 word embeddings themselves" in note
    for word, centre in zip(wte.numpy(), centres.numpy(), strict=True):
        np.testing.assert_allclose(centre, word / np.sqrt((word**2).sum()), rtol=1e-5)


def test_clusters_are_found_kept_and_found_again(monkeypatch, tmp_path):
    monkeypatch.setenv("LAMO_CACHE", str(tmp_path))
    monkeypatch.setattr(wiki_rl, "CLUSTERS", 3)
    directions = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, -1]])
    lengths = torch.rand(60, 1) * 5 + 0.5  # which k-means of directions does not see
    words = directions.repeat(20, 1) * lengths + 0.01 * torch.randn(60, 3)
    centres, note = find_centres(words)
    assert centres.norm(dim=-1).sub(1).abs().max() < 1e-5
    assert (directions @ centres.T).amax(-1).min() > 0.999  # each direction has its centre
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)  # not needed again
    again, _ = find_centres(words)
    assert torch.equal(again, centres)
    assert "3 clusters of 60 word embeddings" in note


def test_the_term_equals_a_direct_computation():
    lamo = LaMo(GPT(GPTConfig(1, 2, 16, 11, 8, dropout=0.0)), (3,), 2, embed="linear")
    torch.nn.init.normal_(lamo.embed_ln.weight)
    centres = torch.nn.functional.normalize(torch.randn(5, 16), dim=-1)
    B, K = 3, 4
    rtg, obs, act = torch.randn(B, K, 1), torch.randn(B, K, 3), torch.randn(B, K, 2)
    valid = torch.arange(K) < torch.tensor([[4], [1], [2]])
    window = [rtg, obs, act, torch.arange(K).expand(B, K), valid]
    similarity = Objective(lamo, centres)(window, valid_steps(valid, 1), None)[2]
    found = []
    for b in range(B):
        for k in range(K):
            if not valid[b, k]:
                continue
            for layer, x in (
                (lamo.embed_return, rtg),
                (lamo.embed_state, obs),
                (lamo.embed_action, act),
            ):
                token = (layer.weight @ x[b, k] + layer.bias).detach().numpy()
                token = (token - token.mean()) / np.sqrt(token.var() + 1e-5)
                token = token * lamo.embed_ln.weight.detach().numpy()
                cosines = [
                    token @ c / np.linalg.norm(token) / np.linalg.norm(c) for c in centres.numpy()
                ]
                found.append(max(cosines))
    assert similarity.item() == pytest.approx(np.mean(found), rel=1e-4)
    assert Objective(lamo)(window, valid_steps(valid, 1), None)[2] == 0
