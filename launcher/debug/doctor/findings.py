"""What a check says, and what it asks the machine. Imports no torch."""

from __future__ import annotations

import os
import re
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from launcher.runtime.cpu import CpuBudget, cpu_budget
from launcher.runtime.memory import MemoryBudget, memory_budget

OK, WARNING, PROBLEM = "ok", "warning", "problem"
DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Finding:
    """What was found under a name, whether it is "ok", a "warning" or a "problem", and for these
    two what to do."""

    topic: str
    name: str
    state: str
    found: str
    remedy: str = ""


class Topic:
    """Makes the findings of one topic."""

    def __init__(self, name: str) -> None:
        self.name = name

    def ok(self, name: str, found: str) -> Finding:
        return Finding(self.name, name, OK, found)

    def warning(self, name: str, found: str, remedy: str) -> Finding:
        return Finding(self.name, name, WARNING, found, remedy)

    def problem(self, name: str, found: str, remedy: str) -> Finding:
        return Finding(self.name, name, PROBLEM, found, remedy)


@dataclass(frozen=True)
class Machine:
    """What the checks ask the machine, and the environment they are asked in; tests give others.

    `free` gives the free bytes of the file system that holds a folder, `modified` the time that it
    gives to a file which is written in a folder now; `open_files` is the limit that a process may
    raise its own to; `driver` that of NVIDIA, or "".
    """

    environ: Mapping[str, str]
    cpu: CpuBudget
    memory: MemoryBudget
    open_files: int
    interfaces: frozenset[str]
    temporary: Path
    driver: str = ""
    free: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free
    clock: Callable[[], float] = time.time
    modified: Callable[[Path], float] = lambda folder: modified(folder)

    @classmethod
    def here(cls, local_ranks: int) -> Machine:
        """This one, of which so many ranks share the CPUs."""
        return cls(
            environ=dict(os.environ),
            cpu=cpu_budget(local_ranks),
            memory=memory_budget(),
            open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
            interfaces=frozenset(psutil.net_if_addrs()),
            # Python passes silently over a TMPDIR that cannot be written.
            temporary=Path(os.environ.get("TMPDIR") or tempfile.gettempdir()),
            driver=driver(),
        )


def driver(path: Path = DRIVER) -> str:
    """The version of NVIDIA's kernel driver, "" where there is none."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+\.\d+(\.\d+)?)\s", path.read_text())
    except OSError:
        return ""
    return found[1] if found else "of unknown version"


def modified(folder: Path) -> float:
    """When a file that is written in a folder now was written, by the file system's clock."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"?")
        file.flush()
        return os.fstat(file.fileno()).st_mtime


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def existing(path: Path) -> Path:
    """The nearest folder of a path that exists."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())
