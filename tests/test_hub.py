"""Downloads from a hub that fails, and Ctrl-C at any moment; the hub is tests/hub.py's.

Every command is a process of its own, forked from one that has imported all but that client.
"""

import io
import multiprocessing
import os
import re
import signal
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub import Hub
from runs import ROOT, SHORT
from safetensors.torch import load, save

import tasks
from data import BUNDLED, WIKITEXT
from load_gpt2 import MINI, fingerprint, load_gpt2
from utils import run_command

os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"  # of what is begun below
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["train"])
SET = BUNDLED / "lamo/hopper/medium-1pct-v0"
READ = "print(data.find_dataset('', hopper, 0.01{})[2])"
USES = {  # what: code, and a file that it needs
    "weights": ("print(load_gpt2.fingerprint(load_gpt2.load_gpt2('gpt2')))", "model.safetensors"),
    "words": ("utils.fetch('', 'openai-community/gpt2', ['vocab.json'])", "vocab"),
    "text": ("print(data.find_text('wikitext'))", "00001-of-00002.parquet"),
    "named": (READ.format(", 'mujoco/hopper/medium-v0'"), "main_data.hdf5"),
    "any": (READ.format(""), "main_data.hdf5"),
}


def table(text):
    pq.write_table(pa.table({"text": ["", f" = {text} = \n"] * 99}), out := io.BytesIO())
    return out.getvalue()


GPT2 = "openai-community/gpt2"
SETS = {f"hopper/medium-v0/data/{x.name}": x.read_bytes() for x in SET.glob("data/*")}
FILES = {GPT2: {"model.safetensors": MINI.read_bytes(), "vocab.json": b'{"!": 0}'}}
FILES["Salesforce/wikitext"] = {name: table(name) for name in WIKITEXT}
FILES["farama-minari/mujoco"] = SETS | {"hopper/expert-v0/data/main_data.hdf5": b"another"}


def execute(code, path, environment):
    """Run code as a command, with its output in a file."""
    os.environ.update(environment)
    for number in (1, 2):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    names = {name: __import__(name) for name in ("data", "load_gpt2", "sys", "train", "utils")}
    run_command(lambda: exec(code, names | {"hopper": tasks.TASKS["hopper"]}))


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


def test_a_fault_is_one_line_and_the_next_try_succeeds(tmp_path):
    cases = [(use, [f"GET {x}", 50, 1], x) for use, (_, x) in USES.items()]
    cases += [("weights", ["GET resolve", 0, 1], "model.safetensors"), ("any", ["", 503, 9], "503")]
    cases += [("weights", ["GET api", status, 9], str(status)) for status in (404, 429)]
    cases += [("named", ["GET", "hang", 9], "timed out.*HF_ENDPOINT")]
    hubs = [Hub(FILES) for _ in cases]
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
    assert not list(tmp_path.rglob("*.incomplete"))


def test_weights_by_name_are_the_hubs_to_the_bit(tmp_path):
    """Also in the other layout, from a slow hub, in parts, twice at once, and without it."""
    other = load(FILES[GPT2]["model.safetensors"])
    other = save(
        {f"transformer.{name}": x for name, x in other.items()}, {"config": '{"n_head": 3}'}
    )
    parts = "from huggingface_hub import constants; constants.DOWNLOAD_CHUNK_SIZE = 99999; "
    mini = fingerprint(load_gpt2("mini"))
    with Hub(FILES) as slow, Hub({GPT2: {"model.safetensors": other}}) as hub:
        slow.faults.append(["", "slow", 9])
        hub.faults += [["GET resolve", "cut", 1], ["GET resolve", "stall", 1]]
        begun = [begin(slow, tmp_path / "slow", "weights", HF_HUB_DOWNLOAD_TIMEOUT="9")]
        begun += [begin(hub, tmp_path / "other", parts + USES["weights"][0]) for _ in range(2)]
        assert all(mini in end(process) for process in begun)
    assert hub.sent == [("model.safetensors", status) for status in (200, 206, 206)]
    assert mini in end(begin(hub, tmp_path / "other", "weights"))  # it is closed now


def test_what_stands_in_and_when(tmp_path):
    """The bundled set only where there is no network; and two that begin at once download once."""
    with Hub(FILES) as hub, Hub(FILES) as slow:
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
    assert hub.sent == [(name, 200) for name in SETS]


@pytest.mark.parametrize("at", ["reading", "downloading", "training:"])
def test_ctrl_c(at, tmp_path):
    words = f"--steps 9999 --eval-every 9999 --lm-coef 0 --dataset {SET} --out {tmp_path}".split()
    read = f"d = data.find_dataset('', hopper, 0.01, '{SET}')[0]; print('reading', flush=True)\n"
    code = {
        "reading": read + "while True: data.load_trajectories(d, d.action_space)",
        "downloading": USES["named"][0],
        "training:": f"sys.argv[1:] = {[*SHORT, *words]}; train.main()",
    }[at]
    with Hub(FILES) as hub:
        hub.faults.append(["GET hdf5", "stall", 3])
        begun = [begin(hub, tmp_path / str(i), code, LAMO_NETWORK="1") for i in range(3)]
        for i, process in enumerate(begun):
            while at not in process.text() and process.is_alive():
                time.sleep(0.01)
            time.sleep(0.2 + 0.07 * i)
            os.kill(process.pid, signal.SIGINT)
        for process in begun:
            assert ("--resume" if "train" in at else "\ninterrupted") in end(process, 130)
    assert not list(tmp_path.rglob("medium-v0/data/main_data.hdf5"))  # under its final name
