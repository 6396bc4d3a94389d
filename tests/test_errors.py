"""A user's mistakes: each one line on stderr, exit code 2, no traceback, nothing left behind."""

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from minari.data_collector import EpisodeBuffer

import evaluate
import load_gpt2
import train
from checkpoint import FORMAT, build_model, trained_state
from data import BUNDLED
from experiments import collect, pretrain
from files import write_atomically
from plumbing import UserError, parse_flags, run_command
from settings import resolve
from tasks import TASKS, pack

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def error_of(monkeypatch, capsys):
    """Run a command's main() on a command line that must fail: the one line it prints."""

    def call(main, *arguments, out=""):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            run_command(main)
        captured = capsys.readouterr()
        lines = captured.err.strip().splitlines()
        assert stop.value.code == 2
        assert len(lines) == 1, captured.err
        assert lines[0].startswith("error: ")
        assert out is None or captured.out == out
        return lines[0]

    return call


@pytest.fixture(autouse=True)
def _no_run_is_begun(tmp_path, monkeypatch):
    """Each test runs in an empty folder; no error may leave a runs/ folder in it."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "runs").exists()


BAD_TRAIN_FLAGS = {
    "--env hoper": "Did you mean hopper?",
    "--method lamo-nlm": "Did you mean lamo-nolm?",
    "--method x": "lamo-nolm, lamo-linear, lamo-freeze, lamo-full, lamo-random, wiki-rl",
    "--lm gpt2-smal": "unknown lm 'gpt2-smal'",
    "--lm nowhere/model.safetensors": "there is no weights file nowhere/model.safetensors",
    "--ratio 0": "--ratio is 0, but must be above 0 and at most 1",
    "--ratio -0.1": "--ratio is -0.1",
    "--ratio 1.01": "--ratio is 1.01",
    "--ratio nan": "--ratio is nan",
    "--ratio 0.5": "--steps 1000000",
    "--mode sparse": "unknown mode 'sparse'; valid: normal, delayed",
    "--embed cnn": "valid: linear, mlp",
    "--quality best": "unknown quality 'best'; valid: simple, medium, expert",
    "--env reacher2d --quality expert": "--quality does not apply: reacher2d has one dataset",
    "--quality expert": "run `minari download mujoco/hopper/expert-v0` where there is a network",
    "--env kitchen-mixed": "run `minari download D4RL/kitchen/mixed-v2` where there is a network",
    "--env spaceinvadors": "Other Atari games go by their names",
    "--dataset lamo/hopper/random-v0": "experiments.collect --env NAME --steps N (and --random",
    "--dataset d4rl/hopper/medium-v2": "collect --env NAME --import-d4rl FILE.hdf5",
    "--dataset dqn-replay/pong/logged-v0": "--env NAME --import-dqn-replay FOLDER",
    "--dataset=": "--dataset is empty; give it a value, or leave it out",
    "--out=": "--out is empty",
    "--lm=": "--lm is empty",
    "--dataset /nowhere/set-v0": "there is no folder /nowhere/set-v0",
    "--dataset short.txt": "short.txt is a file; give the dataset's folder",
    "--dataset .": "is no whole Minari dataset: it lacks data/metadata.json",
    "--env CartPole-v1": "anything else is found from its data: --dataset instead of --env",
    "--context 500000": "--context is 500000, but must be at most 10000",
    "--context 9000": "--context 9000 with --batch 64 would take",
    "--episode-limit 2000000000": "must be at most 1000000000",
    "--targets 1 2 3 4 --episodes 501": "4 targets with 501 episodes each are more than 2000",
    "--targets 1e13": "--targets has one beyond 1e+12",
    "--method auto": "unknown method 'auto'",
    "--quality auto": "unknown quality 'auto'",
    "--env-module no_such": "--env-module no_such: there is no such module",
    "--cooldown 1.5": "--cooldown is 1.5, but is a share: at most 1",
    "--steps 0": "--steps is 0, but must be above 0",
    "--steps many": "invalid int value: 'many'",
    "--lr -1": "--lr is -1.0, but must be above 0",
    "--lr inf": "--lr is inf, but must be finite",
    "--dropout 1": "--dropout is 1.0, but must be below 1",
    "--lm dt": "--lm dt is a shape without weights",
    "--lm-length 4096": "blocks of 4096 tokens, but the model knows 256: use --lm-length 256",
    "--stepz 3": "unrecognized arguments: --stepz 3",
    "--device tpu": "unknown device 'tpu'; valid: cuda, cuda:0 (and so on), cpu",
    "--device cpu:x": "unknown device 'cpu:x'",
    "--device cuda:256": "PyTorch sees 0 CUDA devices here",
    "--device cuda:99999999999": "PyTorch sees 0 CUDA devices here",
    "--device cuda:9": "--device cuda:9: PyTorch sees 0 CUDA devices here",
    "--seed 99999999999999": "--seed is 99999999999999, but must be below 2147483648",
    "--targets nan": "--targets has nan in it, but must be finite",
    "--lm path": "unknown lm 'path'; valid: gpt2, gpt2-medium",
    "--dataset nowhere/set-v0": "minari download nowhere/set-v0",
    "--corpus nowhere.txt": "there is no text nowhere.txt",
    "--corpus short.txt": "has 5 tokens, but a block needs",
    "--corpus wikitext": "give any text: --corpus FILE, or do without: --lm-coef 0",
    "--out short.txt/runs": "short.txt is not a folder that can be written to",
    "--out short.txt": "short.txt is not a folder that can be written to",
}


@pytest.mark.parametrize("flags", BAD_TRAIN_FLAGS)
def test_train_refuses(error_of, flags):
    Path("short.txt").write_text("12345")
    arguments = [] if "--ratio" in flags else ["--ratio", "0.01"]
    assert BAD_TRAIN_FLAGS[flags] in error_of(train.main, *flags.split(), *arguments)


def test_a_number_of_processes_that_is_none(error_of, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "abc")
    for main in (train.main, pretrain.main):
        arguments = ["--text", "x"] if main is pretrain.main else []
        assert "WORLD_SIZE is 'abc'" in error_of(main, *arguments)


def test_a_run_to_go_on_with_is_never_taken_for_none(error_of):
    assert "--resume is empty" in error_of(train.main, "--resume", "")
    assert "it has no config.json" in error_of(train.main, "--resume", "auto")
    Path("ckpt.pt").write_text("")
    assert "ckpt.pt is a file; give the run's folder" in error_of(train.main, "--resume", "ckpt.pt")


def test_nothing_is_no_value(error_of):
    for flag in ("--gif", "--lm", "--env", "--attention", "--corpus"):
        assert f"{flag} is empty" in error_of(evaluate.main, "ckpt.pt", flag, "")
    assert "checkpoint is empty" in error_of(evaluate.main, "")


def test_auto_is_what_is_taken_anyway(monkeypatch):
    words = "x --steps auto --targets auto --lr auto --lm auto"
    monkeypatch.setattr(sys, "argv", words.split())
    assert parse_flags(train.Config, "x", "") == {}
    words = "x --steps 3 --targets 1 2 --method auto --out auto"
    monkeypatch.setattr(sys, "argv", words.split())
    expected = {"steps": 3, "targets": [1.0, 2.0], "method": "auto", "out": "auto"}
    assert parse_flags(train.Config, "x", "") == expected


def test_cuda_asked_for_and_absent(error_of):
    assert "use --device cpu" in error_of(train.main, "--device", "cuda")


def test_gpt2_asked_for_and_absent_says_how_to_get_it(error_of):
    if load_gpt2.is_cached("gpt2"):
        pytest.skip("OpenAI's gpt2 weights are in the Hugging Face cache")
    line = error_of(train.main, "--lm", "gpt2", "--ratio", "0.01")
    assert "hf download openai-community/gpt2 model.safetensors" in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(error_of):
    Path("locked").mkdir(mode=0o500)
    assert "cannot be written" in error_of(train.main, "--ratio", "0.01", "--out", "locked")


def test_a_folder_that_may_not_even_be_looked_into(error_of, monkeypatch):
    """Root may look anywhere, so the refusal is provoked one level down."""
    real = os.stat

    def refuse(path, *args, **kwargs):
        if "locked" in str(path):
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    line = error_of(train.main, "--ratio", "0.01", "--out", "locked/x/y")
    assert "is not a folder that can be written to" in line


def hopper_like(folder, observation_dim=11, action_space=None, **spoilt):
    """A dataset folder with two short episodes of hopper's shapes, some values replaced."""
    action_space = action_space or gym.spaces.Box(-1, 1, (3,))
    episodes = []
    for _ in range(2):
        values = dict(
            observations=np.zeros((6, observation_dim), np.float32),
            actions=np.stack([action_space.sample() for _ in range(5)]),
            rewards=np.ones(5),
            terminations=np.arange(5) == 4,
            truncations=np.zeros(5, bool),
        )
        episodes.append(EpisodeBuffer(**values | spoilt))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder))
        minari.create_dataset_from_buffers(
            "spoilt-v0",
            episodes,
            observation_space=gym.spaces.Box(-np.inf, np.inf, (observation_dim,)),
            action_space=action_space,
            ref_min_score=0.0,
        )
    return folder / "spoilt-v0"


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        (dict(observation_dim=17), "observations do not fit: they are"),
        (dict(action_space=gym.spaces.Box(-1, 1, (6,))), "actions do not fit: they are"),
        (dict(action_space=gym.spaces.Discrete(3)), "actions do not fit: they are Discrete(3)"),
        (dict(rewards=np.full(5, np.nan)), "episode 0 has a NaN or infinite reward"),
        (dict(observations=np.full((6, 11), np.inf, np.float32)), "NaN or infinite observation"),
    ],
    ids=["observation shape", "action shape", "action type", "nan", "infinite"],
)
def test_a_dataset_that_does_not_fit(error_of, tmp_path, spoilt, message):
    folder = hopper_like(tmp_path / "sets", **spoilt)
    assert message in error_of(train.main, "--env", "hopper", "--dataset", folder)


def test_a_part_of_a_dataset(error_of, tmp_path):
    folder = hopper_like(tmp_path / "sets")
    arguments = [train.main, "--env", "hopper", "--dataset"]
    assert f"give the folder above: {folder}" in error_of(*arguments, folder / "data")
    (folder / "data" / "main_data.hdf5").unlink()
    assert "lacks everything in data/ but metadata.json" in error_of(*arguments, folder)


def test_a_damaged_dataset(error_of, tmp_path):
    folder = hopper_like(tmp_path / "sets")
    file = folder / "data" / "main_data.hdf5"
    file.write_bytes(file.read_bytes()[:1000])
    assert "no readable Minari dataset" in error_of(
        train.main, "--env", "hopper", "--dataset", folder
    )
    (folder / "data" / "metadata.json").write_text("{")
    assert "no readable Minari dataset" in error_of(
        train.main, "--env", "hopper", "--dataset", folder
    )


# --- checkpoints ---------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(hopper):
    """A checkpoint as train.py writes it, of an untrained model, as a dictionary."""
    settings, _, notes = resolve(train.Config(), {"ratio": 0.01, "method": "dt"})
    model, base = build_model(settings, hopper)
    return {
        "format": FORMAT,
        "settings": settings,
        "base": base,
        "chosen": notes | {"dataset": "none"},
        "step": 0,
        "model": trained_state(model, "all", 0),
        "obs_mean": torch.zeros(11),
        "obs_std": torch.ones(11),
        "environment": pack(hopper),
    }


def not_ours(c):
    c["format"] = "other"


def lacks_a_key(c):
    del c["obs_mean"]


def lacks_a_tensor(c):
    del c["model"]["embed_ln.bias"]


def has_another_tensor(c):
    c["model"]["embed_ln.scale"] = torch.ones(1)


def has_another_shape(c):
    c["model"]["embed_ln.bias"] = torch.ones(1)


def other_environment(c):
    c["environment"]["spec"] = c["environment"]["spec"].replace("Hopper-v5", "Hoper-v5")
    c["environment"]["spec"] = c["environment"]["spec"].replace("gymnasium.envs", "no_such_package")


def code_for_an_environment(c):
    spec = json.loads(c["environment"]["spec"])
    spec |= {"entry_point": "os:system", "kwargs": {"command": "touch executed"}}
    c["environment"]["spec"] = json.dumps(spec)


def no_environment(c):
    c["environment"]["action_space"] = "{}"


def other_spaces(c):
    space = json.loads(c["environment"]["observation_space"])
    space["shape"], space["low"], space["high"] = [17], [-1.0] * 17, [1.0] * 17
    c["environment"]["observation_space"] = json.dumps(space)


def other_base(c):
    """A frozen base of other weights; of a dt checkpoint all weights are inside."""
    settings, _, _ = resolve(train.Config(), {"ratio": 0.01})
    c["settings"], c["base"]["sha256"] = settings, "0" * 64


def no_step(c):
    del c["step"]


def model_is_a_list(c):
    c["model"]["embed_ln.bias"] = [1.0]


def other_std(c):
    c["obs_std"] = torch.ones(3)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (not_ours, "is not a checkpoint of this project's"),
        (lacks_a_key, "lacks obs_mean as it should be: damaged"),
        (lacks_a_tensor, "lacks embed_ln.bias"),
        (has_another_tensor, "does not know: embed_ln.scale"),
        (has_another_shape, "embed_ln.bias is (1,), expected (128,)"),
        (
            other_environment,
            "Hoper-v5 is in the module no_such_package.mujoco.hopper_v5; importing it runs its",
        ),
        (code_for_an_environment, "Hopper-v5 is in the module os; importing it runs its code"),
        (no_environment, "describes no environment"),
        (other_spaces, "obs_mean is not of the environment's observations"),
        (other_base, "was trained on other weights (random weights in the shape of dt): SHA-256 0"),
        (no_step, "lacks step as it should be: damaged"),
        (model_is_a_list, "lacks embed_ln.bias as it should be: damaged"),
        (other_std, "obs_std is not of the environment's observations"),
    ],
)
def test_evaluate_refuses_a_checkpoint(error_of, checkpoint, spoil, message):
    spoil(checkpoint)
    torch.save(checkpoint, "ckpt.pt")
    assert message in error_of(evaluate.main, "ckpt.pt")
    assert not Path("executed").exists()


def test_evaluate_refuses_what_is_no_checkpoint(error_of, checkpoint):
    Path("one.txt").write_text("1")
    torch.save(checkpoint, "ckpt.pt")
    whole = Path("ckpt.pt").read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        Path("cut.pt").write_bytes(whole[:size])
        assert "no readable checkpoint" in error_of(evaluate.main, "cut.pt")
    assert "is a folder; give the ckpt.pt or best.pt" in error_of(evaluate.main, ".")
    assert "there is no checkpoint absent.pt" in error_of(evaluate.main, "absent.pt")
    assert "was trained on hopper, not ant" in error_of(evaluate.main, "ckpt.pt", "--env", "ant")
    for flags, message in (
        ("--episodes 0", "--episodes is 0"),
        ("--seed -1", "--seed is -1"),
        ("--target nan", "--target has nan in it"),
        ("--tokens 5", "--tokens is for talking: add --prompt TEXT"),
        ("--corpus one.txt", "--corpus is for talking"),
        ("--prompt x --tokens 0", "--tokens is 0"),
        ("--prompt x --json", "--json is for acting, not --prompt"),
        ("--prompt x --seed 3", "--seed is for acting, not for --prompt"),
        ("--prompt x --targets 3", "--target is for acting"),
        ("--device tpu", "unknown device 'tpu'"),
        ("--prompt x --corpus one.txt", "must not be empty"),
        ("--prompt x --corpus absent.txt", "there is no text absent.txt"),
    ):
        assert message in error_of(evaluate.main, "ckpt.pt", *flags.split(), out=None)
    assert "--prompt is empty" in error_of(evaluate.main, "ckpt.pt", "--prompt", "")
    assert "required: checkpoint" in error_of(evaluate.main)


class Payload:
    """Unpickling this makes a file: what a stranger's checkpoint might do."""

    def __reduce__(self):
        return (os.system, ("touch executed",))


def test_code_in_a_checkpoint_does_not_run(error_of, checkpoint):
    checkpoint["chosen"] = Payload()
    torch.save(checkpoint, "ckpt.pt")
    assert "no readable checkpoint" in error_of(evaluate.main, "ckpt.pt")
    torch.save({"wte.weight": Payload()}, "model.bin")
    assert "other than tensors" in error_of(load_gpt2.main, "model.bin")
    assert not Path("executed").exists()


# --- the other commands --------------------------------------------------------------------------


def test_experiments_refuse(error_of, monkeypatch):
    assert "unknown env 'hoper'" in error_of(collect.main, "--env", "hoper", "--steps", "1")
    assert "say what to do" in error_of(collect.main, "--env", "hopper")
    assert "unknown recipe 'ant'" in error_of(collect.main, "--env", "ant", "--train")
    both = ["--env", "hopper", "--train", "--random"]
    assert "give one of them" in error_of(collect.main, *both)
    untrained = error_of(collect.main, "--env", "ant", "--steps", "5")
    assert untrained.rstrip().endswith("ant-medium.safetensors: add --random")
    assert "--steps is 0" in error_of(collect.main, "--env", "hopper", "--steps", "0")
    bundle = ["--env", "hopper", "--steps", "10", "--bundle"]
    before = os.environ["MINARI_DATASETS_PATH"]
    assert "exists already" in error_of(collect.main, *bundle)
    assert os.environ["MINARI_DATASETS_PATH"] == before
    assert "--text is missing" in error_of(pretrain.main)
    text = ["--text", "a.txt", "--heldout", "b.txt", "--out", "x.safetensors"]
    assert "/a.txt: No such file or directory" in error_of(pretrain.main, *text)
    assert "unknown size 'gpt3'" in error_of(pretrain.main, *text, "--size", "gpt3")
    assert "there is no x.state.pt" in error_of(pretrain.main, "--resume", "x.state.pt")
    both = ["--resume", "x.state.pt", "--lr", "1"]
    assert "--lr is as it was" in error_of(pretrain.main, *both)


def test_one_line_and_exit_code_2_from_a_real_process(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), "--env", "hopper"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "asks for more than the 0.01 of a full dataset that is here" in done.stderr


# --- files are whole or absent -------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "file.json"
    write_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half of the n")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"cannot write .*: No space left on device"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    """A real limit on file sizes, under which every kind of file is written."""
    script = (
        "import resource, signal, sys, torch\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from load_gpt2 import save_gpt2\n"
        "from model import GPT, GPTConfig\n"
        "from plumbing import run_command\n"
        "gpt = GPT(GPTConfig(2, 2, 64, 257, 64))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "run_command(lambda: save_gpt2(gpt, sys.argv[1] + '/x.safetensors', {}))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2, done.stderr
    assert "File too large" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# --- is there a network --------------------------------------------------------------------------


def probe(endpoint):
    """What network_available() says of an endpoint in a fresh process, and the seconds it took."""
    script = "import time, plumbing, huggingface_hub.utils\nt = time.monotonic()\n"
    script += "print(plumbing.network_available(), time.monotonic() - t)"
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stderr == ""
    answer, seconds = done.stdout.split()
    return answer == "True", float(seconds)


def test_a_network_that_does_not_answer_is_recognised_within_two_seconds():
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connects, then says nothing
        answer, seconds = probe(f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert not answer
    assert seconds < 2
    for endpoint in ("http://127.0.0.1:1", "http://no-such-host.invalid", "no-address"):
        answer, seconds = probe(endpoint)
        assert not answer, endpoint
        assert seconds < 2, endpoint


def test_a_hub_that_answers_anything_is_a_network():
    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(404)

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Refuse)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    assert probe(f"http://127.0.0.1:{server.server_port}")[0]
    server.shutdown()
    server.server_close()


def test_assets_are_small_and_plain():
    assert [p.name for p in BUNDLED.iterdir()] == ["lamo"]  # no test leaves anything here
    for task in TASKS.values():
        if task.bundled:
            about = json.loads((BUNDLED / task.bundled / "about.json").read_text())
            assert about["command"].startswith("python -m experiments.collect --env")
            assert about["command"].endswith("--bundle")
    assets = [p for p in (ROOT / "assets").rglob("*") if p.is_file()]
    limits = {"main_data.hdf5": 2_500_000, "mini-lm.safetensors": 8_000_000}
    limits |= {
        "mini-lm-early.safetensors": 3_000_000,
        "mini-lm-random-corpus.safetensors": 3_000_000,
    }
    for path in assets:
        limit = 1_000_000 if path.suffix == ".gif" else limits.get(path.name, 500_000)
        assert path.stat().st_size < limit, path
    assert {path.suffix for path in assets} <= {".json", ".hdf5", ".safetensors", ".png", ".gif"}
