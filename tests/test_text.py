"""text.py: tokens against the text's own bytes and GPT-2's BPE, blocks against the tokens."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import text as text_module
from plumbing import UserError
from text import check_text, find_text, get_encoding, parquet_to_text, sample_text, tokenise


@given(st.text())
def test_byte_tokens_are_the_bytes(text):
    encoding = get_encoding(257)
    assert bytes(encoding.encode_ordinary(text)) == text.encode()
    assert encoding.decode(encoding.encode_ordinary(text)) == text
    assert encoding.n_vocab == 257


def test_gpt2_bpe_gives_the_published_token_ids(shared, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared("tiktoken")))
    encoding = get_encoding(50257)
    for case in json.loads(shared("gpt2/golden_logits.json").read_text()):
        assert encoding.encode_ordinary(case["prompt"]) == case["token_ids"]


def test_gpt2_bpe_from_the_hub_is_the_same(shared, monkeypatch, tmp_path):
    files = {
        "merges.txt": text_module.TIKTOKEN_FILES[0],
        "vocab.json": text_module.TIKTOKEN_FILES[1],
    }
    repository = tmp_path / "models--openai-community--gpt2"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    for name, tiktoken_name in files.items():
        shutil.copy(shared("tiktoken") / tiktoken_name, repository / "snapshots" / "abc" / name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    from_hub = get_encoding(50257)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared("tiktoken")))
    text = shared("text/wikitext-2-test.txt").read_text()[:50_000] + " 123 naïve 日本"
    assert from_hub.encode_ordinary(text) == get_encoding(50257).encode_ordinary(text)
    assert from_hub.n_vocab == 50257


def test_gpt2_bpe_without_its_files_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(UserError, match="set TIKTOKEN_CACHE_DIR"):
        get_encoding(50257)
    with pytest.raises(UserError, match=r"known: 50257 \(GPT-2\), 257 \(bytes\)"):
        get_encoding(1000)


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=st.text(min_size=1, max_size=300), chunk=st.integers(1, 50))
def test_a_token_file_holds_the_whole_text(tmp_path, monkeypatch, text, chunk):
    monkeypatch.setattr(text_module, "CHUNK", chunk)
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    tokens = tokenise(path, get_encoding(257))
    assert tokens.dtype == np.uint16
    assert bytes(tokens.astype(np.uint8)) == text.encode()


def test_tokens_are_cached_by_content(tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_text("hello " * 10)
    first = tokenise(path, get_encoding(257))
    cached = text_module.cache_folder() / "tokens"
    files = set(cached.iterdir())
    assert np.array_equal(tokenise(path, get_encoding(257)), first)
    assert set(cached.iterdir()) == files
    path.write_text("hallo " * 10)  # same length, another text
    assert not np.array_equal(tokenise(path, get_encoding(257)), first)


def test_texts_that_cannot_be_used_are_refused(tmp_path):
    (tmp_path / "latin1.txt").write_bytes("café ".encode("latin-1") * 10)
    (tmp_path / "empty.txt").write_bytes(b"")
    encoding = get_encoding(257)
    for name, message in (
        ("latin1.txt", "is not UTF-8"),
        ("empty.txt", "is empty"),
        ("absent.txt", "cannot read the text"),
    ):
        with pytest.raises(UserError, match=message):
            tokenise(tmp_path / name, encoding)
    with pytest.raises(UserError, match="has 10 tokens, but a block needs 11"):
        check_text(np.zeros(10, np.uint16), 10)
    check_text(np.zeros(11, np.uint16), 10)


@settings(deadline=None)
@given(st.integers(2, 200), st.integers(1, 5), st.integers(0, 100))
def test_blocks_of_text_and_their_targets(n, batch, seed):
    tokens = np.arange(n, dtype=np.uint16)
    length = max(1, n // 3)
    x, y = sample_text(tokens, batch, length, torch.Generator().manual_seed(seed))
    assert x.shape == y.shape == (batch, length)
    assert torch.equal(y, x + 1)
    assert torch.equal(x - x[:, :1], torch.arange(length).expand(batch, -1))
    assert y.max() <= n - 1


def test_every_block_can_be_drawn():
    x, y = sample_text(np.arange(5, dtype=np.uint16), 200, 3, torch.Generator().manual_seed(0))
    assert set(x[:, 0].tolist()) == {0, 1}
    assert y.max() == 4


def test_default_text_without_a_network_is_the_python_manual():
    path, note = find_text("auto", byte_level=True)
    text = path.read_text(encoding="utf-8")
    assert "The Python manual" in f"The {note.removeprefix('the ')}"
    assert "no network" in note
    assert "exception" in text
    assert find_text("english", byte_level=False)[0] == path
    for corpus, byte_level in (("auto", False), ("wikitext", True)):
        with pytest.raises(UserError, match="--corpus FILE"):
            find_text(corpus, byte_level)
    with pytest.raises(UserError, match="there is no text"):
        find_text(str(path) + "x", True)


def test_parquet_columns_become_one_text(tmp_path):
    rows = [["", " = Title = \n", " Été . \n"], [" next \n"]]
    files = []
    for i, part in enumerate(rows):
        files.append(tmp_path / f"{i}.parquet")
        pq.write_table(pa.table({"text": part}), files[-1])
    with open(tmp_path / "out.txt", "wb") as out:
        parquet_to_text(files, out)
    assert (tmp_path / "out.txt").read_bytes().decode() == "".join(rows[0] + rows[1])
