"""Environment variables that matter to a run, and what they do here. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator

from launcher.debug.doctor.findings import Finding, Machine, Topic
from launcher.runtime.cpu import threads_set_by_user

TOPIC = Topic("environment")
MATTERS = re.compile(
    r"(OMP|MKL|OPENBLAS)_NUM_THREADS|CUDA_VISIBLE_DEVICES|CUDA_LAUNCH_BLOCKING|"
    r"CUBLAS_WORKSPACE_CONFIG|PYTORCH_\w*ALLOC_CONF|(GLOO|TP)_SOCKET_IFNAME|PYTHONHASHSEED|"
    r"(NCCL|TORCH)_\w+"
)
# These may well be others on each rank or node.
OF_RANK = ("CUDA_VISIBLE_DEVICES", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
# What is slower with them; each for a value that switches it on.
SLOW = {
    "CUDA_LAUNCH_BLOCKING": "every kernel is waited for",
    "NCCL_P2P_DISABLE": "GPUs of a node exchange by way of the host",
    "NCCL_SHM_DISABLE": "ranks of a node exchange through the network",
    "NCCL_IB_DISABLE": "nodes exchange by TCP, not by InfiniBand or RoCE",
}


def told(machine: Machine) -> dict[str, str]:
    """The variables that matter and are set."""
    return {k: v for k, v in sorted(machine.environ.items()) if MATTERS.fullmatch(k)}


def variables(machine: Machine, deterministic: bool = False) -> Iterator[Finding]:
    """One finding for each that is set, and for the number of threads in any case."""
    yield _threads(machine)
    for name, value in told(machine).items():
        if name != "OMP_NUM_THREADS":
            yield _variable(name, value, machine, deterministic)


def _threads(machine: Machine) -> Finding:
    name, budget = "OMP_NUM_THREADS", machine.cpu.per_rank
    value = machine.environ.get(name)
    if value is None:
        return TOPIC.ok(name, f"not set: a rank's threads follow from its {budget} CPUs")
    if not threads_set_by_user(machine.environ):
        return TOPIC.ok(
            name, f"{value}, by torchrun: a rank's threads follow from its {budget} CPUs"
        )
    first = value.split(",")[0]
    if not first.isdigit() or int(first) == 0:
        return TOPIC.problem(name, f"{value!r} is no number of threads", "unset it")
    if int(first) > budget:
        return TOPIC.warning(
            name,
            f"{value} threads a rank, which has {budget} CPUs: they wait for each other",
            f"unset it, or set it to at most {budget}",
        )
    return TOPIC.ok(name, f"{value}: threads of a rank, in place of what its {budget} CPUs give")


def _variable(name: str, value: str, machine: Machine, deterministic: bool) -> Finding:
    if name in SLOW and value not in ("", "0"):
        return TOPIC.warning(name, f"{value}: {SLOW[name]}", "unset it when it is not needed")
    if name == "CUDA_VISIBLE_DEVICES":
        if value.strip() in ("", "-1"):
            return TOPIC.warning(
                name, f"{value!r} hides all GPUs: a run would take the CPU", "unset it to use them"
            )
        return TOPIC.ok(name, f"{value}: torch sees these GPUs alone, counted from 0")
    if name.endswith("SOCKET_IFNAME"):
        return _interface(name, value, machine)
    if name == "PYTHONHASHSEED":
        return TOPIC.ok(
            name,
            f"{value}: the order of sets of texts, for tasks that go by it, is the same each time",
        )
    if name == "CUBLAS_WORKSPACE_CONFIG":
        if deterministic and value not in (":4096:8", ":16:8"):
            return TOPIC.problem(
                name, f"{value}: with it cuBLAS is not deterministic", "unset it, or set :4096:8"
            )
        return TOPIC.ok(name, f"{value}: cuBLAS reads it, for DETERMINISTIC")
    if name == "TORCH_DISTRIBUTED_DEBUG" and value.upper() == "DETAIL":
        return TOPIC.warning(
            name, f"{value}: torch checks each collective over all ranks first", "unset it"
        )
    if name in ("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        return TOPIC.ok(name, f"{value}: read by that library; the CPU budget does not know of it")
    reader = "NCCL" if name.startswith("NCCL_") else "torch"
    return TOPIC.ok(name, f"{value}: {reader} reads it")


def _interface(name: str, value: str, machine: Machine) -> Finding:
    """A name, or for NCCL a list of beginnings; "=eth0" is a whole name, "^docker" all others."""
    there = ", ".join(sorted(machine.interfaces))
    if value.startswith("^"):
        return TOPIC.ok(name, f"{value}: all network interfaces but these")
    whole = value.startswith("=") or not name.startswith("NCCL")
    names = [part.split(":")[0] for part in value.lstrip("=").split(",") if part]
    found = [i for i in machine.interfaces for n in names if (i == n if whole else i.startswith(n))]
    if not found:
        return TOPIC.problem(
            name,
            f"{value}: this host has no such network interface, but {there}",
            "set it to one that reaches the other nodes, on each node",
        )
    return TOPIC.ok(name, f"{value}: the network interface between ranks")
