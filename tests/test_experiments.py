"""experiments/: pre-training lowers the held-out bits, recording writes what was played."""

import json
import math
import os
import re
import signal

import minari
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import TORCHRUN, call, finish, start
from safetensors import safe_open

from data import BUNDLED, get_encoding
from experiments import collect, pretrain
from load_gpt2 import load_gpt2
from model import text_loss
from tasks import TASKS
from utils import UserError

SQUARES = " ".join(str(i * i) for i in range(2000))
TINY = ["--n-layer", 1, "--n-head", 2, "--n-embd", 32, "--block-size", 32, "--steps", 8]
TINY += ["--batch", 4, "--lr", "1e-2", "--warmup", 2, "--eval-every", 3, "--device", "cpu"]


def outcome(folder):
    """What pre-training in a folder left: its log, a list of dictionaries, and its weights."""
    rows = [json.loads(line) for line in (folder / "lm.jsonl").read_text().splitlines()]
    return rows, load_gpt2(str(folder / "lm.safetensors")).state_dict()


def pretrain_tiny(folder, *more, text=SQUARES, times=1):
    """One short pre-training in a folder. Returns its outcome."""
    folder.mkdir(exist_ok=True)
    (folder / "text.txt").write_text(text * times)
    (folder / "heldout.txt").write_text(text)
    files = ["--text", folder / "text.txt", "--heldout", folder / "heldout.txt"]
    call(pretrain.main, *files, "--out", folder / "lm.safetensors", *TINY, *more)
    return outcome(folder)


def test_pretraining_learns_and_saves_what_it_measured(tmp_path):
    text = "the quick brown fox jumps over the lazy dog and runs; " * 5
    tokens = np.array(get_encoding(257).encode_ordinary(text), np.uint16)
    longer = ["--steps", 120, "--eval-every", 60, "--micro-batch", 3, "--block-size", 64]
    bits = []
    for more in ([], ["--shuffle-words", "--half"]):
        folder = tmp_path / str(len(more))
        log, weights = pretrain_tiny(folder, *longer, *more, text=text, times=40)
        assert [row["step"] for row in log] == [60, 120]
        assert log[1]["bits_per_byte"] < log[0]["bits_per_byte"] < 8
        bits.append(log[1]["bits_per_byte"])
        with safe_open(folder / "lm.safetensors", framework="pt") as file:
            assert json.loads(file.metadata()["log"]) == log
            assert ("random" in file.metadata()["word_order"]) == bool(more)
        # a byte is a token here, so bits tell the perplexity
        assert log[1]["perplexity"] == pytest.approx(2 ** bits[-1], rel=1e-6)
        measured = math.exp(text_loss(load_gpt2(str(folder / "lm.safetensors")), tokens))
        assert measured == pytest.approx(log[1]["perplexity"], rel=0.02)
        size = (folder / "lm.safetensors").stat().st_size / sum(x.numel() for x in weights.values())
        assert int(size) == (2 if more else 4)  # bytes
        assert (folder / "lm.png").read_bytes().startswith(b"\x89PNG")
        assert not (folder / "lm.state.pt").exists()  # done: nothing to go on from
    assert bits[1] > 1.2 * bits[0]


@pytest.mark.parametrize("after", [1, 5, 6])
def test_a_resumed_pretraining_ends_as_an_uninterrupted_one(tmp_path, monkeypatch, after):
    more = ["--dropout", 0.1, "--shuffle-words"]
    log, weights = pretrain_tiny(tmp_path / "whole", *more)
    drawn = []

    def draw_and_stop(*arguments):
        drawn.append(arguments)
        if len(drawn) == after:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(*arguments)

    with monkeypatch.context() as patch:
        draw = pretrain.sample_text
        patch.setattr(pretrain, "sample_text", draw_and_stop)
        with pytest.raises(SystemExit) as stop:
            pretrain_tiny(tmp_path / "cut", *more)
    assert stop.value.code == 128 + signal.SIGTERM
    call(pretrain.main, "--resume", tmp_path / "cut" / "lm.state.pt", "--device", "cpu")
    resumed_log, resumed = outcome(tmp_path / "cut")
    assert resumed_log == log
    torch.testing.assert_close(resumed, weights, atol=0, rtol=0)


def test_two_processes_pretrain_what_one_does(tmp_path):
    log, weights = pretrain_tiny(tmp_path, "--micro-batch", 1)
    words = ["--text", tmp_path / "text.txt", "--heldout", tmp_path / "heldout.txt", *TINY]
    words += ["--micro-batch", 1, "--out", tmp_path / "two" / "lm.safetensors"]
    finish(start("-m", "experiments.pretrain", *words, launcher=TORCHRUN))
    other_log, other = outcome(tmp_path / "two")
    torch.testing.assert_close(weights, other, atol=2e-3, rtol=0)
    assert log[-1] == pytest.approx(other_log[-1], rel=0.01)


@settings(max_examples=30, deadline=None)
@given(st.text("ab \n", max_size=80), st.integers(0, 10_000))
def test_a_shuffled_block_has_the_same_words_in_another_order(text, seed):
    text, encoding = f" {text}", get_encoding(257)
    tokens, generator = torch.tensor([encoding.encode_ordinary(text)]), torch.Generator()
    starts = pretrain.word_starts(encoding)
    shuffled = pretrain.shuffle_words(tokens, starts, generator.manual_seed(seed))
    found = encoding.decode(shuffled[0].tolist())
    assert sorted(re.findall(r"\s\S*", found)) == sorted(re.findall(r"\s\S*", text))


def test_the_shorter_recording_is_the_beginning_of_the_longer(tmp_path, monkeypatch):
    recorded = [BUNDLED / TASKS["hopper"].bundled]
    for steps in (400, 900):
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / str(steps)))
        call(collect.main, "--env", "hopper", "--steps", steps)
        recorded.append(tmp_path / str(steps) / TASKS["hopper"].recorded)
        about = json.loads((recorded[-1] / "about.json").read_text())
        assert about["steps"] >= steps
        assert about["share"] == steps / 1_000_000
        assert [path.name for path in recorded[-1].parent.iterdir()] == [recorded[-1].name]
    sets = [minari.MinariDataset(folder / "data") for folder in recorded]
    bundled, short, long = (list(dataset.iterate_episodes()) for dataset in sets)
    assert sum(len(episode) for episode in long) == about["steps"]
    assert sum(episode.rewards.sum() for episode in long) / len(long) == about["return_mean"]
    assert len(short) < len(long)
    for ours, longer in zip(short, long, strict=False):
        np.testing.assert_array_equal(ours.observations, longer.observations)
        np.testing.assert_array_equal(ours.actions, longer.actions)
    near = {"rtol": 1e-4, "atol": 1e-5}  # that one was recorded on another machine
    np.testing.assert_allclose(short[0].actions[:50], bundled[0].actions[:50], **near)
    np.testing.assert_allclose(short[0].rewards[:50], bundled[0].rewards[:50], **near)
    with pytest.raises(UserError, match=str(recorded[-1])):
        call(collect.main, "--env", "hopper", "--steps", 1)
