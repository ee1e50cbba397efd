"""How much memory this process may still take, and what the kernel says of memory it took away."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

from launcher.runtime.cpu import cgroup_folders


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes: what is available to this node's ranks together, and free shared memory (None where
    there is no /dev/shm); whether the machine swaps; what the first is limited by."""

    available: int
    shm: int | None
    swapping: bool
    reason: str


def memory_budget(root: Path = Path("/")) -> MemoryBudget:
    """Read psutil, the memory limits of every enclosing cgroup (v1 and v2) and /dev/shm; `root` is
    that of the file system, for tests."""
    swap, available, reason = psutil.swap_memory(), psutil.virtual_memory().available, "free memory"
    for folder in cgroup_folders(root, "memory"):
        for limit_file, usage_file in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, usage = _number(folder / limit_file), _number(folder / usage_file)
            if limit is not None and usage is not None and limit - usage < available:
                available, reason = max(0, limit - usage), "cgroup memory limit"
    shm = root / "dev/shm"
    free_shm = shutil.disk_usage(shm).free if shm.is_dir() else None
    return MemoryBudget(available, free_shm, swap.used > 0.1 * max(swap.total, 1), reason)


def oom_kills(root: Path = Path("/")) -> int:
    """How many processes of this cgroup (v2) the kernel has killed for memory."""
    for folder in cgroup_folders(root, "memory"):
        with contextlib.suppress(OSError):
            lines = (folder / "memory.events").read_text().splitlines()
            return int(dict(line.split() for line in lines).get("oom_kill", 0))
    return 0


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None
