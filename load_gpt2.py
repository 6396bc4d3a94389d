"""The language models: a name, or OpenAI's GPT-2 weights in a file, into model.GPT.

The files are the hub's own (Radford et al. 2019, as converted by Hugging Face). Their linear layers
are "Conv1D"s, the transpose of nn.Linear's weight, and some carry the causal mask as a tensor. Here
every tensor of a file is used or checked: what is missing, left over or misshapen is an error.
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import torch

from llama import LLAMAS, find_llama, load_llama
from model import ACTIVATIONS, GPT, GPTConfig
from utils import UserError, choose, fetch, is_cached, no_network, reading

MINI = Path(__file__).parent / "assets" / "mini-lm.safetensors"  # made by experiments/pretrain.py
LANGUAGE_MODELS = {  # name: (repository on the hub or file, sizes of Radford et al. 2019, table 2)
    "gpt2": ("openai-community/gpt2", GPTConfig(12, 12, 768)),
    "gpt2-medium": ("openai-community/gpt2-medium", GPTConfig(24, 16, 1024)),
    "gpt2-large": ("openai-community/gpt2-large", GPTConfig(36, 20, 1280)),
    "gpt2-xl": ("openai-community/gpt2-xl", GPTConfig(48, 25, 1600)),
    "distilgpt2": ("distilbert/distilgpt2", GPTConfig(6, 12, 768)),
    "mini": (MINI, GPTConfig(3, 3, 192, vocab_size=257, block_size=256)),
    "dt": (None, GPTConfig(3, 1, 128, vocab_size=257, activation="relu")),  # the paper's DT
    **{name: (repository, None) for name, repository in LLAMAS.items()},  # see llama.py
}
WEIGHTS = "model.safetensors"  # the file's name in each repository
SAME = {"gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new", "swish": "silu"}  # functions
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored transposed


def choose_lm(cuda):
    """The language model where none is named, and why: (name, reason)."""
    if not cuda:
        return "mini", "bundled; no CUDA"
    if is_cached(LANGUAGE_MODELS["gpt2"][0], [WEIGHTS]) or not (why := no_network()):
        return "gpt2", "on CUDA"
    return "mini", f"bundled; gpt2 is not cached, and {why}"


def find_weights(name):
    """Path of the weights of a row of LANGUAGE_MODELS, fetched if need be, or of a file, or of a
    folder as transformers saves it. Raises UserError, naming what to do."""
    for file in ("", WEIGHTS, f"{WEIGHTS}.index.json", "pytorch_model.bin"):
        if (path := Path(name) / file).is_file() and name not in LANGUAGE_MODELS:
            return path
    if name not in LANGUAGE_MODELS and (Path(name).suffix or Path(name).is_absolute()):
        raise UserError(f"no weights {name}; give a .safetensors, .bin or .gguf file, or folder")
    repository, _ = LANGUAGE_MODELS[choose("lm", name, LANGUAGE_MODELS)]
    if repository is None:
        raise UserError(f"--lm {name} is a shape without weights: add --pretrained False")
    if name in LLAMAS:
        return find_llama(name)
    return MINI if repository == MINI else Path(fetch(name, repository, [WEIGHTS])[0])


def read_tensors(path):
    """All tensors of a .safetensors or .bin file, and the safetensors header's metadata."""
    from safetensors import safe_open

    if path.suffix != ".safetensors":
        return torch.load(path, map_location="cpu", weights_only=True), {}
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def read_config(path, tensors, said):
    """The GPTConfig of a weights file. said: its config, as transformers or pretrain wrote it. The
    number of heads leaves no trace in the tensors: it is read from there or, for OpenAI's widths,
    from the published sizes; else it is a UserError."""
    vocab_size, n_embd = tensors["wte.weight"].shape
    published = {c.n_embd: c.n_head for place, c in LANGUAGE_MODELS.values() if place and c}
    n_head = said.get("n_head") or published.get(n_embd)
    if n_head is None:
        raise UserError(f"{path} does not say its number of heads; put its config.json beside it")
    if n_embd % n_head:
        raise ValueError(f"its n_head {n_head} does not divide its n_embd {n_embd}")
    layers = {key.split(".")[1] for key in tensors if key.startswith("h.")}
    visual = said.get("visual") is True or said.get("model_type") == "imagegpt"
    usual = "quick_gelu" if visual else "gelu_new"
    activation = said.get("activation") or said.get("activation_function") or usual
    activation = choose("activation", SAME.get(activation, activation), ACTIVATIONS)
    for name, value in {"n_inner": 4 * n_embd, "add_cross_attention": False}.items():
        if said.get(name) not in (None, value):
            raise UserError(f"{path}: its {name} is {said[name]}, and only {value} can be loaded")
    eps = said.get("norm_eps") or said.get("layer_norm_epsilon") or 1e-5
    sizes = len(layers), n_head, n_embd, vocab_size, len(tensors["wpe.weight"])
    return GPTConfig(*sizes, visual=visual, activation=activation, norm_eps=eps)


def scale_queries(tensors, said, config):
    """Put how a file's config scales attention (Mistral's GPT-2s do so by layer) into the weights
    of the queries, in place: the products with the keys are then GPT-2's own."""
    for i in range(config.n_layer):
        scale = 1 / (i + 1) if said.get("scale_attn_by_inverse_layer_idx") else 1.0
        if not said.get("scale_attn_weights", True):
            scale *= (config.n_embd / config.n_head) ** 0.5
        for kind in ("weight", "bias"):
            tensors[f"h.{i}.attn.c_attn.{kind}"][..., : config.n_embd] *= scale


def load_gpt2(name, dropout=0.1):
    """GPT-2 by name or from a file, as a model.GPT in fp32 on the CPU; LLaMAs as llama.Llama. name:
    as in find_weights; dropout: a number to train with, which no weights file holds. Raises
    UserError if it cannot be had, or if a tensor is missing, misshapen or left over."""
    path = find_weights(name)
    with reading(path, "the weights of a GPT-2 or LLaMA (rm a download, and it is fetched again)"):
        beside = path.parent / "config.json"
        text = beside.read_text() if beside.is_file() else "{}"
        if path.suffix == ".gguf" or "hidden_size" in json.loads(text):
            return load_llama(path, dropout)
        tensors, metadata = read_tensors(path)
        tensors = {key.removeprefix("transformer."): x.float() for key, x in tensors.items()}
        said = json.loads(metadata.get("config") or text)
        config = read_config(path, tensors, said)
        scale_queries(tensors, said, config)
        # The head is tied, so a file may hold wte twice; ImageGPT's, over pixels, is not used.
        head = tensors.pop("lm_head.weight", tensors["wte.weight"])
        if not config.visual and not torch.equal(head, tensors["wte.weight"]):
            raise ValueError("its lm_head is not tied to wte")
        masks = (".attn.bias", ".attn.masked_bias")  # of older files: what is in the future
        state = {
            key: (x.t() if key.endswith(CONV1D) else x).contiguous()
            for key, x in tensors.items()
            if not key.endswith(masks)
        }
        with torch.device("meta"):  # shapes only: every value comes from the file
            gpt = GPT(replace(config, dropout=dropout))
        gpt.load_state_dict(state, assign=True)
    return gpt


def make_gpt(lm, pretrained, dropout, seed, shuffled=False):
    """The GPT that training starts from, and what it is: (GPT, {"lm", "sha256"}). pretrained:
    whether with its weights, or with random ones by the seed in the same shape; shuffled: whether
    each matrix's numbers are then put in random order, by the seed."""
    torch.manual_seed(seed)  # random weights are part of what a seed fixes
    _, known = LANGUAGE_MODELS.get(lm, (None, None))  # a shape; else it is in the files
    if pretrained or known is None:
        gpt = load_gpt2(lm, dropout)
    if not pretrained:
        gpt = type(gpt)(gpt.config) if known is None else GPT(replace(known, dropout=dropout))
    for p in (p for p in gpt.parameters() if shuffled and p.dim() == 2):
        p.data = p.data.flatten()[torch.randperm(p.numel())].view_as(p)
    what = lm if pretrained else f"random weights in the shape of {lm}"
    return gpt, {"lm": what, "sha256": fingerprint(gpt)}


def fingerprint(gpt):
    """SHA-256 of a GPT's weights as fp32, the same whatever file they came from. Returns hex."""
    digest = hashlib.sha256()
    for key, tensor in gpt.state_dict().items():
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().data)
    return digest.hexdigest()
