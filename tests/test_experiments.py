"""experiments/: pre-training lowers the held-out bits, recording writes what was played."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from data import load_trajectories, read_dataset
from experiments import collect, pretrain
from experiments.pretrain import bits_per_byte, shuffle_words, word_starts
from load_gpt2 import load_gpt2, save_gpt2
from model import GPT, GPTConfig, text_loss
from tasks import TASKS
from text import get_encoding

ROOT = Path(__file__).resolve().parent.parent
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
    assert bits_per_byte(text_loss(gpt, tokens), len(tokens), len(tokens)) == pytest.approx(
        log[1]["bits_per_byte"], rel=0.02
    )

    rows = [json.loads(line) for line in (tmp_path / "lm.jsonl").read_text().splitlines()]
    assert rows == log
    expected = math.exp(log[1]["bits_per_byte"] * math.log(2))  # a byte is a token here
    assert log[1]["perplexity"] == pytest.approx(expected, rel=1e-6)
    assert (tmp_path / "lm.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "lm.state.pt").exists()  # done: nothing to go on from


TINY = ["--n-layer", 1, "--n-head", 2, "--n-embd", 32, "--block-size", 32, "--steps", 8]
TINY += ["--batch", 4, "--lr", "1e-2", "--warmup", 2, "--eval-every", 3, "--device", "cpu"]


def pretrain_tiny(monkeypatch, folder, *more):
    """One short pre-training in a folder; returns its log and its weights."""
    folder.mkdir(exist_ok=True)
    text = " ".join(str(i * i) for i in range(2000))
    for name in ("text", "heldout"):
        (folder / f"{name}.txt").write_text(text)
    command = ["pretrain", "--text", folder / "text.txt", "--heldout", folder / "heldout.txt"]
    command += ["--out", folder / "lm.safetensors", *TINY, *more]
    monkeypatch.setattr("sys.argv", [str(x) for x in command])
    pretrain.main()
    return (folder / "lm.jsonl").read_text(), load_gpt2(str(folder / "lm.safetensors")).state_dict()


def test_a_resumed_pretraining_ends_as_an_uninterrupted_one(tmp_path, monkeypatch):
    more = ["--dropout", 0.1, "--shuffle-words"]
    whole = pretrain_tiny(monkeypatch, tmp_path / "whole", *more)
    saved = []

    def stop_at_the_second(*arguments):
        saved.append(arguments)
        if len(saved) == 2:
            raise KeyboardInterrupt
        return save_gpt2(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "save_gpt2", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            pretrain_tiny(patch, tmp_path / "cut", *more)
    state = tmp_path / "cut" / "lm.state.pt"
    monkeypatch.setattr("sys.argv", ["pretrain", "--resume", str(state), "--device", "cpu"])
    pretrain.main()
    log = (tmp_path / "cut" / "lm.jsonl").read_text()
    weights = load_gpt2(str(tmp_path / "cut" / "lm.safetensors")).state_dict()
    assert log == whole[0]
    for name, tensor in whole[1].items():
        assert torch.equal(tensor, weights[name]), name


def test_two_processes_pretrain_what_one_does(tmp_path, monkeypatch):
    one = pretrain_tiny(monkeypatch, tmp_path / "one", "--micro-batch", 1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "experiments.pretrain", "--text", tmp_path / "one" / "text.txt"]
    command += ["--heldout", tmp_path / "one" / "heldout.txt", *TINY, "--micro-batch", 1]
    (tmp_path / "two").mkdir()
    command += ["--out", tmp_path / "two" / "lm.safetensors"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    two = load_gpt2(str(tmp_path / "two" / "lm.safetensors")).state_dict()
    for name, tensor in one[1].items():
        assert torch.allclose(tensor, two[name], atol=2e-3), name
    last = [
        json.loads(log.splitlines()[-1])
        for log in (one[0], (tmp_path / "two" / "lm.jsonl").read_text())
    ]
    assert last[0]["perplexity"] == pytest.approx(last[1]["perplexity"], rel=0.01)


@pytest.mark.parametrize("size", ["mini", "gpt2-medium"])
def test_a_size_is_a_shape_and_a_flag_wins(size):
    base = {"text": ["t"], "heldout": ["h"], "out": "lm.safetensors", "size": size}
    settings = pretrain.resolve(base | {"n_layer": 7})
    expected = (7, 3, 192, 257, 256) if size == "mini" else (7, 16, 1024, 50257, 1024)
    names = ("n_layer", "n_head", "n_embd", "vocab_size", "block_size")
    assert tuple(settings[name] for name in names) == expected
    assert settings["dropout"] == 0
    assert settings["lr"] == (1.5e-3 if size == "mini" else 3e-4)


def test_a_model_that_knows_nothing_needs_eight_bits_a_byte():
    gpt = GPT(GPTConfig(1, 1, 8, 257, 32))
    gpt.wte.weight.data.zero_()  # all logits equal
    tokens = np.arange(200, dtype=np.uint16)
    assert bits_per_byte(text_loss(gpt, tokens), 200, 200) == pytest.approx(
        math.log2(257), rel=1e-5
    )


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
