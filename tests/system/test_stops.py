"""Asked to stop, a run stops after a step that all ranks agree on, saves once, and goes on exactly
(issue 5, items 1 and 8)."""

from __future__ import annotations

import contextlib
import re
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher import cli
from tests.system import jobs
from tests.system.exact import COMMON, assert_same
from tests.system.jobs import saving, slow, wait_for_step
from tests.waiting import wait_until

SLEEP = {"LAUNCHER_TEST_SLEEP": "0.2"}
# As many workers, and so threads, in all runs that are compared.
ONE_WORKER = [*COMMON, "DATALOADER.NUM_WORKERS", "1"]


References = dict[int | None, Path]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> References:
    """Runs that nobody stopped, by number of ranks."""
    runs = {ranks: tmp_path_factory.mktemp("reference") / "run" for ranks in (None, 2)}
    for ranks, run in runs.items():
        jobs.train(*ONE_WORKER, "OUTPUT_DIR", run, ranks=ranks).ok()
    return runs


def send(job: jobs.Running, number: int, to: str) -> None:
    torchrun, ranks = psutil.Process(job.pid), job.ranks()
    targets = {
        "itself": [torchrun],
        "torchrun": [torchrun],
        "rank 0": ranks[:1],
        "rank 1": ranks[1:],
        "everyone": [*job.descendants(), torchrun],
        "everyone, twice": [*job.descendants(), torchrun] * 2,
    }[to]
    for process in targets:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def assert_stopped(run: Path, *reasons: str) -> None:
    """Stopped, for one of these reasons."""
    status = jobs.status(run)
    assert status["state"] == "stopped" and any(r in status["reason"] for r in reasons), status
    stop = jobs.history(run, "stop")[-1]
    assert (stop["step"], stop["reason"]) == (status["step"], status["reason"])
    saved = [record["step"] for record in jobs.history(run, "checkpoint")]
    assert saved.count(status["step"]) == 1
    assert cli.main(["runs", "status", str(run)]) == 75


def has_ended(process: psutil.Process) -> bool:
    """Also where nobody has asked for its exit code yet, as happens to orphans."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def assert_gone(processes: list[psutil.Process]) -> None:
    """No process is left after 10 s, and no shared memory that one of them made."""
    wait_until(lambda: all(map(has_ended, processes)), 10, f"the end of {processes}")
    pids = {str(process.pid) for process in processes}
    shared = [path.name for path in Path("/dev/shm").glob("*")]
    assert not [name for name in shared if pids & set(re.split(r"\D+", name))], shared


def next_record(run: Path, job: jobs.Running) -> None:
    """Wait for a record of this attempt."""
    wait_for_step(run, jobs.status(run)["step"] + 1 if run.exists() else 1, job)


def stop(run: Path, ranks: int | None, number: int, to: str) -> None:
    """One attempt and a signal: one checkpoint, the right exit code, and no process left."""
    args = [*ONE_WORKER, "--resume", "OUTPUT_DIR", run]
    with jobs.start(*args, ranks=ranks, env=SLEEP, cold=True) as job:
        next_record(run, job)
        left = job.descendants()
        send(job, number, to)
        ended = job.wait(60)
        assert_gone(left)
    died = to == "torchrun" and number in (signal.SIGKILL, signal.SIGUSR1)
    reasons = ["torchrun died"] if died else [signal.Signals(number).name]
    if to.startswith("everyone"):  # torchrun sends a SIGTERM on; of two at once any may be first
        reasons.append("SIGTERM")
    assert_stopped(run, *reasons)
    if ranks is None:
        assert ended.code == 75
    elif to in ("rank 0", "rank 1"):
        assert ended.code == 0  # torchrun would take any other for a failure


def assert_goes_on_exactly(run: Path, ranks: int | None, reference: Path) -> None:
    jobs.train(*ONE_WORKER, "--resume", "OUTPUT_DIR", run, ranks=ranks, cold=True).ok()
    assert_same(run, reference)


def test_signals_to_one_process(reference: References, tmp_path: Path) -> None:
    run = tmp_path / "run"
    stop(run, None, signal.SIGINT, "itself")
    stop(run, None, signal.SIGUSR1, "itself")
    assert_goes_on_exactly(run, None, reference[None])


def test_signals_to_torchrun_and_everyone(reference: References, tmp_path: Path) -> None:
    run = tmp_path / "run"
    stop(run, 2, signal.SIGTERM, "torchrun")
    stop(run, 2, signal.SIGINT, "everyone, twice")
    # The next attempt starts at once, while these ranks still end.
    env = {"LAUNCHER_TEST_SLEEP": "0.4"}
    again = [*ONE_WORKER, "--resume", "OUTPUT_DIR", run]
    with jobs.start(*again, ranks=2, env=env, cold=True) as job:
        next_record(run, job)
        orphans = job.descendants()
        send(job, signal.SIGKILL, "torchrun")
        assert_goes_on_exactly(run, 2, reference[2])
        assert_gone(orphans)
    assert len(jobs.history(run, "resume")) == 3


@pytest.mark.slow
def test_other_signals_to_torchrun(reference: References, tmp_path: Path) -> None:
    run = tmp_path / "run"
    stop(run, 2, signal.SIGINT, "torchrun")
    stop(run, 2, signal.SIGUSR1, "torchrun")
    stop(run, 2, signal.SIGKILL, "torchrun")
    assert_goes_on_exactly(run, 2, reference[2])


@pytest.mark.slow
def test_signals_to_ranks(reference: References, tmp_path: Path) -> None:
    run = tmp_path / "run"
    stop(run, 2, signal.SIGTERM, "rank 1")
    stop(run, 2, signal.SIGUSR1, "rank 0")
    stop(run, 2, signal.SIGTERM, "everyone")
    assert_goes_on_exactly(run, 2, reference[2])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [None, 2])
def test_a_signal_inside_a_save(ranks: int | None, tmp_path: Path) -> None:
    """The save is finished, and the stop's own one made; nothing of either is left half done."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    args = [*COMMON, "TASK.WIDTH", "2560"]  # large enough for a save to be caught at work
    env = {"LAUNCHER_TEST_SLEEP": "0.05"}
    with jobs.start(*args, "OUTPUT_DIR", run, ranks=ranks, env=env, cold=True) as job:
        wait_for_step(run, 3, job)
        under_way = wait_until(lambda: saving(run), what="a save")
        send(job, signal.SIGTERM, "everyone")
        assert saving(run) == under_way  # the signal fell into it
        job.wait(60)
    assert_stopped(run, "SIGTERM")
    assert not saving(run)
    jobs.train(*args, "OUTPUT_DIR", run, "--resume", ranks=ranks).ok()
    jobs.train(*args, "OUTPUT_DIR", whole, ranks=ranks).ok()
    assert_same(run, whole)


@pytest.mark.parametrize("ranks", [None, slow(2)])
def test_a_second_signal_leaves_at_once(ranks: int | None, tmp_path: Path) -> None:
    """Five seconds after the first it is no longer the same request."""
    run = tmp_path / "run"
    args = [*ONE_WORKER, "LOG.EVERY", "1step", "OUTPUT_DIR", run]
    env = {"LAUNCHER_TEST_EVAL_SLEEP": "1000"}  # a stop would have to wait for its batch
    with jobs.start(*args, ranks=ranks, env=env, cold=True) as job:
        wait_for_step(run, 3, job)
        time.sleep(1)
        left = job.descendants()
        send(job, signal.SIGINT, "everyone, twice")
        time.sleep(5.5)
        assert job.poll() is None
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
    with jobs.start(*COMMON, "OUTPUT_DIR", run, ranks=2, env=env, cold=True) as job:
        job.until(lambda: "rank 0 of 2" in job.output(), "ranks that have met")
        send(job, signal.SIGTERM, "everyone")
        job.wait(60)
    assert_stopped(run, "SIGTERM")
    assert jobs.status(run)["step"] == 1


def test_other_reasons_to_stop(reference: References, tmp_path: Path) -> None:
    run = tmp_path / "run"
    args = [*ONE_WORKER, "--resume", "OUTPUT_DIR", run]
    slowly = {"LAUNCHER_TEST_SLEEP": "0.4"}
    with jobs.start(*args, env=slowly) as job:
        next_record(run, job)
        (run / "STOP").touch()
        assert job.wait(60).code == 75
    assert_stopped(run, "file STOP")

    assert jobs.train(*args, "TRAIN.MAX_TIME", "3s", env=slowly).code == 75
    assert_stopped(run, "TRAIN.MAX_TIME")
    assert not (run / "STOP").exists()

    # In Unix seconds; half a minute is spared for the job file.
    limit = {"SLURM_JOB_END_TIME": str(int(time.time()) + 34)}
    assert jobs.train(*args, env=slowly | limit).code == 75
    assert_stopped(run, "Slurm's time limit")
    assert_goes_on_exactly(run, None, reference[None])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, None])
def test_a_stop_in_an_evaluation(ranks: int | None, tmp_path: Path) -> None:
    """The evaluation is given up, and made up for by the attempt that goes on: once, exactly. The
    reference runs beside it: two jobs start at once on one machine, without a clash of ports."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    args: list[Any] = [*COMMON, "EVAL.BATCH_SIZE", "4"]
    slowly = {"LAUNCHER_TEST_EVAL_SLEEP": "2"}
    with (
        jobs.start(*args, "OUTPUT_DIR", run, ranks=ranks, env=slowly, cold=True) as job,
        jobs.start(*args, "OUTPUT_DIR", whole, ranks=ranks, cold=True) as other,
    ):
        wait_for_step(run, 3, job)
        time.sleep(3)  # an evaluation, every fifth step, takes far longer than all between
        send(job, signal.SIGTERM, "everyone")
        job.wait(60)
        other.wait(90).ok()
    assert_stopped(run, "SIGTERM")
    at = [record for record in jobs.metrics(run) if record["step"] == jobs.status(run)["step"]]
    assert not any("val/loss" in record for record in at)
    jobs.train(*args, "--resume", "OUTPUT_DIR", run, ranks=ranks).ok()
    assert_same(run, whole)


def test_a_stop_before_the_first_step(tmp_path: Path) -> None:
    """Nothing is done yet that could be saved: the process leaves, resumable, with nothing made."""
    run = tmp_path / "run"
    env = {"LAUNCHER_TEST_BUILD_SLEEP": "60"}
    with jobs.start(*COMMON, "OUTPUT_DIR", run, env=env, cold=True) as job:
        job.until(lambda: len(psutil.Process(job.pid).threads()) > 1, "a second thread")
        time.sleep(3)
        job.send(signal.SIGTERM)
        ended = job.wait(20)
    assert ended.code == 75 and "stopped before the first step" in ended.err
    assert not run.exists()
