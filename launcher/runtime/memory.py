"""How much memory this process may still take, and what the kernel says of memory it took away."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

from launcher.runtime.cpu import cgroup_folders

PROC_CGROUP, CGROUP_ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes: what is available to this node's ranks together, the total it is part of, and free
    shared memory (None where there is no /dev/shm); whether the machine swaps."""

    available: int
    total: int
    shm: int | None
    swapping: bool
    reason: str


def memory_budget(
    proc_cgroup: Path = PROC_CGROUP,
    cgroup_root: Path = CGROUP_ROOT,
    shm: Path = Path("/dev/shm"),
) -> MemoryBudget:
    """Read psutil, the memory limits of every enclosing cgroup (v1 and v2) and /dev/shm."""
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    available, total, reason = memory.available, memory.total, "free memory"
    for folder in cgroup_folders(proc_cgroup, cgroup_root, "memory"):
        for limit_file, usage_file in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, usage = _number(folder / limit_file), _number(folder / usage_file)
            if limit is not None and usage is not None and limit - usage < available:
                available, total, reason = max(0, limit - usage), limit, "cgroup memory limit"
    free_shm = shutil.disk_usage(shm).free if shm.is_dir() else None
    return MemoryBudget(available, total, free_shm, swap.used > 0.1 * max(swap.total, 1), reason)


def oom_kills(proc_cgroup: Path = PROC_CGROUP, cgroup_root: Path = CGROUP_ROOT) -> int:
    """How many processes of this cgroup (v2) the kernel has killed for memory."""
    for folder in cgroup_folders(proc_cgroup, cgroup_root, "memory"):
        try:
            lines = (folder / "memory.events").read_text().splitlines()
        except OSError:
            continue
        counts = dict(line.split() for line in lines)
        return int(counts.get("oom_kill", 0))
    return 0


def own_memory() -> int:
    """Bytes of anonymous memory of this process: what a forked worker may come to copy."""
    try:
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
            if line.startswith("Anonymous:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return psutil.Process().memory_info().rss


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None
