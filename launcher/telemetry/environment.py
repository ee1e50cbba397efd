"""What a run runs on, and with which code, for environment.json."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil
import torch


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
        "directory": os.getcwd(),
        "platform": platform.platform(),
        "versions": versions(),
        "git": _git(),
    }


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python, the launcher and the packages that a run depends on."""
    from launcher import __version__

    found = {"launcher": __version__, "python": platform.python_version()}
    for package in ("torch", "numpy", "yacs", "tensorboard", "psutil", "rich"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def _git() -> dict[str, Any] | None:
    """Commit and dirty flag of the working directory's repository; None outside of one."""

    def ask(*words: str) -> str:
        command = ["git", *words]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        return ended.stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
