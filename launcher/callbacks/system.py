"""Figures of rank 0's process and its machine, from psutil and torch."""

from __future__ import annotations

import contextlib
import shutil
import time

import psutil
import torch

from launcher.callbacks import Run
from launcher.log import get_logger

logger = get_logger(__name__)
GIB = 1 << 30


class SystemFigures:
    """Memory, CPU, device and disk of rank 0's process and its loader workers, as `system/*`.

    Read in the thread that writes the records: to look for the workers, psutil reads every process
    of the machine. It looks at most once a second, and takes no more than a hundredth of the time.
    """

    def __init__(self, run: Run) -> None:
        self.device, self.directory = run.runtime.device, run.directory
        self.process = psutil.Process()
        self.cpu_seconds: dict[int, float] = {}
        # At first since this process began.
        self.since = time.monotonic() - max(time.time() - self.process.create_time(), 0.0)
        self.next = 0.0
        self.latest: dict[str, float] = {}
        self.utilisation = run.runtime.device.type == "cuda"  # as long as it can be read

    def late_figures(self) -> dict[str, float]:
        """The figures, read anew if they are old."""
        began = time.monotonic()
        if began >= self.next:
            self.latest = self._read(began)
            self.next = began + max(1.0, 100 * (time.monotonic() - began))
        return self.latest

    def _read(self, now: float) -> dict[str, float]:
        memory, used, seconds = {True: 0.0, False: 0.0}, {True: 0.0, False: 0.0}, {}
        for process in [self.process, *self.process.children(recursive=True)]:
            try:
                with process.oneshot():
                    times, rss = process.cpu_times(), process.memory_info().rss
            except psutil.Error:  # a worker that left just now
                continue
            own, pid = process.pid == self.process.pid, process.pid
            seconds[pid] = times.user + times.system
            used[own] += seconds[pid] - self.cpu_seconds.get(pid, 0.0)
            memory[own] += rss
        percent = 100 / max(now - self.since, 1e-9)
        self.cpu_seconds, self.since = seconds, now
        figures = {
            # Pages that workers share with the process that they were forked from count for each.
            "system/rss_gib": (memory[True] + memory[False]) / GIB,
            "system/workers_rss_gib": memory[False] / GIB,
            "system/cpu_percent": (used[True] + used[False]) * percent,
            "system/workers_cpu_percent": used[False] * percent,
        }
        with contextlib.suppress(OSError):
            figures["system/disk_free_gib"] = shutil.disk_usage(self.directory).free / GIB
        return figures | self._device()

    def _device(self) -> dict[str, float]:
        if self.device.type != "cuda":
            return {}
        # The allocator's own books: no call to the device.
        figures = {
            "system/gpu_mem_gib": torch.cuda.max_memory_allocated(self.device) / GIB,
            "system/gpu_mem_reserved_gib": torch.cuda.max_memory_reserved(self.device) / GIB,
        }
        if self.utilisation:
            try:
                # Asks the driver's management library, not the device: nothing waits for kernels.
                figures["system/gpu_percent"] = float(torch.cuda.utilization(self.device))
            except Exception as error:  # no nvidia-ml-py, or a device that does not tell (MIG)
                self.utilisation = False
                hint = "; pip install 'launcher[gpu]'" if isinstance(error, ImportError) else ""
                logger.info("no system/gpu_percent: %s%s", str(error).splitlines()[0], hint)
        return figures
