"""experiments/: pre-training lowers the held-out bits, recording writes what was played."""

import json
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from data import load_trajectories, read_dataset
from experiments import collect, pretrain
from experiments.pretrain import bits_per_byte, shuffle_words, word_starts
from load_gpt2 import load_gpt2
from model import GPT, GPTConfig
from tasks import TASKS
from text import get_encoding

HOPPER = TASKS["hopper"]


def test_pretraining_lowers_the_held_out_bits_and_saves_what_it_measured(tmp_path, monkeypatch):
    sentence = "the quick brown fox jumps over the lazy dog; "
    (tmp_path / "text.txt").write_text(sentence * 200)
    (tmp_path / "heldout.txt").write_text(sentence * 5)
    out = tmp_path / "lm.safetensors"
    command = ["pretrain", "--text", tmp_path / "text.txt", "--heldout", tmp_path / "heldout.txt"]
    command += ["--out", out, "--n-layer", 1, "--n-head", 2, "--n-embd", 32, "--block-size", 64]
    command += ["--steps", 60, "--batch", 4, "--micro-batch", 3, "--lr", "1e-2", "--warmup", 5]
    command += ["--eval-every", 30, "--device", "cpu"]
    monkeypatch.setattr("sys.argv", [str(x) for x in command])
    pretrain.main()
    with safe_open(out, framework="pt") as file:
        log = json.loads(file.metadata()["log"])
    assert [row["step"] for row in log] == [30, 60]
    assert log[1]["bits_per_byte"] < log[0]["bits_per_byte"] < 8
    gpt = load_gpt2(str(out))
    tokens = np.array(get_encoding(257).encode_ordinary(sentence * 5), np.uint16)
    assert bits_per_byte(gpt, tokens, len(tokens)) == pytest.approx(
        log[1]["bits_per_byte"], rel=0.02
    )


def test_a_model_that_knows_nothing_needs_eight_bits_a_byte():
    gpt = GPT(GPTConfig(1, 1, 8, 257, 32))
    gpt.wte.weight.data.zero_()  # all logits equal
    tokens = np.arange(200, dtype=np.uint16)
    assert bits_per_byte(gpt, tokens, 200) == pytest.approx(math.log2(257), rel=1e-5)


def test_recording_repeats_and_the_shorter_is_the_beginning_of_the_longer(tmp_path, monkeypatch):
    flat = []
    for steps in (400, 900):
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / str(steps)))
        command = ["collect", "--env", "hopper", "--steps", str(steps)]
        monkeypatch.setattr("sys.argv", command)
        collect.main()
        folder = tmp_path / str(steps) / HOPPER.recorded
        about = json.loads((folder / "about.json").read_text())
        dataset = read_dataset(folder)
        flat.append(load_trajectories(dataset, dataset.action_space, HOPPER.scale))
        assert about["steps"] == len(flat[-1]) >= steps
        assert about["share"] == steps / 1_000_000
        assert about["return_mean"] == pytest.approx(flat[-1].returns.mean())
    short, long = flat
    n = len(short.returns)
    assert n < len(long.returns)
    np.testing.assert_array_equal(short.returns, long.returns[:n])
    np.testing.assert_array_equal(short.act, long.act[: len(short)])


def test_the_bundled_set_is_the_beginning_of_the_full_one(tmp_path, monkeypatch):
    bundled = read_dataset(collect.BUNDLED / HOPPER.bundled)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["collect", "--env", "hopper", "--steps", "1"])
    collect.main()
    (first,) = read_dataset(tmp_path / HOPPER.recorded).iterate_episodes()
    theirs = next(bundled.iterate_episodes())
    np.testing.assert_allclose(first.actions[:50], theirs.actions[:50], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(first.rewards[:50], theirs.rewards[:50], rtol=1e-4, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.text("ab \n", min_size=1, max_size=80), st.integers(0, 10_000))
def test_a_shuffled_block_has_the_same_words_in_another_order(text, seed):
    encoding = get_encoding(257)
    tokens = torch.tensor([encoding.encode_ordinary(text)])
    generator = torch.Generator().manual_seed(seed)
    shuffled = shuffle_words(tokens, word_starts(encoding), generator)
    assert sorted(shuffled[0].tolist()) == sorted(tokens[0].tolist())

    def words(text):  # each with the white space character before it
        return sorted(re.findall(r"\s[^\s]*|^[^\s]+", text))

    def pieces(row):  # cut where a word began in the original, which only the first may hide
        return words(encoding.decode(row.tolist()))

    first = re.match(r"[^\s]*", text).group()
    if not first:  # every word begins with white space, so none can grow together
        assert pieces(shuffled[0]) == pieces(tokens[0])
    else:
        assert first in encoding.decode(shuffled[0].tolist())


def test_shuffling_a_corpus_keeps_its_unigrams_and_costs_bits(tmp_path, monkeypatch):
    sentence = "the quick brown fox jumps over the lazy dog and runs; "
    (tmp_path / "text.txt").write_text(sentence * 200)
    (tmp_path / "heldout.txt").write_text(sentence * 5)
    bits = {}
    for extra in ([], ["--shuffle-words"]):
        out = tmp_path / f"lm{len(extra)}.safetensors"
        command = ["pretrain", "--text", tmp_path / "text.txt", "--heldout"]
        command += [tmp_path / "heldout.txt", "--out", out, "--n-layer", 1, "--n-head", 2]
        command += ["--n-embd", 32, "--block-size", 64, "--steps", 200, "--batch", 8]
        command += ["--lr", "1e-2", "--warmup", 5, "--device", "cpu", "--half", *extra]
        monkeypatch.setattr("sys.argv", [str(x) for x in command])
        pretrain.main()
        with safe_open(out, framework="pt") as file:
            bits[len(extra)] = json.loads(file.metadata()["log"])[-1]["bits_per_byte"]
            assert ("random" in file.metadata()["word_order"]) == bool(extra)
        assert next(load_gpt2(str(out)).parameters()).dtype == torch.float32
        assert out.stat().st_size < 2.2 * sum(p.numel() for p in load_gpt2(str(out)).parameters())
    assert bits[1] > 1.2 * bits[0]
