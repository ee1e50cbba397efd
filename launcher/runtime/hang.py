"""Which rank all the others wait for, and what it is at."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

# What a rank posts about itself, a second apart: n (a count), collectives (begun so far), phase,
# step, age and limit (seconds, see Watch), rss_gib.
Beat = dict[str, Any]
# What rank 0 does while the others wait for it; these phases have a limit of their own.
ALONE = ("save", "summarize")


def judge(
    before: Mapping[int, Beat],
    after: Mapping[int, Beat],
    world_size: int,
    age: float,
    limit: float,
) -> tuple[int, list[int]] | None:
    """The rank that is to blame, and the ranks that gave no sign of life between two readings.

    `age` and `limit` are those of the rank that asks. A silent rank is suspected first, else those
    that have begun fewest collectives: all others wait there for them. None while every suspect
    still moves, or is within the time its phase may take.
    """
    ranks = range(world_size)
    silent = [r for r in ranks if r not in after or after[r]["n"] == before.get(r, {}).get("n")]
    fewest = min((beat["collectives"] for beat in after.values()), default=0)
    suspects = silent or [r for r in ranks if after[r]["collectives"] == fewest]

    def overdue(rank: int) -> float:
        beat = after.get(rank, {})
        # Nobody knows a silent rank's age, but that the others have waited for it so long.
        if rank not in silent:
            return beat["age"] - beat["limit"]
        return age - (beat["limit"] if beat.get("phase") in ALONE else limit)

    worst = max(suspects, key=overdue)
    return (worst, silent) if overdue(worst) > 0 else None


def stacks() -> str:
    """The Python stacks of all threads of this process, the main thread's last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] == main)
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frame)).rstrip()
        for ident, frame in frames
    )


def main_stack() -> str:
    """The Python stack of the main thread."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return "".join(traceback.format_stack(frame)) if frame is not None else ""


def process_state(pid: int) -> str:
    """What the kernel says of a process that cannot speak for itself (proc(5))."""
    lines = []
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        times = process.cpu_times()
        lines.append(
            f"process {pid}: {process.status()}, {process.num_threads()} threads, "
            f"{process.memory_info().rss / 2**30:.2f} GiB, CPU {times.user + times.system:.1f} s"
        )
    for name in ("wchan", "stack"):  # the latter for root alone
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{pid}/{name}").read_text().strip()
            if text not in ("", "0"):
                lines.append(f"{name}: {text}")
    return "\n".join(lines) or f"process {pid} is gone"


def is_alive(pid: int, created: float | None = None) -> bool:
    """Whether a process of this host still lives; by when it began, for its number may have been
    given to another since."""
    try:
        process = psutil.Process(pid)
        same = created is None or abs(process.create_time() - created) < 1
        return same and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except (psutil.Error, ValueError):  # gone, or no process id
        return False


def kill(pid: int, created: float) -> None:
    """SIGKILL for this very process."""
    if is_alive(pid, created):
        with contextlib.suppress(psutil.Error):
            psutil.Process(pid).kill()


def myself() -> dict[str, Any]:
    """How other ranks can find this process: host, pid, and when it began (Unix seconds)."""
    process = psutil.Process()
    host = os.uname().nodename
    return {"host": host, "pid": process.pid, "created": process.create_time()}


def rss_gib() -> float:
    """Resident memory of this process, in GiB; 20 microseconds."""
    return psutil.Process().memory_info().rss / 2**30


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Ask again and again for at most so long; whether it became true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
