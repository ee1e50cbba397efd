"""A killed run resumes exactly: the same bits, and every record once."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from tests.system import jobs
from tests.system.exact import COMMON, assert_same
from tests.system.jobs import saving, slow
from tests.waiting import wait_until

WORKERS, ACCUMULATING = ("DATALOADER.NUM_WORKERS",), ("TRAIN.MICRO_BATCH_SIZE", "1")


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        slow(None, [*WORKERS, "0"], id="one process"),
        pytest.param(3, [*WORKERS, "1", *ACCUMULATING], id="3 ranks, workers, accumulation"),
        slow(2, [*WORKERS, "2"], id="2 ranks"),
        slow(4, ACCUMULATING, id="4 ranks"),
    ],
)
def test_a_killed_run_resumes_exactly(
    ranks: int | None, options: Sequence[str], tmp_path: Path
) -> None:
    """Invariants 1 and 2: SIGKILL to torchrun and to a rank, mid-epoch and mid-period."""
    args = [*COMMON, *options]
    reference, run = tmp_path / "reference", tmp_path / "run"
    jobs.train(*args, "OUTPUT_DIR", reference, ranks=ranks).ok()
    draw = random.Random(ranks or 1)
    for victim, step in (("torchrun", 6), ("rank", 15)):
        env = {"LAUNCHER_TEST_SLEEP": "0.02"}
        with jobs.start(
            *args, "--resume", "OUTPUT_DIR", run, ranks=ranks, env=env, cold=True
        ) as job:
            jobs.wait_for_step(run, step, job)
            time.sleep(draw.random() * 0.1)
            if victim == "rank":
                draw.choice(job.ranks()).send_signal(signal.SIGKILL)
                assert job.wait().code != 0
    jobs.train(*args, "--resume", "OUTPUT_DIR", run, ranks=ranks).ok()
    assert_same(run, reference)
    assert len(jobs.history(run, "resume")) == 2


# How many kills the kill test makes in all; 50 is the full count (see docs).
KILLS = int(os.environ.get("LAUNCHER_TEST_KILLS", "6"))
# A state of 26 MB takes long enough to write that a kill can hit it.
LONG = [
    *("TRAIN.DURATION", "8ep", "TASK.WIDTH", "1280", "DATALOADER.NUM_WORKERS", "0"),
    *("LOG.EVERY", "2step", "CHECKPOINT.EVERY", "3step", "CHECKPOINT.KEEP_LAST", "2"),
]
SLEEP = {"LAUNCHER_TEST_SLEEP": "0.04"}


def wait_for_own_step(job: jobs.Running, run: Path, began: float) -> None:
    """Wait for a record written since a moment: by this attempt then, after its first step."""
    wait_until(
        lambda: jobs.last_record(run)["time"] > began or job.poll() is not None, what="a first step"
    )


def strike(job: jobs.Running, run: Path, victim: str, in_save: bool, draw: random.Random) -> bool:
    """SIGKILL at a random instant; whether it fell inside a save: into the same one that was seen
    right before the signal and right after it."""
    ranks = job.ranks()
    targets = {
        "torchrun": [psutil.Process(job.pid)],
        "rank": [draw.choice(ranks)],
        "all ranks": ranks,
    }[victim]
    if in_save:
        wait_until(lambda: saving(run) or job.poll() is not None, what="a save")
        time.sleep(draw.random() * 0.03)
    else:
        time.sleep(draw.random() * 1.2)
    before = saving(run)
    for process in targets:
        process.send_signal(signal.SIGKILL)
    return bool(before & saving(run))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_killed_at_random_instants(
    ranks: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Invariants 1, 2 and 5: SIGKILL again and again, to a rank, to all ranks and to torchrun, many
    times inside a save; each time resumed at once, and in the end the weights, metrics.jsonl and
    TensorBoard's scalars are those of the run that was never interrupted."""
    launch = None if ranks == 1 else ranks
    args = [*COMMON, *LONG]
    reference = tmp_path / "reference"
    jobs.train(*args, "OUTPUT_DIR", reference, ranks=launch).ok()
    wanted = KILLS // 3 + (ranks <= KILLS % 3)
    seed = int(os.environ.get("LAUNCHER_TEST_SEED", str(ranks)))
    draw = random.Random(seed)
    landed: Counter[tuple[str, bool]] = Counter()
    late = finished = attempts = 0
    while sum(landed.values()) < wanted:
        run = tmp_path / f"run{finished}"
        victim = ("torchrun", "rank", "all ranks")[(attempts + ranks) % 3]
        in_save = attempts % 2 == 0
        attempts += 1
        assert attempts < 4 * wanted + 10, f"kills come too late: {landed}, {late} late"
        began = time.time()
        with jobs.start(
            *args, "--resume", "OUTPUT_DIR", run, ranks=launch, env=SLEEP, cold=True
        ) as job:
            hit = alive = False
            wait_for_own_step(job, run, began)
            with contextlib.suppress(psutil.NoSuchProcess):
                hit, alive = strike(job, run, victim, in_save, draw), True
            # Of torchrun alone: its ranks may still be ending when the next attempt starts.
            job.wait()
        if not alive or jobs.status(run)["state"] == "completed":
            late += 1
            assert_same(run, reference)
            finished += 1
        else:
            landed[victim, hit] += 1
    run = tmp_path / f"run{finished}"
    if run.exists():
        jobs.train(*args, "--resume", "OUTPUT_DIR", run, ranks=launch).ok()
        assert_same(run, reference)
    inside = sum(count for (_, hit), count in landed.items() if hit)
    victims = Counter(victim for victim, _ in landed.elements())
    with capsys.disabled():
        print(
            f"\n{ranks} ranks, seed {seed}: {sum(landed.values())} kills ({dict(victims)}), "
            f"{inside} of them inside a save; {late} too late, not counted; "
            f"{finished + run.exists()} runs equal to the uninterrupted one"
        )
    assert inside * 5 >= wanted, f"{inside} of {wanted} kills fell inside a save"
