"""What is told of a failure, and where: console, failure.json, status, history, and torchrun."""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from launcher.config import CfgNode
from launcher.runtime.process import Runtime
from launcher.runtime.progress import Progress
from launcher.telemetry.rundir import RunDirectory

LOG_LINES, TRACE_LINES = 50, 20  # in failure.json; on the console
# As it stands in failure.json: rank, host, pid, step, exception, traceback, time.
Failure = Mapping[str, Any]


def headline(failure: Failure) -> str:
    """Which rank failed first, when and why."""
    return (
        f"rank {failure['rank']} on {failure['host']} failed first, {failure['step']} steps done: "
        f"{failure['exception']}"
    )


def describe(error: BaseException, cfg: CfgNode, runtime: Runtime) -> str:
    """An error in words; of one for want of device memory, also the figures and the key to
    change."""
    text = f"{type(error).__name__}: {error}".strip(": ")
    if isinstance(error, torch.OutOfMemoryError):
        text = f"{text}\n{_memory_hint(cfg, runtime)}"
    return text


def _memory_hint(cfg: CfgNode, runtime: Runtime) -> str:
    train, device, figures = cfg.TRAIN, runtime.device, ""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        peak = torch.cuda.max_memory_allocated(device)
        figures = (
            f"{device} has {total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB of it free; this "
            f"rank took {peak / 2**30:.1f} GiB at most. "
        )
    share = -(-train.BATCH_SIZE // runtime.world_size)
    micro = min(share, train.MICRO_BATCH_SIZE or share)
    return (
        f"{figures}{micro} samples were put through the model at once (TRAIN.BATCH_SIZE "
        f"{train.BATCH_SIZE} over {runtime.world_size} ranks, TRAIN.MICRO_BATCH_SIZE "
        f"{train.MICRO_BATCH_SIZE}). TRAIN.MICRO_BATCH_SIZE {max(1, micro // 2)} needs about "
        "half the memory, and trains the same; EVAL.BATCH_SIZE is that of evaluations "
        f"({cfg.EVAL.BATCH_SIZE})."
    )


def show(failure: Failure, directory: RunDirectory | None) -> None:
    """Print it on stderr; `directory` is where there is more to see."""
    trace = [line for line in failure["traceback"].splitlines() if line.strip(" ^~")]
    if trace and trace[-1] == failure["exception"]:
        del trace[-1]  # the headline has it
    lines = [headline(failure), *trace[-TRACE_LINES:]]
    if directory is not None:
        lines.append(f"see {directory.failure} and {directory.log(failure['rank'])}")
    with contextlib.suppress(OSError):
        print(*[f"launcher: {line}" for line in lines], sep="\n", file=sys.stderr)


def write(failure: Failure, directory: RunDirectory, progress: Progress, own: bool) -> None:
    """Write failure.json, with the end of that rank's log, the status and the history; `own`: it is
    that of the rank that writes."""
    reason, step = failure["exception"], failure["step"]
    if not own:
        reason = f"rank {failure['rank']} on {failure['host']}: {reason}"
    directory.create_failure({**failure, "log": _tail(directory.log(failure["rank"]))})
    directory.write_status("failed", progress.as_dict(), reason)
    directory.write_history("failure", step, rank=failure["rank"], reason=reason)


def _tail(log: Path) -> list[str]:
    try:
        with log.open(encoding="utf-8", errors="replace") as lines:
            return [line.rstrip("\n") for line in deque(lines, LOG_LINES)]
    except OSError:
        return []


def tell_torchrun(error: BaseException) -> None:
    """Write torchrun's own error file, whose first entry it shows as the root cause."""
    with contextlib.suppress(BaseException):
        _raise(error)


@record
def _raise(error: BaseException) -> None:
    raise error
