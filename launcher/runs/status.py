"""How a run is doing, from its status.json."""

from __future__ import annotations

import json
import math
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.errors import RunError, UsageError
from launcher.runtime.member import Member
from launcher.telemetry.rundir import STALE_S, RunDirectory

# The exit code of `launcher runs status` for each state: job files go on by it.
EXIT_CODES = {"completed": 0, "failed": 1, "running": 3, "stopped": 75, "lost": 75}


@dataclass(frozen=True)
class RunStatus:
    """What status.json says, and what it means now.

    `state` is "running", "completed", "stopped", "failed", or "lost": a run that says it is running
    but whose process is dead, or has not updated its status for STALE_S seconds.
    """

    state: str
    step: int
    epoch: int
    reason: str
    host: str
    pid: int
    updated: float  # Unix seconds

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.state]


def read_status(path: Path) -> RunStatus:
    """The status of the run in a directory.

    Raises UsageError where there is no run, RunError where its status cannot be read.
    """
    directory = RunDirectory(path)
    if not directory.holds_run():
        raise UsageError(f"{path} holds no run")
    try:
        found = json.loads(directory.status.read_text(encoding="utf-8"))
        status = RunStatus(
            state=found["state"],
            step=int(found["step"]),
            epoch=int(found["epoch"]),
            reason=str(found.get("reason", "")),
            host=str(found.get("host", "")),
            pid=int(found.get("pid", 0)),
            updated=float(found.get("updated", 0.0)),
        )
        if status.state not in EXIT_CODES:
            raise ValueError(f"unknown state {status.state!r}")
        if not math.isfinite(status.updated):
            raise ValueError(f"updated is {status.updated}")
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise RunError(f"{directory.status} cannot be read: {error!r}") from error
    if status.state != "running":
        return status
    if status.host == socket.gethostname() and not Member(status.host, status.pid).lives():
        reason = f"process {status.pid} on {status.host} is gone"
    elif (silent := time.time() - status.updated) > STALE_S:
        reason = f"no sign of life from {status.host} for {silent:.0f} s"
    else:
        return status
    return replace(status, state="lost", reason=reason)
