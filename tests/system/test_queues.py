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
from tests.system.jobs import wait_for_step
from tests.system.test_failures import COMMON as FAILING

SBATCH, LOOP = jobs.ROOT / "tools/slurm.sbatch", jobs.ROOT / "tools/keep_running.sh"
SLEEP = {"LAUNCHER_TEST_SLEEP": "0.05"}
# Two tasks, on as many nodes as the test says. What the options are is left to the job file.
SRUN = """
import itertools, os, subprocess, sys
command = list(itertools.dropwhile(lambda word: word.startswith("-"), sys.argv[1:]))
apart = os.environ["NODES"] == "2"
common = {
    **os.environ, "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)" if apart else "2",
    "SLURM_STEP_NODELIST": "localhost,elsewhere" if apart else "localhost",
}
tasks = []
for i in "01":
    node, place = (i, "0") if apart else ("0", i)
    own = {"SLURM_PROCID": i, "SLURM_NODEID": node, "SLURM_LOCALID": place}
    tasks.append(subprocess.Popen(command, env=common | own))
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
        folder.mkdir()
        self.folder, self.job, self.restarts = folder, jobs.slurm_job(), -1
        bin = folder / "bin"
        bin.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (bin / name).write_text(f"#!{sys.executable}{text}")
            (bin / name).chmod(0o755)
        self.path = f"{bin}{os.pathsep}{os.environ['PATH']}"

    def start(self, *words: object, nodes: int = 2) -> jobs.Job:
        """The job's next attempt."""
        self.restarts += 1
        env = {
            **SLEEP,
            **{"OMP_NUM_THREADS": "1", "NODES": str(nodes), "SLURM_JOB_ID": self.job},
            **{"PATH": self.path, "PYTHON": sys.executable, "PYTHONPATH": str(jobs.ROOT)},
            **({"SLURM_RESTART_COUNT": str(self.restarts)} if self.restarts else {}),
        }
        (self.folder / "tasks").unlink(missing_ok=True)
        return jobs.Job(["bash", SBATCH, *words], env, self.folder)

    def run(self, *words: object, nodes: int = 2) -> jobs.Ended:
        with self.start(*words, nodes=nodes) as job:
            return job.wait(90)

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
    def requeued(self) -> int:
        """How often the job file has asked for the job's next attempt; it asks for nothing else."""
        file = self.folder / "requests"
        requests = file.read_text().splitlines() if file.exists() else []
        assert set(requests) <= {f"requeue {self.job}"}
        return len(requests)


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path / "slurm")


@pytest.mark.slow
def test_a_job_that_outlives_its_limits(slurm: Slurm, tmp_path: Path) -> None:
    """A time limit, a failed node and a preemption later it is complete, exactly."""
    run, reference = tmp_path / "run", tmp_path / "reference"
    args = [run, *COMMON, "DATALOADER.NUM_WORKERS", "1"]

    with slurm.start(*args) as job:
        wait_for_step(run, 6, job)
        slurm.warn()
        assert "back to the queue" in job.wait(60).ok().out
    assert slurm.requeued == 1
    assert jobs.status(run)["state"] == "stopped" and jobs.status(run)["reason"] == "SIGUSR1"

    with slurm.start(*args) as job:
        wait_for_step(run, jobs.status(run)["step"] + 3, job)
        job.kill()  # with its node, and Slurm starts it again without being asked

    with slurm.start(*args) as job:
        wait_for_step(run, 18, job)
        slurm.signal(signal.SIGTERM)
        job.wait(60).ok()
    assert slurm.requeued == 2

    assert "completed" in slurm.run(*args).ok().out
    assert slurm.requeued == 2
    assert not (slurm.folder / f"slurm-{slurm.job}.attempts").exists()

    # The same on one node, in one go.
    alone = Slurm(tmp_path / "alone")
    alone.run(reference, *COMMON, nodes=1).ok()
    assert alone.requeued == 0
    assert sorted(path.name for path in (reference / "logs").iterdir()) == [
        "rank0.log",
        "rank1.log",
    ]
    environment = jobs.environment(reference)
    assert (environment["job"], environment["launched_by"]) == (alone.job, "srun")
    assert len(environment["ranks"]) == 2
    assert_same(run, reference)


@pytest.mark.slow
def test_a_job_that_gets_nowhere(slurm: Slurm, tmp_path: Path) -> None:
    """Fails before its first step: tried once more, then never again."""
    run = tmp_path / "run"
    args = [run, *FAILING, "TASK.RANK", "0", "TASK.FAILURE", "start"]
    ended = slurm.run(*args).ok()
    assert "no data here" in ended.err and slurm.requeued == 1
    ended = slurm.run(*args)
    assert ended.code == 1 and slurm.requeued == 1
    assert "no run yet, and 2 attempts in a row made no progress (step 0)" in ended.out
    assert not run.exists()


def test_bad_usage_is_not_tried_again(slurm: Slurm, tmp_path: Path) -> None:
    ended = slurm.run(tmp_path / "run", *FAILING, "OPTIM.LRR", "1")
    assert ended.code == 2 and slurm.requeued == 0
    assert "did you mean OPTIM.LR?" in ended.err and "would only repeat itself" in ended.out


@pytest.mark.slow
def test_a_person_stops_the_job(slurm: Slurm, tmp_path: Path) -> None:
    """With a file STOP, while it runs and while it waits in the queue."""
    run = tmp_path / "run"
    with slurm.start(run, *COMMON) as job:
        wait_for_step(run, 3, job)
        (run / "STOP").touch()
        ended = job.wait(60)
    assert ended.code == 1 and slurm.requeued == 0
    assert "stopped, and asked not to go on by" in ended.out
    with jobs.unchanged(run):
        ended = slurm.run(run, *COMMON)
    assert ended.code == 1 and "not started again" in ended.out


def loop(run: Path, *words: object, sleep: str = "0") -> jobs.Job:
    env = {"PYTHON": sys.executable, "LAUNCHER_TEST_SLEEP": sleep}
    return jobs.Job([LOOP, run, *words], env)


def looped(run: Path, *words: object) -> jobs.Ended:
    with loop(run, sys.executable, jobs.TRAIN, *FAILING, "TASK.RANK", "0", *words) as job:
        return job.wait(90)


def test_the_loop_goes_on_until_the_run_is_complete(tmp_path: Path) -> None:
    run = tmp_path / "run"
    once = ["TASK.FAILURE", "kill", "TASK.ONCE", tmp_path / "killed", "TASK.AT", "8"]
    assert "lost at step 6, to go on" in looped(run, *once).ok().out
    assert len(jobs.history(run, "resume")) == 1
    steps = [record["step"] for record in jobs.metrics(run) if "train/loss" in record]
    assert steps == list(range(1, 21))


@pytest.mark.slow
def test_the_loop_ends_where_it_gets_nowhere(tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = looped(run, "TASK.FAILURE", "start")
    assert ended.code == 1 and ended.err.count("FileNotFoundError: no data here") == 2
    assert "2 attempts in a row made no progress" in ended.out
    assert looped(run, "TASK.FAILURE", "start", "OPTIM.LRR", "1").code == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_loop_ends_with_its_run(number: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C goes to the whole process group, SIGTERM to the loop alone."""
    run = tmp_path / "run"
    torchrun = [*jobs.TORCHRUN, "--standalone", "--nproc-per-node=2", jobs.TRAIN]
    with loop(run, *torchrun, *COMMON, sleep="0.1") as job:
        wait_for_step(run, 3, job)
        left = job.descendants()
        if number == signal.SIGINT:
            os.killpg(job.pid, number)
        else:
            job.send(number)
        ended = job.wait(60)
        assert ended.code == 75 and "stopped (" in ended.out and "to go on" not in ended.out
        assert not psutil.wait_procs(left, timeout=10)[1]
    assert jobs.status(run)["state"] == "stopped"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_the_scripts_are_clean() -> None:
    subprocess.run(["shellcheck", str(SBATCH), str(LOOP)], check=True)
