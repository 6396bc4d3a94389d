"""embeddings.py: bins there and back, and tables against looking one number up at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint import build_model
from embeddings import BINS, LARGEST, ZERO, TokenEmbedding, embed_numbers, from_bins, to_bins
from model import GPT, GPTConfig, LaMo
from plumbing import UserError
from settings import resolve
from text import get_encoding
from train import Config

EDGES = from_bins(torch.arange(BINS + 1) - 0.5).double()  # between neighbouring bins


@settings(max_examples=300, deadline=None)
@given(st.floats(-LARGEST, LARGEST, width=32))
def test_a_number_comes_back_to_within_its_bin(x):
    bin = to_bins(torch.tensor(x)).item()
    width = (EDGES[bin + 1] - EDGES[bin]).item()
    assert 0 <= bin < BINS
    assert abs(from_bins(torch.tensor(bin)).item() - x) < width * 1.001


def test_every_bin_is_its_own_and_they_are_in_order():
    middles = from_bins(torch.arange(BINS))
    assert torch.equal(to_bins(middles), torch.arange(BINS))
    assert (middles.diff() > 0).all()
    assert torch.allclose(middles, -middles.flip(0), rtol=1e-4)  # as fine below zero as above
    assert EDGES[257] - EDGES[256] < 1e-3  # around 0
    assert to_bins(torch.tensor([-1e9, 1e9])).tolist() == [0, BINS - 1]


@pytest.mark.parametrize("vocab_size", list(ZERO))
def test_a_row_begins_as_its_digits_tokens(vocab_size, request):
    if vocab_size == 50257:
        folder = request.getfixturevalue("shared")("tiktoken")
        request.getfixturevalue("monkeypatch").setenv("TIKTOKEN_CACHE_DIR", str(folder))
    encoding = get_encoding(vocab_size)
    wte = torch.randn(vocab_size, 8)
    rows = TokenEmbedding(3, wte).table.weight
    for bin in (0, 7, 42, 307, 511):
        tokens = [token for digit in f"{bin:03d}" for token in encoding.encode(digit)]
        assert len(tokens) == 3
        for dimension in range(3):
            expected = wte[tokens].mean(0)
            assert torch.allclose(rows[dimension * BINS + bin], expected, atol=1e-6)


def test_a_vector_is_the_mean_of_its_numbers_rows():
    embedding = TokenEmbedding(3, torch.randn(257, 8))
    torch.nn.init.normal_(embedding.table.weight)
    x = torch.randn(2, 5, 3) * 10
    found = embedding(x)
    assert found.shape == (2, 5, 8)
    for b, t in np.ndindex(2, 5):
        rows = [embedding.table.weight[d * BINS + to_bins(x[b, t, d])] for d in range(3)]
        assert torch.allclose(found[b, t], torch.stack(rows).mean(0), atol=1e-6)
    # and each dimension learns only in its own rows
    found[0, 0].sum().backward()
    touched = embedding.table.weight.grad.abs().sum(1).nonzero()[:, 0]
    assert (touched // BINS).tolist() == [0, 1, 2]


def test_unknown_words_are_refused(boxes):
    with pytest.raises(ValueError, match="no digits"):
        TokenEmbedding(2, torch.randn(100, 8))
    with pytest.raises(ValueError, match="'linear', 'mlp' or 'tokens'"):
        embed_numbers("byte", 2, torch.randn(257, 8))
    config, _, _ = resolve(Config(), {"embed": "tokens", "method": "dt"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("checkpoint.ZERO", {})
        with pytest.raises(UserError, match="--embed tokens knows the digits"):
            build_model(config, boxes(3, 2))


def test_lamo_trains_its_tables():
    torch.manual_seed(0)
    lamo = LaMo(GPT(GPTConfig(1, 2, 16, 257, 32, 0.0)), (3,), 2, embed="tokens", max_ep_len=10)
    rtg, obs, act = torch.rand(4, 5, 1), torch.randn(4, 5, 3), torch.rand(4, 5, 2)
    tables = {n: p.detach().clone() for n, p in lamo.named_parameters() if "table" in n}
    assert len(tables) == 3
    optimiser = torch.optim.Adam(lamo.parameters(), lr=1e-2)
    timestep = torch.arange(5).expand(4, 5)
    losses = []
    for _ in range(60):
        loss = (lamo(rtg, obs, act, timestep) - act).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]
    for name, before in tables.items():
        assert not torch.equal(lamo.get_parameter(name), before), name
