"""Whether another attempt at a run is worth it: what job files and loops ask after each attempt."""

from __future__ import annotations

import json
import time
from pathlib import Path

from launcher.checkpoint.store import CheckpointStore
from launcher.errors import UsageError
from launcher.runs.status import RunStatus, read_status
from launcher.telemetry.rundir import STALE_S, RunDirectory, replace_json

AGAIN, GIVEN_UP = 75, 1
# So many attempts in a row without a new checkpoint, and the next would do no better.
IN_VAIN = 2


def again(path: Path, notes: Path) -> tuple[int, str]:
    """Whether to start the run in a directory again, as an exit code, and why.

    Asked before the first attempt and after each: `notes` holds the newest checkpoint's step, and
    how many attempts in a row have not raised it. These stand beside the run and not in it, since
    an attempt that fails before its first step leaves nothing there.
    """
    step = _newest_checkpoint(path)
    before = _read(notes)
    if before is None:
        _write(notes, step, 0)
        return AGAIN, f"the first attempt, from step {step}"
    status = _ended(path)
    state = status.state if status is not None else "no run yet"
    if state == "completed":
        return 0, "completed"
    if state == "running":
        return 3, "another job runs it"
    stop = RunDirectory(path).stop
    if stop.exists():
        return GIVEN_UP, f"{state}, and asked not to go on by {stop}"
    last, in_vain = before
    in_vain = 0 if step > last else in_vain + 1
    _write(notes, step, in_vain)
    if in_vain >= IN_VAIN:
        return GIVEN_UP, f"{state}, and {in_vain} attempts in a row made no progress (step {step})"
    return AGAIN, f"{state} at step {step}, to go on"


def _newest_checkpoint(path: Path) -> int:
    return max(CheckpointStore(RunDirectory(path).checkpoints).steps(), default=0)


def _ended(path: Path) -> RunStatus | None:
    """The status after an attempt's end; None where there is no run.

    A rank 0 that was killed on another host counts as running until its sign of life is overdue.
    """
    deadline = time.monotonic() + STALE_S + 1
    try:
        status = first = read_status(path)
        while status.state == "running" and status.updated == first.updated:
            if time.monotonic() > deadline:
                break
            time.sleep(1.0)
            status = read_status(path)
        return status
    except UsageError:
        return None


def _read(notes: Path) -> tuple[int, int] | None:
    try:
        found = json.loads(notes.read_text())
        return int(found["step"]), int(found["in_vain"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--again {notes} cannot be read: {error!r}") from error


def _write(notes: Path, step: int, in_vain: int) -> None:
    try:
        replace_json(notes, {"step": step, "in_vain": in_vain})
    except OSError as error:
        raise UsageError(f"--again {notes} cannot be written: {error.strerror}") from error
