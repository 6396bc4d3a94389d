"""experiments/bench.py: what it counts and what it writes. Never how long anything takes."""

import json
import sys

import numpy as np
import pytest
import torch

from experiments import bench
from experiments.bench import CPU, SIZES, synthetic
from model import GPTConfig


@pytest.mark.parametrize("n", [10, 1000, 2500])
def test_synthetic_transitions_know_where_their_episode_ends(n):
    data = synthetic(n, CPU)
    assert data.end.tolist() == np.minimum((np.arange(n) // 1000 + 1) * 1000, n).tolist()
    assert len(data.lengths) == len(data.returns) == -(-n // 1000)


def test_the_peer_trains_what_we_train():
    pytest.importorskip("peft")
    model, body = bench.peer_model(SIZES["mini"].config)
    assert body.h[0].mlp.act(torch.tensor(-1.0)).item() == pytest.approx(-0.15880801)  # GPT-2's
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("lora_A" in n for n in trained)
    assert any("embed_state" in n for n in trained)
    assert not [n for n in trained if ".mlp." in n or "wte" in n or ".ln_" in n]


def test_rows_are_written_and_growth_is_drawn(monkeypatch, tmp_path):
    """Every kind of row, of a model and amounts that take no time."""
    pytest.importorskip("peft")
    small = bench.Size(GPTConfig(1, 1, 8, 257, 16, dropout=0.0), 16, 1)
    monkeypatch.setattr(bench, "SIZES", {"mini": small})
    monkeypatch.setattr(bench, "TRANSITIONS", (100, 1000))
    monkeypatch.setattr(bench, "GROWTH", {"context": (2, 3), "batch": (1, 2)})
    files = ["--json", str(tmp_path / "rows.json"), "--plot", str(tmp_path / "growth.png")]
    only = ["--only", "windows", "step", "act", "evaluate", "growth"]
    monkeypatch.setattr(
        sys, "argv", ["bench", "--models", "mini", "--device", "cpu", *only, *files]
    )
    bench.main()
    written = json.loads((tmp_path / "rows.json").read_text())
    acts = [row for row in written["rows"] if row["what"].startswith("act, mini")]
    assert [row["tokens_per_s"] * row["ms"] / 1000 for row in acts] == pytest.approx([59, 40 * 59])
    assert all(row["share_of_ceiling"] > 0 for row in acts)
    assert {row["grows"] for row in written["growth"]} >= {"context", "batch", "transitions"}
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
