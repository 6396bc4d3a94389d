"""experiments/fit.py: which episodes count as learnt from, and the error on them."""

import json

import minari
import numpy as np
import pytest
import torch
from runs import ROOT, SHORT, call

import train
from experiments import fit

SET = ROOT / "assets/minari/lamo/reacher2d/medium-v0"


def test_errors_are_of_the_episodes_drawn_and_of_the_rest(tmp_path):
    """A policy whose actions are 0 has an action's mean square as its error."""
    words = ["--env", "reacher2d", "--ratio", 0.1, "--lm-coef", 0, "--seed", 3, "--name", "run"]
    call(train.main, *SHORT[4:], *words, "--out", tmp_path)
    path = tmp_path / "run" / "ckpt.pt"
    saved = torch.load(path, weights_only=True)
    for name in ("head.2.weight", "head.2.bias"):
        saved["model"][name].zero_()
    train.save_checkpoint(path, saved)
    call(fit.main, tmp_path / "run", "--batches", 60, "--json", tmp_path / "fit.json")
    (row,) = json.loads((tmp_path / "fit.json").read_text())
    episodes = [e.actions for e in minari.MinariDataset(SET / "data").iterate_episodes()]
    drawn = set(np.random.default_rng(3).choice(50, 5, replace=False).tolist())
    for part, wanted in (("training", True), ("held_out", False)):
        chosen = [a for i, a in enumerate(episodes) if (i in drawn) == wanted]
        # a step is in as many windows as may begin before it, up to the context of 4
        weights = [np.minimum(np.arange(len(a)) + 1, 4.0) for a in chosen]
        squares = np.concatenate([(a**2).mean(1) for a in chosen])
        expected = np.average(squares, weights=np.concatenate(weights))
        assert row[part] == pytest.approx(expected, rel=0.02)
    assert row["training"] != pytest.approx(row["held_out"], rel=0.02)
