"""Asked to stop, a run stops after a step that all ranks agree on, saves once, and goes on exactly
(issue 5, items 1 and 8)."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.system import jobs
from tests.system.exact import COMMON, assert_same
from tests.system.test_exact import family, saving, wait_for_step

SLEEP = {"LAUNCHER_TEST_SLEEP": "0.05"}
# As many workers, and so threads, in all runs that are compared.
ONE_WORKER = [*COMMON, "DATALOADER.NUM_WORKERS", "1"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[int | None, Path]:
    """Runs that nobody stopped, by number of ranks."""
    runs = {}
    for ranks in (None, 2):
        runs[ranks] = tmp_path_factory.mktemp("reference") / "run"
        jobs.train(*ONE_WORKER, "OUTPUT_DIR", runs[ranks], ranks=ranks).ok()
    return runs


def descendants(job: jobs.Job) -> list[psutil.Process]:
    return psutil.Process(job.process.pid).children(recursive=True)


def send(job: jobs.Job, number: int, to: str) -> None:
    torchrun, ranks = psutil.Process(job.process.pid), family(job)
    targets = {
        "itself": [torchrun],
        "torchrun": [torchrun],
        "rank 0": ranks[:1],
        "rank 1": ranks[1:],
        "everyone": [torchrun, *descendants(job)],
        "everyone, twice": [torchrun, *descendants(job)] * 2,
    }[to]
    for process in targets:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def assert_stopped(run: Path, reason: str) -> None:
    status = jobs.status(run)
    assert status["state"] == "stopped" and reason in status["reason"], status
    history = jobs.history(run)
    stops = [record for record in history if record["event"] == "stop"]
    assert stops[-1]["step"] == status["step"] and stops[-1]["reason"] == status["reason"]
    saved = [record["step"] for record in history if record["event"] == "checkpoint"]
    assert saved.count(status["step"]) == 1
    command = [sys.executable, "-m", "launcher", "runs", "status", str(run)]
    assert subprocess.run(command, cwd=jobs.ROOT, capture_output=True).returncode == 75


def assert_gone(processes: list[psutil.Process]) -> None:
    """No process is left after 10 s, and no shared memory that one of them made."""
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive
    pids = {str(process.pid) for process in processes}
    shared = [path.name for path in Path("/dev/shm").glob("*")]
    assert not [name for name in shared if pids & set(re.split(r"\D+", name))], shared


@pytest.mark.parametrize(
    ("ranks", "number", "to"),
    [
        (2, signal.SIGTERM, "torchrun"),
        pytest.param(2, signal.SIGTERM, "rank 1", marks=pytest.mark.slow),
        (2, signal.SIGINT, "everyone, twice"),
        (2, signal.SIGKILL, "torchrun"),
        pytest.param(2, signal.SIGTERM, "everyone", marks=pytest.mark.slow),
        pytest.param(2, signal.SIGINT, "torchrun", marks=pytest.mark.slow),
        pytest.param(2, signal.SIGUSR1, "rank 0", marks=pytest.mark.slow),
        pytest.param(2, signal.SIGUSR1, "torchrun", marks=pytest.mark.slow),
        (None, signal.SIGINT, "itself"),
        pytest.param(None, signal.SIGUSR1, "itself", marks=pytest.mark.slow),
    ],
)
def test_a_signal(
    ranks: int | None, number: int, to: str, reference: dict[int | None, Path], tmp_path: Path
) -> None:
    """One checkpoint, the right exit code, no process left, and the run goes on exactly."""
    run = tmp_path / "run"
    args = [*ONE_WORKER, "OUTPUT_DIR", run]
    with jobs.start(*args, ranks=ranks, env=SLEEP) as job:
        wait_for_step(run, 6, job)
        left = descendants(job)
        send(job, number, to)
        ended = job.wait(60)
        assert_gone(left)
    died = to == "torchrun" and number in (signal.SIGKILL, signal.SIGUSR1)
    assert_stopped(run, "torchrun died" if died else signal.Signals(number).name)
    if ranks is None:
        assert ended.code == 75
    elif to in ("rank 0", "rank 1"):
        assert ended.code == 0  # torchrun would take any other for a failure
    jobs.train(*args, "--resume", ranks=ranks).ok()
    assert_same(run, reference[ranks])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [None, 2])
def test_a_signal_inside_a_save(ranks: int | None, tmp_path: Path) -> None:
    """The save is finished, and the stop's own one made; nothing of either is left half done."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    args = [*COMMON, "TASK.WIDTH", "2560"]  # large enough for a save to be caught at work
    with jobs.start(*args, "OUTPUT_DIR", run, ranks=ranks, env=SLEEP) as job:
        wait_for_step(run, 3, job)
        deadline = time.monotonic() + 60
        while not (under_way := saving(run)):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        send(job, signal.SIGTERM, "everyone")
        assert saving(run) == under_way  # the signal fell into it
        job.wait(60)
    assert_stopped(run, "SIGTERM")
    assert not saving(run)
    jobs.train(*args, "OUTPUT_DIR", run, "--resume", ranks=ranks).ok()
    jobs.train(*args, "OUTPUT_DIR", whole, ranks=ranks).ok()
    assert_same(run, whole)


@pytest.mark.parametrize("ranks", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_a_second_signal_leaves_at_once(ranks: int | None, tmp_path: Path) -> None:
    """Five seconds after the first it is no longer the same request."""
    run = tmp_path / "run"
    env = {"LAUNCHER_TEST_EVAL_SLEEP": "1000"}  # a stop would have to wait for its batch
    with jobs.start(
        *COMMON,
        "LOG.EVERY",
        "1step",
        "DATALOADER.NUM_WORKERS",
        "1",
        "OUTPUT_DIR",
        run,
        ranks=ranks,
        env=env,
    ) as job:
        wait_for_step(run, 3, job)
        time.sleep(1)
        left = descendants(job)
        send(job, signal.SIGINT, "everyone, twice")
        time.sleep(5.5)
        assert job.process.poll() is None
        send(job, signal.SIGINT, "everyone")
        ended = job.wait(20)
        assert_gone(left)
    assert ended.code != 0 and "SIGINT again: leaving at once" in ended.err
    assert jobs.status(run)["state"] == "running"  # readers call it lost; the last save is there
    assert jobs.checkpoint_steps(run) == [4]


@pytest.mark.slow
def test_a_signal_while_ranks_start(tmp_path: Path) -> None:
    """Ranks that have met stop together, after the first step."""
    run = tmp_path / "run"
    env = {"LAUNCHER_TEST_BUILD_SLEEP": "8"}
    with jobs.start(*COMMON, "OUTPUT_DIR", run, ranks=2, env=env) as job:
        deadline = time.monotonic() + 60
        while jobs.read(job.err).count("rank 0 of 2") == 0:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        send(job, signal.SIGTERM, "everyone")
        job.wait(60)
    assert_stopped(run, "SIGTERM")
    assert jobs.status(run)["step"] == 1


def test_two_jobs_start_at_once(tmp_path: Path) -> None:
    """On one machine, without a clash of ports."""
    runs = [tmp_path / "a", tmp_path / "b"]
    started = [
        jobs.start(*COMMON, "TRAIN.DURATION", "6step", "OUTPUT_DIR", run, ranks=2) for run in runs
    ]
    try:
        for job in started:
            job.wait(90).ok()
    finally:
        for job in started:
            if job.process.poll() is None:
                job.kill()
    assert [jobs.status(run)["state"] for run in runs] == ["completed"] * 2


@pytest.mark.parametrize(
    ("options", "env", "reason"),
    [
        ([], {}, "file STOP"),
        (["TRAIN.MAX_TIME", "6s"], {}, "TRAIN.MAX_TIME"),
        pytest.param(
            *([], {"SLURM_JOB_END_TIME": "38"}, "Slurm's time limit"), marks=pytest.mark.slow
        ),
    ],
    ids=["file", "time", "Slurm"],
)
def test_other_reasons_to_stop(
    options: list[str],
    env: dict[str, str],
    reason: str,
    reference: dict[int | None, Path],
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    args = [*ONE_WORKER, "OUTPUT_DIR", run]
    # From now on, in Unix seconds; half a minute is spared for the job file.
    env = {name: str(int(time.time()) + int(seconds)) for name, seconds in env.items()}
    slow = {"LAUNCHER_TEST_SLEEP": "0.4"}
    with jobs.start(*args, *options, env=slow | env) as job:
        if reason == "file STOP":
            wait_for_step(run, 3, job)
            (run / "STOP").touch()
        assert job.wait(60).code == 75
    assert_stopped(run, reason)
    jobs.train(*args, "--resume").ok()
    assert_same(run, reference[None])
    assert not (run / "STOP").exists()


@pytest.mark.parametrize("ranks", [pytest.param(None, marks=pytest.mark.slow), 2])
def test_a_stop_in_an_evaluation(
    ranks: int | None, reference: dict[int | None, Path], tmp_path: Path
) -> None:
    """The evaluation is given up, and made up for by the attempt that goes on: once, exactly."""
    run = tmp_path / "run"
    args: list[Any] = [*COMMON, "EVAL.BATCH_SIZE", "4", "OUTPUT_DIR", run]
    with jobs.start(*args, ranks=ranks, env={"LAUNCHER_TEST_EVAL_SLEEP": "2"}) as job:
        wait_for_step(run, 3, job)
        time.sleep(3)  # an evaluation, every fifth step, takes far longer than all between
        send(job, signal.SIGTERM, "everyone")
        job.wait(60)
    assert_stopped(run, "SIGTERM")
    at = [record for record in jobs.metrics(run) if record["step"] == jobs.status(run)["step"]]
    assert not any("val/loss" in record for record in at)
    jobs.train(*args, "--resume", ranks=ranks).ok()
    whole = tmp_path / "whole"
    jobs.train(*COMMON, "EVAL.BATCH_SIZE", "4", "OUTPUT_DIR", whole, ranks=ranks).ok()
    assert_same(run, whole)


def test_a_stop_before_the_first_step(tmp_path: Path) -> None:
    """Nothing is done yet that could be saved: the process leaves, resumable, with nothing made."""
    slow = {"LAUNCHER_TEST_BUILD_SLEEP": "60"}
    job = jobs.start(*COMMON, "OUTPUT_DIR", tmp_path / "run", env=slow)
    deadline = time.monotonic() + 60
    while not (threads := psutil.Process(job.process.pid).threads()) or len(threads) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(3)
    job.process.send_signal(signal.SIGTERM)
    ended = job.wait(20)
    assert ended.code == 75 and "stopped before the first step" in ended.err
    assert not (tmp_path / "run").exists()
