"""Many runs from one command: a study of the paper's, or any grid.

    python -m experiments.sweep table3                       # the paper's table, all seeds
    python -m experiments.sweep --env hopper,walker2d --method lamo,dt --ratio 0.01,0.1 --seed 0,1,2
    python -m experiments.sweep bundled --workers 2          # what the README reports, on a CPU
    python -m experiments.sweep table3 --cluster slurm --partition gpu

Every run is a process of train.py or experiments/baselines.py with a folder of its own in --out,
named after its place in the grid. The same command continues a sweep that was stopped: finished
runs are skipped and interrupted ones resumed (baselines, which cannot resume, begin anew). A run
that fails does not stop the others; the end of its output is printed at the end.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import tyro
from tqdm import tqdm

from tasks import find_task
from train import METHODS
from utils import StopSignals, UserError, choose, run_command, write_atomically, write_json

ALGORITHMS = ("bc", "td3bc", "iql", "cql", "bcq", "nfq")  # the other methods are train.py's
PROBE_STEPS = 20  # after which a step's time is known
POLL_SECONDS = 0.5  # between looks at the runs' logs

SEEDS = (0, 1, 2)
PAPER_METHODS = ("lamo", "dt", "wiki-rl", "cql", "iql", "td3bc", "bc")  # tables 1 and 3
ATARI_METHODS = ("lamo", "dt", "wiki-rl", "cql", "bcq", "nfq", "bc")  # table 2
ABLATIONS = ("lamo", "lamo-nolm", "lamo-linear", "lamo-freeze", "lamo-full", "lamo-random", "dt")
OTHER_LMS = ("assets/mini-lm-early.safetensors", "assets/mini-lm-random-corpus.safetensors")


@dataclass
class Config:
    study: tyro.conf.Positional[str | None] = None  # a row of STUDIES; the next five pick a part
    env: str | None = None  # tasks, between commas
    method: str | None = None  # methods of train.py, and bc, td3bc, iql, cql, bcq, nfq
    ratio: str | None = None  # shares of the dataset; None: 1
    seed: str | None = None  # None: 0,1,2
    lm: str | None = None  # language models, or paths of weights
    flags: str = ""  # more flags for each run, in quotes: --flags "--steps 500"
    out: str = "runs"  # where the runs' folders are
    workers: int = 1  # runs at a time
    threads: int | None = None  # CPU threads of a run; None: OMP_NUM_THREADS, or the cores shared
    dry_run: bool = False  # only list the runs and how long they take
    cluster: str | None = None  # slurm; or local, which is submitit without a cluster
    partition: str | None = None  # SLURM's
    gpus: int = 1  # of a run on SLURM
    minutes: int = 24 * 60  # a run's limit on the cluster


# --- which runs ----------------------------------------------------------------------------------


def grid(env, method=("lamo",), ratio=(1.0,), seed=SEEDS, lm=(None,)):
    """Every combination, as dictionaries; seeds outermost, so that each is a whole study."""
    names = ("seed", "env", "ratio", "method", "lm")
    return [dict(zip(names, row, strict=True)) for row in product(seed, env, ratio, method, lm)]


STUDIES = {  # the paper's tables by their numbers in it, and what the README reports
    "table1": [
        *grid(["kitchen-partial"], PAPER_METHODS, (0.01, 0.1, 1.0)),
        *grid(["kitchen-complete"], PAPER_METHODS, (0.3, 0.5, 1.0)),
        *grid(["reacher2d"], PAPER_METHODS, (0.1, 0.3, 1.0)),
    ],
    "table2": grid(["breakout", "qbert", "pong"], ATARI_METHODS, (0.1, 1.0)),
    "table3": grid(["hopper", "halfcheetah", "walker2d"], PAPER_METHODS, (0.005, 0.01, 0.1, 1.0)),
    "ratios": grid(["hopper"], ("lamo", "lamo-random", "dt"), (0.005, 0.01, 0.05, 0.1)),
    "ablations": [
        *grid(["hopper"], ABLATIONS, (0.01,)),
        *grid(["reacher2d"], ABLATIONS),
    ],
    "bundled": [  # on what comes with the project; "ratios" needs a full recording first
        *grid(["hopper"], METHODS, (0.01,)),
        *grid(["reacher2d"], METHODS),
        *grid(["hopper"], ("bc", "td3bc", "iql", "cql"), (0.01,)),
        *grid(["reacher2d"], ("bc", "td3bc", "iql", "cql")),
        *grid(["hopper"], ("lamo",), (0.01,), lm=OTHER_LMS),
        *grid(["reacher2d"], ("lamo",), lm=OTHER_LMS),
        *grid(["walker2d", "halfcheetah"], ("lamo", "lamo-random", "dt", "bc"), (0.01,)),
    ],
}


def name_of(run):
    """The run's folder in --out: its place in the grid."""
    parts = [run["env"], run["method"], f"{run['ratio']:g}"]
    if run["lm"]:
        parts.append(Path(run["lm"]).name.removesuffix(".safetensors"))
    return "-".join([*parts, f"s{run['seed']}"]).replace("/", "-")


def runs_of(args):
    """The runs that were asked for, each once. Raises UserError for what is no study or grid."""
    asked = {}
    for name, kind in (("env", str), ("method", str), ("ratio", float), ("seed", int), ("lm", str)):
        if typed := getattr(args, name):
            try:
                asked[name] = [kind(part) for part in typed.split(",")]
            except ValueError as error:
                raise UserError(f"--{name} {typed}: {error}") from error
    if args.study:
        runs = STUDIES[choose("study", args.study, STUDIES)]
        runs = [run for run in runs if all(run[name] in asked[name] for name in asked)]
    elif "env" in asked:
        runs = grid(**asked)
    else:
        raise UserError(f"name a study ({', '.join(STUDIES)}), or a grid: --env NAME,NAME ..")
    if not runs:
        raise UserError(f"no run of {args.study} is left by these flags")
    by_name = {}
    for run in runs:
        run = run | {"env": find_task(run["env"])[0]}  # as it is written in tasks.py
        choose("method", run["method"], [*METHODS, *ALGORITHMS])
        if not 0 < run["ratio"] <= 1:
            raise UserError(f"--ratio has {run['ratio']:g}, but must be above 0 and at most 1")
        if by_name.setdefault(name_of(run), run) != run:
            raise UserError(f"two runs would be called {name_of(run)}; change --ratio or --lm")
    return list(by_name.values())


def flags_of(text):
    """--flags as a list of words. Raises UserError for those that the sweep itself gives."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"--flags {text}: {error}") from error
    for flag in ("env", "method", "algo", "ratio", "seed", "lm", "out", "name", "resume"):
        if any(word.split("=")[0] == f"--{flag}" for word in words):
            raise UserError(f"--flags has --{flag}, which the sweep gives each run; leave it out")
    return words


# --- one run -------------------------------------------------------------------------------------


def state_of(run, out):
    """What has become of a run: "finished", "interrupted" or "new"."""
    folder = Path(out) / name_of(run)
    if (folder / "result.json").is_file():
        return "finished"
    return "interrupted" if folder.exists() else "new"


def log_of(run, out):
    """Where what a run prints goes. The first line has the --flags it was begun with."""
    return Path(out) / "logs" / f"{name_of(run)}.txt"


def heading(flags):
    return f"flags: {shlex.join(flags)}\n"


def start(run, out, flags, threads, apart=True):
    """The process, a subprocess.Popen, that begins or resumes a run.

    apart: whether a Ctrl-C in this terminal does not reach it.
    """
    folder = Path(out) / name_of(run)
    if run["method"] not in ALGORITHMS and (folder / "ckpt.pt").is_file():
        command = ["train.py", "--resume", str(folder)]
    else:
        if folder.exists():  # a baseline's, or a run that saved nothing yet
            shutil.rmtree(folder)
        command = ["train.py", "--method", run["method"]]
        if run["method"] in ALGORITHMS:
            command = ["-m", "experiments.baselines", "--algo", run["method"]]
        command += ["--env", run["env"], "--ratio", str(run["ratio"]), "--seed", str(run["seed"])]
        command += ["--lm", run["lm"]] if run["lm"] else []
        command += ["--out", str(out), "--name", name_of(run), *flags]
        write_atomically(log_of(run, out), lambda file: file.write(heading(flags).encode()))
    with open(log_of(run, out), "a") as log:
        return subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=apart,
        )


def carry_out(run, out, flags, threads):
    """A run's job on a cluster."""
    start(run, out, flags, threads, apart=False).wait()


def last_lines(run, out, n=5):
    """The end of a run's output, without its progress bars."""
    text = log_of(run, out).read_text(errors="replace") if log_of(run, out).is_file() else ""
    lines = [line for line in text.replace("\r", "\n").splitlines()[1:] if line.strip()]
    return [line for line in lines if "it/s" not in line and "s/it" not in line][-n:]


def progress_of(run, out):
    """(steps done, steps in all, seconds a step) by a run's own files; zeros if it has none yet."""
    folder = Path(out) / name_of(run)
    try:
        steps = json.loads((folder / "config.json").read_text())["settings"]["steps"]
        lines = (folder / "log.jsonl").read_text().split("\n")[:-1]  # the whole ones
    except FileNotFoundError:
        return 0, 0, 0.0
    for row in map(json.loads, reversed(lines)):
        if "seconds" in row:  # an evaluation has none
            return row["step"], steps, row["seconds"] / row["step"]
    return 0, steps, 0.0


def measure(run, flags, threads, stop):
    """(steps in all, seconds a step), by beginning a run in a temporary folder.

    Prints why, and returns (0, 0.0), where that fails: so would the real one.
    """
    print(f"measuring {PROBE_STEPS} steps of {name_of(run)}", flush=True)
    with tempfile.TemporaryDirectory() as aside:
        process = start(run, aside, [*flags, "--log-every", str(PROBE_STEPS)], threads)
        try:
            while not (progress_of(run, aside)[0] or stop.number) and process.poll() is None:
                time.sleep(0.1)
        finally:
            process.terminate()
            process.wait()
        if stop.number:
            raise SystemExit(128 + stop.number)
        _, steps, seconds = progress_of(run, aside)
        if not seconds:
            print(f"{name_of(run)} will fail:", *last_lines(run, aside), sep="\n    ", flush=True)
            return 0, 0.0
    return steps, seconds


# --- all of them ---------------------------------------------------------------------------------


def check_flags(runs, out, flags):
    """Raises UserError where a run that is there was begun with other flags than are given now."""
    for run in runs:
        if state_of(run, out) != "new" and log_of(run, out).is_file():
            with open(log_of(run, out), errors="replace") as log:
                had = log.readline()
            if had != heading(flags) and had.startswith("flags: "):
                what = f"{name_of(run)} was begun with other --flags ({had[7:].strip() or 'none'})"
                raise UserError(f"{what}; give the same again, or another --out")


def estimate(runs, out, flags, workers, threads, stop):
    """Print the runs and, from measured step times, how long they will take together.

    Step times are kept in out/probes.json. Seeds share one; ratios do not, for a dataset may hold a
    part only. Returns the runs that will fail.
    """
    kept, total, failing = Path(out) / "probes.json", 0.0, []
    known = json.loads(kept.read_text()) if kept.is_file() else {}
    for run in runs:
        done, steps, seconds = progress_of(run, out)
        done = 0 if run["method"] in ALGORITHMS else done  # baselines begin anew
        if not seconds:
            place = [run["env"], run["method"], f"{run['ratio']:g}", run["lm"] or "", *flags]
            key = f"{shlex.join(place)}, {threads} threads"
            if key not in known:
                known[key] = measure(run, flags, threads, stop)
                write_json(kept, {kind: found for kind, found in known.items() if found[1]})
            steps, seconds = known[key]
        failing += [] if seconds else [run]
        left = (steps - done) * seconds
        total += left
        what = f"{steps - done:7} steps {left / 60:6.1f} min" if seconds else "fails"
        print(f"{state_of(run, out):12} {name_of(run):45} {what}")
    hours = total / workers / 3600
    fails = f"; {len(failing)} of them will fail" if failing else ""
    print(f"{len(runs)} run(s), {workers} at a time: {hours:.1f} h without evaluations{fails}")
    return failing


def run_locally(runs, out, flags, workers, threads, stop):
    """Carry out runs, `workers` at a time, with one bar. A signal lets those at work save."""
    waiting, working, ended = list(runs), {}, 0
    form = "{l_bar}{bar}| {n:.2f}/{total} runs [{elapsed}<{remaining}]"
    with tqdm(total=len(runs), desc="sweep", bar_format=form) as bar:
        try:
            while (waiting or working) and not stop.number:
                while waiting and len(working) < workers:
                    run = waiting.pop(0)
                    working[start(run, out, flags, threads)] = run
                time.sleep(POLL_SECONDS)
                for process, run in list(working.items()):
                    if process.poll() is not None:
                        del working[process]
                        ended += 1
                        if process.returncode:
                            bar.write(f"failed: {name_of(run)}")
                steps = [progress_of(run, out)[:2] for run in working.values()]
                bar.n = round(ended + sum(step / most for step, most in steps if most), 2)
                bar.update(0)  # draws, if it is time to
        finally:  # also where a second signal ends this at once
            for process in working:
                process.terminate()
        for process in working:
            process.wait()
    if stop.number:
        print("stopped; the same command goes on")
        raise SystemExit(128 + stop.number)


def run_on_cluster(runs, out, flags, args, stop):
    """Hand runs to a cluster through submitit, and wait for them."""
    import submitit

    stop.at_once = True  # the jobs go on without us
    executor = submitit.AutoExecutor(folder=Path(out) / "submitit", cluster=args.cluster)
    executor.update_parameters(timeout_min=args.minutes, cpus_per_task=args.threads)
    if args.cluster == "slurm":
        executor.update_parameters(
            gpus_per_node=args.gpus,
            slurm_partition=args.partition,
            slurm_array_parallelism=args.workers,
        )
    with executor.batch():
        jobs = [executor.submit(carry_out, run, out, flags, args.threads) for run in runs]
    for run, job in tqdm(list(zip(runs, jobs, strict=True)), desc="runs", unit="run"):
        try:
            job.result()
        except Exception as error:  # a job that was killed, or never ran
            print(f"{name_of(run)}: {error}", file=sys.stderr)


def main():
    words = sys.argv[1:]
    if "--flags" in words[:-1]:  # else "--x" behind it would be taken for a flag of the sweep's
        i = words.index("--flags")
        words[i : i + 2] = [f"--flags={words[i + 1]}"]
    args = tyro.cli(Config, args=words, description=__doc__)
    runs, out, flags = runs_of(args), args.out, flags_of(args.flags)
    if args.workers < 1:
        raise UserError(f"--workers is {args.workers}, but must be at least 1")
    if args.cluster:
        choose("cluster", args.cluster, ("slurm", "local"))
        if args.cluster == "slurm" and shutil.which("srun") is None:
            raise UserError("--cluster slurm: there is no srun here; start it on a login node")
    if args.threads is None:
        shared = max(1, (os.cpu_count() or 1) // args.workers)
        args.threads = int(os.environ.get("OMP_NUM_THREADS") or shared)
    check_flags(runs, out, flags)
    left = [run for run in runs if state_of(run, out) != "finished"]
    print(f"{len(runs) - len(left)} run(s) finished already")
    stop = StopSignals()
    failing = estimate(left, out, flags, args.workers, args.threads, stop)
    if not args.dry_run and left:
        if len(failing) == len(left):
            raise UserError("every run would fail, for the reasons above; none was begun")
        if args.cluster:
            run_on_cluster(left, out, flags, args, stop)
        else:
            run_locally(left, out, flags, args.workers, args.threads, stop)
        failing = [run for run in left if state_of(run, out) != "finished"]
        for run in failing:
            print(f"failed: {name_of(run)}", *last_lines(run, out), sep="\n    ")
        print(f"{len(left) - len(failing)} of {len(left)} runs finished")
    if failing:
        raise SystemExit(1)


if __name__ == "__main__":
    run_command(main)
