"""A long run holds no more at its end than at its beginning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.system import jobs

TASK = Path(__file__).with_name("soak_task.py")
MIB = 2**20


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("ranks", "steps"), [(None, 100_000), (2, 20_000)])
def test_memory_descriptors_and_threads_stay_flat(
    ranks: int | None, steps: int, tmp_path: Path
) -> None:
    """Over records, evaluations, checkpoints, epochs and what is written of each."""
    held, every = tmp_path / "held", steps // 50
    words = [
        *("TASK.NAME", f"{TASK}:Soak", "TASK.HELD", held, "TASK.EVERY", every),
        *("TRAIN.BATCH_SIZE", 8, "TRAIN.DURATION", f"{steps}step", "OUTPUT_DIR", tmp_path / "run"),
        *("EVAL.EVERY", f"{every}step", "CHECKPOINT.EVERY", f"{every}step", "LOG.LEVEL", "WARNING"),
        *("LOG.EVERY", "10step", "DATALOADER.NUM_WORKERS", 0 if ranks is None else 1),
    ]
    jobs.train(*words, ranks=ranks, timeout=1700).ok()
    noted = [json.loads(line) for line in held.read_text().splitlines()]
    assert len(noted) == 50
    early, late = noted[10:20], noted[-10:]
    for what in ("descriptors", "threads", "children"):
        assert max(n[what] for n in late) <= max(n[what] for n in early), what
    # 10 MiB in 70,000 steps would be 150 bytes a step.
    grown = min(n["bytes"] for n in late) - min(n["bytes"] for n in early)
    assert grown < 10 * MIB, f"{grown / MIB:.1f} MiB more"
