"""A killed run resumes exactly: the same bits, and every record once."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.system import jobs
from tests.system.exact import COMMON, assert_same

MATRIX = [
    pytest.param(1, ["DATALOADER.NUM_WORKERS", "0"], id="1 rank"),
    pytest.param(
        3,
        ["DATALOADER.NUM_WORKERS", "1", "TRAIN.MICRO_BATCH_SIZE", "1"],
        id="3 ranks, workers, accumulation",
    ),
    pytest.param(2, ["DATALOADER.NUM_WORKERS", "2"], id="2 ranks", marks=pytest.mark.slow),
    pytest.param(
        4,
        ["OPTIM.NAME", "sgd", "TRAIN.MICRO_BATCH_SIZE", "1"],
        id="4 ranks",
        marks=pytest.mark.slow,
    ),
]


def family(job: jobs.Job) -> list[psutil.Process]:
    """The ranks of a job: torchrun's children, or the job itself."""
    torchrun = psutil.Process(job.process.pid)
    return [p for p in torchrun.children() if "train.py" in " ".join(p.cmdline())] or [torchrun]


def wait_for_step(run: Path, step: int, job: jobs.Job, timeout: float = 120) -> None:
    """Wait until a record of this step, or a later one, is written."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and job.process.poll() is None:
        text = (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""
        lines = text.splitlines()[:-1]
        if lines and jobs.strict_json(lines[-1])["step"] >= step:
            return
        time.sleep(0.005)
    raise AssertionError(f"no step {step}: {jobs.read(job.out)}{jobs.read(job.err)}")


@pytest.mark.parametrize(("ranks", "options"), MATRIX)
def test_a_killed_run_resumes_exactly(ranks: int, options: list[str], tmp_path: Path) -> None:
    """Invariants 1 and 2: SIGKILL to torchrun and to a rank, mid-epoch and mid-period."""
    args = [*COMMON, *options]
    reference, run = tmp_path / "reference", tmp_path / "run"
    launch = None if ranks == 1 else ranks
    jobs.train(*args, "OUTPUT_DIR", reference, ranks=launch).ok()
    draw = random.Random(ranks)
    for victim, step in (("torchrun", 6), ("rank", 15)):
        job = jobs.start(
            *args, "--resume", "OUTPUT_DIR", run, ranks=launch, env={"LAUNCHER_TEST_SLEEP": "0.02"}
        )
        wait_for_step(run, step, job)
        time.sleep(draw.random() * 0.1)
        if victim == "torchrun":
            job.kill()
        else:
            draw.choice(family(job)).send_signal(signal.SIGKILL)
            assert job.wait(60).code != 0
    jobs.train(*args, "--resume", "OUTPUT_DIR", run, ranks=launch).ok()
    assert_same(run, reference)
    events = [record["event"] for record in jobs.history(run)]
    assert events.count("resume") == 2
    assert (run / "metrics.rewound.jsonl").exists()
