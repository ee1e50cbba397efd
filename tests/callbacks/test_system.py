"""Figures of this process and its children."""

import logging
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from launcher.callbacks.system import GIB, SystemFigures
from tests.callbacks.helpers import view

# A child that holds 200 MiB, computes, and waits for its end.
CHILD = """
import sys
kept = bytearray(200 << 20)
sum(range(3 * 10**7))
print("done", flush=True)
sys.stdin.read()
"""


def test_a_childs_memory_and_time_are_told_apart() -> None:
    figures = SystemFigures(view())
    before = figures.late_figures()
    other = before["system/workers_rss_gib"]  # children that other tests have left
    assert before["system/rss_gib"] > max(0.01, other)
    assert before["system/cpu_percent"] > 0  # since this process began
    command, pipe = [sys.executable, "-c", CHILD], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as child:
        assert child.stdout is not None and child.stdout.readline() == b"done\n"
        figures.next = 0.0
        after = figures.late_figures()
    assert after["system/workers_rss_gib"] > other + 200 / 1024
    assert after["system/rss_gib"] > after["system/workers_rss_gib"]
    assert after["system/workers_cpu_percent"] > 0
    assert after["system/cpu_percent"] >= after["system/workers_cpu_percent"]


def test_they_are_read_anew_only_when_they_are_old(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = SystemFigures(view())
    reads = []

    def slow(now: float) -> dict[str, float]:
        reads.append(now)
        clock[0] += 0.5  # what a read takes, on a machine of many processes
        return {"system/x": float(len(reads))}

    clock = [1000.0]
    monkeypatch.setattr(figures, "_read", slow)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    assert figures.late_figures() == {"system/x": 1.0}
    clock[0] += 49
    assert figures.late_figures() == {"system/x": 1.0}  # a hundredth of the time, no more
    clock[0] += 2
    assert figures.late_figures() == {"system/x": 2.0}


def test_the_disk_that_the_run_is_on(tmp_path: Path) -> None:
    here, gone = (SystemFigures(view(directory=path)) for path in (tmp_path, tmp_path / "gone"))
    assert 0 < here.late_figures()["system/disk_free_gib"] < (1 << 60) / GIB
    assert "system/disk_free_gib" not in gone.late_figures()


def test_a_gpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Where torch has no library to ask for the utilisation, it is told once and left out."""
    gpu, asked = torch.device("cuda", 0), Mock(side_effect=ModuleNotFoundError("no nvidia-ml-py"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * GIB)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 4 * GIB)
    monkeypatch.setattr(torch.cuda, "utilization", asked)
    figures = SystemFigures(view(device=gpu))
    caplog.set_level(logging.INFO, "launcher")
    for _ in range(2):
        figures.next = 0.0
        found = figures.late_figures()
        assert (found["system/gpu_mem_gib"], found["system/gpu_mem_reserved_gib"]) == (3, 4)
        assert "system/gpu_percent" not in found
    asked.assert_called_once_with(gpu)
    assert caplog.text.count("launcher[gpu]") == 1
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 55)
    assert SystemFigures(view(device=gpu)).late_figures()["system/gpu_percent"] == 55
