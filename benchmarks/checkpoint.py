"""How long one save of a 200 MB state (a model and Adam) keeps the training waiting.

    python benchmarks/checkpoint.py [--quick] [--json]

Ours beside a plain torch.save (and fsync), and torch.distributed.checkpoint.async_save, of one
state, in one process and one run, on the CPU. Every method saves to the same disk, after warm-up
saves that are not counted, and each save is waited for before the next begins, with training steps
in between. The blocked time of ours is what `Saver.save` takes; what the steps beside a save in
flight lose by sharing the machine with it is told apart: `steps beside it`, their time over that of
the same steps without a save, and `lost`, how much later the training is in all when it is done.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn

from launcher.checkpoint.saver import Saver
from launcher.checkpoint.store import CheckpointStore

MIB = 2**20


class PeakMemory:
    """The most memory this process had beyond what it had at the start, in MiB."""

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.start = self.peak = self.process.memory_info().rss
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self.stop.wait(0.005):
            self.peak = max(self.peak, self.process.memory_info().rss)

    def __enter__(self) -> PeakMemory:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()

    @property
    def mib(self) -> float:
        return (self.peak - self.start) / MIB


class Training:
    """A model with Adam, a third of the state each for weights and two averages; and its steps."""

    def __init__(self, megabytes: float, layers: int = 16) -> None:
        width = round((megabytes * 1e6 / 3 / 4 / layers) ** 0.5)
        torch.manual_seed(0)
        self.model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
        self.model.append(nn.BatchNorm1d(width))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-6, fused=True)
        self.width = width

    def step(self, batch: int) -> None:
        """One training step; a batch of 0 is the limit of a short one, which costs nothing."""
        if batch == 0:
            time.sleep(0.001)
            return
        self.model(torch.randn(batch, self.width)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def size(self) -> int:
        tensors = [*self.model.state_dict().values()]
        for values in self.optimizer.state.values():
            tensors += values.values()
        return sum(t.numel() * t.element_size() for t in tensors)


def ours(
    training: Training, folder: Path, batch: int, base: float
) -> Callable[[], dict[str, float]]:
    """A save beside the training, with steps of `batch` samples until it is done."""
    errors: list[Exception | None] = []
    saver = Saver(CheckpointStore(folder), lambda _m, _s, error: errors.append(error))
    count = 0

    def save() -> dict[str, float]:
        nonlocal count
        count += 1
        manifest = {"step": count, "epoch": 0, "samples": 0, "world_size": 1, "metrics": {}}
        began = time.perf_counter()
        saver.save(training.state(), manifest)
        blocked = start = time.perf_counter() - began
        times = []
        while saver.writing is not None and not saver.writing.done():
            step_began = time.perf_counter()
            training.step(batch)
            times.append(time.perf_counter() - step_began)
        total = time.perf_counter() - began
        # The first step's wait is counted as blocked already; the last one outlives the save.
        beside = statistics.median(times[1:-1]) if len(times) > 2 else float("nan")
        assert errors[-1] is None, errors[-1]
        lost = total - len(times) * base
        return {
            "blocked": blocked,
            "call": start,
            "total": total,
            "step_beside": beside,
            "lost": lost,
        }

    return save


def plain(training: Training, folder: Path) -> Callable[[], dict[str, float]]:
    """torch.save to a file, fsync, rename: what training scripts do."""

    def save() -> dict[str, float]:
        began = time.perf_counter()
        with (folder / "plain.tmp").open("wb") as file:
            torch.save(training.state(), file)
            file.flush()
            os.fsync(file.fileno())
        (folder / "plain.tmp").rename(folder / "plain.pt")
        blocked = time.perf_counter() - began
        return {"blocked": blocked, "call": blocked, "total": blocked, "lost": blocked}

    return save


def clone(training: Training) -> Callable[[], dict[str, float]]:
    """A copy of the whole state into fresh memory, saved nowhere."""

    def save() -> dict[str, float]:
        began = time.perf_counter()
        copies = [v.clone() for v in training.model.state_dict().values()]
        for values in training.optimizer.state.values():
            copies += [v.clone() for v in values.values()]
        blocked = time.perf_counter() - began
        return {"blocked": blocked, "call": blocked, "total": blocked, "lost": blocked}

    return save


def asynchronous(
    training: Training, folder: Path, batch: int, base: float
) -> Callable[[], dict[str, float]]:
    """torch.distributed.checkpoint.async_save, with steps of `batch` samples until it is done."""
    import torch.distributed.checkpoint as dcp

    def save() -> dict[str, float]:
        shutil.rmtree(folder / "dcp", ignore_errors=True)
        began = time.perf_counter()
        future = dcp.async_save(training.state(), checkpoint_id=str(folder / "dcp"))
        blocked = time.perf_counter() - began
        times = []
        while not future.done():
            step_began = time.perf_counter()
            training.step(batch)
            times.append(time.perf_counter() - step_began)
        future.result()
        beside = statistics.median(times[1:-1]) if len(times) > 2 else float("nan")
        total = time.perf_counter() - began
        lost = total - len(times) * base
        return {
            "blocked": blocked,
            "call": blocked,
            "total": total,
            "step_beside": beside,
            "lost": lost,
        }

    return save


def measure(
    name: str, save: Callable[[], dict[str, float]], train: Callable[[], Any], repeats: int
) -> dict[str, Any]:
    """Medians and ranges in ms, after three saves to warm up."""
    with PeakMemory() as memory:
        for _ in range(3):
            save()
            train()
        found = []
        for _ in range(repeats):
            found.append(save())
            train()
    row: dict[str, Any] = {"method": name, "repeats": repeats, "extra_mib": memory.mib}
    for key in found[0]:
        values = sorted(1000 * one[key] for one in found if one[key] == one[key])
        if values:
            row[f"{key}_ms"] = statistics.median(values)
            row[f"{key}_range_ms"] = [values[0], values[-1]]
    return row


def step_time(training: Training, batch: int, repeats: int = 10) -> float:
    """The median of a step's time without a save, in ms."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        training.step(batch)
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)


def find_batch(training: Training, copy_ms: float) -> int:
    """The smallest batch whose step is at least twice as long as the copy of the state."""
    batch = 8
    while step_time(training, batch, 3) < 2 * copy_ms and batch < 1 << 14:
        batch *= 2
    return batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=200, help="size of the state")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="20 MB and 10 repetitions")
    parser.add_argument("--folder", type=Path, help="on the disk to save to (default: TMPDIR)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.megabytes, options.repeats = 20, 10
    folder = Path(tempfile.mkdtemp(prefix="bench_checkpoint_", dir=options.folder))
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    try:
        result = compare(options.megabytes, options.repeats, folder)
    finally:
        dist.destroy_process_group()
        shutil.rmtree(folder, ignore_errors=True)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)


def compare(megabytes: float, repeats: int, folder: Path) -> dict[str, Any]:
    training = Training(megabytes)
    for _ in range(3):
        training.step(8)
    copy = measure("clone of the state", clone(training), lambda: None, 5)
    small, large = 2, find_batch(training, copy["blocked_ms"])
    steps = {batch: step_time(training, batch) for batch in (large, small, 0)}

    def train() -> None:
        training.step(small)

    rows = [copy, measure("torch.save + fsync", plain(training, folder), train, repeats)]
    for batch in (large, small, 0):
        name = f"{steps[batch]:.0f} ms steps" if batch else "update at once"
        for label, make in (("ours", ours), ("async_save", asynchronous)):
            place = folder / f"{label}_{batch}"
            place.mkdir()
            row = measure(
                f"{label}, {name}",
                make(training, place, batch, steps[batch] / 1000),
                train,
                repeats,
            )
            if "step_beside_ms" in row:
                row["slowdown"] = row["step_beside_ms"] / steps[batch]
            rows.append(row)
    for row in rows:
        row["ratio"] = row["blocked_ms"] / rows[1]["blocked_ms"]
    return {
        "state_mb": training.size() / 1e6,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpus": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "folder": str(folder),
        "rows": rows,
    }


def show(result: dict[str, Any]) -> None:
    title = (
        f"One save of {result['state_mb']:.0f} MB; torch {result['torch']}, "
        f"{result['threads']} threads on {result['cpus']} CPUs"
    )
    table = Table(title=title)
    for name in ("method", "blocked ms", "range", "/ plain", "lost ms", "on disk ms"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for name in ("steps beside it", "extra MiB"):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        low, high = row["blocked_range_ms"]
        table.add_row(
            row["method"],
            f"{row['blocked_ms']:.1f}",
            f"{low:.1f}-{high:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['lost_ms']:.0f}",
            f"{row['total_ms']:.0f}",
            f"{row['slowdown']:.2f} x" if "slowdown" in row else "",
            f"{row['extra_mib']:.0f}",
        )
    console = Console(width=120)
    console.print(table)


if __name__ == "__main__":
    main()
