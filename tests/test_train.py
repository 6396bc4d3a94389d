"""train.py: a first run as a user has it, every setting, every method, Wiki-RL, the trackers."""

import json
import math
import shutil
from dataclasses import asdict, fields
from functools import partial
from types import SimpleNamespace
from typing import Literal, get_args, get_origin, get_type_hints

import minari
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tyro
from hypothesis import given
from hypothesis import strategies as st
from runs import ROOT, SHORT, assert_same, call, finish, log_of, outcome, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import evaluate
import train
import utils
from load_gpt2 import LANGUAGE_MODELS, MINI, fingerprint, load_gpt2
from lora import inject_lora, mark_trainable
from model import GPT, LaMo
from tasks import TASKS, pack
from train import METHODS, PRESETS, Config, build_model, load_policy, read_checkpoint

CUDA = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA, or LAMO_TEST_CUDA is not set"
)
FIRST = "--env hopper --ratio 0.01 --steps 60 --warmup 10 --batch 16 --lm-length 64 --lr 1e-3"
FIRST += " --log-every 20 --eval-every 40 --episodes 2 --episode-limit 99"


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The folder of a short training on the bundled data, and what it printed."""
    out = tmp_path_factory.mktemp("first")
    printed, _ = finish(start("train.py", *FIRST.split(), "--out", out))
    (folder,) = out.iterdir()
    return folder, printed


def test_training_lowers_both_losses(first):
    rows = [row for row in log_of(first[0]) if "action_loss" in row]
    assert [row["step"] for row in rows] == [20, 40, 60]
    assert rows[-1]["action_loss"] < 0.7 * rows[0]["action_loss"]
    assert rows[-1]["lm_loss"] < rows[0]["lm_loss"]
    assert rows[-1].get("similarity") is None


def test_evaluate_gives_the_logged_evaluations_again_to_the_digit(first, capsys):
    folder, logged = first[0], [r["evaluation"] for r in log_of(first[0]) if "evaluation" in r]
    assert [r["step"] for r in log_of(folder) if "evaluation" in r] == [40, 60]
    again = json.loads(finish(start("evaluate.py", folder / "ckpt.pt", "--json"))[0])
    assert (again["step"], again["results"]) == (60, logged[1])
    call(evaluate.main, folder / "best.pt", "--json")
    best = max(logged, key=lambda results: max(r["score"] for r in results))
    assert json.loads(capsys.readouterr().out)["results"] == best
    call(evaluate.main, folder / "ckpt.pt")
    table = capsys.readouterr().out
    assert all(f"{r['target']:g} " in table for r in logged[1])
    assert all(f" {r['return_mean']:.1f} " in table for r in logged[1])
    call(evaluate.main, folder / "ckpt.pt", "--prompt", "Hello, my name is", "--tokens", 5)
    assert capsys.readouterr().out.count("Hello, my name is") == 2  # before training and after


def test_what_was_chosen_is_printed_and_kept(first):
    folder, printed = first
    config = json.loads((folder / "config.json").read_text())
    checkpoint = read_checkpoint(folder / "ckpt.pt")
    assert config["settings"].keys() == {field.name for field in fields(Config)}
    assert config["settings"] == json.loads(json.dumps(checkpoint["settings"]))
    assert config["notes"] == checkpoint["notes"]
    assert "lamo/hopper/medium-1pct-v0" in config["notes"]["dataset"]
    assert all(note in printed for note in config["notes"].values())
    assert str(folder) in printed
    assert config["versions"]["torch"] == torch.__version__
    result = json.loads((folder / "result.json").read_text())
    assert result["score"] == max(t["score"] for t in result["targets"])
    assert result["dataset"] == config["notes"]["dataset"]


def test_a_checkpoint_holds_what_was_trained_and_no_more(first):
    checkpoint = read_checkpoint(first[0] / "ckpt.pt")
    model, environment = load_policy(first[0] / "ckpt.pt", checkpoint)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert checkpoint["model"].keys() == trained
    assert environment.spec.id == "Hopper-v5"
    size = 4 * sum(tensor.numel() for tensor in checkpoint["model"].values())
    assert (first[0] / "best.pt").stat().st_size < size + 50_000
    assert (first[0] / "ckpt.pt").stat().st_size < 3 * size + 100_000  # and AdamW's moments


def test_the_same_command_gives_the_same_bits(tmp_path):
    """Also under --deterministic, which changes nothing on a CPU. Another seed gives others."""
    found = []
    for more in ([], ["--deterministic"], ["--seed", 1]):
        out = tmp_path / str(len(found))
        call(train.main, *SHORT, "--out", out, "--name", "run", *more)
        found.append(outcome(out / "run"))
        for name in ("ckpt.pt", "best.pt"):
            found[-1][name]["settings"].pop("deterministic")
    assert_same(found[0], found[1])
    assert found[0]["log.jsonl"] != found[2]["log.jsonl"]


def test_the_readmes_own_data_train_and_act(tmp_path, monkeypatch):
    """Its code, as it stands, records choices for which there is no row in tasks.py."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    exec((ROOT / "README.md").read_text().partition("```python\n")[2].partition("```")[0], {})
    words = ["--dataset", "my/cartpole-v0", *SHORT[4:], "--out", tmp_path, "--name", "run"]
    call(train.main, *words)
    returns = [episode.rewards.sum() for episode in minari.load_dataset("my/cartpole-v0")]
    targets = [max(returns), pytest.approx(np.percentile(returns, 90), rel=1e-3)]
    assert read_checkpoint(tmp_path / "run")["settings"]["targets"] == targets
    call(evaluate.main, tmp_path / "run/ckpt.pt", "--targets", 20)


def test_a_checkpoint_acts_where_its_language_model_lies_elsewhere(tmp_path, capsys):
    shutil.copy(MINI, here := tmp_path / "lm.safetensors")
    call(train.main, *SHORT, "--lm", here, "--out", tmp_path, "--name", "run")
    here.rename(there := tmp_path / "moved.safetensors")
    with pytest.raises(train.UserError, match=str(here)):
        call(evaluate.main, tmp_path / "run/ckpt.pt")
    capsys.readouterr()
    call(evaluate.main, tmp_path / "run/ckpt.pt", "--json", "--lm", there)
    last = log_of(tmp_path / "run")[-1]["evaluation"]
    assert json.loads(capsys.readouterr().out)["results"] == last


# --- settings ------------------------------------------------------------------------------------


def chosen(**typed):
    c = Config(**typed)
    train.choose_settings(c, {})
    return c


def test_every_field_is_a_flag_and_comes_back_from_a_checkpoint(tmp_path):
    known = {bool: True, int: 7, float: 0.25, str: "x", list[float]: [1.5, -2.0]}
    known |= {tuple[str, ...]: ("c_fc", "c_proj")}
    values, words = {}, []
    for name, hint in get_type_hints(Config).items():
        kind = hint if hint in known or get_origin(hint) is Literal else get_args(hint)[0]
        value = values[name] = known[kind] if kind in known else get_args(kind)[-1]
        words.append(f"--{name.replace('_', '-')}")
        words += [] if kind is hint is bool else value if type(value) in (list, tuple) else [value]
    c = tyro.cli(Config, args=[str(word) for word in words])
    assert asdict(c) == values
    checkpoint = {"format": train.FORMAT, "settings": asdict(c), "model": {}}
    train.save_checkpoint(tmp_path / "ckpt.pt", checkpoint)
    assert Config(**read_checkpoint(tmp_path / "ckpt.pt")["settings"]) == c
    assert tyro.cli(Config, args=[]) == Config()


TYPED = {
    "embed": st.sampled_from(["linear", "mlp", "tokens"]),
    "train": st.sampled_from(["lora", "new", "all"]),
    "lm_coef": st.floats(0, 1),
    "lr": st.floats(1e-6, 1),
    "steps": st.integers(1, 10**6),
    "targets": st.lists(st.floats(-9, 9), min_size=1),
}


@given(
    env=st.sampled_from([None, *TASKS]),
    method=st.sampled_from(list(METHODS)),
    typed=st.fixed_dictionaries({}, optional=TYPED),
)
def test_flags_win_over_the_method_over_presets_over_the_task(env, method, typed):
    c = chosen(env=env, method=method, **typed)
    task = TASKS[env or "hopper"]
    short = {name: values[1] for name, values in PRESETS.items()}  # there is no CUDA here
    shown = {}
    first_two = {"targets": list(task.targets[:2])}
    for values in (vars(task) | first_two, short, METHODS[method], typed):
        for name, value in values.items():
            if name in vars(c) and value is not None:
                shown[name] = value
    assert {name: getattr(c, name) for name in shown} == shown
    assert c.device == "cpu"
    assert c.compile is False
    again = Config(**asdict(c))  # as --resume does
    train.choose_settings(again, {})
    assert again == c


@pytest.mark.parametrize("limit", [None, 60])
def test_what_a_dataset_without_a_row_says(limit):
    c = Config(episode_limit=0)
    environment = SimpleNamespace(spec=SimpleNamespace(max_episode_steps=limit, id="Any-v0"))
    data = SimpleNamespace(returns=np.arange(11.0), lengths=np.array([3, 40, 7]), scale=10.0)
    train.complete_settings(c, data, environment)
    assert (c.targets, c.scale, c.max_ep_len) == ([10.0, 9.0], 10.0, limit or 40)
    assert c.episode_limit == (0 if limit else 400)  # an episode is to end


@given(st.integers(1, 300), st.integers(0, 100), st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_the_learning_rate_rises_stays_and_falls(steps, warmup, cooldown):
    c = Config(lr=0.25, steps=steps, warmup=warmup, cooldown=cooldown)
    for step in range(1, steps + 1):
        rising = np.interp(step, [0, max(warmup, 1)], [0, 0.25])
        last = steps + 1  # when it would be 0
        falling = np.interp(step, [last - cooldown * steps, last], [0.25, 0]) if cooldown else 1
        assert train.get_lr(step, c) == pytest.approx(min(rising, falling))


# --- methods -------------------------------------------------------------------------------------

TABLE = {  # pre-trained, what is trained, embed (None: the task's), lm_coef, similarity
    "lamo": (True, "lora", None, 0.1, 0),
    "lamo-nolm": (True, "lora", None, 0, 0),
    "lamo-linear": (True, "lora", "linear", 0.1, 0),
    "lamo-freeze": (True, "new", None, 0.1, 0),
    "lamo-full": (True, "all", None, 0.1, 0),
    "lamo-random": (False, "lora", None, 0.1, 0),
    "lamo-shuffled": (True, "lora", None, 0.1, 0),
    "dt": (False, "all", "linear", 0, 0),
    "wiki-rl": (True, "all", "linear", 0, 0.1),
}


def is_trained(name, how, language, env):
    """Whether a parameter is, from the method's description; for Atari biases are frozen, too."""
    if how != "all" and name.startswith("gpt."):
        parts = ("lora_A", "lora_B", "c_attn.bias")[: 2 if env == "breakout" else 3]
        return how == "lora" and name.endswith(parts)
    return language or name not in ("gpt.wte.weight", "gpt.wpe.weight")


def test_the_presets_numbers():
    """The paper's (None: the task's), and those of the short preset: docs/differences.md."""
    paper = dict(steps=100_000, warmup=2500, cooldown=0, eval_every=2500, episodes=20, dropout=0.1)
    paper |= dict(batch=None, lr=None, lora_dropout=None, episode_limit=0, lm_length=1024)
    assert {name: values[0] for name, values in PRESETS.items()} == paper
    c = chosen(env="hopper")
    assert (c.batch, c.dropout, c.lora_dropout, c.cooldown) == (32, 0, 0, 0.5)
    assert (c.steps, c.eval_every, c.episodes, c.lr) == (2000, 350, 10, 5e-4)
    assert c.targets == [3600, 1800]


def test_embed_std_is_that_of_the_trajectory_tokens(hopper):
    model, _ = build_model(chosen(embed_std=0.14), hopper)
    torch.nn.init.zeros_(model.embed_time.weight)
    window = torch.randn(4, 20, 1), torch.randn(4, 20, *hopper.sizes()[0])
    tokens = model.observe(*window, torch.zeros(4, 20, dtype=torch.long))  # (4, 20, 2, C)
    assert tokens.std(-1).mean().item() == pytest.approx(0.14, rel=0.01)


@pytest.mark.parametrize("env", ["hopper", "breakout"])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_what_it_says_and_nothing_else(method, env, hopper):
    c = chosen(env=env, method=method)
    pretrained, how, embed, lm_coef, similarity = TABLE[method]
    embed = embed or {"hopper": "linear", "breakout": "mlp"}[env]
    assert (c.pretrained, c.train, c.embed, c.lm_coef) == (pretrained, how, embed, lm_coef)
    other = method == "dt" or env == "breakout"
    assert (c.similarity, c.eps, c.sample) == (similarity, 1e-8 if other else 1e-6, False)
    assert c.lm == ("dt" if method == "dt" else "mini")
    assert c.shuffled == (method == "lamo-shuffled")
    model, base = build_model(c, hopper)
    assert (base["sha256"] == fingerprint(load_gpt2("mini"))) == (pretrained and not c.shuffled)
    for name, parameter in model.named_parameters():
        expected = is_trained(name, how, lm_coef > 0, env)
        assert parameter.requires_grad == expected, name
    lora = [layer for layer in model.modules() if hasattr(layer, "lora_A")]
    numbers = (32, 1) if env == "breakout" else (16, 2)  # rank; alpha / rank
    assert {(x.lora_B.shape[1], x.scaling) for x in lora} == ({numbers} if how == "lora" else set())


MILLIONS = {"lamo": "3.55 128.0", "dt": "0.64 0.81", "wiki-rl": "85.3 124.7"}


@pytest.mark.parametrize("method", MILLIONS)
def test_parameters_are_those_of_the_docs(method):
    """Trained and in all, at GPT-2 small for D4RL's kitchen: docs/results.md."""
    c = chosen(env="kitchen-complete", method=method)
    with torch.device("meta"):  # shapes only
        gpt = GPT(LANGUAGE_MODELS["dt" if method == "dt" else "gpt2"][1])
        model = LaMo(gpt, (60,), 9, False, c.embed, c.max_ep_len)
        if c.train == "lora":
            inject_lora(gpt, rank=c.lora_rank)
    mark_trainable(model, c.train, language=c.lm_coef > 0)
    for text, every in zip(MILLIONS[method].split(), (False, True), strict=True):
        found = sum(p.numel() for p in model.parameters() if p.requires_grad or every) / 1e6
        assert f"{found:.{len(text.partition('.')[2])}f}" == text


@pytest.mark.parametrize("method", ["dt", "lamo-full", "lamo-random"])
def test_a_checkpoint_needs_its_base_only_where_that_was_frozen(method, hopper):
    """Another seed stands for another machine, whose random numbers may differ."""
    c = chosen(method=method)
    model, base = build_model(c, hopper)
    checkpoint = {"settings": asdict(c) | {"seed": 1}, "base": base, "environment": pack(hopper)}
    trained = {name for name, p in model.named_parameters() if p.requires_grad or c.train == "all"}
    checkpoint["model"] = {n: x for n, x in model.state_dict().items() if n in trained}
    if method == "lamo-random":
        with pytest.raises(train.UserError, match="--lm"):
            load_policy("ckpt.pt", checkpoint)
        checkpoint["settings"]["seed"] = 0
    again, _ = load_policy("ckpt.pt", checkpoint)
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


# --- Wiki-RL -------------------------------------------------------------------------------------


def test_the_pull_fades():
    assert train.fading(0) == pytest.approx(1 / (1 + math.exp(-5)))
    assert train.fading(2500) == 0.5
    assert train.fading(5000) == pytest.approx(1 / (1 + math.exp(5)))
    assert train.fading(10**7) < 1e-9


def test_words_are_clustered_by_their_directions():
    directions = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, -1]])
    lengths = torch.rand(60, 1) * 5 + 0.5  # which are not to matter
    words = directions.repeat(20, 1) * lengths + 0.01 * torch.randn(60, 3)
    centres = train.word_centres(words, clusters=3)
    assert torch.allclose(centres.norm(dim=-1), torch.ones(3))
    assert (directions @ centres.T).amax(-1).min() > 0.999
    few = train.word_centres(words[:3], clusters=3)
    assert torch.allclose(few, words[:3] / words[:3].norm(dim=-1, keepdim=True))


# --- trackers ------------------------------------------------------------------------------------


def test_trackers_have_the_numbers_of_the_log(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    words = [*SHORT, "--method", "dt", "--out", tmp_path, "--name", "run"]
    finish(start("train.py", *words, "--tensorboard", "--wandb"))
    (offline,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert list(offline.glob("*.wandb"))
    read = EventAccumulator(str(tmp_path / "run"))
    read.Reload()
    found = {(t, e.step): e.value for t in read.Tags()["scalars"] for e in read.Scalars(t)}
    wanted = {}
    for row in log_of(tmp_path / "run"):
        for name in {"action_loss", "lr"} & row.keys():
            wanted[name, row["step"]] = row[name]
        for r in row.get("evaluation", ()):
            for name in ("return_mean", "score"):
                wanted[f"{name}/{r['target']}", row["step"]] = r[name]
    assert len(wanted) == 4 * 2 + 3 * 4
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, rel=1e-6)


@CUDA
def test_a_replay_draws_what_a_plain_call_would():
    """Of every generator, dropout among it, and leaves them where plain calls do."""
    x, found = torch.ones(2, 2, 16, 64, device="cuda", dtype=torch.bfloat16), []
    attend = partial(F.scaled_dot_product_attention, dropout_p=0.5, is_causal=True)
    dropped = torch.compile(lambda: F.dropout(attend(x, x, x), 0.5).double().sum())
    dropped()  # compiled before anything is seeded
    for wrap in (lambda work, rngs: work, utils.as_graph):
        torch.manual_seed(0)
        rng = torch.Generator("cuda").manual_seed(1)

        def work(rng=rng):
            return torch.randint(10**6, (), generator=rng, device="cuda") + dropped()

        step = wrap(work, [rng])
        drawn = [step().item() for _ in range(8)]
        found.append((drawn, rng.get_state().tolist(), torch.cuda.get_rng_state().tolist()))
    assert found[0] == found[1]
    assert len(set(drawn)) == 8


@CUDA
def test_steps_as_cuda_graphs_are_the_plain_steps(tmp_path):
    """Over 20 steps, evaluations between them."""
    losses = []
    for compiled in ("True", "False"):
        words = ["--dtype", "fp32", "--dropout", 0, "--lora-dropout", 0, "--compile", compiled]
        words += ["--steps", 20, "--eval-every", 5, "--log-every", 1, "--device", "cuda"]
        call(train.main, *SHORT, *words, "--out", tmp_path, "--name", compiled)
        rows = [row for row in log_of(tmp_path / compiled) if "action_loss" in row]
        losses.append([(row["action_loss"], row["lm_loss"]) for row in rows])
    assert len(losses[0]) == 20
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-3, atol=0)
