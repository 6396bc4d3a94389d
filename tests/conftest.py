"""Fixtures: files that may be absent, and where the tests keep theirs."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's client: tests use no network

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("LAMO_SHARED", ROOT.parent / "shared"))  # reference files, if any


@pytest.fixture(autouse=True)
def _private_folders(tmp_path_factory, monkeypatch):
    """Token caches and Minari datasets of a test run never mix with the user's."""
    home = tmp_path_factory.getbasetemp()
    monkeypatch.setenv("LAMO_CACHE", str(home / "cache"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(home / "minari"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.manual_seed(0)


@pytest.fixture
def shared():
    """Path of a reference file outside the project; the test skips where it is absent."""

    def find(name):
        if not (SHARED / name).exists():
            pytest.skip(f"{name} is not in {SHARED}")
        return SHARED / name

    return find
