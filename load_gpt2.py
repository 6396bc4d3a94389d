"""OpenAI's GPT-2 weights into model.GPT: from the hub, its cache, or a file.

    python load_gpt2.py gpt2              # parameters, perplexity, a completion
    python load_gpt2.py path/to/model.safetensors --text FILE

The files are the hub's own (Radford et al. 2019, as converted by Hugging Face). Their linear layers
are "Conv1D"s, the transpose of nn.Linear's weight, and some carry the causal mask as a tensor. Here
every tensor of the file is used or checked: what is missing, left over or misshapen is an error.
"""

import hashlib
import json
import math
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import torch

from files import check_memory, load_tensors, read_json, write_atomically
from model import GPT, GPTConfig, text_loss
from plumbing import (
    Parser,
    UserError,
    choose,
    choose_dtype,
    first_line,
    network_available,
    printable,
    run_command,
)

HUB = {  # name: (repository, config); sizes: Radford et al. 2019, table 2; DistilGPT2's card
    "gpt2": ("openai-community/gpt2", GPTConfig(12, 12, 768)),
    "gpt2-medium": ("openai-community/gpt2-medium", GPTConfig(24, 16, 1024)),
    "gpt2-large": ("openai-community/gpt2-large", GPTConfig(36, 20, 1280)),
    "gpt2-xl": ("openai-community/gpt2-xl", GPTConfig(48, 25, 1600)),
    "distilgpt2": ("distilbert/distilgpt2", GPTConfig(6, 12, 768)),
}
MINI_CONFIG = GPTConfig(3, 3, 192, vocab_size=257, block_size=256)
DT = GPTConfig(3, 1, 128, vocab_size=257)  # the Decision Transformer's body, as the paper has it
NAMES = [*HUB, "mini", "dt"]  # dt is a shape: it has no weights
MINI = Path(__file__).parent / "assets" / "mini-lm.safetensors"  # made by experiments/pretrain.py
WEIGHTS = "model.safetensors"  # the file's name in each repository
TEXT_TOKENS = 16_384  # how much of a text the perplexity is measured on
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored transposed


def is_cached(name):
    """Whether the weights of hub model `name` are in huggingface_hub's cache already."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(HUB[name][0], WEIGHTS), str)


def find_weights(name_or_path):
    """Where the weights are, fetched if need be. Returns a file's Path.

    name_or_path: a key of HUB, "mini", or a file, or a folder as transformers saves it.
    Raises UserError, naming what to do, for what cannot be had.
    """
    if name_or_path == "mini":
        return MINI
    if name_or_path in HUB:
        from huggingface_hub import hf_hub_download

        repository, cached = HUB[name_or_path][0], is_cached(name_or_path)
        if not cached and not network_available():
            raise UserError(
                f"{name_or_path} is not in the Hugging Face cache and the hub cannot be reached; "
                f"on a machine with a network run `hf download {repository} {WEIGHTS}`, "
                f"copy the file here and give its path: --lm path/to/{WEIGHTS}"
            )
        try:  # what is cached is not asked for again: the client would wait for the network
            return Path(hf_hub_download(repository, WEIGHTS, local_files_only=cached))
        except Exception as error:  # the hub client's and its transport's many kinds
            raise UserError(
                f"{name_or_path} could not be downloaded: {first_line(error)}"
            ) from error
    path = Path(name_or_path)
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:  # too long a name, or a folder that may not be read
        what = printable(name_or_path)[:60]
        raise UserError(f"cannot look for the weights {what}: {error.strerror}") from error
    if is_folder:
        for file in (WEIGHTS, "pytorch_model.bin"):
            if (path / file).is_file():
                return path / file
        raise UserError(f"{path} holds neither {WEIGHTS} nor pytorch_model.bin")
    if is_file:
        return path
    if path.suffix or path.parent != Path("."):
        raise UserError(f"there is no weights file {path}; give a .safetensors or .bin file")
    choose("lm", name_or_path, NAMES)


def read_tensors(path):
    """All tensors of a .safetensors or .bin file, and the safetensors header's metadata.

    Raises UserError for a file that is neither or is damaged.
    """
    from safetensors import safe_open

    try:
        check_memory(2 * path.stat().st_size, path)
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
        if not zipfile.is_zipfile(path):  # before PyTorch 1.6, with sizes that nothing checks
            why = "nor torch.save's: transformers' save_pretrained writes .safetensors"
            raise UserError(f"{path} is not a .safetensors file, {why}")
        tensors = load_tensors(path)
    except UserError:
        raise
    except Exception as error:  # of many kinds, for as many kinds of damage; code is refused here
        why = "damaged, or it holds something other than tensors"
        raise UserError(f"{path} is no readable .safetensors or .bin file: {why}") from error
    if not isinstance(tensors, dict) or not all(torch.is_tensor(t) for t in tensors.values()):
        raise UserError(f"{path} is no state dict: expected a dictionary of tensors")
    return {str(name): tensor for name, tensor in tensors.items()}, {}


def read_config(path, tensors, metadata):
    """The GPTConfig of a weights file: what stands beside it, which must agree with its tensors.

    The number of heads leaves no trace in the tensors, so it is read from the file's own metadata,
    a config.json next to it, or, for OpenAI's widths, the published sizes; else UserError.
    """
    for name in ("wte.weight", "wpe.weight"):
        if name not in tensors or tensors[name].dim() != 2:
            raise UserError(f"{path} is no GPT-2: it has no matrix {name}")
    vocab_size, n_embd = tensors["wte.weight"].shape
    block_size = len(tensors["wpe.weight"])
    layers = {key.split(".")[1] for key in tensors if key.startswith("h.")}
    found = {"n_layer": len(layers), "n_embd": n_embd, "vocab_size": vocab_size}
    said, source = {}, path
    try:
        if "config" in metadata:
            said = dict(json.loads(metadata["config"]))
        elif (path.parent / "config.json").is_file():
            source = path.parent / "config.json"
            said = read_json(source)
            block_size = said.get("n_positions", block_size)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"the configuration in {source} is no JSON object") from error
    if type(block_size) is not int or not 1 <= block_size <= len(tensors["wpe.weight"]):
        rows = len(tensors["wpe.weight"])
        raise UserError(f"{source} says n_positions {block_size}, but {path} has {rows}")
    for key, value in found.items():
        if said.get(key, value) != value:
            raise UserError(f"{path} has {key} {value}, but {source} says {said[key]}")
    for i in range(len(layers)):  # before any of them is made
        name = f"h.{i}.attn.c_attn.weight"
        if name not in tensors or tensors[name].numel() != 3 * n_embd**2:
            raise UserError(f"{path}: {name} is missing, or not of {3 * n_embd**2} numbers")
    if 0 in found.values():
        raise UserError(
            f"{path} is no GPT-2: it has {', '.join(f'{k} {v}' for k, v in found.items())}"
        )
    published = {config.n_embd: config.n_head for _, config in HUB.values()}
    n_head = said.get("n_head", published.get(n_embd))
    if n_head is None:
        raise UserError(f"{path} does not say its number of heads; put its config.json beside it")
    if type(n_head) is not int or n_head < 1 or n_embd % n_head:
        raise UserError(f"{source} says n_head {n_head}, which does not divide n_embd {n_embd}")
    visual = said.get("visual") is True or said.get("model_type") == "imagegpt"
    return GPTConfig(n_head=n_head, block_size=block_size, visual=visual, **found)


def find_config(name_or_path):
    """The sizes of a model without its weights: a GPTConfig. Names as in load_gpt2, and "dt"."""
    if name_or_path == "dt":
        return DT
    if name_or_path in HUB:
        return HUB[name_or_path][1]
    return load_gpt2(name_or_path).config


def load_gpt2(name_or_path, dropout=0.1):
    """GPT-2 by name or from a file, as a model.GPT in fp32 on the CPU.

    name_or_path: gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2 (from the hub, whose HF_HOME,
    HF_ENDPOINT and HF_HUB_OFFLINE work), mini (bundled), a .safetensors or .bin file, or a folder
    with one. dropout is a number to train with; no weights file holds it. ImageGPT's weights are
    read from a folder as transformers saves it, but for their head: nobody paints here.
    Raises UserError if it cannot be had, or if a tensor is missing, misshapen or left over.
    """
    path = find_weights(name_or_path)
    tensors, metadata = read_tensors(path)
    tensors = {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}
    config = read_config(path, tensors, metadata)
    if name_or_path in HUB and config != HUB[name_or_path][1]:
        raise UserError(f"{path} is not {name_or_path}: its sizes are {config}")

    with torch.device("meta"):  # shapes only: every value comes from the file
        gpt = GPT(replace(config, dropout=dropout))
    state = {}
    for key, parameter in gpt.state_dict().items():
        if key not in tensors:
            raise UserError(f"{path} lacks the tensor {key}")
        tensor, expected = tensors.pop(key).float(), parameter.shape
        transposed = key.endswith(CONV1D)
        expected = tuple(reversed(expected)) if transposed else tuple(expected)
        if tuple(tensor.shape) != expected:
            raise UserError(f"{path}: {key} is {tuple(tensor.shape)}, expected {expected}")
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {key} has numbers that are not finite")
        state[key] = (tensor.t() if transposed else tensor).contiguous()
    for key, tensor in tensors.items():  # what may be left: the tied head and the causal masks
        if key == "lm_head.weight" and (
            config.visual or torch.equal(tensor.float(), state["wte.weight"])
        ):
            continue
        if key.endswith(("attn.bias", "attn.masked_bias")) and key.split(".")[0] == "h":
            T = config.block_size  # (1, 1, T, T) of ones below the diagonal, or one large number
            if tensor.numel() == 1 or (
                tensor.shape[-2:] == (T, T) and torch.equal(tensor, tensor.tril())
            ):
                continue
        raise UserError(f"{path} holds a tensor GPT-2 has no use for: {key} {tuple(tensor.shape)}")
    gpt.load_state_dict(state, assign=True)
    return gpt


def save_gpt2(gpt, path, about, dtype=torch.float32):
    """Write a GPT in the hub's layout, so that load_gpt2 and transformers both read it back.

    about: dictionary of strings kept in the header (where the weights come from); dtype: of the
    written weights, which are read back as fp32.
    """
    from safetensors.torch import save

    tensors = {
        key: (tensor.t() if key.endswith(CONV1D) else tensor).to(dtype).contiguous()
        for key, tensor in gpt.state_dict().items()
    }
    metadata = {"format": "pt", "config": json.dumps(asdict(gpt.config)), **about}
    write_atomically(path, lambda file: file.write(save(tensors, metadata)))


def fingerprint(gpt):
    """SHA-256 of a GPT's weights as fp32, the same whatever file they came from. Returns hex."""
    digest = hashlib.sha256()
    for key, tensor in gpt.state_dict().items():
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().data)
    return digest.hexdigest()


def talk(gpt, prompt, n, tokens, encoding, seed=0):
    """What a GPT has to say, and how well it knows a text.

    prompt: str, continued by n tokens (sampled at temperature 0.8 from the 40 likeliest, by the
    seed); tokens (N,): a text's. Returns (str, perplexity per token). Raises UserError for an empty
    prompt and a text of less than 2 tokens.
    """
    if not prompt or len(tokens) < 2:
        raise UserError("the prompt and the text must not be empty: one token, or two, at least")
    gpt.eval()
    start = torch.tensor([encoding.encode_ordinary(prompt)], device=gpt.wte.weight.device)
    generator = torch.Generator(gpt.wte.weight.device).manual_seed(seed)
    out = gpt.generate(start, n, temperature=0.8, top_k=40, generator=generator)
    device = gpt.wte.weight.device
    with torch.autocast(device.type, torch.bfloat16, choose_dtype(device) == "bf16"):
        loss = min(text_loss(gpt, tokens), 700.0)  # e to more is infinite
        return encoding.decode(out[0].tolist()), math.exp(loss)


def main():
    from text import find_text, get_encoding, tokenise

    parser = Parser(prog="load_gpt2.py", description="Load a GPT-2 and let it show itself.")
    parser.add_argument("lm", help=f"{', '.join(HUB)}, mini, or a file or folder of weights")
    parser.add_argument("--text", help="measure perplexity on this file (default: Python's manual)")
    parser.add_argument("--prompt", default="Hello, my name is Tom.", help="what to continue")
    parser.add_argument("--tokens", type=int, default=100, help="how many to add (default 100)")
    args = parser.parse_args()
    gpt = load_gpt2(args.lm)
    print(f"{args.lm}: {sum(p.numel() for p in gpt.parameters()):,} parameters, {gpt.config}")
    encoding = get_encoding(gpt.config.vocab_size)
    path, _ = find_text(args.text or "english", byte_level=True)
    tokens = tokenise(path, encoding)[:TEXT_TOKENS]
    text, perplexity = talk(gpt, args.prompt, args.tokens, tokens, encoding)
    print(f"perplexity {perplexity:.2f} per token on the first {len(tokens)} tokens of {path}")
    print(text)


if __name__ == "__main__":
    run_command(main)
