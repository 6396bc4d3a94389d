"""Fixtures: files that may be absent, and where the tests keep theirs."""

import os
import tempfile
from pathlib import Path
from unittest import mock

# Before anything is imported: no network, no GPU unless asked for, and folders of our own.
FOLDER = tempfile.TemporaryDirectory(prefix="lamo-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
if not os.environ.get("LAMO_TEST_CUDA"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["LAMO_CACHE"] = f"{FOLDER.name}/cache"
os.environ["MINARI_DATASETS_PATH"] = f"{FOLDER.name}/minari"

import gymnasium as gym
import pytest
import torch
from hypothesis import settings

from tasks import Environment, find_task

ROOT = Path(__file__).resolve().parent.parent
settings.register_profile("lamo", deadline=None)  # a busy machine is no failure
settings.load_profile("lamo")
SHARED = Path(os.environ.get("LAMO_SHARED", ROOT.parent / "shared"))  # reference files, if any


@pytest.fixture(autouse=True)
def _afresh():
    """Every test begins with the same seed, and leaves no variable behind (a sweep sets one)."""
    torch.manual_seed(0)
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture
def hopper():
    """The Environment of the task hopper, without a dataset."""
    _, task = find_task("hopper")
    env = gym.make(task.env_id)
    known = env.observation_space, env.action_space, task.random, task.expert
    return Environment(env.spec, *known)


@pytest.fixture
def shared():
    """Path of a reference file outside the project; the test skips where it is absent."""

    def find(name):
        if not (SHARED / name).exists():
            pytest.skip(f"{name} is not in {SHARED}")
        return SHARED / name

    return find
