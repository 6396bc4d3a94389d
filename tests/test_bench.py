"""experiments/bench.py: what it counts and what it writes. Never how long anything takes."""

import json

import numpy as np
import pytest
import torch
from runs import call
from torch.utils.flop_counter import FlopCounterMode

from experiments import bench
from experiments.bench import BATCH, CONTEXT, CPU, SIZES, synthetic
from model import GPT, GPTConfig

SMALL = GPTConfig(2, 1, 8, 257, 16, dropout=0.0)


@pytest.mark.parametrize("n", [10, 1000, 2500])
def test_synthetic_transitions_know_where_their_episode_ends(n):
    data = synthetic(n, CPU)
    assert data.end.tolist() == np.minimum((np.arange(n) // 1000 + 1) * 1000, n).tolist()
    assert data.timestep.tolist() == [i % 1000 for i in range(n)]


def test_operations_are_those_that_pytorch_counts():
    """In both ways through frozen blocks, whose c_attn learns, and the head."""
    gpt = GPT(SMALL).requires_grad_(False)
    for block in gpt.h:
        block.attn.c_attn.bias.requires_grad_()
    x = torch.randn(BATCH, 3 * CONTEXT, 8, requires_grad=True)
    text = torch.randint(257, (2, 2, 16))
    with FlopCounterMode(display=False) as counter:
        (gpt.blocks(x, read=slice(1, None, 3)).sum() + gpt(*text)).backward()
    made = counter.get_flop_counts()["Global"]
    made = made[torch.ops.aten.addmm] + made[torch.ops.aten.mm]
    unread = 2 * 2 * 8 * 8 * 2 * BATCH * CONTEXT  # Q of the last block, made but not needed
    assert bench.step_operations(SMALL, 32) == made - unread


def test_the_peer_trains_what_we_train():
    pytest.importorskip("peft")
    model, body = bench.peer_model(SIZES["mini"][0])
    assert body.h[0].mlp.act(torch.tensor(-1.0)).item() == pytest.approx(-0.15880801)  # GPT-2's
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("lora_A" in n for n in trained)
    assert any("embed_state" in n for n in trained)
    assert not [n for n in trained if ".mlp." in n or "wte" in n or ".ln_" in n]


def test_rows_are_written_and_growth_is_drawn(monkeypatch, tmp_path):
    """Every kind of row, of a model and amounts that take no time."""
    pytest.importorskip("peft")
    known = {"SIZES": {"mini": (SMALL, 16)}, "TRANSITIONS": (100, 1000), "CALLS": 3}
    known |= {"CONTEXTS": (2, 3), "BATCHES": (1, 2), "ACTING": (1, 2)}
    for name, value in known.items():
        monkeypatch.setattr(bench, name, value)
    files = ["--json", tmp_path / "rows.json", "--plot", tmp_path / "growth.png"]
    call(bench.main, "--models", "mini", "--device", "cpu", *files)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    kinds = ["a block's", "peer", "ours", "act", "evaluate", " h"]
    kinds += ["transitions", "context", "batch", "environments"]
    assert not [kind for kind in kinds if not any(kind in row["what"] for row in rows)]
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
