"""Many runs from one command: a study of the paper's, or any grid.

    python -m experiments.sweep table3                       # the paper's table, all seeds
    python -m experiments.sweep --env hopper,walker2d --method lamo,dt --ratio 0.01,0.1 --seed 0,1,2
    python -m experiments.sweep bundled --workers 2          # what the README reports, on a CPU
    python -m experiments.sweep table3 --cluster slurm --partition gpu

Every run is a process of train.py or experiments/baselines.py with a folder of its own in --out,
named after its place in the grid. So the same command goes on where it was stopped: finished runs
are skipped, interrupted ones resumed (baselines, which cannot be, begin anew), failed ones are told
at the end with their output's last lines, while the others go on.
"""

import os
import shutil
import sys
import threading
import time
from contextlib import contextmanager
from itertools import product
from pathlib import Path

from tqdm import tqdm

import settings
from experiments.one_run import (
    ALGORITHMS,
    SAID_AGAIN,
    carry_out,
    flags_begun,
    last_lines,
    name_of,
    progress_of,
    seconds_a_step,
    state_of,
    steps_of,
    values_of,
)
from files import check_writable, read_json, try_lock
from plumbing import (
    Parser,
    StopSignals,
    UserError,
    check_package,
    choose,
    counted,
    is_number,
    printable,
    run_command,
    split_flags,
)
from tasks import find_task

POLL_SECONDS = 1.0  # between looks at the runs' logs

SEEDS = (0, 1, 2)
PAPER_METHODS = ("lamo", "dt", "wiki-rl", "cql", "iql", "td3bc", "bc")  # tables 1 and 3
ATARI_METHODS = ("lamo", "dt", "wiki-rl", "cql", "bcq", "nfq", "bc")  # table 2
ABLATIONS = ("lamo", "lamo-nolm", "lamo-linear", "lamo-freeze", "lamo-full", "lamo-random", "dt")
QUALITIES = ("mini", "assets/mini-lm-early.safetensors", "assets/mini-lm-random-corpus.safetensors")


def grid(env, method, ratio=(1.0,), seed=SEEDS, lm=("auto",)):
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
    "bundled": [  # on what comes with the project; "ratios" wants a full recording first
        *grid(["hopper"], tuple(settings.METHODS), (0.01,)),
        *grid(["reacher2d"], tuple(settings.METHODS)),
        *grid(["hopper"], ("bc", "td3bc", "iql", "cql"), (0.01,)),
        *grid(["reacher2d"], ("bc", "td3bc", "iql", "cql")),
        *grid(["hopper"], ("lamo",), (0.01,), lm=QUALITIES[1:]),
        *grid(["reacher2d"], ("lamo",), lm=QUALITIES[1:]),
        *grid(["walker2d", "halfcheetah"], ("lamo", "lamo-random", "dt", "bc"), (0.01,)),
    ],
}


# --- before they begin ----------------------------------------------------------------------------


def check_flags(runs, out, flags):
    """Raises UserError where a run that is there was begun with other flags than are given now."""
    for run in runs:
        try:
            had = dict(read_json(Path(out) / name_of(run) / "config.json")["settings"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # none yet, or none of ours: that is told elsewhere
        for flag, now in values_of(flags).items():
            name = flag.removeprefix("--").removeprefix("no-").replace("-", "_")
            if now == ["auto"] or flag in SAID_AGAIN:
                continue
            if name not in had:
                raise UserError(f"{name_of(run)} knows no {flag}; see train.py --help")
            before = had[name] if isinstance(had[name], list) else [had[name]]
            same = len(before) == len(now) and all(map(alike, before, now))
            if not same and (now or before != [not flag.startswith("--no-")]):
                was = f"was begun with {name} {' '.join(map(str, before))}"
                what = " ".join([flag, *now])
                raise UserError(f"{name_of(run)} {was}, not {what}; give another --out")
        left_out = values_of(flags_begun(run, out)).keys() - values_of(flags).keys()
        for flag in sorted(left_out - set(SAID_AGAIN)):
            what = f"was begun with {flag}, which --flags lacks now"
            raise UserError(f"{name_of(run)} {what}; give it again, or another --out")


def alike(before, typed):
    """Whether a flag's typed value is that of a setting."""
    try:
        return float(typed) == before if is_number(before) else str(before) == typed
    except ValueError:
        return False


def flags_of(text):
    """--flags as a list of words. Raises UserError for those that the sweep itself gives."""
    words = split_flags(text)
    if words and words[0][:2] != "--":
        raise UserError(f"--flags begins with {words[0]}, but a flag begins with --")
    for flag in ("--env", "--method", "--algo", "--ratio", "--seed", "--lm", "--out", "--name"):
        if flag in values_of(words):
            own = {"--algo": "--method", "--name": "--out"}.get(flag, flag)
            raise UserError(f"--flags has {flag}, which names the runs: give the sweep {own}")
    return words


def estimate(runs, out, flags, workers, threads):
    """Print the runs and, from measured step times, how long they will take together.

    Returns how many of them will fail.
    """
    total, failing = 0.0, 0
    for run in runs:
        folder = Path(out) / name_of(run)
        done, steps, seconds = progress_of(run, out)
        done = 0 if run["method"] in ALGORITHMS else done  # baselines begin anew
        if not seconds:
            seconds = seconds_a_step(run, out, flags, threads)
            failing += seconds is None
            steps = steps or steps_of(run, flags)
        left = (steps - done) * (seconds or 0.0)
        total += left
        time_left = "  fails" if seconds is None else f"{left / 60:6.1f} min"
        print(f"{state_of(folder):12} {name_of(run):45} {steps - done:7} steps {time_left}")
    hours = total / workers / 3600
    fails = f"; {failing} of them will fail" if failing else ""
    at_once = f"{counted(len(runs), 'run')}, {workers} at a time"
    print(f"{at_once}: about {hours:.1f} h without evaluations{fails}")
    return failing


# --- running them --------------------------------------------------------------------------------


def run_locally(runs, out, flags, workers, threads):
    """Carry out runs, `workers` at a time, with one bar."""
    waiting, failed, lock = list(reversed(runs)), [], threading.Lock()
    at_work, told = [], []  # processes; those that were told to stop

    def work():
        while True:
            with lock:
                if not waiting:
                    return
                run = waiting.pop()
            why = ""
            try:
                code = carry_out(run, out, flags, threads, at_work)
            except OSError as error:  # a full disk, a file where a folder should be
                code, why = 1, f" ({error})"
            if code and not stop.number:
                failed.append(run)
                others = "; the others go on" if len(runs) > 1 else ""
                bar.write(f"failed: {name_of(run)}{printable(why)}{others}")

    stop = StopSignals("stopping once the runs at work have saved what they have")
    pool = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
    form = "{l_bar}{bar}| {n:.2f}/{total} runs [{elapsed}<{remaining}]"
    try:
        with tqdm(total=len(runs), desc="sweep", bar_format=form) as bar:
            for thread in pool:
                thread.start()
            while any(thread.is_alive() for thread in pool):
                time.sleep(POLL_SECONDS)
                if stop.number:
                    with lock:
                        waiting.clear()
                    for process in at_work:
                        if process not in told and process.poll() is None:
                            process.terminate()
                            told.append(process)
                done = 0.0
                for run in runs:
                    if state_of(Path(out) / name_of(run)) == "finished" or run in failed:
                        done += 1
                    else:
                        step, steps, _ = progress_of(run, out)
                        done += step / steps if steps else 0
                if round(done, 2) != bar.n:
                    bar.n = round(done, 2)
                    bar.refresh()
    finally:  # a second signal: what is at work must not stay behind
        for process in at_work:
            if process not in told and process.poll() is None:
                process.terminate()
    stop.restore()
    if stop.number:
        print("stopped; the same command goes on")
        raise SystemExit(128 + stop.number)


def run_on_cluster(runs, out, flags, arguments):
    """Hand runs to a cluster through submitit, and wait for them."""
    import submitit

    executor = submitit.AutoExecutor(folder=Path(out) / "submitit", cluster=arguments.cluster)
    executor.update_parameters(timeout_min=arguments.minutes, cpus_per_task=arguments.threads)
    if arguments.cluster == "slurm":
        executor.update_parameters(
            gpus_per_node=arguments.gpus,
            slurm_partition=arguments.partition,
            slurm_array_parallelism=arguments.workers,
        )
    with executor.batch():
        jobs = [executor.submit(carry_out, run, out, flags, arguments.threads) for run in runs]
    for run, job in tqdm(list(zip(runs, jobs, strict=True)), desc="runs", unit="run"):
        try:
            job.result()
        except Exception as error:  # a job that was killed, or never ran
            print(f"{name_of(run)}: {error}", file=sys.stderr)


# --- the command ---------------------------------------------------------------------------------


def listed(kind):
    """A flag's values between commas: "1,2" -> (1, 2)."""

    def parse(text):
        return tuple(kind(part) for part in text.split(",") if part)

    parse.__name__ = f"{kind.__name__},{kind.__name__},.."  # how argparse names it in errors
    return parse


def runs_of(arguments):
    """The runs that were asked for, each once. Raises UserError for what is no study or grid."""
    asked = {name: getattr(arguments, name) for name in ("env", "method", "ratio", "seed", "lm")}
    asked = {name: value for name, value in asked.items() if value is not None}
    if arguments.study:
        runs = STUDIES[choose("study", arguments.study, STUDIES)]
        for name, values in asked.items():  # a part of a study
            runs = [run for run in runs if run[name] in values]
    elif "env" in asked:
        runs = grid(**({"method": ("lamo",)} | asked))
    else:
        studies = ", ".join(STUDIES)
        raise UserError(f"nothing to do: name a study ({studies}), or a grid: --env NAME,NAME ..")
    for run in runs:
        choose("method", run["method"], [*settings.METHODS, *ALGORITHMS])
        if not 0 < run["ratio"] <= 1:
            raise UserError(f"--ratio has {run['ratio']:g}, but must be above 0 and at most 1")
    of_name = {}
    for run in runs:
        run = run | {"env": find_task(run["env"])[0]}  # as it is written in tasks.py
        if of_name.setdefault(name_of(run), run) != run:
            why = "name ratios or language models that differ more"
            raise UserError(f"two runs of that grid would both be called {name_of(run)}; {why}")
    runs = list(of_name.values())
    if not runs:
        raise UserError(f"no run of {arguments.study or 'that grid'} is left by these flags")
    return runs


@contextmanager
def held(out):
    """Within this, no other sweep works in --out. Raises UserError if one does already."""
    lock = try_lock(Path(out) / ".sweep.lock")
    if lock is None:
        raise UserError(f"another sweep is at work in {out}; give another --out")
    try:
        yield
    finally:
        lock.release()


def sweep(runs, out, flags, arguments):
    """List runs, carry out those that are not finished, and say how they went."""
    check_flags(runs, out, flags)
    finished = [run for run in runs if state_of(Path(out) / name_of(run)) == "finished"]
    runs = [run for run in runs if run not in finished]
    print(f"{counted(len(finished), 'run')} finished already")
    failing = estimate(runs, out, flags, arguments.workers, arguments.threads)
    if arguments.dry_run or not runs:
        if failing:
            raise SystemExit(1)
        return
    if failing == len(runs):
        raise UserError("every run would fail, as is said above, so none was begun")
    if arguments.cluster:
        run_on_cluster(runs, out, flags, arguments)
    else:
        run_locally(runs, out, flags, arguments.workers, arguments.threads)
    failed = [run for run in runs if state_of(Path(out) / name_of(run)) != "finished"]
    for run in failed:
        print(f"failed: {name_of(run)}", *last_lines(run, out), sep="\n    ")
    print(f"{len(runs) - len(failed)} of {len(runs)} runs finished")
    if failed:
        raise SystemExit(1)


def main():
    parser = Parser(prog="python -m experiments.sweep", description=__doc__)
    add = parser.add_argument
    add("study", nargs="?", help=f"one of {', '.join(STUDIES)}; the next five flags take a part")
    add("--env", type=listed(str), help="tasks, between commas")
    add("--method", type=listed(str), help="methods of train.py, and bc, td3bc, iql, cql, bcq, nfq")
    add("--ratio", type=listed(float), help="shares of the dataset (default: 1)")
    add("--seed", type=listed(int), help="seeds (default: 0,1,2)")
    add("--lm", type=listed(str), help="language models, or weights' paths")
    add("--flags", default="", help='more flags for each run, in quotes: --flags "--steps 500"')
    add("--out", default="runs", help="where the runs' folders are (default: runs)")
    add("--workers", type=int, default=1, help="runs at a time (default: 1)")
    add(
        "--threads",
        type=int,
        help="CPU threads of a run (default: OMP_NUM_THREADS, or the cores, shared out)",
    )
    add("--dry-run", action="store_true", help="list the runs and how long they take, no more")
    add("--cluster", help="slurm; or local, which is submitit without a cluster")
    add("--partition", help="SLURM's")
    add("--gpus", type=int, default=1, help="of a run on SLURM (default: 1)")
    add("--minutes", type=int, default=24 * 60, help="a run's limit there (default: a day)")
    words = sys.argv[1:]
    if "--flags" in words[:-1]:  # argparse would take a lone "--x" behind it for a flag of its own
        i = words.index("--flags")
        words[i : i + 2] = [f"--flags={words[i + 1]}"]
    arguments = parser.parse_args(words)
    if arguments.cluster:
        choose("cluster", arguments.cluster, ("slurm", "local"))
        check_package("submitit", "--cluster")
        if arguments.cluster == "slurm" and shutil.which("srun") is None:
            raise UserError("--cluster slurm: there is no srun here; start it on a login node")
    if arguments.workers < 1:
        raise UserError(f"--workers is {arguments.workers}, but must be at least 1")
    if arguments.threads is not None and arguments.threads < 1:
        raise UserError(f"--threads is {arguments.threads}, but must be at least 1")
    if arguments.threads is None:  # then the user's own OMP_NUM_THREADS, if there is one
        shared = max(1, (os.cpu_count() or 1) // arguments.workers)
        said = os.environ.get("OMP_NUM_THREADS", "")
        arguments.threads = int(said) if said.isdecimal() and int(said) else shared
    runs, out, flags = runs_of(arguments), arguments.out, flags_of(arguments.flags)
    check_writable(out, "--out")
    Path(out).mkdir(parents=True, exist_ok=True)
    with held(out):
        sweep(runs, out, flags, arguments)


if __name__ == "__main__":
    run_command(main)
