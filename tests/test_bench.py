"""bench.py and growth.py: what they count and what they write. Never how long anything takes."""

import json

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from experiments import bench, growth
from experiments.bench import SIZES, make_lamo, make_text, our_step, synthetic
from experiments.measure import CPU, block_operations, step_operations
from experiments.peer import peer_model
from plumbing import UserError


@pytest.mark.parametrize("lm_coef", [0, 0.1])
def test_the_floor_is_most_of_what_pytorch_counts(lm_coef):
    size = SIZES["mini"]
    step = our_step(size, lm_coef, CPU, torch.float32, "eager")
    with FlopCounterMode(display=False) as counter:
        step()
    floor = step_operations(size.config, 2 * size.lm_length if lm_coef else 0)
    # besides: attention, LoRA's factors and their gradients, the embeddings, logits made twice
    assert floor < counter.get_total_flops() < 1.5 * floor


def test_the_floor_of_acting_is_most_of_what_pytorch_counts():
    lamo = make_lamo(SIZES["mini"].config, CPU, torch.float32).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        lamo.gpt.blocks(torch.randn(4, 59, 192), read=slice(-1, None))
    floor = block_operations(SIZES["mini"].config, 4 * 59, 4)
    assert floor < counter.get_total_flops() < 1.5 * floor


@pytest.mark.parametrize("n", [10, 1000, 2500])
def test_synthetic_transitions_know_where_their_episode_ends(n):
    data = synthetic(n, CPU)
    expected = np.minimum((np.arange(n) // 1000 + 1) * 1000, n)
    assert data.end.tolist() == expected.tolist()
    assert len(data.lengths) == len(data.returns) == -(-n // 1000)


def test_the_peer_trains_what_we_train():
    pytest.importorskip("peft")
    config = SIZES["mini"].config
    model, body, name = peer_model(config, 11, 3)
    assert name == "transformers + peft"
    assert body.h[0].mlp.act(torch.tensor(-1.0)).item() == pytest.approx(-0.15880801)  # GPT-2's
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("lora_A" in n for n in trained)
    assert any("embed_state" in n for n in trained)
    assert not [n for n in trained if ".mlp." in n or "wte" in n or ".ln_" in n]
    text = make_text(SIZES["mini"], CPU)[0]
    assert body(input_ids=text).last_hidden_state.shape == (*text.shape, config.n_embd)


def test_bench_writes_its_rows(monkeypatch, capsys, tmp_path):
    arguments = ["bench", "--models", "mini", "--only", "act", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", [*arguments, "--json", str(tmp_path / "rows.json")])
    bench.main()
    written = json.loads((tmp_path / "rows.json").read_text())
    acts = [row for row in written["rows"] if row["what"].startswith("act, mini")]
    assert [row["tokens_per_s"] * row["ms"] / 1000 for row in acts] == pytest.approx([59, 40 * 59])
    assert all(row["share_of_ceiling"] > 0 for row in acts)
    assert "act, mini, 40 environments" in capsys.readouterr().out


@pytest.mark.parametrize(("main", "flag"), [(bench.main, "--models"), (growth.main, "--model")])
def test_an_unknown_model_is_one_line(monkeypatch, main, flag):
    monkeypatch.setattr("sys.argv", ["bench", flag, "gpt3"])
    with pytest.raises(UserError, match=r"gpt3.*mini"):
        main()


def test_growth_draws_what_it_is_given(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        {"grows": kind, "timed": "a step", "value": value, "ms": value / 7}
        for kind in ("context", "batch")
        for value in (1, 10, 100)
    ]
    growth.plot(rows, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
