"""What tests/fuzz.py once found: each of these inputs ended in a traceback, and is refused now.

And a few hundred more at each run of the tests. A long run of it is told in the README.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import h5py
import pytest
import torch

import tasks
import train
from checkpoint import load_model, read_checkpoint
from data import find_dataset, load_trajectories
from environments import make_vector_env
from experiments import baselines
from files import load_tensors
from load_gpt2 import load_gpt2
from plumbing import UserError, run_command
from resume import read_run
from tasks import Task, find_environment

ROOT = Path(__file__).resolve().parent.parent


# --- datasets ------------------------------------------------------------------------------------


def replace(name, change):
    def spoil(folder):
        with h5py.File(folder / "data" / "main_data.hdf5", "a") as file:
            values = change(file[name][()])
            del file[name]
            file[name] = values

    return spoil


def told(**parts):
    def spoil(folder):
        path = folder / "data" / "metadata.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | parts))

    return spoil


def two_lines(folder):
    path = folder / "data" / "metadata.json"
    metadata = json.loads(path.read_text())
    spec = json.loads(metadata["env_spec"]) | {"entry_point": "gym\nnasium\x1b[2J:Env"}
    path.write_text(json.dumps(metadata | {"env_spec": json.dumps(spec)}))


def untold(folder):
    """Minari would make the environment to see its spaces: here a call of os.system."""
    path = folder / "data" / "metadata.json"
    metadata = json.loads(path.read_text())
    del metadata["action_space"]
    spec = json.loads(metadata["env_spec"]) | {"entry_point": "os:system"}
    spec |= {"kwargs": {"command": f"touch {folder / 'ran'}"}, "additional_wrappers": []}
    path.write_text(json.dumps(metadata | {"env_spec": json.dumps(spec)}))


def load(folder):
    source, _, _ = find_dataset("x", Task(), 1.0, str(folder))
    environment, _ = find_environment(Task(), source)
    return load_trajectories(source, environment.action_space)


def share(text):
    return lambda folder: (folder / "about.json").write_text(f'{{"share": {text}}}')


DATASETS = {
    "a share of nothing": (share("0"), "a share of 0, not in (0, 1]"),
    "a share that is no number": (share("NaN"), "a share of nan"),
    "a share of too deep a nest": (share("[" * 10**5), "does not tell a share"),
    "rewards in columns": (replace("episode_1/rewards", lambda r: r[:, None]), "expected (5,)"),
    "actions in a cube": (replace("episode_1/actions", lambda a: a[..., None]), "expected (5,)"),
    "actions of text": (replace("episode_1/actions", lambda a: a.astype("S5")), "no numbers (S)"),
    "rewards of complex numbers": (
        replace("episode_1/rewards", lambda r: r + 1j),
        "no numbers (c)",
    ),
    "an id that is none": (told(dataset_id="fu\0\0/set-."), "no readable Minari dataset"),
    "a version that is none": (told(minari_version="x" * 99), "no readable Minari dataset"),
    "no space of its own": (untold, "does not tell its action_space"),
    "a format that is none": (told(data_format="pickle"), "is of no format that is known"),
    "a module over two lines": (two_lines, r"the module gym\nnasium\x1b[2J;"),
}


def test_a_sound_dataset_is_read(sound):
    assert len(load(sound / "minari/fuzz/set-v0")) == 15


@pytest.mark.parametrize("what", DATASETS)
def test_a_dataset_is_refused_in_one_line(what, sound, tmp_path):
    spoil, says = DATASETS[what]
    folder = tmp_path / "set"
    shutil.copytree(sound / "minari/fuzz/set-v0", folder)
    spoil(folder)
    with pytest.raises(UserError) as error:
        load(folder)
    assert says in str(error.value)
    assert str(error.value).isprintable()
    assert not (folder / "ran").exists()


def test_another_environment_beside_a_checkpoints_spaces_is_refused(sound, tmp_path):
    content = load_tensors(sound / "run" / "ckpt.pt")
    content["environment"]["spec"] = gym.spec("CartPole-v1").to_json()
    torch.save(content, tmp_path / "ckpt.pt")
    environment = read_checkpoint(tmp_path / "ckpt.pt")["environment"]
    with pytest.raises(UserError, match="what the policy sees do not fit"):
        make_vector_env(environment, 1)


def test_a_path_among_an_environments_arguments_is_not_read(sound, tmp_path, monkeypatch):
    """A scene of MuJoCo's, which may be any file that this user can read."""
    content = load_tensors(sound / "run" / "ckpt.pt")
    spec = json.loads(content["environment"]["spec"])
    content["environment"]["spec"] = json.dumps(spec | {"kwargs": {"xml_file": "/none/scene.xml"}})
    torch.save(content, tmp_path / "ckpt.pt")
    environment = read_checkpoint(tmp_path / "ckpt.pt")["environment"]
    module = spec["entry_point"].partition(":")[0]
    with pytest.raises(UserError, match=f"the path /none/scene.xml; .* --env-module {module}"):
        make_vector_env(environment, 1)
    monkeypatch.setattr("tasks.NAMED", set())
    tasks.trust(module)
    with pytest.raises(UserError, match="scene"):  # which is not there
        make_vector_env(environment, 1)


def test_a_wrapper_is_not_made_of_any_size(sound, tmp_path):
    content = load_tensors(sound / "run" / "ckpt.pt")
    spec = json.loads(content["environment"]["spec"])
    wrapper = {"name": "x", "entry_point": "gymnasium.wrappers:FrameStackObservation"}
    spec["additional_wrappers"] = [wrapper | {"kwargs": {"stack_size": 10**7}}]
    content["environment"]["spec"] = json.dumps(spec)
    torch.save(content, tmp_path / "ckpt.pt")
    environment = read_checkpoint(tmp_path / "ckpt.pt")["environment"]
    with pytest.raises(UserError, match="10000000 among its arguments: too large"):
        make_vector_env(environment, 1)


BASELINE = {"env": "hopper", "algo": "bc", "mode": "normal", "dtype": "fp32", "targets": [None]}
BASELINE |= {"context": 1, "scale": 1.0, "episodes": 1, "episode_limit": 2, "layers": 1}


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"episode_limit": "x"}, "the setting episode_limit x"),
        ({"episodes": -1}, "the setting episodes -1"),
        ({"context": "x"}, "the setting context x"),
        ({"context": 7}, "the setting context 7"),
        ({"layers": 20_000}, "the setting layers 20000"),
        ({"layers": "x"}, "the setting layers x"),
        ({}, "does not fit its own settings"),
    ],
)
def test_a_baselines_checkpoint_is_refused_in_one_line(parts, says, sound, tmp_path, monkeypatch):
    pytest.importorskip("torchrl")
    content = load_tensors(sound / "run" / "ckpt.pt")
    content |= {"format": "lamo-baseline-1", "settings": BASELINE | parts, "base": {}}
    content["model"] = {"policy.0.weight": torch.zeros(2, 2)}
    torch.save(content, tmp_path / "ckpt.pt")
    words = ["baselines", "--evaluate", str(tmp_path / "ckpt.pt")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(UserError) as error:
        baselines.main()
    assert says in str(error.value)


# --- checkpoints and runs ------------------------------------------------------------------------


def base_without_hash(c):
    del c["base"]["sha256"]


def score_of_text(c):
    c["environment"]["expert"] = "inf"


def other_embedding(c):
    c["settings"]["embed"] = "linE"


def too_much_dropout(c):
    c["settings"]["lora_dropout"] = 1.1


def no_rank(c):
    c["settings"]["lora_rank"] = 0


def true_episodes(c):
    c["settings"]["max_ep_len"] = True


def endless_context(c):
    c["settings"]["context"] = 10**12


def endless_episodes(c):
    c["settings"]["max_ep_len"] = 10**12


def a_hundred_thousand_targets(c):
    c["settings"]["targets"] = [1.0] * 100_000


def an_empty_table(c):
    c["settings"]["max_ep_len"] = 10**7
    c["model"]["embed_time.weight"] = torch.zeros(10**7, 0)


def statistics_of_seven(c):
    c["obs_mean"], c["obs_std"] = torch.zeros(7), torch.ones(7)


def words_of_a_number(c):
    c["chosen"]["text"] = 5


def nan_weight(c):
    c["model"]["embed_ln.bias"][0] = float("nan")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (base_without_hash, "does not name its language model"),
        (score_of_text, "describes no environment"),
        (other_embedding, "the setting embed linE"),
        (too_much_dropout, "the setting lora_dropout 1.1, which cannot be"),
        (true_episodes, "the setting max_ep_len True, which cannot be"),
        (no_rank, "the setting lora_rank 0, which cannot be"),
        (endless_context, "the setting context 1000000000000, which cannot be"),
        (endless_episodes, "embed_time.weight is (1000, 12), not of 1000000000000 rows"),
        (a_hundred_thousand_targets, "the setting targets [1.0, 1.0"),
        (an_empty_table, "embed_time.weight is (10000000, 0), not of 10000000 rows"),
        (statistics_of_seven, "obs_mean is not of the environment's observations"),
        (words_of_a_number, "does not tell what was chosen in words"),
        (nan_weight, "embed_ln.bias holds what is no finite number"),
    ],
)
def test_a_checkpoint_is_refused_in_one_line(spoil, says, sound, tmp_path):
    content = load_tensors(sound / "run" / "ckpt.pt")
    spoil(content)
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(UserError) as error:
        load_model(tmp_path / "ckpt.pt", read_checkpoint(tmp_path / "ckpt.pt"))
    assert says in str(error.value)


def model_of_text(s):
    s["model"] = dict.fromkeys(s["model"], "x")


def evaluation_without_step(s):
    del s["evaluations"][0]["step"]


def results_of_a_tensor(s):
    s["evaluations"][0]["results"] = torch.zeros(())


def failed_of_a_number(s):
    s["evaluations"][0]["results"][0]["failed"] = torch.tensor(1)


def log_before_its_beginning(s):
    s["log_bytes"] = -1


def steps_beyond_the_end(s):
    s["step"] = 3


def moments_of_another_shape(s):
    s["optimiser"]["state"][0]["exp_avg"] = torch.zeros(1)


def optimiser_of_text(s):
    s["optimiser"]["param_groups"][0]["betas"] = "xx"


def optimiser_of_a_list(s):
    s["optimiser"]["state"] = []


def text_for_a_generator(s):
    s["processes"][0]["windows"] = "x"


@pytest.mark.parametrize(
    "spoil",
    [
        model_of_text,
        evaluation_without_step,
        results_of_a_tensor,
        failed_of_a_number,
        log_before_its_beginning,
        steps_beyond_the_end,
        moments_of_another_shape,
        optimiser_of_text,
        optimiser_of_a_list,
        text_for_a_generator,
    ],
)
def test_a_run_is_not_gone_on_with_in_one_line(spoil, sound, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(sound / "minari"))
    shutil.copytree(sound / "run", tmp_path / "run")
    saved = load_tensors(tmp_path / "run" / "resume.pt")
    spoil(saved)
    torch.save(saved, tmp_path / "run" / "resume.pt")
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as ended:
        run_command(train.main)
    assert ended.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert str(tmp_path / "run") in line


@pytest.mark.parametrize(
    "parts",
    [
        {"base": "x"},
        {"base": {}},
        {"versions": 1.5},
        {"chosen": {"dataset": None}},
        {"chosen": {}},
        {"chosen": {"dataset": "x"}},
        {"settings": {"env": "hopper"}},
        {"settings": []},
        {"settings": None},
    ],
)
def test_a_runs_config_is_refused_in_one_line(parts, sound, tmp_path):
    shutil.copytree(sound / "run", tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))
    with pytest.raises(UserError, match="damaged, or another version's"):
        read_run(tmp_path / "run", {}, train.Config)


def test_a_setting_left_open_is_refused(sound, tmp_path):
    shutil.copytree(sound / "run", tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    config["settings"]["lm_coef"] = "auto"
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="it has lm_coef 'auto': damaged, or another version's"):
        read_run(tmp_path / "run", {}, train.Config)


def test_settings_that_make_no_sense_are_refused_on_resuming(sound, tmp_path, monkeypatch):
    shutil.copytree(sound / "run", tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    config["settings"]["lr"] = -1.0
    path.write_text(json.dumps(config))
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", str(tmp_path / "run")])
    with pytest.raises(UserError, match=r"--lr is -1\.0"):
        train.main()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--max-ep-len 1000000000000", "--max-ep-len 1000000000000 would take"),
        ("--lora-rank 1000000000000", "--lora-rank 1000000000000 would take"),
        ("--batch 1000000000000", "--context 20 with --batch 1000000000000 would take"),
        ("--lm-batch 1000000000000", "not enough memory"),
        ("--corpus " + "x" * 5000, "xxx: File name too long"),
    ],
)
def test_too_large_a_number_is_one_line(flags, says, sound, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(sound / "minari"))
    words = f"--env hopper --dataset fuzz/set-v0 --lm {sound / 'tiny.safetensors'} --steps 2"
    words += f" --lm-length 8 --out {tmp_path} {flags}"
    monkeypatch.setattr(sys, "argv", ["train.py", *words.split()])
    with pytest.raises(SystemExit) as ended:
        run_command(train.main)
    assert ended.value.code == 2
    errors = capsys.readouterr().err
    assert says in errors.strip().splitlines()[-1]
    assert "Traceback" not in errors


def test_positions_beside_the_weights_must_be_theirs(sound, tmp_path):
    tensors = load_gpt2(str(sound / "tiny.safetensors")).state_dict()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    for n in (12.5, "32", 0, 33, 10**12):
        (tmp_path / "config.json").write_text(json.dumps({"n_head": 1, "n_positions": n}))
        with pytest.raises(UserError, match="says n_positions"):
            load_gpt2(str(tmp_path))


def test_a_short_run_of_the_fuzzer(tmp_path):
    """A short run of the fuzzer."""
    command = [sys.executable, "tests/fuzz.py", "--inputs", "300"]
    command += ["--out", str(tmp_path / "fuzz")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "300 inputs, 0 failures" in done.stdout
