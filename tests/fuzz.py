"""Spoilt files and command lines by the thousand: each is refused in one line, or it works.

    python tests/fuzz.py --inputs 100000 --out fuzz          # a table at the end, fuzz/record.json

An input is a sound one that was changed: bits, slices, numbers, JSON, pickles (with checksums made
right again), HDF5's attributes and arrays, flags. It goes to the code that reads its kind, in a
process that is watched: an audit hook sees every program that is started, every connection, every
file outside of the process's folder that is opened for writing, removed or renamed. What counts as
a failure: any exception but UserError (which is one line to a user), SECONDS without an end, a
process that dies, and whatever the hook or the canary module saw. Its input is kept in --out.
"""

import argparse
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 20  # an input may take
CANARY = "canary_of_fuzz"  # a module that says so if it is imported
LIFETIME = 4000  # inputs of one process: then it begins anew, so that a leak is seen as one
ODD = [None, True, -1, 0, 1, 2**31, 2**63, 10**30, -0.5, 1e308, float("nan"), float("inf"), "", "x"]
ODD += ["auto", "../../x", "x" * 10_000, [], {}, [[]], ["os", "system"], {"a": 1}, f"{CANARY}:Env"]
ODD += [f"import {CANARY}", f"{CANARY}:make", "os:system", "gymnasium:make", "nan"]


# --- spoiling ------------------------------------------------------------------------------------


def spoil_bytes(draw, content):
    content = bytearray(content)
    for _ in range(draw.choice([1, 1, 1, 2, 5, 20])):
        at = draw.randrange(len(content) + 1)
        n = draw.choice([1, 2, 4, 8, 64, 512])
        kind = draw.randrange(7)
        if kind == 0 and at < len(content):
            content[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            content[at : at + n] = draw.randbytes(n)
        elif kind == 2:
            del content[at : at + n]
        elif kind == 3:
            content[at:at] = content[at : at + n]
        elif kind == 4:
            number = draw.choice([0, 1, -1, 2**31 - 1, 2**32 - 1, 2**62, 2**64 - 1])
            size = draw.choice([1, 2, 4, 8])
            number %= 256**size
            content[at : at + size] = number.to_bytes(size, draw.choice(["little", "big"]))
        elif kind == 5:
            content = content[:at]
        else:
            content[at : at + n] = bytes(n)
    return bytes(content)


def spoil_tree(draw, tree, odd=ODD):
    """One place of a nest of dictionaries and lists, which is changed, replaced or removed."""
    if isinstance(tree, dict) and tree and draw.random() < 0.9:
        key = draw.choice(list(tree))
        changed = dict(tree)
        if draw.random() < 0.1:
            del changed[key]
        elif draw.random() < 0.05:
            changed[draw.choice(["x", "", "a" * 300, key * 2 if isinstance(key, str) else 9])] = 1
        else:
            changed[key] = spoil_tree(draw, tree[key], odd)
        return changed
    if isinstance(tree, list) and tree and draw.random() < 0.8:
        i = draw.randrange(len(tree))
        return [*tree[:i], spoil_tree(draw, tree[i], odd), *tree[i + 1 :]]
    if isinstance(tree, str) and tree[:1] in "{[" and len(tree) > 1 and draw.random() < 0.9:
        try:
            return json.dumps(spoil_tree(draw, json.loads(tree)))
        except ValueError:
            pass
    if isinstance(tree, str) and draw.random() < 0.3:
        return spoil_bytes(draw, tree.encode()).decode(errors="replace")
    if type(tree) in (int, float) and draw.random() < 0.5:
        return draw.choice([tree + 1, tree - 1, -tree, tree * 1000, tree * 10**9, tree / 3, 0])
    return draw.choice(odd)


def spoil_json(draw, content):
    if draw.random() < 0.2:
        return spoil_bytes(draw, content)
    if draw.random() < 0.02:
        return b"[" * 10**6
    return json.dumps(spoil_tree(draw, json.loads(content))).encode()


def spoil_zip(draw, content, folder, payloads):
    """A file of torch.save's: by its bytes, by its pickle, by what is in it, or with a payload."""
    import torch

    kind = draw.random()
    if kind < 0.25:
        return spoil_bytes(draw, content)
    (folder / "zip").write_bytes(content)
    if kind < 0.55:
        with zipfile.ZipFile(folder / "zip") as old, zipfile.ZipFile(folder / "new", "w") as new:
            pick = draw.choice([e.filename for e in old.infolist()])
            pick = pick if draw.random() < 0.2 else "data.pkl"
            payload = draw.choice(payloads) if draw.random() < 0.2 else None
            for entry in old.infolist():
                part = old.read(entry.filename)
                if entry.filename.endswith(pick):
                    part = payload if payload and pick == "data.pkl" else spoil_bytes(draw, part)
                new.writestr(zipfile.ZipInfo(entry.filename), part)
        return (folder / "new").read_bytes()
    tensors = [torch.tensor(x) for x in (float("nan"), 1, True, [], [[1.0, float("inf")]])]
    tensors += [torch.zeros(1).expand(10**5, 10**5), torch.zeros(3).to_sparse(), torch.zeros(2, 3)]
    tree = torch.load(folder / "zip", weights_only=True)
    for _ in range(draw.choice([1, 1, 1, 2])):
        tree = spoil_tree(draw, tree, ODD + tensors)
    torch.save(tree, folder / "new")
    return (folder / "new").read_bytes()


def spoil_hdf5(draw, path):
    """In place, through h5py: an attribute, an array or a group, now something else."""
    import h5py
    import numpy as np

    with h5py.File(path, "a") as file:
        names = []
        file.visit(names.append)
        name = draw.choice(names)
        item = file[name]
        if item.attrs and draw.random() < 0.5:
            key = draw.choice(list(item.attrs))
            item.attrs[key] = draw.choice([-1, 0, 1, 10**12, 2.5, "x", [1, 2], np.nan, b"x"])
        elif draw.random() < 0.15:
            del file[name]
        elif isinstance(item, h5py.Dataset):
            kind = item.dtype
            values = item[()]
            del file[name]
            if (way := draw.randrange(7)) == 0:
                file[name] = h5py.ExternalLink("/etc/passwd", "/")
            elif way == 1:
                shape = draw.choice([(10**12,), (10**5, 10**5), (0,), (3, 10**9)])
                file.create_dataset(name, shape, kind, chunks=True)
            elif way == 2:
                file[name] = draw.choice(["text", 1.0, b"x"])
            elif way == 3:
                file[name] = values[: draw.randrange(len(values) + 1)]
            elif way == 4:
                file[name] = np.full(values.shape, draw.choice([np.nan, np.inf, 1e300]))
            elif way == 5:
                file[name] = values.astype(draw.choice(["i1", "f2", "S5", "c16", "?"]))
            else:
                file[name] = values[..., None]
        else:
            del file[name]
            file[name] = draw.choice([h5py.SoftLink("/"), h5py.SoftLink(f"/{name}"), 1.0])


# --- what reads it -------------------------------------------------------------------------------


def make_sound(folder):
    """Put into a folder a tiny language model, a dataset in minari/, and two runs' folders.

    The one of train.py is as a kill just before its end leaves it. MINARI_DATASETS_PATH must be
    folder/minari.
    """
    import gymnasium as gym
    import minari
    import numpy as np
    import torch
    from minari.data_collector import EpisodeBuffer
    from safetensors.torch import load_file

    import train
    from experiments import baselines, pretrain
    from load_gpt2 import save_gpt2
    from model import GPT, GPTConfig

    torch.manual_seed(0)
    gpt = GPT(GPTConfig(1, 1, 12, 257, 32))
    save_gpt2(gpt, folder / "tiny.safetensors", {})
    torch.save(load_file(folder / "tiny.safetensors"), folder / "tiny.bin")
    episodes = [
        EpisodeBuffer(
            observations=np.random.default_rng(i).normal(size=(6, 11)),
            actions=np.zeros((5, 3), np.float32),
            rewards=np.ones(5),
            terminations=np.arange(5) == 4,
            truncations=np.zeros(5, bool),
        )
        for i in range(3)
    ]
    minari.create_dataset_from_buffers("fuzz/set-v0", episodes, env=gym.make("Hopper-v5"))
    words = f"--lm {folder / 'tiny.safetensors'} --dataset fuzz/set-v0 --env hopper --steps 2"
    words += " --eval-every 1 --episodes 1 --episode-limit 2 --batch 2 --context 2 --lm-length 8"
    sys.argv = ["train.py", *words.split(), "--dtype", "fp32", "--out", str(folder)]
    sys.argv += ["--name", "run"]
    really, train.end_run = train.end_run, lambda *a, **k: None
    try:
        train.main()
    finally:
        train.end_run = really
    words = "--algo bc --env hopper --dataset fuzz/set-v0 --steps 2 --eval-every 2 --episodes 1"
    words += f" --episode-limit 2 --batch 2 --out {folder} --name baseline"
    sys.argv = ["baselines", *words.split()]
    baselines.main()
    (folder / "text.txt").write_text("A text of a few words. " * 40)
    words = f"--text {folder}/text.txt --heldout {folder}/text.txt --out {folder}/p.safetensors"
    words += " --steps 3 --eval-every 2 --batch 2 --block-size 8 --n-layer 1 --n-head 1 --n-embd 4"
    sys.argv = ["pretrain", *words.split(), "--device", "cpu"]
    really, pretrain.plot = pretrain.plot, lambda *a: sys.exit()  # before it removes its state
    try:
        pretrain.main()
    except SystemExit:
        pass
    finally:
        pretrain.plot = really


class Readers:
    """Sound inputs, made once, and for each kind: spoil one, and hand it to its reader."""

    def __init__(self, folder):
        self.folder, self.sound = folder, folder / "sound"
        self.sound.mkdir()
        make_sound(self.sound)
        shutil.rmtree(folder / "cache")
        self.payloads = [
            b"cos\nsystem\n(S'touch ran'\ntR.",
            f"c{CANARY}\nEnv\n)R.".encode(),
            b'cbuiltins\nexec\n(S\'open("ran","w")\'\ntR.',
            b"cbuiltins\nbytearray\n(L100000000000L\ntR.",
            b"ctorch.storage\nUntypedStorage\n(L100000000000L\ntR.",
        ]
        self.kinds = {
            "checkpoint": (self.checkpoint, 22),
            "baseline": (self.baseline, 8),
            "run to resume": (self.resume, 12),
            "safetensors": (self.safetensors, 14),
            ".bin": (self.bin, 10),
            "Minari folder": (self.dataset, 22),
            "pretraining to resume": (self.pretraining, 6),
            "run to report": (self.report, 8),
            "tokens and text": (self.tokens, 10),
            "command line": (self.words, 10),
        }

    def checkpoint(self, draw, at):
        from checkpoint import load_model, read_checkpoint
        from evaluate import rollout

        content = (self.sound / "run" / "ckpt.pt").read_bytes()
        at.write_bytes(spoil_zip(draw, content, self.folder, self.payloads))
        read = read_checkpoint(at)
        model = load_model(at, read)
        if draw.random() < 0.3:
            settings = read["settings"] | {"episode_limit": 2}
            stats = read["obs_mean"], read["obs_std"]
            rollout(model, read["environment"], settings, stats, settings["targets"][:1], 1)

    def baseline(self, draw, at):
        from experiments import baselines
        from plumbing import run_command

        content = (self.sound / "baseline" / "ckpt.pt").read_bytes()
        at.write_bytes(spoil_zip(draw, content, self.folder, self.payloads))
        words = ["--evaluate", str(at), "--episodes", "1", "--episode-limit", "2"]
        sys.argv = ["baselines", *words]
        run_command(baselines.main)

    def resume(self, draw, at):
        import train
        from plumbing import run_command
        from resume import read_run

        shutil.copytree(self.sound / "run", at)
        name = draw.choice(["config.json", "resume.pt", "resume.pt", "log.jsonl"])
        content = (at / name).read_bytes()
        spoilt = spoil_json(draw, content) if name == "config.json" else None
        if name == "resume.pt":
            spoilt = spoil_zip(draw, content, self.folder, self.payloads)
        (at / name).write_bytes(spoil_bytes(draw, content) if spoilt is None else spoilt)
        begun, _ = read_run(at, {}, train.Config)
        sizes = [
            begun["settings"][n] for n in ("steps", "episodes", "batch", "lm_batch", "context")
        ]
        if max(sizes) < 100 and draw.random() < 0.25:  # larger ones just take long
            sys.argv = ["train.py", "--resume", str(at)]
            run_command(train.main)

    def safetensors(self, draw, at):
        from load_gpt2 import load_gpt2

        content = (self.sound / "tiny.safetensors").read_bytes()
        size = int.from_bytes(content[:8], "little")
        if draw.random() < 0.4:
            content = spoil_bytes(draw, content)
        else:
            header = json.dumps(spoil_tree(draw, json.loads(content[8 : 8 + size]))).encode()
            content = len(header).to_bytes(8, "little") + header + content[8 + size :]
        at = at.with_suffix(".safetensors")
        at.write_bytes(content)
        load_gpt2(str(at))

    def bin(self, draw, at):
        from load_gpt2 import load_gpt2

        at.mkdir()
        config = json.dumps({"n_head": 1, "n_positions": 32, "vocab_size": 257}).encode()
        content = (self.sound / "tiny.bin").read_bytes()
        if draw.random() < 0.25:
            config = spoil_json(draw, config)
        else:
            content = spoil_zip(draw, content, self.folder, self.payloads)
        (at / "config.json").write_bytes(config)
        (at / "pytorch_model.bin").write_bytes(content)
        load_gpt2(str(at))

    def dataset(self, draw, at):
        from data import find_dataset, load_trajectories
        from tasks import Task, find_environment

        shutil.copytree(self.sound / "minari/fuzz/set-v0", at)
        path = at / "data" / "main_data.hdf5"
        told = at / "data" / "metadata.json"
        if draw.random() < 0.3:  # a stranger's environment, beside what else is odd
            metadata = json.loads(told.read_text())
            spec = json.loads(metadata["env_spec"]) | {"entry_point": f"{CANARY}:make"}
            told.write_text(json.dumps(metadata | {"env_spec": json.dumps(spec)}))
        if (kind := draw.random()) < 0.05:
            about = json.dumps({"share": 0.5, "episodes": 3}).encode()
            (at / "about.json").write_bytes(spoil_json(draw, about))
        elif kind < 0.4:
            told.write_bytes(spoil_json(draw, told.read_bytes()))
        elif kind < 0.75:
            spoil_hdf5(draw, path)
        else:
            path.write_bytes(spoil_bytes(draw, path.read_bytes()))
        source, _, _ = find_dataset("x", Task(), 0.5, str(at))
        environment, _ = find_environment(Task(), source)
        load_trajectories(source, environment.action_space)

    def pretraining(self, draw, at):
        from experiments import pretrain
        from plumbing import run_command

        at = at.with_suffix(".state.pt")
        content = (self.sound / "p.state.pt").read_bytes()
        at.write_bytes(spoil_zip(draw, content, self.folder, self.payloads))
        settings = pretrain.read_state(at)["settings"]
        sizes = [settings[n] for n in ("steps", "batch", "block_size", "n_layer", "n_embd")]
        if max(sizes) < 100 and draw.random() < 0.25:
            sys.argv = ["pretrain", "--resume", str(at)]
            run_command(pretrain.main)

    def report(self, draw, at):
        from experiments import report
        from plumbing import run_command

        for name in ("one", "two"):  # of two seeds, whose mean is drawn
            shutil.copytree(self.sound / "run", at / name)
            (at / name / "result.json").write_text('{"score": 1.0}')
        config = json.loads((at / "two" / "config.json").read_text())
        config["settings"]["seed"] += 1
        (at / "two" / "config.json").write_text(json.dumps(config))
        name = draw.choice(["config.json", "config.json", "log.jsonl", "result.json"])
        path = at / "one" / name
        lines = [path.read_bytes()] if name == "config.json" else path.read_bytes().splitlines()
        i = draw.randrange(len(lines))
        lines[i] = spoil_json(draw, lines[i])
        path.write_bytes(b"\n".join(lines))
        figures = [] if draw.random() < 0.05 else ["--no-figures"]
        sys.argv = ["report", str(at), "--out", str(at / "report"), *figures]
        run_command(report.main)

    def tokens(self, draw, at):
        import text

        encoding = text.get_encoding(257)
        at.write_bytes(b"The quick brown fox.\n" * 30)
        if draw.random() < 0.5:
            at.write_bytes(spoil_bytes(draw, at.read_bytes()))
        text.tokenise(at, encoding)
        (made,) = (text.cache_folder() / "tokens").glob("*.bin")
        made.write_bytes(spoil_bytes(draw, made.read_bytes()))
        tokens = text.tokenise(at, encoding)
        text.check_text(tokens, 5)
        assert tokens.max() < 257

    def words(self, draw, at):
        import evaluate
        import train
        from experiments import pretrain, sweep
        from plumbing import parse_flags, run_command
        from settings import resolve

        flags = [f"--{f.replace('_', '-')}" for f in train.Config.__dataclass_fields__]
        flags += ["--evaluate", "--algo", "--text", "--heldout", "--size", "--x", "--", "-h"]
        values = ["hopper", "lamo", "dt", "0", "-1", "1e400", "nan", "0.5", "mini", "auto", ""]
        values += ["x" * 5000, "é", "--env", "1 2", "/", "..", "gpt2", "os", "true", "9" * 11]
        values += ["\0", "a\nb", "\x1b[2J"]
        ours = ["--target", "--episodes", "--seed", "--video", "--at", "--json", "--prompt"]
        kind = draw.choice(["train", "train", "pretrain", "evaluate", "sweep"])
        flags = ours if kind == "evaluate" else flags
        pools = [draw.choice([flags, flags, values]) for _ in range(draw.randrange(9))]
        words = [draw.choice(pool) for pool in pools]
        sys.argv = ["command", *words]

        def command():
            if kind == "train":
                typed = parse_flags(train.Config, "train.py", "")
                if not typed.pop("resume", ""):
                    resolve(train.Config(), typed)
            elif kind == "pretrain":
                pretrain.resolve(parse_flags(pretrain.Config, "pretrain", ""))
            elif kind == "evaluate":
                sys.argv.insert(1, str(self.sound / "none.pt"))
                evaluate.main()
            else:
                sys.argv += ["--out", str(at), "--dry-run", "--flags", "--none"]
                sweep.main()

        run_command(command)


# --- watching ------------------------------------------------------------------------------------


class Hang(BaseException):
    """An input took too long."""


def shortened(text):
    """A traceback without long repetitions, its end."""
    return re.sub(r"(.)\1{50,}", r"\1..", text)[-1500:]


def watch(folder):
    """Note what is done outside of `folder`, from now on. Returns the list of notes."""
    notes = []
    allowed = (str(folder), "/dev/", "/proc/")

    def outside(path):
        return isinstance(path, (str, bytes, os.PathLike)) and not os.path.abspath(
            os.fsdecode(path)
        ).startswith(allowed)

    def hook(event, arguments):
        if event == "open":
            path, mode, flags = arguments
            writing = (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if writing and outside(path):
                notes.append(f"open {path!r} {mode} {flags}")
        elif event in ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod"):
            if any(outside(path) for path in arguments[:2]):
                notes.append(f"{event} {arguments!r}")
        elif event in ("os.system", "os.exec", "socket.connect") or (
            event in ("subprocess.Popen", "os.posix_spawn", "os.fork")
            and arguments[0] not in ("git", "fc-list")  # of run_folder, and of matplotlib
        ):
            notes.append(f"{event} {arguments!r}")

    sys.addaudithook(hook)
    return notes


def work(seed, first, n, folder):
    """Feed inputs `first` to `first + n`, one JSON line each to stdout."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    os.environ["LAMO_CACHE"] = f"{folder}/cache"
    os.environ |= {"HOME": str(folder), "TMPDIR": str(folder), "MPLCONFIGDIR": str(folder)}
    os.environ["MINARI_DATASETS_PATH"] = f"{folder}/sound/minari"
    (folder / f"{CANARY}.py").write_text(
        "import pathlib; pathlib.Path('ran').touch()\nEnv = make = 1"
    )
    sys.path[:0] = [str(ROOT), str(folder)]
    os.chdir(folder)

    import psutil

    from plumbing import UserError

    def too_long(number, frame):
        raise Hang

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libraries in C write where they like
    sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
    signal.signal(signal.SIGALRM, too_long)
    readers = Readers(folder)
    names = list(readers.kinds)
    weights = [readers.kinds[name][1] for name in names]
    notes = watch(folder)
    for i in range(first, first + n):
        draw = random.Random(f"{seed} {i}")
        name = draw.choices(names, weights)[0]
        at, told = folder / "input", {"i": i, "kind": name}
        print(json.dumps(told | {"begins": True}), file=answers, flush=True)
        signal.alarm(SECONDS)
        try:
            readers.kinds[name][0](draw, at)
            told["end"] = "accepted"
        except UserError as error:
            told["end"] = "refused"
            if "\n" in str(error):
                told |= {"end": "failure", "why": f"more than a line: {error}"}
        except SystemExit as error:
            told["end"] = "refused"
            said = sys.stderr.getvalue().splitlines()
            if error.code == 2 and not (said and said[-1].startswith("error: ")):
                told |= {"end": "failure", "why": f"no one line at the end: {said[-3:]}"}
            if error.code not in (0, 1, 2, None):
                told |= {"end": "failure", "why": f"exit code {error.code}"}
        except Hang:
            told |= {"end": "failure", "why": f"hang: {shortened(traceback.format_exc())}"}
        except BaseException:
            told |= {"end": "failure", "why": shortened(traceback.format_exc())}
        finally:
            signal.alarm(0)
        if Path("ran").exists() or CANARY in sys.modules:
            notes.append("the payload ran")
            Path("ran").unlink(missing_ok=True)
            sys.modules.pop(CANARY, None)
        if notes:
            told |= {"end": "failure", "why": "; ".join(notes)}
            notes.clear()
        if told["end"] == "failure":
            kept = folder / "kept" / str(i)
            kept.parent.mkdir(exist_ok=True)
            for path in folder.glob("input*"):
                shutil.move(path, kept.with_suffix(path.suffix))
        sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
        for path in [*folder.glob("input*"), *(folder / "cache").rglob("*.bin")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        told["memory"] = psutil.Process().memory_info().rss
        print(json.dumps(told), file=answers, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--out", default="fuzz", help="a folder for what fails")
    parser.add_argument("--worker", type=int, help="(of a process of its own: its inputs)")
    args = parser.parse_args()
    out = Path(args.out).absolute()
    if args.worker:
        work(args.seed, args.first, args.worker, out)
        return
    table, failures, i, started, process_n = {}, [], args.first, time.time(), 0
    last = args.first + args.inputs
    while i < last:
        n = min(LIFETIME, last - i)
        folder = out / f"process{process_n}"
        folder.mkdir(parents=True)
        command = [sys.executable, __file__, "--worker", n, "--first", i, "--seed", args.seed]
        command = [*map(str, command), "--out", str(folder)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        open_input = None
        for line in process.stdout:
            told = json.loads(line)
            open_input = told if "begins" in told else None
            if open_input is None:
                row = table.setdefault(told["kind"], {"accepted": 0, "refused": 0, "failure": 0})
                row[told["end"]] += 1
                row["memory"] = max(row.get("memory", 0), told["memory"])
                i = told["i"] + 1
                if told["end"] == "failure":
                    failures.append(told)
                    print(f"input {told['i']}, {told['kind']}: {told['why']}", flush=True)
                if i % 1000 == 0:
                    print(f"{i - args.first} inputs, {time.time() - started:.0f} s", flush=True)
        errors = process.stderr.read()
        if process.wait() != 0:
            if open_input is None:
                raise SystemExit(f"the worker could not begin: {errors[-2000:]}")
            why = f"the process died with exit code {process.returncode}"
            failures.append(open_input | {"end": "failure", "why": why})
            row = table.setdefault(open_input["kind"], {"accepted": 0, "refused": 0, "failure": 0})
            row["failure"] += 1
            print(f"input {open_input['i']}, {open_input['kind']}: {why}", flush=True)
            i = open_input["i"] + 1
        elif not (folder / "kept").exists():
            shutil.rmtree(folder)
        process_n += 1
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    record = {"commit": commit.stdout.strip()}
    record |= {"inputs": args.inputs, "seed": args.seed, "first": args.first, "table": table}
    record |= {"failures": failures, "seconds": time.time() - started}
    (out / "record.json").write_text(json.dumps(record, indent=1))
    print(f"{'':18} {'refused':>8} {'accepted':>8} {'failures':>8} {'memory':>9}")
    for name, row in sorted(table.items()):
        counts = f"{row['refused']:8} {row['accepted']:8} {row['failure']:8}"
        print(f"{name:18} {counts} {row.get('memory', 0) / 2**20:5.0f} MiB")
    print(f"{args.inputs} inputs, {len(failures)} failures")
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
