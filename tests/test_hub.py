"""Downloads from a hub that fails, and Ctrl-C at any moment; the hub is tests/hub.py's.

Every command is a process of its own, forked from one that has imported all but the hub's client.
"""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import time
from dataclasses import asdict

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub import Hub
from runs import ROOT, SHORT
from safetensors.torch import load, save

from data import BUNDLED, WIKITEXT
from load_gpt2 import fingerprint, save_gpt2
from model import GPT, GPTConfig
from utils import run_command

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["train"])
SET, READ = (
    BUNDLED / "lamo/hopper/medium-1pct-v0",
    "print(data.find_dataset('', hopper, 0.01, {})[2])",
)
USES = {  # what: code, and a file that it needs
    "weights": ("print(load_gpt2.fingerprint(load_gpt2.load_gpt2('gpt2')))", "model.safetensors"),
    "words": ("utils.fetch('', 'openai-community/gpt2', ['merges.txt', 'vocab.json'])", "vocab"),
    "text": ("print(data.find_text('wikitext'))", "00001-of-00002.parquet"),
    "named": (READ.format("'mujoco/hopper/medium-v0'"), "main_data.hdf5"),
    "any": (READ.format(None), "main_data.hdf5"),
}


def execute(code, path, environment):
    """Run code as a command, with its output in a file."""
    os.environ.update(environment)
    for number in (1, 2):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    names = {name: __import__(name) for name in ("data", "load_gpt2", "sys", "train", "utils")}
    names["hopper"] = __import__("tasks").TASKS["hopper"]
    run_command(lambda: exec(code, names))


def begin(hub, folder, use, **more):
    """A process that carries out a row of USES, or code; its files are in the folder."""
    folder.mkdir(exist_ok=True)
    (out := folder / f"{time.time()}.txt").touch()
    settings = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    for name in ("HF_HOME", "LAMO_CACHE", "MINARI_DATASETS_PATH"):
        settings[name] = str(folder / name)
    args = USES.get(use, (use,))[0], str(out), settings | more
    process = PROCESSES.Process(target=execute, args=args)
    process.start()
    process.text = out.read_text
    return process


def end(process, code=0):
    """Wait for a process to end with this exit code. Returns what it printed."""
    process.join(60)
    text = process.text()
    assert process.exitcode == code, text
    assert "Traceback" not in text
    return text


def unfinished(folder):
    return [path for end in ("incomplete", "tmp", "download") for path in folder.rglob(f"*{end}")]


@pytest.fixture(scope="module")
def gpt():
    return GPT(GPTConfig(1, 2, 8, 11, 8))


@pytest.fixture(scope="module")
def files(gpt, tmp_path_factory):
    """The repositories of a hub."""
    with pytest.MonkeyPatch.context() as patch:  # the one that all others are forked from
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        PROCESSES.Process(target=int).start()
    place = tmp_path_factory.mktemp("files")
    save_gpt2(gpt, place / "weights", {})
    for i, name in enumerate(WIKITEXT):
        (place / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"text": ["", f" = {i} = \n", "words\n"] * 99}), place / name)
    data = {f"hopper/medium-v0/data/{path.name}": path.read_bytes() for path in SET.glob("data/*")}
    words = {"merges.txt": b"#version: 0.2\n" * 9, "vocab.json": b'{"!": 0}' * 9}
    return {
        "openai-community/gpt2": {"model.safetensors": (place / "weights").read_bytes()} | words,
        "Salesforce/wikitext": {name: (place / name).read_bytes() for name in WIKITEXT},
        "farama-minari/mujoco": data | {"hopper/expert-v0/data/main_data.hdf5": b"another"},
    }


def test_a_fault_is_one_line_and_the_next_try_succeeds(files, tmp_path):
    cases = [(use, [f"GET {x}", 50, 1], x) for use, (_, x) in USES.items()]
    cases += [("weights", ["GET resolve", 0, 1], "model.safetensors"), ("any", ["", 503, 9], "503")]
    cases += [("weights", ["GET api", status, 9], str(status)) for status in (404, 429)]
    cases += [("named", ["GET", "hang", 9], "timed out.*HF_ENDPOINT")]
    hubs = [Hub(files) for _ in cases]
    for code in (2, 0):
        begun = []
        for i, (use, fault, _) in enumerate(cases):
            hubs[i].faults = [fault] if code else []
            begun.append(begin(hubs[i], tmp_path / str(i), use))
        for hub, process, (_, _, said) in zip(hubs, begun, cases, strict=True):
            text = end(process, code)
            assert not re.search("bundled|-download", text)
            where = f"^downloading .* MB, from {hub.address}/.* to "
            assert re.search(f"^error: .*{said}.*\n\\Z" if code else where, text, re.MULTILINE)
    assert not unfinished(tmp_path)


def test_weights_by_name_are_the_hubs_to_the_bit(files, gpt, tmp_path):
    """Also in the other layout, from a slow hub, in parts, twice at once, and without it."""
    tensors = load(files["openai-community/gpt2"]["model.safetensors"])
    other = {f"transformer.{name}": x for name, x in tensors.items()}
    other = save(other, {"config": json.dumps(asdict(gpt.config))})
    with Hub(files) as slow, Hub({"openai-community/gpt2": {"model.safetensors": other}}) as hub:
        slow.faults.append(["", "slow", 9])
        hub.faults += [["GET resolve", "cut", 1], ["GET resolve", "stall", 1]]
        begun = [begin(slow, tmp_path / "slow", "weights", HF_HUB_DOWNLOAD_TIMEOUT="9")]
        small = "from huggingface_hub import constants; constants.DOWNLOAD_CHUNK_SIZE = 512; "
        code = small + USES["weights"][0]  # parts smaller than the file
        begun += [begin(hub, tmp_path / "other", code) for _ in range(2)]
        assert all(fingerprint(gpt) in end(process) for process in begun)
    assert hub.sent == [("model.safetensors", status) for status in (200, 206, 206)]
    assert fingerprint(gpt) in end(begin(hub, tmp_path / "other", "weights"))  # it is closed now


def test_a_file_of_the_cache_that_is_damaged_is_named(files, tmp_path):
    with Hub(files) as hub:
        end(begin(hub, tmp_path, "weights"))
        (path,) = tmp_path.rglob("model.safetensors")
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        text = end(begin(hub, tmp_path, "weights"), 2)
        subprocess.run(re.search(r"rm [^ ,]+", text)[0].split(), check=True)
        end(begin(hub, tmp_path, "weights"))


def test_what_stands_in_and_when(files, tmp_path):
    """The bundled set only where there is no network; and two that begin at once download once."""
    with Hub(files) as hub, Hub(files) as slow:
        slow.faults.append(["HEAD /", "slow", 99])
        hub.faults.append(["HEAD /", 503, 1])  # an answer, so there is a network
        begun = [begin(hub, tmp_path / "two", "any") for _ in range(2)]
        begun += [begin(slow, tmp_path / "x", "any", LAMO_NETWORK="1", HF_HUB_ETAG_TIMEOUT="9")]
        without = {
            "does not answer": begin(slow, tmp_path / "0", "any"),
            "HF_HUB_OFFLINE": begin(hub, tmp_path / "1", "any", HF_HUB_OFFLINE="1"),
            "as decided": begin(hub, tmp_path / "2", "any", LAMO_NETWORK="as decided"),
            "HTTP_PROXY": begin(hub, tmp_path / "3", "any", HTTP_PROXY="http://x:y", NO_PROXY=""),
        }
        for why, process in without.items():
            assert re.search(f"^the bundled .*{why}", end(process))
        assert all("bundled" not in end(process) for process in begun)
    assert sorted(hub.sent) == [(name, 200) for name in sorted(files["farama-minari/mujoco"])[1:]]


@pytest.mark.parametrize("at", ["reading", "downloading", "training:"])
def test_ctrl_c(at, files, tmp_path):
    words = [
        *SHORT,
        "--steps",
        "99999",
        "--corpus",
        "english",
        "--dataset",
        str(SET),
        "--out",
        str(tmp_path),
    ]
    code = {
        "reading": f"""
d = data.find_dataset('', hopper, 0.01, '{SET}')[0]
print('reading', flush=True)
while True: data.load_trajectories(d, d.action_space)""",
        "downloading": USES["named"][0],
        "training:": f"sys.argv[1:] = {words}; train.main()",
    }[at]
    with Hub(files) as hub:
        hub.faults.append(["GET hdf5", "stall", 3])
        begun = [begin(hub, tmp_path / str(i), code, LAMO_NETWORK="1") for i in range(3)]
        for i, process in enumerate(begun):
            while at not in process.text():
                assert process.is_alive()
                time.sleep(0.01)
            time.sleep(0.2 + 0.07 * i)
            os.kill(process.pid, signal.SIGINT)
        for process in begun:
            text = end(process, 130)
            assert ("--resume" if "train" in at else "\ninterrupted") in text
    assert not [path for path in unfinished(tmp_path) if path.is_file()]
    assert not list(tmp_path.rglob("medium-v0/data/main_data.hdf5"))
