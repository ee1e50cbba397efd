"""The CPU budget: the least of affinity, cgroup quota and Slurm's grant, shared by the ranks."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.runtime.cpu import CpuBudget, cgroup_cpu_quota, cpu_budget, threads_set_by_user
from tests.runtime.groups import cgroup

V2 = "0::/job/step\n"
V1 = "4:memory:/job/step\n3:cpu,cpuacct:/job/step\n"
HYBRID = V1 + V2
MS100 = 100_000


def v1(folder: str, quota: int) -> dict[str, str]:
    return {f"{folder}/cpu.cfs_quota_us": f"{quota}\n", f"{folder}/cpu.cfs_period_us": f"{MS100}\n"}


def budget(local_world_size: int = 1, env: dict[str, str] | None = None, **more: Any) -> CpuBudget:
    more = {"host": 64, "affinity": 64, "root": Path("/nonexistent"), **more}
    return cpu_budget(local_world_size, env or {}, **more)


CASES: dict[str, tuple[str, dict[str, str], float | None]] = {
    "v2 own group": (V2, {"job/step/cpu.max": "400000 100000\n"}, 4),
    "v2 outer is tighter": (
        V2,
        {"job/step/cpu.max": "800000 100000\n", "job/cpu.max": "250000 100000\n"},
        2.5,
    ),
    "v2 inner is tighter": (
        V2,
        {"job/step/cpu.max": "150000 50000\n", "job/cpu.max": "800000 100000\n"},
        3,
    ),
    "v2 max": (V2, {"job/step/cpu.max": "max 100000\n", "job/cpu.max": "max 100000\n"}, None),
    "v2 max inside a quota": (
        V2,
        {"job/step/cpu.max": "max 100000\n", "job/cpu.max": "600000 100000\n"},
        6,
    ),
    "v2 container, path of the host": (V2, {"cpu.max": "800000 100000\n"}, 8),
    "v2 garbage": (V2, {"job/step/cpu.max": "what\n", "job/cpu.max": "5 0\n"}, None),
    "v1 own group": (V1, v1("cpu,cpuacct/job/step", 3 * MS100), 3),
    "v1 under its single name": (V1, v1("cpu/job/step", 3 * MS100), 3),
    "v1 outer is tighter": (
        V1,
        {**v1("cpu,cpuacct/job/step", 8 * MS100), **v1("cpu,cpuacct/job", 2 * MS100)},
        2,
    ),
    "v1 no quota": (V1, v1("cpu,cpuacct/job/step", -1), None),
    "v1 container, path of the host": (V1, v1("cpu,cpuacct", 5 * MS100), 5),
    "v1 quota of another controller": (V1, v1("memory/job/step", MS100), None),
    "hybrid, quota in v1": (HYBRID, v1("cpu,cpuacct/job/step", 4 * MS100), 4),
    "hybrid, quota in v2": (HYBRID, {"unified/job/step/cpu.max": "700000 100000\n"}, 7),
    "nothing mounted": (V2, {}, None),
    "no controller named": ("junk\n\n", {"job/cpu.max": "100000 100000\n"}, None),
}


@pytest.mark.parametrize(("proc", "files", "quota"), CASES.values(), ids=CASES)
def test_cgroup_quota(
    tmp_path: Path, proc: str, files: dict[str, str], quota: float | None
) -> None:
    assert cgroup_cpu_quota(cgroup(tmp_path, proc, files)) == quota


def test_no_cgroups_at_all(tmp_path: Path) -> None:
    assert cgroup_cpu_quota(tmp_path) is None


def with_quota(root: Path, quota: str) -> dict[str, Any]:
    return {"root": cgroup(root, "0::/\n", {"cpu.max": f"{quota} 100000\n"})}


def test_quota_is_shared_by_the_ranks_of_the_node(tmp_path: Path) -> None:
    found = budget(2, **with_quota(tmp_path, "800000"))
    assert found == CpuBudget(64, 8, 4, "cgroup quota; host has 64")


@pytest.mark.parametrize(
    ("quota", "usable"), [("50000", 1), ("150000", 1), ("290000", 2), ("6400000", 64)]
)
def test_a_part_of_a_cpu_does_not_count_but_one_is_always_there(
    tmp_path: Path, quota: str, usable: int
) -> None:
    assert budget(**with_quota(tmp_path, quota)).usable == usable


def test_every_rank_has_a_cpu_even_where_there_are_fewer() -> None:
    assert budget(8, affinity=3).per_rank == 1


STEP = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_PROCID": "0"}
ONE_TASK = {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "RANK": "2"}


@pytest.mark.parametrize(
    ("ranks", "env", "affinity", "usable", "per_rank", "reason"),
    [
        (1, {}, 64, 64, 64, "all CPUs of the host"),
        (1, {}, 6, 6, 6, "CPU affinity; host has 64"),
        (4, {**STEP, "SLURM_CPUS_PER_TASK": "3"}, 64, 12, 3, "Slurm's grant; host has 64"),
        (1, {"SLURM_CPUS_ON_NODE": "16"}, 64, 16, 16, "Slurm's grant; host has 64"),
        (4, {"SLURM_CPUS_ON_NODE": "16"}, 8, 8, 2, "CPU affinity; host has 64"),
        (1, {"SLURM_CPUS_ON_NODE": "64"}, 64, 64, 64, "all CPUs of the host"),
        (1, {"SLURM_CPUS_ON_NODE": "many"}, 64, 64, 64, "all CPUs of the host"),
        (1, {"SLURM_CPUS_PER_TASK": "2", "SLURM_CPUS_ON_NODE": "32"}, 64, 32, 32, "Slurm"),
        # One task of the step on this node, which is a torchrun with four ranks of its own: it
        # gives them RANK.
        (4, {**ONE_TASK, "SLURM_CPUS_PER_TASK": "16"}, 64, 16, 4, "Slurm's grant; host has 64"),
    ],
)
def test_the_least_limit_counts_and_is_named(
    ranks: int, env: dict[str, str], affinity: int, usable: int, per_rank: int, reason: str
) -> None:
    found = budget(ranks, env, affinity=affinity)
    assert (found.usable, found.per_rank) == (usable, per_rank)
    assert found.reason.startswith(reason)


@pytest.mark.skipif(shutil.which("taskset") is None, reason="needs taskset (util-linux)")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one CPU cannot be narrowed")
def test_real_affinity_is_seen() -> None:
    cpu = str(min(os.sched_getaffinity(0)))
    code = (
        "from launcher.runtime.cpu import cpu_budget as b; from pathlib import Path;"
        "x = b(1, {}, root=Path('/nonexistent')); print(x.usable, x.reason)"
    )
    done = subprocess.run(
        ["taskset", "-c", cpu, sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("1 CPU affinity; host has ")


UNDER_TORCHRUN = {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}


@pytest.mark.parametrize(
    ("env", "parent", "by_user"),
    [
        ({}, b"OMP_NUM_THREADS=4\0", False),
        ({"OMP_NUM_THREADS": "4"}, None, True),
        (UNDER_TORCHRUN, b"HOME=/\0", False),
        (UNDER_TORCHRUN, b"A=1\0OMP_NUM_THREADS=1\0", True),
        (UNDER_TORCHRUN, b"OMP_NUM_THREADS=1\0A=1\0", True),
        (UNDER_TORCHRUN, b"X_OMP_NUM_THREADS=1\0", False),
        (UNDER_TORCHRUN, None, True),  # cannot be read
    ],
)
def test_whose_threads(
    tmp_path: Path, env: dict[str, str], parent: bytes | None, by_user: bool
) -> None:
    path = tmp_path / "environ"
    if parent is not None:
        path.write_bytes(parent)
    assert threads_set_by_user(env, path) is by_user
