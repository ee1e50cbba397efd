"""The CPU budget: the least of affinity, cgroup quota and Slurm's grant, shared by the ranks."""

import os
from pathlib import Path
from typing import Any

import pytest

from launcher.runtime.cpu import CpuBudget, cgroup_cpu_quota, cpu_budget, threads_set_by_user
from tests.runtime.groups import HYBRID, V1, V2, cgroup

NOWHERE = Path("/nonexistent")


def v1(quotas: dict[str, int]) -> dict[str, object]:
    files = {f"{group}/cpu.cfs_quota_us": quota for group, quota in quotas.items()}
    return files | {f"{group}/cpu.cfs_period_us": 100_000 for group in quotas}


def v2(quotas: dict[str, str]) -> dict[str, object]:
    return {f"{group}/cpu.max": quota for group, quota in quotas.items()}


CASES: dict[str, tuple[str, dict[str, object], float | None]] = {
    "v2 own group": (V2, v2({"job/step": "400000 100000"}), 4),
    "v2 outer is tighter": (V2, v2({"job/step": "800000 100000", "job": "250000 100000"}), 2.5),
    "v2 inner is tighter": (V2, v2({"job/step": "150000 50000", "job": "800000 100000"}), 3),
    "v2 max": (V2, v2({"job/step": "max 100000", "job": "max 100000"}), None),
    "v2 max inside a quota": (V2, v2({"job/step": "max 100000", "job": "600000 100000"}), 6),
    "v2 container, path of the host": (V2, v2({".": "800000 100000"}), 8),
    "v2 garbage": (V2, v2({"job/step": "what", "job": "5 0"}), None),
    "v1 own group": (V1, v1({"cpu,cpuacct/job/step": 300_000}), 3),
    "v1 under its single name": (V1, v1({"cpu/job/step": 300_000}), 3),
    "v1 outer is tighter": (
        V1,
        v1({"cpu,cpuacct/job/step": 800_000, "cpu,cpuacct/job": 200_000}),
        2,
    ),
    "v1 no quota": (V1, v1({"cpu,cpuacct/job/step": -1}), None),
    "v1 container, path of the host": (V1, v1({"cpu,cpuacct": 500_000}), 5),
    "v1 quota of another controller": (V1, v1({"memory/job/step": 100_000}), None),
    "hybrid, quota in v1": (HYBRID, v1({"cpu,cpuacct/job/step": 400_000}), 4),
    "hybrid, quota in v2": (HYBRID, v2({"unified/job/step": "700000 100000"}), 7),
    "nothing mounted": (V2, {}, None),
    "no controller named": ("junk\n", v2({"job": "100000 100000"}), None),
}


@pytest.mark.parametrize(("proc", "files", "quota"), CASES.values(), ids=CASES)
def test_cgroup_quota(
    tmp_path: Path, proc: str, files: dict[str, object], quota: float | None
) -> None:
    assert cgroup_cpu_quota(cgroup(tmp_path, proc, files)) == quota


HOST, AFFINITY = "all CPUs of the host", "CPU affinity; host has 64"
GRANT, QUOTA = "Slurm's grant; host has 64", "cgroup quota; host has 64"
STEP = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_PROCID": "0"}
ONE_TASK = {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "RANK": "2"}


@pytest.mark.parametrize(
    ("ranks", "env", "affinity", "quota", "budget"),
    [
        (1, {}, 64, None, (64, 64, HOST)),
        (1, {}, 6, None, (6, 6, AFFINITY)),
        (8, {}, 3, None, (3, 1, AFFINITY)),  # every rank has one
        (2, {}, 64, 800_000, (8, 4, QUOTA)),
        (1, {}, 64, 290_000, (2, 2, QUOTA)),  # a part of a CPU does not count
        (1, {}, 64, 150_000, (1, 1, QUOTA)),
        (1, {}, 64, 50_000, (1, 1, QUOTA)),  # but one is always there
        (1, {}, 64, 6_400_000, (64, 64, HOST)),
        (4, {**STEP, "SLURM_CPUS_PER_TASK": "3"}, 64, None, (12, 3, GRANT)),
        (1, {"SLURM_CPUS_ON_NODE": "16"}, 64, None, (16, 16, GRANT)),
        (4, {"SLURM_CPUS_ON_NODE": "16"}, 8, None, (8, 2, AFFINITY)),
        (1, {"SLURM_CPUS_ON_NODE": "64"}, 64, None, (64, 64, HOST)),
        (1, {"SLURM_CPUS_ON_NODE": "many"}, 64, None, (64, 64, HOST)),
        (1, {"SLURM_CPUS_PER_TASK": "2", "SLURM_CPUS_ON_NODE": "32"}, 64, None, (32, 32, GRANT)),
        # One task of the step on this node, which is a torchrun with four ranks of its own: it
        # gives them RANK.
        (4, {**ONE_TASK, "SLURM_CPUS_PER_TASK": "16"}, 64, None, (16, 4, GRANT)),
    ],
)
def test_the_least_limit_counts_in_whole_cpus_and_is_named(
    tmp_path: Path, ranks: int, env: Any, affinity: int, quota: int | None, budget: Any
) -> None:
    root = cgroup(tmp_path, V2, v2({".": f"{quota or 'max'} 100000"}))
    found = cpu_budget(ranks, env, host=64, affinity=affinity, root=root)
    assert found == CpuBudget(64, *budget)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one CPU cannot be narrowed")
def test_real_affinity_is_seen() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        found = cpu_budget(1, {}, root=NOWHERE)
    finally:
        os.sched_setaffinity(0, before)
    host = os.cpu_count() or 0
    assert found == CpuBudget(host, 1, 1, f"CPU affinity; host has {host}")


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
