"""What a run runs on, and with which code, for environment.json."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

import launcher
from launcher.provenance.code import Code
from launcher.provenance.packages import installed

# What changes numbers: how many threads share a sum, which algorithms are taken.
VARIABLES = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_CBWR"),
    *("CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "CUDA_VISIBLE_DEVICES"),
    *("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "PYTHONHASHSEED"),
)
PREFIXES = ("TORCH_", "PYTORCH_", "NCCL_", "GLOO_")


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


def describe(argv: Sequence[str], code: Code | None = None) -> dict[str, Any]:
    """Command line, versions, git state and what else may change bits, for environment.json. The
    versions are also those of what the task's `code` imports."""
    known = versions()
    return {
        "command": [sys.executable, *argv],
        "directory": os.getcwd(),
        "platform": platform.platform(),
        "versions": {**known, **(code.packages(known) if code is not None else {})},
        "launcher_source": source(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "variables": {name: os.environ[name] for name in sorted(os.environ) if matters(name)},
        "git": _git(),
    }


def matters(name: str) -> bool:
    """Whether an environment variable of this name can change what is computed."""
    return name in VARIABLES or name.startswith(PREFIXES)


@functools.cache
def source() -> str:
    """The SHA-256 over the launcher's own files: two checkouts of one version may differ."""
    folder, found = Path(launcher.__file__).parent, hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        found.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python, the launcher and the packages that a run depends on."""
    found = {"launcher": launcher.__version__, "python": platform.python_version()}
    found |= installed(("torch", "numpy", "yacs", "tensorboard", "psutil", "rich"))
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
