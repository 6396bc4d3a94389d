"""Many runs from one command: a study of the paper's, or any grid.

    python -m experiments.sweep table3                       # the paper's table, all seeds
    python -m experiments.sweep --env hopper,walker2d --method lamo,dt --ratio 0.01,0.1 --seed 0,1,2
    python -m experiments.sweep bundled --workers 2          # what the README reports, on a CPU
    python -m experiments.sweep table3 --cluster slurm --partition gpu

Every run is a process of train.py or experiments/baselines.py with a folder of its own in --out,
named after its place in the grid. The same command continues a sweep that was stopped: finished
runs are skipped and interrupted ones resumed (baselines, which cannot resume, begin anew). A run
that fails does not stop the others; the end of its output is printed at the end. On a cluster every
run is a job that saves before its time limit, is queued again, and outlives this command.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal

import tyro

from tasks import find_task
from train import METHODS
from utils import StopSignals, UserError, choose, no_network, reason, run_command, write_json

ALGORITHMS = ("bc", "td3bc", "iql", "cql", "bcq", "nfq")  # the other methods are train.py's
PROBE_STEPS = 20  # after which a step's time is known
AXES = {"seed": int, "env": str, "ratio": float, "method": str, "lm": str, "mode": str}  # of a grid
OWN_FLAGS = ["--algo", "--out", "--name", "--resume", *(f"--{name}" for name in AXES)]
GRACE_SECONDS = 120  # that SLURM leaves a preempted job at most
POLL_SECONDS = 0.5  # between looks at the runs' logs
QUEUE_SECONDS = 5  # between looks at SLURM's queue

PAPER_METHODS = ("lamo", "dt", "wiki-rl", "cql", "iql", "td3bc", "bc")  # tables 1 and 3
ATARI_METHODS = ("lamo", "dt", "wiki-rl", "cql", "bcq", "nfq", "bc")  # table 2
ABLATIONS = ("lamo", "lamo-nolm", "lamo-linear", "lamo-freeze", "lamo-full", "lamo-random", "dt")
SCARCE = ("lamo", "lamo-random", "dt", "bc")
REAL = ("lamo", "lamo-random", "lamo-shuffled", "lamo-nolm")
OTHER_LMS = ("assets/mini-lm-early.safetensors", "assets/mini-lm-random-corpus.safetensors")


@dataclass
class Config:
    study: tyro.conf.Positional[str | None] = None  # a study; the next six pick a part of it
    env: str | None = None  # tasks, between commas
    method: str | None = None  # methods of train.py, and bc, td3bc, iql, cql, bcq, nfq
    ratio: str | None = None  # shares of the dataset; None: 1
    seed: str | None = None  # None: 0,1,2
    lm: str | None = None  # language models, or paths of weights; dt and baselines have none
    mode: str | None = None  # normal, delayed; None: normal
    flags: str = ""  # more flags for each run, in quotes: --flags "--steps 500"
    out: str = "runs"  # where the runs' folders are
    workers: int = 1  # runs at a time
    threads: int | None = None  # CPU threads of a run; None: the cores shared, or 4 on a cluster
    dry_run: bool = False  # only list the runs and how long they take
    cluster: Literal["slurm"] | None = None  # each run a job of its own
    partition: str | None = None  # SLURM's
    gpus: int = 1  # of a run on SLURM
    minutes: int = 24 * 60  # a job's limit; the run saves before it and is queued again
    slurm: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # more for sbatch: --slurm mem=8G


# --- which runs ----------------------------------------------------------------------------------


def grid(env, method=("lamo",), ratio=(1.0,), seed=(0, 1, 2), lm=(None,), mode=("normal",)):
    """Every combination, as dictionaries; seeds outermost, so that each is a whole study."""
    every = product(seed, env, ratio, method, lm, mode)
    return [dict(zip(AXES, values, strict=True)) for values in every]


STUDIES = {  # the paper's tables by their numbers in it, and what the README reports
    "table1": [
        *grid(["kitchen-partial"], PAPER_METHODS, (0.01, 0.1, 1.0)),
        *grid(["kitchen-complete"], PAPER_METHODS, (0.3, 0.5, 1.0)),
        *grid(["reacher2d"], PAPER_METHODS, (0.1, 0.3, 1.0)),
    ],
    "table2": grid(["breakout", "qbert", "pong"], ATARI_METHODS, (0.1, 1.0)),
    "table3": grid(["hopper", "halfcheetah", "walker2d"], PAPER_METHODS, (0.005, 0.01, 0.1, 1.0)),
    "ratios": grid(["hopper"], ("lamo", "lamo-random", "dt"), (0.005, 0.01, 0.05, 0.1)),
    "ablations": [*grid(["hopper"], ABLATIONS, (0.01,)), *grid(["reacher2d"], ABLATIONS)],
    "bundled": [  # on what comes with the project; "ratios" needs a full recording first
        *grid(["hopper"], (*ABLATIONS, "wiki-rl", *ALGORITHMS[:4]), (0.01,)),
        *grid(["reacher2d"], (*ABLATIONS, "wiki-rl", *ALGORITHMS[:4])),
        *grid(["hopper"], ("lamo",), (0.01,), lm=OTHER_LMS),
        *grid(["reacher2d"], ("lamo",), lm=OTHER_LMS),
        *grid(["walker2d", "halfcheetah"], SCARCE, (0.01,)),
    ],
    "scarce": [  # few episodes or delayed reward, where the paper's lead is largest
        *grid(["reacher2d"], SCARCE, (0.1, 0.3), seed=range(10)),
        *grid(["hopper"], SCARCE, (0.01,), seed=range(5), mode=("delayed",)),
    ],
    "real": [  # a real language model: what of its pre-training matters
        *grid(["reacher2d"], REAL, (0.1, 0.3), lm=("smollm2",)),
        *grid(["hopper", "walker2d"], REAL, (0.01,), lm=("smollm2",)),
    ],
}


def name_of(run):
    """The run's folder in --out: its place in the grid."""
    mode, lm = run["mode"].replace("normal", ""), Path(run["lm"] or "").name
    parts = [run["env"], run["method"], f"{run['ratio']:g}", mode, lm.removesuffix(".safetensors")]
    return "-".join([*filter(None, parts), f"s{run['seed']}"]).replace("/", "-")


def parse(flag, text, kind):
    """A flag's text as `kind` reads it. Raises UserError."""
    try:
        return kind(text)
    except ValueError as error:
        raise UserError(f"--{flag} {text}: {error}") from error


def runs_of(args):
    """The runs that were asked for, each once. Raises UserError for what is no study or grid."""
    asked = {}
    for name, kind in AXES.items():
        if typed := getattr(args, name):
            asked[name] = [parse(name, part, kind) for part in typed.split(",")]
    if args.study:
        runs = STUDIES[choose("study", args.study, STUDIES)]
        for name, values in asked.items():
            if absent := [str(x) for x in values if x not in {run[name] for run in runs}]:
                raise UserError(f"{args.study} has no {name} {', '.join(absent)}; give a grid")
        runs = [run for run in runs if all(run[name] in asked[name] for name in asked)]
    elif "env" in asked:
        runs = grid(**asked)
    else:
        raise UserError(f"name a study ({', '.join(STUDIES)}), or a grid: --env NAME,NAME ..")
    if not runs:
        raise UserError(f"no run of {args.study} is left by these flags")
    without = ("dt", *ALGORITHMS)  # a language model; dt has its own shape
    if "lm" in asked and all(run["method"] in without for run in runs):
        raise UserError("no method of this grid has a language model; leave out --lm")
    by_name = {}
    for run in runs:
        run = run | {"env": find_task(run["env"])[0]}  # as it is written in tasks.py
        run["lm"] = None if run["method"] in without else run["lm"]
        choose("method", run["method"], [*METHODS, *ALGORITHMS])
        choose("mode", run["mode"], ["normal", "delayed"])
        if by_name.setdefault(name_of(run), run) != run:
            raise UserError(f"two runs would be called {name_of(run)}; change --ratio or --lm")
    return list(by_name.values())


# --- one run -------------------------------------------------------------------------------------


def state_of(run, out):
    """What has become of a run: "finished", "interrupted" or "new"."""
    folder = Path(out) / name_of(run)
    if (folder / "result.json").is_file():
        return "finished"
    return "interrupted" if folder.exists() else "new"


def log_of(run, out):
    """Where what a run prints goes."""
    return Path(out) / "logs" / f"{name_of(run)}.txt"


def write_record(run, out, flags, job=None):
    """Write down the --flags that a run is begun with, and the id of its job."""
    write_json(log_of(run, out).with_suffix(".json"), {"flags": shlex.join(flags), "job": job})


def record_of(run, out):
    """What write_record wrote, or an empty dictionary."""
    path = log_of(run, out).with_suffix(".json")
    return json.loads(path.read_text()) if path.is_file() else {}


def start(run, out, flags, threads, **how):
    """The process, a subprocess.Popen made as `how` says, that begins or resumes a run."""
    folder, log = Path(out) / name_of(run), log_of(run, out)
    resumes = run["method"] not in ALGORITHMS and (folder / "ckpt.pt").is_file()
    if resumes:
        command = ["train.py", "--resume", str(folder)]
    else:
        shutil.rmtree(folder, ignore_errors=True)  # a baseline's, or of a run that saved nothing
        command, own = ["train.py"], {"out": out, "name": name_of(run), **run}
        if run["method"] in ALGORITHMS:
            command, own["algo"] = ["-m", "experiments.baselines"], own.pop("method")
        command += [f"--{name}={x}" for name, x in own.items() if x is not None] + flags
    log.parent.mkdir(parents=True, exist_ok=True)
    how["env"] = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with open(log, "a" if resumes else "w") as file:
        return subprocess.Popen([sys.executable, *command], stdout=file, stderr=file, **how)


def last_lines(run, out):
    """The end of a run's output, without its progress bars."""
    text = log_of(run, out).read_text(errors="replace") if log_of(run, out).is_file() else ""
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return [line for line in lines if "it/s" not in line and "s/it" not in line][-5:]


def progress_of(run, out):
    """(steps done, steps in all, seconds a step) by a run's own files; zeros if it has none yet."""
    folder = Path(out) / name_of(run)
    if not (folder / "log.jsonl").is_file():
        return 0, 0, 0.0
    steps = json.loads((folder / "config.json").read_text())["settings"]["steps"]
    lines = (folder / "log.jsonl").read_text().split("\n")[:-1]  # the whole ones
    rows = [row for row in map(json.loads, lines) if "seconds" in row]  # an evaluation has none
    if not rows:
        return 0, steps, 0.0
    done, spent = rows[-1]["step"], rows[-1]["seconds"]
    if len(rows) == 1:
        return done, steps, spent / done
    first = rows[0]  # by then a GPU has compiled the step
    return done, steps, (spent - first["seconds"]) / (done - first["step"])


def measure(run, flags, threads):
    """(steps in all, seconds a step), by beginning a run in a temporary folder. Where that fails,
    as the real one would, it prints why, and the seconds are 0."""
    print(f"measuring {PROBE_STEPS} steps of {name_of(run)}", flush=True)
    with tempfile.TemporaryDirectory() as aside:
        words = [*flags, "--log-every", str(PROBE_STEPS // 2), "--no-wandb"]
        process = start(run, aside, words, threads, start_new_session=True)
        try:
            while progress_of(run, aside)[0] < PROBE_STEPS and process.poll() is None:
                time.sleep(0.1)
        finally:
            process.terminate()
            process.wait()
        _, steps, seconds = progress_of(run, aside)
        if not seconds:
            print(f"{name_of(run)} will fail:", *last_lines(run, aside), sep="\n    ", flush=True)
    return steps, seconds


# --- all of them ---------------------------------------------------------------------------------


def estimate(runs, out, flags, workers, threads):
    """Print the runs and, from step times, which are kept in out/probes.json, how long they take.
    Seeds share a time; ratios do not, for a dataset may hold a part. Returns what will fail."""
    kept, total, failing = Path(out) / "probes.json", 0.0, []
    known = json.loads(kept.read_text()) if kept.is_file() else {}
    for run in runs:
        done, steps, seconds = progress_of(run, out)
        if not seconds:
            key = " ".join([name_of(run | {"seed": 0}), *flags, f"{threads} threads"])
            if key not in known:
                known[key] = measure(run, flags, threads)
                write_json(kept, {kind: found for kind, found in known.items() if found[1]})
            steps, seconds = known[key]
        failing += [] if seconds else [run]
        left = (steps - done) * seconds
        total += left / workers
        what = f"{steps - done:7} steps {left / 60:6.1f} min" if seconds else "fails"
        print(f"{state_of(run, out):12} {name_of(run):45} {what}")
    how_long = timedelta(seconds=round(total))
    print(f"{len(runs)} run(s), {workers} at a time: {how_long} without evaluations")
    return failing


def run_locally(runs, out, flags, workers, threads, stop):
    """Carry out runs, `workers` at a time. A signal lets those at work save."""
    waiting, working = list(runs), {}
    try:
        while (waiting or working) and not stop.number:
            while waiting and len(working) < workers:
                run = waiting.pop(0)
                write_record(run, out, flags)
                working[start(run, out, flags, threads, start_new_session=True)] = run
            time.sleep(POLL_SECONDS)
            for process in [process for process in working if process.poll() is not None]:
                run, left = working.pop(process), len(waiting) + len(working)
                print(f"{state_of(run, out)}: {name_of(run)}, {left} left", flush=True)
    finally:  # also where a second signal ends this at once
        for process in working:
            process.terminate()
        for process in working:
            process.wait()
    if stop.number:
        print("stopped; the same command goes on")
        raise SystemExit(128 + stop.number)


# --- on a cluster --------------------------------------------------------------------------------


class Job:
    """A run as submitit calls it on a node. `what` are the first arguments of start()."""

    def __init__(self, *what):
        self.what, self.process = what, None

    def __call__(self):
        if state_of(*self.what[:2]) == "finished":  # before the job was queued again
            return
        # SLURM's SIGUSR2 reaches every process of the job and ends those that do not handle it.
        deaf = partial(signal.signal, signal.SIGUSR2, signal.SIG_IGN)
        self.process = start(*self.what, preexec_fn=deaf)
        if self.wait() in (signal.SIGTERM, 128 + signal.SIGTERM):
            time.sleep(GRACE_SECONDS)  # a preempted job that exits by itself is not queued again

    def wait(self):
        """The exit code or signal of the process, also in a handler, where Popen.wait() locks."""
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT).si_status

    def checkpoint(self):
        """Let the run save. Returns what submitit, which calls this on SIGUSR2, queues again."""
        from submitit.helpers import DelayedSubmission

        if self.process:
            os.kill(self.process.pid, signal.SIGTERM)
            self.wait()
        return DelayedSubmission(Job(*self.what))


def submit(runs, out, flags, args):
    """Hand runs to the cluster as one array of jobs. Returns submitit's jobs. Raises UserError."""
    import submitit

    executor = submitit.AutoExecutor(Path(out) / "submitit", args.cluster)
    more = dict(word.partition("=")[::2] for word in args.slurm)
    executor.update_parameters(
        timeout_min=args.minutes,
        cpus_per_task=args.threads,
        gpus_per_node=args.gpus,
        slurm_partition=args.partition,
        slurm_array_parallelism=args.workers,
        slurm_srun_args=["--ntasks=1", f"--cpus-per-task={args.threads}"],
        slurm_additional_parameters={"requeue": True} | {k: x or True for k, x in more.items()},
    )
    try:
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):  # it prints what it raises
            return executor.submit_array([Job(run, out, flags, args.threads) for run in runs])
    except submitit.core.utils.FailedJobError as error:
        raise UserError(f"nothing was submitted: {reason(error)}") from error


def look_at_queue():
    """{id: (state, why it waits)} of the user's jobs that have not ended. Raises UserError."""
    command = ["squeue", "--me", "--array", "--noheader", "--format", "%i|%T|%r"]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        raise UserError(f"cannot look at the queue: {reason(found.stderr)}")
    return {job: rest for job, *rest in (row.split("|", 2) for row in found.stdout.splitlines())}


def run_on_cluster(runs, out, flags, args, stop):
    """Submit those runs that have no job in the queue yet, and wait for all of them."""
    told, queue = set(), look_at_queue()
    known = {record_of(run, out).get("job"): run for run in runs}
    while any(queue[job][0] == "COMPLETING" for job in known.keys() & queue.keys()):
        time.sleep(QUEUE_SECONDS)  # cancelled a moment ago, and still saving
        queue = look_at_queue()
    jobs = {job: run for job, run in known.items() if job in queue}
    new = [run for run in runs if run not in jobs.values()]
    print(f"{len(jobs)} run(s) have a job already, {len(new)} to submit", flush=True)
    submitted = submit(new, out, flags, args) if new else []
    for run, job in zip(new, submitted, strict=True):
        jobs[job.job_id] = run
        write_record(run, out, flags, job.job_id)
    while jobs and not stop.number:
        time.sleep(QUEUE_SECONDS)
        try:
            queue = look_at_queue()
        except UserError as error:  # SLURM's controller may be restarting
            queue = {job: ("PENDING", str(error)) for job in jobs}
        for job, run in list(jobs.items()):
            state, why = queue.get(job, ("", ""))
            if job not in queue:
                del jobs[job]
                log = Path(out) / "submitit" / f"{job}_0_log.err"
                print(f"{state_of(run, out)}: {name_of(run)}, {log}, {len(jobs)} left", flush=True)
            elif state == "PENDING" and why not in told:
                told.add(why)
                print(f"waiting: {name_of(run)}, job {job}: {why}", flush=True)
    if stop.number:
        print(f"the jobs go on; the same command waits for them; scancel {' '.join(jobs)}")
        raise SystemExit(128 + stop.number)


# --- the command ---------------------------------------------------------------------------------


def main():
    words = sys.argv[1:]
    if "--flags" in words[:-1]:  # else "--x" behind it would be taken for a flag of the sweep's
        i = words.index("--flags")
        words[i : i + 2] = [f"--flags={words[i + 1]}"]
    args = tyro.cli(Config, args=words, description=__doc__)
    runs, out, flags = runs_of(args), args.out, parse("flags", args.flags, shlex.split)
    if own := {word.split("=")[0] for word in flags}.intersection(OWN_FLAGS):
        raise UserError(f"--flags has {own.pop()}, which the sweep gives each run; leave it out")
    if args.workers < 1:
        raise UserError(f"--workers is {args.workers}, but must be at least 1")
    if args.cluster and shutil.which("srun") is None:
        raise UserError("--cluster slurm: there is no srun here; start it on a login node")
    if args.threads is None:
        here = os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // args.workers)
        args.threads = 4 if args.cluster else int(here)  # a login node's cores say nothing
    os.environ["LAMO_NETWORK"] = no_network() or "1"  # decided once, for all runs
    queue = look_at_queue() if args.cluster else {}
    for run in runs:
        had = record_of(run, out)
        begun = state_of(run, out) != "new" or had.get("job") in queue
        if had and begun and had["flags"] != shlex.join(flags):
            what = f"{name_of(run)} was begun with other --flags ({had['flags'] or 'none'})"
            raise UserError(f"{what}; give the same again, or another --out")
    left = [run for run in runs if state_of(run, out) != "finished"]
    print(f"{len(runs) - len(left)} run(s) finished already")
    stop, failing = StopSignals(), []
    if args.cluster:
        print(*(f"{state_of(run, out):12} {name_of(run)}" for run in left), sep="\n")
        print(f"{len(left)} run(s), {args.threads} CPU thread(s) each; no estimate on a cluster")
    else:
        stop.at_once = True
        failing = estimate(left, out, flags, args.workers, args.threads)
        stop.at_once = False
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
