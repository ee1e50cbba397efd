"""The job file for Slurm and the loop for machines without a queue (issue 5, item 2).

The tests play Slurm: `srun` and `scontrol` are stand-ins on the PATH, the warning signal and the
next attempt come from here.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.system import jobs
from tests.system.exact import COMMON, assert_same
from tests.system.test_exact import wait_for_step
from tests.system.test_failures import COMMON as FAILING

SBATCH, LOOP = jobs.ROOT / "tools/slurm.sbatch", jobs.ROOT / "tools/keep_running.sh"
SLEEP = {"LAUNCHER_TEST_SLEEP": "0.05"}
JOB = 4711
# Two nodes of one task each. What the options are is left to the job file.
SRUN = """
import itertools, os, subprocess, sys
command = list(itertools.dropwhile(lambda word: word.startswith("-"), sys.argv[1:]))
common = {
    **os.environ, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_STEP_NODELIST": "localhost,elsewhere", "SLURM_LOCALID": "0",
}
tasks = [
    subprocess.Popen(command, env=common | {"SLURM_PROCID": str(i), "SLURM_NODEID": str(i)})
    for i in range(2)
]
with open("tasks", "w") as file:
    print(*(task.pid for task in tasks), file=file, flush=True)
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """
import sys
with open("requests", "a") as file:
    print(*sys.argv[1:], file=file)
"""


class Slurm:
    """A queue of one job, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.restarts = folder, -1
        bin = folder / "bin"
        bin.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (bin / name).write_text(f"#!{sys.executable}{text}")
            (bin / name).chmod(0o755)
        self.path = f"{bin}{os.pathsep}{os.environ['PATH']}"

    def start(self, *words: object) -> jobs.Job:
        """The job's next attempt."""
        self.restarts += 1
        env = {
            **SLEEP,
            "OMP_NUM_THREADS": "1",
            **{"PATH": self.path, "PYTHON": sys.executable, "PYTHONPATH": str(jobs.ROOT)},
            "SLURM_JOB_ID": str(JOB),
            **({"SLURM_RESTART_COUNT": str(self.restarts)} if self.restarts else {}),
        }
        (self.folder / "tasks").unlink(missing_ok=True)
        return jobs.Job(["bash", str(SBATCH), *map(str, words)], env, self.folder)

    def warn(self) -> None:
        """The signal before the time limit, as the job file asks for it."""
        (shell, name), *_ = re.findall(r"^#SBATCH --signal=(B:)?(\w+)@", SBATCH.read_text(), re.M)
        assert not shell, "the ranks would get none"
        self.signal(signal.Signals[f"SIG{name}"])

    def signal(self, number: int) -> None:
        """As Slurm does it: to every process of the job's steps, not to the job file's shell."""
        tasks = [psutil.Process(int(pid)) for pid in (self.folder / "tasks").read_text().split()]
        for process in [*tasks, *(child for task in tasks for child in task.children())]:
            process.send_signal(number)

    @property
    def requests(self) -> list[str]:
        file = self.folder / "requests"
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path)


def test_a_job_that_outlives_its_limits(slurm: Slurm, tmp_path: Path) -> None:
    """A time limit, a failed node and a preemption later it is complete, exactly."""
    reference, run = tmp_path / "reference", tmp_path / "run"
    slurm.start(reference, *COMMON).wait(90).ok()
    assert slurm.requests == []
    slurm.restarts = -1
    args = [run, *COMMON, "DATALOADER.NUM_WORKERS", "1"]

    job = slurm.start(*args)
    wait_for_step(run, 6, job)
    slurm.warn()
    assert "back to the queue" in job.wait(60).ok().out
    assert slurm.requests == [f"requeue {JOB}"]
    assert jobs.status(run)["state"] == "stopped" and jobs.status(run)["reason"] == "SIGUSR1"

    job = slurm.start(*args)
    wait_for_step(run, jobs.status(run)["step"] + 3, job)
    job.kill()  # with its node, and Slurm starts it again without being asked

    job = slurm.start(*args)
    wait_for_step(run, 18, job)
    slurm.signal(signal.SIGTERM)
    job.wait(60).ok()
    assert slurm.requests == [f"requeue {JOB}"] * 2

    assert "completed" in slurm.start(*args).wait(90).ok().out
    assert slurm.requests == [f"requeue {JOB}"] * 2
    assert not (tmp_path / f"slurm-{JOB}.attempts").exists()
    assert_same(run, reference)


def test_a_job_that_gets_nowhere(slurm: Slurm, tmp_path: Path) -> None:
    """Fails before its first step: tried once more, then never again."""
    run = tmp_path / "run"
    args = [run, *FAILING, "TASK.RANK", "0", "TASK.FAILURE", "start"]
    ended = slurm.start(*args).wait(60).ok()
    assert "no data here" in ended.err and slurm.requests == [f"requeue {JOB}"]
    ended = slurm.start(*args).wait(60)
    assert ended.code == 1 and slurm.requests == [f"requeue {JOB}"]
    assert "no run yet, and 2 attempts in a row made no progress (step 0)" in ended.out
    assert not run.exists()


def test_bad_usage_is_not_tried_again(slurm: Slurm, tmp_path: Path) -> None:
    ended = slurm.start(tmp_path / "run", *FAILING, "OPTIM.LRR", "1").wait(60)
    assert ended.code == 2 and slurm.requests == []
    assert "did you mean OPTIM.LR?" in ended.err and "would only repeat itself" in ended.out


@pytest.mark.slow
def test_a_person_stops_the_job(slurm: Slurm, tmp_path: Path) -> None:
    """With a file STOP, while it runs and while it waits in the queue."""
    run = tmp_path / "run"
    job = slurm.start(run, *COMMON)
    wait_for_step(run, 3, job)
    (run / "STOP").touch()
    ended = job.wait(60)
    assert ended.code == 1 and slurm.requests == []
    assert "stopped, and asked not to go on by" in ended.out
    before = jobs.snapshot(run)
    ended = slurm.start(run, *COMMON).wait(60)
    assert ended.code == 1 and "not started again" in ended.out
    assert jobs.snapshot(run) == before


def loop(run: Path, *command: object, sleep: str = "0") -> jobs.Job:
    env = {"PYTHON": sys.executable, "LAUNCHER_TEST_SLEEP": sleep}
    return jobs.Job([str(LOOP), str(run), sys.executable, *map(str, command)], env, jobs.ROOT)


def test_the_loop_goes_on_until_the_run_is_complete(tmp_path: Path) -> None:
    run = tmp_path / "run"
    once = ["TASK.FAILURE", "kill", "TASK.RANK", "0", "TASK.ONCE", tmp_path / "killed"]
    ended = loop(run, jobs.TRAIN, *FAILING, *once, "TASK.AT", "8").wait(90).ok()
    assert "lost at step 6, to go on" in ended.out
    assert [record["event"] for record in jobs.history(run)].count("resume") == 1
    assert [record["step"] for record in jobs.metrics(run)] == list(range(1, 21))


def test_the_loop_ends_where_it_gets_nowhere(tmp_path: Path) -> None:
    run = tmp_path / "run"
    args = [*FAILING, "TASK.RANK", "0", "TASK.FAILURE"]
    ended = loop(run, jobs.TRAIN, *args, "start").wait(60)
    assert ended.code == 1 and ended.err.count("FileNotFoundError: no data here") == 2
    assert "2 attempts in a row made no progress" in ended.out
    assert loop(run, jobs.TRAIN, *args, "start", "OPTIM.LRR", "1").wait(60).code == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_loop_ends_with_its_run(number: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C goes to the whole process group, SIGTERM to the loop alone."""
    run = tmp_path / "run"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", jobs.TRAIN]
    job = loop(run, *torchrun, *COMMON, sleep="0.1")
    try:
        wait_for_step(run, 3, job)
        left = psutil.Process(job.process.pid).children(recursive=True)
        if number == signal.SIGINT:
            os.killpg(job.process.pid, number)
        else:
            job.process.send_signal(number)
        ended = job.wait(60)
        assert ended.code == 75 and "stopped (" in ended.out and "to go on" not in ended.out
        assert not psutil.wait_procs(left, timeout=10)[1]
    finally:
        if job.process.poll() is None:
            job.kill()
    assert jobs.status(run)["state"] == "stopped"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_the_scripts_are_clean() -> None:
    subprocess.run(["shellcheck", str(SBATCH), str(LOOP)], check=True)
