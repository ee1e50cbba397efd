"""What torch's DataLoader says of its workers, in words that help."""

from __future__ import annotations

import signal
from multiprocessing.process import BaseProcess
from typing import Any

from launcher.errors import RunError, UsageError


def explain(
    error: Exception, waited_for: str, timeout_s: float, processes: list[BaseProcess], oom: bool
) -> Exception:
    """What a DataLoader's own error means; an error that is not about its workers itself."""
    text, kind = str(error), type(error)
    if isinstance(error, UsageError):
        return kind(text.rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2].strip())
    if "timed out" in text:
        return RunError(
            f"a loader worker took longer than {timeout_s:g} s (DIST.TRAIN_TIMEOUT) for "
            f"{waited_for}: is a file or a server it reads from stuck?"
        )
    if "exited unexpectedly" not in text and "killed by signal" not in text:
        return error
    codes = [-p.exitcode for p in processes if p.exitcode is not None and p.exitcode < 0]
    cause = f"killed by {signal.Signals(codes[0]).name}" if codes else "it exited by itself"
    if oom:
        cause = "the kernel killed it for memory (oom_kill of its cgroup rose)"
    elif signal.SIGBUS in codes or "Bus error" in text:
        cause = "bus error: /dev/shm is full"
    elif signal.SIGKILL in codes:
        cause += ", as the kernel does when memory is short"
    return RunError(
        f"a loader worker died while {waited_for} were due: {cause}. Fewer DATALOADER.NUM_WORKERS "
        "or a smaller DATALOADER.PREFETCH_FACTOR need less memory and /dev/shm."
    )


def named(request: Any) -> str:
    """The samples of a request that nobody has answered yet."""
    samples = request.samples if request else []
    more = f", ... ({len(samples)} in all)" if len(samples) > 8 else ""
    return f"samples {', '.join(map(str, samples[:8]))}{more}"
