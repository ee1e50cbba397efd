"""Figures of this process and its children."""

import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from launcher.callbacks.system import GIB, SystemFigures
from tests.callbacks.helpers import view

# A child that holds 200 MiB, computes, and waits for its end.
CHILD = """
import sys
kept = bytearray(200 << 20)
print("ready", flush=True)
sum(range(3 * 10**7))
print("done", flush=True)
sys.stdin.read()
"""


def test_a_childs_memory_and_time_are_told_apart(tmp_path: Path) -> None:
    figures = SystemFigures(view(directory=tmp_path))
    before = figures.late_figures()
    other = before["system/workers_rss_gib"]  # children that other tests have left
    assert before["system/rss_gib"] > max(0.01, other)
    assert before["system/cpu_percent"] > 0  # since this process began
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == b"ready\n"
        assert child.stdout.readline() == b"done\n"
        figures.next = 0.0
        after = figures.late_figures()
    finally:
        child.communicate()
    assert after["system/workers_rss_gib"] > other + 200 / 1024
    assert after["system/rss_gib"] > after["system/workers_rss_gib"]
    assert after["system/workers_cpu_percent"] > 0
    assert after["system/cpu_percent"] >= after["system/workers_cpu_percent"]


def test_they_are_read_anew_only_when_they_are_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = SystemFigures(view(directory=tmp_path))
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


def test_disk(tmp_path: Path) -> None:
    free = SystemFigures(view(directory=tmp_path)).late_figures()["system/disk_free_gib"]
    assert 0 < free < (1 << 60) / GIB
    assert (
        "system/disk_free_gib"
        not in SystemFigures(view(directory=tmp_path / "gone")).late_figures()
    )


def test_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where torch has no library to ask for the utilisation, it is told once and left out."""
    asked, gpu = [], torch.device("cuda", 0)

    def utilization(device: torch.device) -> int:
        asked.append(device)
        raise ModuleNotFoundError("nvidia-ml-py is not installed")

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * GIB)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 4 * GIB)
    monkeypatch.setattr(torch.cuda, "utilization", utilization)
    figures = SystemFigures(view(device=gpu, directory=tmp_path))
    caplog.set_level(logging.INFO, "launcher")
    for _ in range(2):
        figures.next = 0.0
        found = figures.late_figures()
        assert (found["system/gpu_mem_gib"], found["system/gpu_mem_reserved_gib"]) == (3, 4)
        assert "system/gpu_percent" not in found
    assert len(asked) == 1 and caplog.text.count("launcher[gpu]") == 1
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 55)
    again = SystemFigures(view(device=gpu, directory=tmp_path))
    assert again.late_figures()["system/gpu_percent"] == 55
