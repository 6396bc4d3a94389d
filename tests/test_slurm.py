"""experiments/sweep.py on a real SLURM: a cluster of this machine alone, in a temporary folder."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import ExitStack

import pytest
from runs import finish, log_of, start, wait_for

from experiments.sweep import grid, name_of, state_of

pytest.importorskip("submitit")
missing = [name for name in ("munged", "slurmctld", "slurmd") if shutil.which(name) is None]
if missing or os.geteuid():
    pytest.skip(f"slurm-wlm, munge: no {missing or 'root'} here", allow_module_level=True)

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES
"""
SWEEP = ["-m", "experiments.sweep", "--env=hopper", "--ratio=0.01", "--seed=0", "--cluster=slurm"]
FLAGS = "--log-every 2 --episodes 1 --episode-limit 5 --batch 4 --lm-length 32 --steps"
(DT,) = grid(["hopper"], ("dt",), (0.01,), (0,))


def ask(*command):
    return subprocess.run(command, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Runs munged, slurmctld and slurmd while the tests of this file run."""
    folder, host = tmp_path_factory.mktemp("slurm"), socket.gethostname().split(".")[0]
    with socket.create_server(("", 0)) as one, socket.create_server(("", 0)) as two:
        ports = [one.getsockname()[1], two.getsockname()[1]]
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, host=host, ports=ports))
    (folder / "key").write_bytes(os.urandom(64))
    (folder / "key").chmod(0o600)
    files = {"key-file": "key", "socket": "munge.socket", "pid-file": "pid", "seed-file": "seed"}
    words = [f"--{flag}={folder / name}" for flag, name in files.items()]
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        for command in (["munged", "-F", "-f", *words], ["slurmctld", "-D"], ["slurmd", "-D"]):
            log = stack.enter_context(open(folder / f"{command[0]}.txt", "w"))
            daemon = subprocess.Popen(command, stdout=log, stderr=log)
            stack.callback(daemon.wait, 30)
            stack.callback(daemon.terminate)
        while "idle" not in ask("sinfo", "--noheader"):
            assert daemon.poll() is None, (folder / "slurmd.txt").read_text()
            time.sleep(0.2)
        yield
        while ask("squeue", "--noheader"):
            ask("scancel", "--me")
            time.sleep(1)


def job_of(run, out):
    return json.loads((out / "logs" / f"{name_of(run)}.json").read_text())["job"]


def test_jobs_outlive_the_sweep_which_takes_them_up_and_a_preempted_one_goes_on(slurm, tmp_path):
    # baselines learn no text, so bc does not know one of these flags
    words = [*SWEEP, "--gpus=0", "--method=dt,bc", "--workers=2", "--threads=1", "--out", tmp_path]
    words += ["--flags", f"{FLAGS} 1000", "--slurm", "comment=one two"]
    sweep, log = start(*words), tmp_path / name_of(DT) / "log.jsonl"
    wait_for(log, sweep)
    job = job_of(DT, tmp_path)
    assert "one two" in ask("squeue", "--noheader", "--format", "%k")
    sweep.send_signal(signal.SIGINT)
    out, _ = finish(sweep, 128 + signal.SIGINT)
    assert f"scancel {job}" in out
    sweep = start(*words)
    ask("scancel", "--signal=USR2", job)  # as before a time limit
    out, _ = finish(sweep, 1)
    assert job_of(DT, tmp_path) == job
    assert state_of(DT, tmp_path) == "finished"
    assert "going on with" in (tmp_path / "logs" / f"{name_of(DT)}.txt").read_text()
    assert [row["step"] for row in log_of(log.parent) if "lr" in row] == [*range(2, 1001, 2)]
    assert "--lm-length" in out  # its output's last lines


def test_a_job_that_cannot_start_is_explained_and_a_cancelled_one_is_given_up(slurm, tmp_path):
    sweep = start(*SWEEP, "--gpus=0", "--method=dt", "--threads=64", "--out", tmp_path)
    assert any("PartitionConfig" in line for line in sweep.stdout)  # SLURM's reason
    ask("scancel", job_of(DT, tmp_path))
    finish(sweep, 1)


@pytest.mark.parametrize("word", ["--partition=moon", "--gpus=8"])
def test_what_sbatch_refuses_is_one_line(slurm, word, tmp_path):
    _, errors = finish(start(*SWEEP, "--method=dt", "--out", tmp_path, word), 2)
    assert errors.count("\n") == 1
