"""What ended a run: the record of it, and what is told of it on the console and to torchrun."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from launcher.config import CfgNode
from launcher.errors import RunError
from launcher.telemetry.rundir import RunDirectory

LOG_LINES, TRACE_LINES = 50, 20  # in failure.json; on the console


@dataclass(frozen=True)
class Failure:
    """The first failure of a run, as it stands on the board and in failure.json."""

    rank: int
    host: str
    pid: int
    step: int  # that were done
    exception: str
    told_by: int  # the rank that tells of it
    traceback: str = ""  # or the stack of a rank that hangs, or the state of its process
    silent: list[int] = field(default_factory=list)  # ranks that gave no sign of life
    # What NCCL was at on each rank, in a hang.
    collectives: dict[str, dict[str, Any]] = field(default_factory=dict)
    time: float = field(default_factory=time.time)  # Unix seconds
    log: list[str] = field(default_factory=list)  # the end of that rank's log

    def __str__(self) -> str:
        where = f"rank {self.rank} on {self.host}"
        return f"{where} failed first, {self.step} steps done: {self.exception}"

    def with_log(self, directory: RunDirectory) -> Failure:
        """The same with the end of that rank's log."""
        end: list[str] = []
        with contextlib.suppress(OSError):
            text = directory.log(self.rank).read_text(encoding="utf-8", errors="replace")
            end = text.splitlines()[-LOG_LINES:]
        return replace(self, log=end)


def describe(error: BaseException, cfg: CfgNode, world_size: int) -> str:
    """An error in words; of one for want of device memory, also the key to change."""
    text = f"{type(error).__name__}: {error}".strip(": ")
    text += "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    given = cfg.TRAIN.MICRO_BATCH_SIZE
    if not isinstance(error, torch.OutOfMemoryError) or given == "auto":
        return text
    share = -(-cfg.TRAIN.BATCH_SIZE // world_size)
    micro = min(share, given or share)
    return (
        f"{text}\n{micro} samples were put through the model at once. TRAIN.MICRO_BATCH_SIZE "
        f"{max(1, micro // 2)} needs about half the memory, and trains the same; evaluations take "
        f"EVAL.BATCH_SIZE {cfg.EVAL.BATCH_SIZE} at once."
    )


def lost_connection(error: BaseException) -> bool:
    """Whether an error only says that another rank is gone."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(
        sign in str(error) for sign in ("gloo/", "Connection closed by peer", "Connection reset")
    )


def show(failure: Failure, directory: RunDirectory | None) -> None:
    """Print it on stderr; `directory` is where there is more to see."""
    trace = [line for line in failure.traceback.splitlines() if line.strip(" ^~")]
    if trace and trace[-1] == failure.exception:
        del trace[-1]  # the first line has it
    lines = [str(failure), *trace[-TRACE_LINES:]]
    if directory is not None:
        lines.append(f"see {directory.failure} and {directory.log(failure.rank)}")
    with contextlib.suppress(OSError):
        print(*[f"launcher: {line}" for line in lines], sep="\n", file=sys.stderr)


def tell_torchrun(failure: Failure, error: BaseException | None = None) -> None:
    """Write torchrun's own error file, whose first entry it shows as the root cause; `error` is
    the failure itself, where it is this rank's own."""
    with contextlib.suppress(Exception):
        handler: Any = get_error_handler()
        handler.record_exception(error or RunError(str(failure)))
