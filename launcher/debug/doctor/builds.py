"""Python, torch, drivers and devices."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.distributed as dist

from launcher import __version__
from launcher.debug.doctor.findings import Finding, Machine, Topic
from launcher.errors import UsageError
from launcher.runtime.process import choose_device
from launcher.runtime.topology import Topology

OLDEST_PYTHON, OLDEST_TORCH = (3, 10), (2, 6)


def builds(machine: Machine) -> Iterator[Finding]:
    """Versions, what torch was built for, and the driver."""
    topic = Topic("builds")
    found = f"{platform.python_version()}, {sys.executable}"
    if sys.version_info < OLDEST_PYTHON:
        yield topic.problem("Python", found, "the launcher needs Python 3.10 or newer")
    else:
        yield topic.ok("Python", found)
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    kind = torch_kind()
    found = f"{torch.__version__}, {kind}"
    if release < OLDEST_TORCH:
        yield topic.problem("torch", found, "the launcher needs torch 2.6 or newer: upgrade it")
    elif machine.driver and kind == "built for the CPU only":
        yield topic.problem(
            "torch",
            f"{found}, though this machine has NVIDIA's driver {machine.driver}: its GPUs are not "
            "used",
            "install a build of torch for CUDA (https://pytorch.org/get-started/locally)",
        )
    else:
        yield topic.ok("torch", found)
    if machine.driver:
        yield topic.ok("NVIDIA driver", machine.driver)
    yield from _backends(topic)


def _backends(topic: Topic) -> Iterator[Finding]:
    if dist.is_gloo_available():
        yield topic.ok("gloo", "built in: ranks on CPUs, and what hosts tell each other")
    else:
        yield topic.problem(
            "gloo", "not in this build of torch", "several ranks need it: take another build"
        )
    if dist.is_nccl_available():
        yield topic.ok("NCCL", f"{nccl_version()}: exchange between GPUs")
    elif torch.version.cuda:
        yield topic.problem(
            "NCCL",
            "not in this build of torch, which is for CUDA",
            "ranks on GPUs need it: take another build, or set DIST.BACKEND gloo",
        )
    else:
        yield topic.ok("NCCL", "not in this build of torch; only GPUs need it")


def torch_kind() -> str:
    """What this torch was built for."""
    if torch.version.cuda:
        return f"built for CUDA {torch.version.cuda}"
    return f"built for ROCm {torch.version.hip}" if torch.version.hip else "built for the CPU only"


def nccl_version() -> str:
    """That of NCCL, "" where there is none."""
    if not dist.is_nccl_available():
        return ""
    found: Any = torch.cuda.nccl.version()
    return ".".join(map(str, found)) if isinstance(found, tuple) else str(found)


def devices(machine: Machine, topology: Topology, choice: str) -> Iterator[Finding]:
    """What this node's ranks compute on, if DIST.DEVICE is `choice`."""
    topic, count = Topic("devices"), torch.cuda.device_count()
    try:
        device = choose_device(topology, choice)
    except UsageError as error:
        remedy = "start fewer ranks a node, or set DIST.DEVICE cpu"
        yield topic.problem("device", str(error), remedy)
    else:
        told = "a GPU for each rank" if device.type == "cuda" else "the CPU"
        yield topic.ok("device", f"DIST.DEVICE {choice}: {told}")
    if not count and machine.driver and torch.version.cuda:
        yield topic.problem(
            "GPUs",
            f"torch finds none, though NVIDIA's driver {machine.driver} is here",
            "look at CUDA_VISIBLE_DEVICES, at nvidia-smi, and whether the container was given GPUs",
        )
    for index in range(count):
        yield _gpu(topic, index)
    if torch.backends.mps.is_available():
        yield topic.ok("MPS", "here, but the launcher does not use it: DIST.DEVICE takes cuda, cpu")


def _gpu(topic: Topic, index: int) -> Finding:
    name = f"cuda:{index}"
    try:
        found = torch.cuda.get_device_name(index)
        free, total = torch.cuda.mem_get_info(index)
        found += f", {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        # Waits for the device: a build without code for this GPU fails at the first kernel.
        torch.ones(2, device=name).sum().item()
    except RuntimeError as error:
        return topic.problem(
            name,
            f"cannot be used: {str(error).splitlines()[0]}",
            "look at nvidia-smi; a build of torch for another CUDA, or another driver, may help",
        )
    if free < total / 2:
        return topic.warning(
            name, f"{found}: other processes use the rest", "look at nvidia-smi for who they are"
        )
    return topic.ok(name, found)


def versions() -> dict[str, str]:
    """What must be the same on all ranks, by name."""
    found = {
        "Python": platform.python_version(),
        "launcher": __version__,
        "torch": torch.__version__,
        "what torch was built for": torch_kind(),
        "NCCL": nccl_version(),
    }
    try:
        found["numpy"] = version("numpy")
    except PackageNotFoundError:
        found["numpy"] = ""
    return found


def device_names() -> str:
    """Those of this process's GPUs."""
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
