"""Which rank all the others wait for, and what it is at."""

from __future__ import annotations

import contextlib
import sys
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

# What rank 0 does while the others wait for it; these phases have a limit of their own.
ALONE = frozenset({"save", "summarize"})
DEBUGGERS = {"bdb", "pdb", "ipdb", "pudb", "pydevd", "_pydevd_bundle", "debugpy"}


@dataclass(frozen=True)
class Beat:
    """What a rank posts about itself, a second apart."""

    number: int  # of this beat
    collectives: int  # begun so far
    phase: str
    step: int
    age: float  # seconds since something moved
    limit: float  # seconds that the phase may take without a move
    rss_gib: float


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
    silent = [r for r in ranks if r not in after or after[r] == before.get(r)]
    fewest = min((beat.collectives for beat in after.values()), default=0)
    suspects = silent or [r for r in ranks if after[r].collectives == fewest]

    def overdue(rank: int) -> float:
        beat = after.get(rank)
        # Nobody knows a silent rank's age, but that the others have waited for it so long.
        if beat is not None and rank not in silent:
            return beat.age - beat.limit
        return age - (beat.limit if beat is not None and beat.phase in ALONE else limit)

    worst = max(suspects, key=overdue)
    return (worst, silent) if overdue(worst) > 0 else None


def in_debugger() -> bool:
    """Whether the main thread is in a debugger: somebody looks at it, and it does not hang."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if str(frame.f_globals.get("__name__")).split(".")[0] in DEBUGGERS:
            return True
        frame = frame.f_back
    return False


def stacks() -> str:
    """The Python stacks of all threads of this process, the main thread's last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] == main)
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frame)).rstrip()
        for ident, frame in frames
    )


def process_state(pid: int) -> str:
    """What the kernel says of a process that cannot speak for itself (proc(5))."""
    text = f"process {pid} is gone"
    with contextlib.suppress(psutil.Error, OSError):
        process = psutil.Process(pid)
        times, rss = process.cpu_times(), process.memory_info().rss / 2**30
        text = f"process {pid}: {process.status()}, {process.num_threads()} threads, "
        text += f"{rss:.2f} GiB, CPU {times.user + times.system:.1f} s"
        for name in ("wchan", "stack"):  # the latter for root alone
            text += f"\n{name}: {Path(f'/proc/{pid}/{name}').read_text().strip()}"
    return text
