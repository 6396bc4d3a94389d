"""README and docs: the flags and the tests that they name exist."""

import re
from dataclasses import fields

from runs import ROOT

import evaluate
import train
from experiments import baselines, bench, collect, fit, pretrain, report, sweep, watch

KINDS = [train.Config, baselines.Config, pretrain.Config, sweep.Config]
KINDS += [module.Arguments for module in (evaluate, bench, collect, fit, report, watch)]
OTHERS = {"help", "no-figures", "target-decay"}  # tyro's two, and a recipe's
OTHERS |= {"no-deps", "local-dir", "repo-type", "nproc-per-node"}  # of other programs


def test_flags_and_tests_that_the_docs_name_exist():
    pages = [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
    text = "\n".join(page.read_text() for page in pages)
    flags = {field.name.replace("_", "-") for kind in KINDS for field in fields(kind)} | OTHERS
    named = {name.replace("_", "-") for name in re.findall(r"(?<![\w-])--(\w[\w-]*)", text)}
    assert named - flags == set()
    tests = "".join(path.read_text() for path in ROOT.glob("tests/test_*.py"))
    assert [x for x in re.findall(r"`(test_\w+)`", text) if f"def {x}(" not in tests] == []
