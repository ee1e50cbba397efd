"""Runs that are killed and resumed, and the comparison with the run that was never interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.system import jobs

TASK = Path(__file__).with_name("exact_task.py")
# Samples are not divisible by the batch, nor periods by each other: everything is interrupted once.
COMMON = [
    *("TASK.NAME", f"{TASK}:Exact", "TRAIN.BATCH_SIZE", "8", "TRAIN.DURATION", "4ep"),
    *("LOG.EVERY", "3step", "EVAL.EVERY", "5step", "CHECKPOINT.EVERY", "4step"),
    *("CHECKPOINT.METRIC", "val/accuracy", "CHECKPOINT.MODE", "max", "CHECKPOINT.KEEP_LAST", "3"),
    *("OPTIM.LR", "0.05", "OPTIM.SCHEDULE", "cosine", "OPTIM.WARMUP", "5step"),
    *("MODEL.EMA_DECAY", "0.9"),
]
FREE = ("time", "perf/", "system/")


def records(run: Path) -> list[dict[str, Any]]:
    """The records without what may differ between two runs of one seed."""
    return [
        {key: value for key, value in record.items() if not key.startswith(FREE)}
        for record in jobs.metrics(run)
    ]


def scalars(run: Path) -> dict[tuple[str, int], list[float]]:
    """What TensorBoard holds, likewise."""
    return {
        place: [value for value, _ in events]
        for place, events in jobs.event_scalars(run).items()
        if not place[0].startswith(FREE)
    }


def assert_same_weights(run: Path, reference: Path) -> None:
    """Assert that two runs ended in the same weights, averaged ones included."""
    ours, theirs = jobs.state(run), jobs.state(reference)
    for part in ("model", "ema"):
        for name, tensor in theirs[part].items():
            assert torch.equal(ours[part][name], tensor), f"{part} {name} differs"


def assert_same(run: Path, reference: Path) -> None:
    """Assert that two runs ended in the same bits and left the same records, each once."""
    assert_same_weights(run, reference)
    ours, theirs = jobs.state(run), jobs.state(reference)
    assert ours["progress"] == theirs["progress"]
    momenta = zip(
        ours["optimizer"]["state"].values(), theirs["optimizer"]["state"].values(), strict=True
    )
    assert all(torch.equal(a["momentum_buffer"], b["momentum_buffer"]) for a, b in momenta)
    assert records(run) == records(reference)
    events = scalars(run)
    assert events == scalars(reference)
    assert all(len(values) == 1 for values in events.values())
    assert jobs.status(run)["state"] == "completed"
