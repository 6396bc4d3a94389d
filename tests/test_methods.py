"""Each method of the paper's comparison: what its row says, and that it trains just that."""

import pytest

from checkpoint import build_model
from plumbing import UserError
from settings import METHODS, resolve
from train import Config

# method: weights pre-trained, what is trained, embed (None: the task's), lm_coef, similarity
TABLE = {
    "lamo": (True, "lora", None, 0.1, 0.0),
    "lamo-nolm": (True, "lora", None, 0.0, 0.0),
    "lamo-linear": (True, "lora", "linear", 0.1, 0.0),
    "lamo-freeze": (True, "new", None, 0.1, 0.0),
    "lamo-full": (True, "all", None, 0.1, 0.0),
    "lamo-random": (False, "lora", None, 0.1, 0.0),
    "dt": (False, "all", "linear", 0.0, 0.0),
    "wiki-rl": (True, "all", "linear", 0.0, 0.1),
}
SWITCHES = ("pretrained", "train", "embed", "lm_coef", "similarity")
TASKS_OWN = {"hopper": "linear", "reacher2d": "mlp"}


def test_the_table_is_whole():
    assert TABLE.keys() == METHODS.keys()


@pytest.mark.parametrize("env", TASKS_OWN)
@pytest.mark.parametrize("method", TABLE)
def test_a_method_is_its_row(method, env):
    settings, _, _ = resolve(Config(), {"method": method, "env": env})
    expected = dict(zip(SWITCHES, TABLE[method], strict=True))
    expected["embed"] = expected["embed"] or TASKS_OWN[env]
    assert {name: settings[name] for name in SWITCHES} == expected
    assert settings["lm"] == ("dt" if method == "dt" else "mini")
    assert settings["lora_rank"] == 16
    assert settings["lora_alpha"] == 32


@pytest.mark.parametrize("method", TABLE)
def test_a_typed_flag_wins(method):
    other = {"embed": "tokens", "lr": 3e-3, "dropout": 0.25}
    settings, _, _ = resolve(Config(), {"method": method} | other)
    assert {name: settings[name] for name in other} == other


def expected_names(train, embed, language, layers):
    """Names of all that is trained, written out from the method's description."""
    outside = {"embed_time.weight", "embed_ln.weight", "embed_ln.bias"}
    for part in ("embed_return", "embed_state", "embed_action"):
        if embed == "linear":
            outside |= {f"{part}.weight", f"{part}.bias"}
        else:
            outside |= {
                f"{part}.{fc}.{kind}" for fc in ("fc1", "fc2") for kind in ("weight", "bias")
            }
    heads = (0,) if embed == "linear" else (0, 2)
    outside |= {f"head.{i}.{kind}" for i in heads for kind in ("weight", "bias")}
    if train == "new":
        return outside
    if train == "lora":
        parts = ("lora_A", "lora_B", "c_attn.bias")
        return outside | {
            f"gpt.h.{i}.attn.{part}" if part == "c_attn.bias" else f"gpt.h.{i}.attn.c_attn.{part}"
            for i in range(layers)
            for part in parts
        }
    inside = {"gpt.ln_f.weight", "gpt.ln_f.bias"}
    for i in range(layers):
        for part in ("ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            inside |= {f"gpt.h.{i}.{part}.weight", f"gpt.h.{i}.{part}.bias"}
    # no one reads words and their positions where no language is learnt
    return outside | inside | ({"gpt.wte.weight", "gpt.wpe.weight"} if language else set())


@pytest.mark.parametrize("env", TASKS_OWN)
@pytest.mark.parametrize("method", TABLE)
def test_a_method_trains_what_it_says_and_nothing_else(method, env, boxes):
    settings, _, _ = resolve(Config(), {"method": method, "env": env})
    model, _ = build_model(settings | {"max_ep_len": 10}, boxes(11, 3))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    _, train, embed, lm_coef, _ = TABLE[method]
    assert trained == expected_names(train, embed or TASKS_OWN[env], lm_coef > 0, layers=3)


def test_pulling_tokens_to_random_words_is_refused():
    with pytest.raises(UserError, match="--similarity"):
        resolve(Config(), {"method": "wiki-rl", "pretrained": False})
