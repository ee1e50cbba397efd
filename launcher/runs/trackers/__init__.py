"""Where `launcher runs publish` sends records: one file a tracker, over one protocol. No torch.

A tracker's package is imported when its class is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Memory = dict[str, Any]  # plain values, kept for a tracker from call to call


@dataclass(frozen=True)
class Published:
    """What a tracker is told of a run."""

    key: str  # the same at each call, and no other run's
    name: str
    project: str
    began: float  # Unix seconds
    config: dict[str, Any]  # dotted key -> value


class Tracker:
    """One run in a tracker. Whatever it raises ends the call; what is not safe is sent again.

    `at_once`: what `send` was given is safe when it returns; else it is after `finish`.
    """

    at_once = True

    def open(self, run: Published, memory: Memory, remember: Callable[[], None]) -> bool:
        """Begin, or go on with what `memory` tells; `remember` has the memory written down. False
        where nothing that was sent before counts: it begins afresh, and all is sent again. Called
        before the first `send`, and where there is only an end to tell."""
        raise NotImplementedError

    def configure(self, run: Published) -> list[str]:
        """Tell the config, at first and where a resume has changed it. Returns what a person should
        know of that."""
        raise NotImplementedError

    def send(self, first: int, records: Sequence[Record]) -> None:
        """Records in order, with NaN for null; the first of them is the run's record `first`,
        counted from 0. Some may have been sent before by a call that was killed: these count
        once."""
        raise NotImplementedError

    def finish(self, state: str, reason: str, at: float) -> None:
        """What was sent is safe when this returns; the run's state ("running" where it goes on)."""
        raise NotImplementedError

    def abandon(self) -> None:
        """End after an error, as well as that is possible."""


def numbers(record: Record) -> tuple[Record, list[str]]:
    """A record as numbers by name, NaN for null, and the names of what a float does not hold."""
    values = {k: math.nan if v is None else v for k, v in record.items() if k != "nonfinite"}
    kept = {k: v for k, v in values.items() if isinstance(v, (int, float)) and not _loses(v)}
    return kept, [name for name in values if name not in kept]


def _loses(value: float) -> bool:
    return isinstance(value, int) and int(float(value)) != value


def make(to: str, folder: Path | None) -> Tracker:
    """The tracker of this name. Raises ImportError where its package is missing."""
    if to == "mlflow":
        from launcher.runs.trackers.mlflow_run import MLflowRun

        return MLflowRun()
    if to == "wandb":
        from launcher.runs.trackers.wandb_run import WandbRun

        return WandbRun()
    from launcher.runs.trackers.event_dir import EventDir

    assert folder is not None  # the command line demands one
    return EventDir(folder)
