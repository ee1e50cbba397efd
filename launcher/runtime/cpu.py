"""The CPU budget: how many CPUs this process may really use, and how that was found.

A container with a quota of 8 CPUs on a host of 64 shows 64 to `os.cpu_count()`. The budget is the
least of the affinity mask, the cgroup quota (v1 or v2, every enclosing group) and Slurm's grant,
shared by the ranks of the node. Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CpuBudget:
    """CPUs of this node, those usable by this job, and one rank's share; `reason` says why."""

    host: int
    usable: int
    per_rank: int
    reason: str


def cpu_budget(
    local_world_size: int,
    env: Mapping[str, str] = os.environ,
    *,
    affinity: int | None = None,
    host: int | None = None,
    root: Path = Path("/"),
) -> CpuBudget:
    """Find the budget of one of `local_world_size` ranks; the keywords are for tests."""
    host = host or os.cpu_count() or 1
    limits: dict[str, float] = {"all CPUs of the host": host}
    limits["CPU affinity"] = affinity or len(os.sched_getaffinity(0))
    if (quota := cgroup_cpu_quota(root)) is not None:
        limits["cgroup quota"] = quota
    # What srun gave this one task, or the whole node's share of the job.
    if env.get("SLURM_CPUS_PER_TASK", "").isdigit() and "SLURM_STEP_NUM_TASKS" in env:
        # A task of the step is a rank, or torchrun with all ranks of the node.
        tasks = 1 if "RANK" in env else local_world_size
        limits["Slurm's grant"] = int(env["SLURM_CPUS_PER_TASK"]) * tasks
    elif env.get("SLURM_CPUS_ON_NODE", "").isdigit():
        limits["Slurm's grant"] = int(env["SLURM_CPUS_ON_NODE"])
    # min() keeps the first of equals, so a limit that does not bite is not named as the reason.
    reason = min(limits, key=lambda name: limits[name])
    usable = max(1, int(limits[reason]))
    note = reason if usable == host else f"{reason}; host has {host}"
    return CpuBudget(host, usable, max(1, usable // local_world_size), note)


def cgroup_cpu_quota(root: Path) -> float | None:
    """The smallest CPU quota on the way from this process's cgroup up to the root, in CPUs.

    Reads cgroup v2 (`cpu.max`) and v1 (`cpu.cfs_quota_us`); None where nothing limits.
    https://docs.kernel.org/admin-guide/cgroup-v2.html#cpu-interface-files
    """
    quotas = map(_quota, cgroup_folders(root, "cpu"))
    return min((quota for quota in quotas if quota is not None), default=None)


def cgroup_folders(root: Path, controller: str) -> list[Path]:
    """Folders of this process's cgroup for one controller, innermost first, the outermost included;
    `root` is the root of the file system.

    In a container `/proc/self/cgroup` may name a path of the host that is not mounted here; the
    walk upwards then still ends at the mounted root, whose files hold the container's limits.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders, mounted = list[Path](), root / "sys/fs/cgroup"
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":  # v2, or the v2 part of a hybrid host
            bases = [mounted, mounted / "unified"]
        elif controller in controllers.split(","):
            bases = [mounted / controllers, mounted / controller]
        else:
            continue
        relative = Path(path.lstrip("/"))
        for base in bases:
            folders += [base / p for p in (relative, *relative.parents) if (base / p).is_dir()]
    return list(dict.fromkeys(folders))


def _quota(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()  # "max": no number
        else:
            quota, period = ((folder / f"cpu.cfs_{n}_us").read_text() for n in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def threads_set_by_user(env: Mapping[str, str], parent_environ: Path | None = None) -> bool:
    """Whether OMP_NUM_THREADS is the user's.

    torchrun sets it to 1 for its ranks where the user has not set it; the environment that torchrun
    itself was started with tells the two apart.
    """
    if "OMP_NUM_THREADS" not in env or "TORCHELASTIC_RUN_ID" not in env:
        return "OMP_NUM_THREADS" in env
    path = parent_environ or Path(f"/proc/{os.getppid()}/environ")
    try:
        return b"\0OMP_NUM_THREADS=" in b"\0" + path.read_bytes()
    except OSError:
        return True
