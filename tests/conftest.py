"""Fixtures: files that may be absent, and where the tests keep theirs."""

import os
import tempfile
from pathlib import Path

# Before anything is imported: no network, no GPU, and folders that are not the user's.
FOLDER = tempfile.TemporaryDirectory(prefix="lamo-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["LAMO_CACHE"] = f"{FOLDER.name}/cache"
os.environ["MINARI_DATASETS_PATH"] = f"{FOLDER.name}/minari"

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("LAMO_SHARED", ROOT.parent / "shared"))  # reference files, if any


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def shared():
    """Path of a reference file outside the project; the test skips where it is absent."""

    def find(name):
        if not (SHARED / name).exists():
            pytest.skip(f"{name} is not in {SHARED}")
        return SHARED / name

    return find
