"""Runs of a task that gathers: the same on any number of ranks, exact over a crash, never stuck."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from tests.system import contrast_task, jobs
from tests.system.exact import COMMON, assert_same

LOSS = ("CHECKPOINT.METRIC", "val/loss", "CHECKPOINT.MODE", "min", "DATALOADER.NUM_WORKERS", "0")


def words(name: str, run: Path, *options: str) -> list[object]:
    task = ("TASK.NAME", f"{contrast_task.__file__}:{name}")
    return [*COMMON, *LOSS, *task, "OUTPUT_DIR", run, *options]


@pytest.mark.slow
def test_weights_are_those_of_one_rank(tmp_path: Path) -> None:
    """The last batch of an epoch leaves the second rank idle."""
    one, two = tmp_path / "one", tmp_path / "two"
    jobs.train(*words("Contrast", one)).ok()
    jobs.train(*words("Contrast", two), ranks=2).ok()
    ours, theirs = (jobs.state(run)["model"] for run in (two, one))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    start = contrast_task.Contrast(None).build_model()  # type: ignore[arg-type]
    assert not torch.equal(ours["queue"], start.get_buffer("queue"))


@pytest.mark.slow
def test_a_killed_run_resumes_exactly(tmp_path: Path) -> None:
    """Where one of three ranks has a micro-batch less than the others in every step."""
    reference, run = tmp_path / "reference", tmp_path / "run"
    micro = "TRAIN.MICRO_BATCH_SIZE", "2"
    jobs.train(*words("Contrast", reference, *micro), ranks=3).ok()
    for step in (6, 15):
        args = [*words("Contrast", run, *micro), "--resume"]
        env = {"LAUNCHER_TEST_SLEEP": "0.05"}
        with jobs.start(*args, ranks=3, env=env, cold=True) as job:
            jobs.wait_for_step(run, step, job)
            job.ranks()[step % 3].send_signal(signal.SIGKILL)
            assert job.wait().code != 0
    jobs.train(*words("Contrast", run, *micro), "--resume", ranks=3).ok()
    assert_same(run, reference)
    assert len(jobs.history(run, "resume")) == 2


def test_a_gather_in_an_evaluation_is_an_error_at_once(tmp_path: Path) -> None:
    failed = jobs.train(*words("Gathering", tmp_path / "run"), ranks=2)
    assert failed.code != 0
    told = jobs.failure(tmp_path / "run")["exception"]
    assert "Task.gather was called in an evaluation" in told


@pytest.mark.slow
def test_the_rank_that_a_gather_waits_for_is_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    failed = jobs.train(*words("Late", run, "DIST.TRAIN_TIMEOUT", "4s"), ranks=2)
    assert failed.code != 0
    told = jobs.failure(run)
    assert told["rank"] == 1 and told["step"] == 2 and "time.sleep(600)" in told["traceback"]
