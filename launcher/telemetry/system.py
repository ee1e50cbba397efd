"""Figures of the process and its machine, from psutil and torch."""

from __future__ import annotations

import platform
import socket
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil
import torch

GIB = 1 << 30


class SystemFigures:
    """Memory and CPU of this rank and its loader workers, as `system/*` metrics."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.process = psutil.Process()
        self.cpu_seconds: dict[int, float] = {}
        self.since = 0.0

    def read(self, now: float) -> dict[str, float]:
        """Figures since the last call; `now` in seconds of a monotonic clock."""
        rss, cpu = 0.0, {}
        for process in [self.process, *self.process.children(recursive=True)]:
            try:
                with process.oneshot():
                    times = process.cpu_times()
                    cpu[process.pid] = times.user + times.system
                    rss += process.memory_info().rss
            except psutil.Error:  # a worker that left just now
                continue
        used = sum(seconds - self.cpu_seconds.get(pid, 0.0) for pid, seconds in cpu.items())
        figures = {"system/rss_gib": rss / GIB}
        if self.since:
            figures["system/cpu_percent"] = 100 * used / max(now - self.since, 1e-9)
        if self.device.type == "cuda":
            # The allocator's own books: no call to the device.
            figures["system/gpu_mem_gib"] = torch.cuda.max_memory_allocated(self.device) / GIB
        self.cpu_seconds, self.since = cpu, now
        return figures


def this_rank(device: torch.device) -> dict[str, Any]:
    """Host, pid and device of a rank, for environment.json."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "host": socket.gethostname(),
        "pid": psutil.Process().pid,
        "device": str(device),
        "device_name": name or platform.machine(),
        "threads": torch.get_num_threads(),
    }


def describe(argv: Sequence[str]) -> dict[str, Any]:
    """Command line, versions and git state, for environment.json."""
    return {
        "command": [sys.executable, *argv],
        "platform": platform.platform(),
        "versions": versions(),
        "git": _git(),
    }


def versions() -> dict[str, str]:
    """Versions of Python, the launcher and the packages that a run depends on."""
    from launcher import __version__

    found = {"launcher": __version__, "python": platform.python_version()}
    for package in ("torch", "numpy", "yacs", "tensorboard", "jsonlines", "psutil", "rich"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def _git() -> dict[str, Any] | None:
    """Commit and dirty flag of the working directory's repository; None outside of one."""
    try:
        commit, status = (
            subprocess.run(
                ["git", *arguments], capture_output=True, text=True, timeout=5, check=True
            ).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": bool(status)}
