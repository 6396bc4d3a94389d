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
K = 4  # steps of context in SHORT


def test_errors_are_of_the_episodes_drawn_and_of_the_rest(tmp_path):
    """They equal those of every window, made here from Minari's own episodes."""
    words = ["--env", "reacher2d", "--ratio", 0.1, "--lm-coef", 0, "--seed", 3, "--name", "run"]
    call(train.main, *SHORT[4:], *words, "--lr", 0.003, "--dtype", "fp32", "--out", tmp_path)
    call(fit.main, tmp_path / "run", "--batches", 30, "--json", tmp_path / "fit.json")
    (row,) = json.loads((tmp_path / "fit.json").read_text())

    saved = train.read_checkpoint(tmp_path / "run")
    model, _ = train.load_policy(tmp_path / "run" / "ckpt.pt", saved)
    episodes = [*minari.MinariDataset(SET / "data").iterate_episodes()]
    drawn = set(np.random.default_rng(3).choice(50, 5, replace=False).tolist())
    seen = np.concatenate([episodes[i].observations[:-1] for i in drawn])
    assert torch.allclose(saved["obs_mean"], torch.tensor(seen.mean(0)).float(), atol=1e-5)
    errors = {}
    for part, wanted in (("training", True), ("held_out", False)):
        squares = []
        for episode in (e for i, e in enumerate(episodes) if (i in drawn) == wanted):
            obs = torch.tensor(episode.observations[:-1]).float()
            obs = (obs - saved["obs_mean"]) / saved["obs_std"]
            rtg = torch.tensor(episode.rewards[::-1].cumsum()[::-1] / 10).float()[:, None]
            act, t = torch.tensor(episode.actions).float(), torch.arange(len(rtg))
            for n in range(1, K + 1):  # windows of n steps: K long, or cut by the end
                starts = t[: len(t) - K + 1] if n == K else t[len(t) - n][None]
                at = starts[:, None] + torch.arange(n)  # (B, n)
                with torch.no_grad():
                    said = model.eval()(rtg[at], obs[at], act[at], t[at])  # (B, n, A)
                squares.append(((said - act[at]) ** 2).mean(-1).flatten())
        errors[part] = torch.cat(squares).mean().item()
    assert row["training"] == pytest.approx(errors["training"], rel=0.02)
    assert row["held_out"] == pytest.approx(errors["held_out"], rel=0.02)
    assert errors["training"] != pytest.approx(errors["held_out"], rel=0.04)
