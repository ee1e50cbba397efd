"""The records of a run that stand: no resume will cut them off any more."""

from __future__ import annotations

from itertools import islice

import orjson

from launcher.checkpoint.store import CheckpointStore, DamagedCheckpoint
from launcher.runs.records import Damage, Place, objects
from launcher.telemetry.rundir import RunDirectory

# A run that ended so has a checkpoint at its last step.
FINAL = ("completed", "stopped")


def standing_lines(directory: RunDirectory, place: Place, most: int) -> list[bytes]:
    """Whole lines of metrics.jsonl from a place on, at most so many."""
    status = directory.read_status()
    final = status.get("state") in FINAL
    try:
        with directory.metrics.open("rb") as file:
            left = (_size(directory) if final else _covered(directory)) - place.end
            file.seek(place.end)
            lines = []
            for line in islice(file, most):
                left -= len(line)
                if left < 0 or not line.endswith(b"\n"):
                    break
                lines.append(line)
    except FileNotFoundError:  # nothing is recorded yet
        return []
    # Where a resume has begun meanwhile, some of these may be its own.
    return lines if not final or directory.read_status() == status else []


def _size(directory: RunDirectory) -> int:
    return directory.metrics.stat().st_size


def _covered(directory: RunDirectory) -> int:
    """Bytes of metrics.jsonl that the newest committed checkpoint goes back to."""
    store = CheckpointStore(directory.checkpoints)
    for step in reversed(store.steps()):
        try:
            manifest = store.manifest(step)
        except DamagedCheckpoint:  # a resume passes it over
            continue
        covered = manifest.get("records")
        return covered if isinstance(covered, int) else _before(directory, step)
    return 0


def _before(directory: RunDirectory, step: int) -> int:
    """For a checkpoint of an earlier launcher, which does not tell: the records of earlier steps.
    Those of its own step may have been written after it."""
    end = 0
    with directory.metrics.open("rb") as file:
        lines = file.readlines()
    for (_, found), line in zip(objects(lines, orjson.loads), lines, strict=True):
        if not isinstance(found, Damage) and found.get("step", 0) >= step:
            break
        end += len(line)
    return end
