"""docs/recipes: every patch applies to the code as it stands, and its page's commands train."""

import json
import shlex
import shutil
import subprocess
import sys

import pytest
from runs import ROOT

PATCHES = sorted((ROOT / "docs" / "recipes").glob("*.patch"))
SHORT = "--steps 3 --eval-every 3 --episodes 1 --episode-limit 5 --log-every 1 --batch 4"


def call(folder, *command):
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def copy(tmp_path):
    """The project's code in a folder of its own."""
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments")
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    return tmp_path


@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: path.stem)
def test_a_recipe_trains(patch, copy):
    """It is small, and applies; its page's commands then run, cut to three steps."""
    changed = [
        x for x in patch.read_text().splitlines() if x[0] in "+-" and x[1:3] not in ("++", "--")
    ]
    assert 0 < len(changed) <= 15
    call(copy, "git", "apply", patch)
    page = patch.with_suffix(".md").read_text().splitlines()
    commands = [shlex.split(line)[1:] for line in page if line.startswith("    python ")]
    for words in commands:
        text = ["--lm-length", "32"] if words[0] == "train.py" else []
        trains = [*SHORT.split(), *text, "--out", "runs", "--name", "run"]
        call(copy, sys.executable, *words, *([] if "experiments.collect" in words else trains))
    rows = [json.loads(line) for line in (copy / "runs/run/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 3]


def test_as_published_leaves_out_the_best_episode_and_positions(copy):
    """The windows begin in every episode but the best, and wpe has no part in the language loss."""
    call(copy, "git", "apply", ROOT / "docs/recipes/as-published.patch")
    code = """
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from data import find_dataset, load_trajectories, sample_windows
from load_gpt2 import load_gpt2
from tasks import TASKS, find_environment

dataset, *_ = find_dataset("hopper", TASKS["hopper"], 0.01, "lamo/hopper/medium-1pct-v0")
environment, _ = find_environment(TASKS["hopper"], dataset)
data = load_trajectories(dataset, environment.action_space, 1000.0)
rtg, obs, act, timestep, valid = sample_windows(data, 100_000, 1, torch.Generator().manual_seed(0))
seen, best = {tuple(row) for row in obs[:, 0].tolist()}, data.returns.argmax()
ends = data.lengths.cumsum()
for i, (end, length) in enumerate(zip(ends, data.lengths)):
    drawn = {tuple(row) for row in data.obs[end - length : end].tolist()} & seen
    assert len(drawn) == 0 if i == best else len(drawn) > 0.9 * length

theirs = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50)).eval()
theirs.save_pretrained("gpt")
theirs.transformer.wpe.weight.data.zero_()
tokens = torch.randint(50, (2, 33))
ours = load_gpt2("gpt").eval()(tokens[:, :-1], tokens[:, 1:])
assert abs(ours - theirs(tokens, labels=tokens).loss) < 1e-5
"""
    call(copy, sys.executable, "-c", code)
