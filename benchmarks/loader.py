#!/usr/bin/env python3
"""Loading side by side: the launcher, torch's DataLoader with DistributedSampler, torchdata's
StatefulDataLoader and accelerate's skip_first_batches, in one run on one machine.

    python benchmarks/loader.py [--quick] [--json]        (pip install -e '.[bench]' first)

The peers run as their manuals say: torch skips batches by loading them, torchdata goes on from a
state_dict, accelerate skips batches in the sampler. A peer that is not installed is left out.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import psutil
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from launcher.data.fetch import Fetcher
from launcher.data.loader import load
from launcher.data.order import Shuffle
from launcher.data.plan import Plan, Request, train_requests
from launcher.datasets import ListFile

BATCH = 64
# A list of Python integers takes 40 bytes a sample, the tensor that it is made from 8 more.
LIST_BYTES = 48
# A peer is not run where its list of indices would need more than this.
LIMIT = min(6 * 2**30, psutil.virtual_memory().available // 2)
# (data set, workers, skipped batches) -> batches of an epoch
Loader = Callable[[Any, int, int], Iterator[Any]]


def launcher(dataset: Any, workers: int, skip: int) -> Iterator[Any]:
    plan, order = Plan(len(dataset), BATCH), Shuffle(len(dataset), seed=0)
    requests = train_requests(plan, order, 0, skip, plan.steps_per_epoch)
    return load(Fetcher(dataset, None, seed=0), requests, workers, 2, False, 300)


def torch_loader(dataset: Any, workers: int) -> DataLoader:
    sampler = DistributedSampler(dataset, num_replicas=1, rank=0)
    return DataLoader(dataset, BATCH, sampler=sampler, num_workers=workers)


def bare_torch(dataset: Any, workers: int, skip: int) -> Iterator[Any]:
    return itertools.islice(torch_loader(dataset, workers), skip, None)


def torchdata(dataset: Any, workers: int, skip: int) -> Iterator[Any]:
    from torchdata.stateful_dataloader import StatefulDataLoader
    from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

    def make() -> Any:
        sampler = StatefulDistributedSampler(dataset, num_replicas=1, rank=0)
        return StatefulDataLoader(dataset, BATCH, sampler=sampler, num_workers=workers)

    loader = make()
    if skip:
        # The state that a checkpoint in the middle would hold; the first run is not counted.
        before = make()
        for _ in itertools.islice(before, skip):
            pass
        loader.load_state_dict(before.state_dict())
        if isinstance(dataset, Counting):
            dataset.start()
    return iter(loader)


def accelerate(dataset: Any, workers: int, skip: int) -> Iterator[Any]:
    from accelerate import skip_first_batches

    return iter(skip_first_batches(torch_loader(dataset, workers), skip))


def loaders() -> tuple[dict[str, Loader], list[str]]:
    """Those that can run here, and a note on each that cannot."""
    found: dict[str, Loader] = {"launcher": launcher, "torch": bare_torch}
    notes = []
    for name, loader in (("torchdata", torchdata), ("accelerate", accelerate)):
        try:
            importlib.metadata.version(name)
            found[name] = loader
        except importlib.metadata.PackageNotFoundError:
            notes.append(f"{name} is not installed (pip install -e '.[bench]'): left out")
    return found, notes


class Numbers(Dataset):
    """`length` samples that cost next to nothing and take no memory."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


class Counting(Numbers):
    """The same, counting what is taken and when the count began."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.start()

    def start(self) -> None:
        self.taken, self.began = 0, time.perf_counter()

    def __getitem__(self, index: int) -> int:
        self.taken += 1
        return index


class Working(Numbers):
    """1 ms of one CPU a sample."""

    def __getitem__(self, index: int) -> int:
        end = time.perf_counter() + 1e-3
        while time.perf_counter() < end:
            pass
        return index


def in_child(work: Callable[..., Any], *args: Any) -> Any:
    """The result of `work` in a process of its own, so that its peak memory is its own."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def call() -> None:
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        send.send(work(*args))

    child = context.Process(target=call)
    child.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        return None
    finally:
        child.join()


def start_of_epoch(loader: Loader, length: int) -> dict[str, float]:
    next(loader(Numbers(1000), 0, 0))  # imports, and whatever else is done once
    before = peak_bytes(reset=True)
    began = time.perf_counter()
    next(loader(Numbers(length), 0, 0))
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "mib": (peak_bytes() - before) / 2**20}


def peak_bytes(reset: bool = False) -> int:
    """The most memory this process has held, since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")  # see proc(5)
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def best(results: list[Any]) -> dict[str, Any]:
    """The fastest: what else runs on the machine only slows down."""
    done = [result for result in results if result is not None]
    return min(done, key=lambda result: result["seconds"]) if done else {}


def starts(found: dict[str, Loader], quick: bool) -> list[dict[str, Any]]:
    rows = []
    for length in (10**5, 10**6, 10**7) if quick else (10**5, 10**6, 10**7, 10**8, 10**9):
        for name, loader in found.items():
            row = {"samples": length, "loader": name, "seconds": None, "mib": None}
            if name != "launcher" and length * LIST_BYTES > LIMIT:
                row["note"] = f"not run: needs about {length * LIST_BYTES / 2**30:.0f} GiB"
            elif name not in ("launcher", "torch") and length > 10**7:
                row["note"] = "not run: the same list as torch's, half a minute more"
            else:
                turns = 3 if length <= 10**7 else 1
                results = [in_child(start_of_epoch, loader, length) for _ in range(turns)]
                row |= best(results) or {"note": "was killed"}
            rows.append(row)
    return rows


def seek(loader: Loader, length: int) -> dict[str, float]:
    next(loader(Numbers(1000), 0, 1))  # imports, and whatever else is done once
    dataset = Counting(length)
    next(loader(dataset, 0, length // BATCH // 2))
    seconds = time.perf_counter() - dataset.began
    # The batch that is returned is wanted; all else was loaded for nothing.
    return {"seconds": seconds, "skipped_calls": dataset.taken - BATCH}


def seeks(found: dict[str, Loader], quick: bool) -> list[dict[str, Any]]:
    length = 10**5 if quick else 10**6
    return [
        {
            "samples": length,
            "loader": name,
            **best([in_child(seek, loader, length) for _ in range(1 if quick else 3)]),
        }
        for name, loader in found.items()
    ]


def samples_per_s(loader: Loader, dataset: Any, workers: int, seconds: float) -> float:
    """After one batch a worker, in whole rounds of one batch a worker; see tune_loader.py."""
    # As many epochs as it takes.
    batches = (batch for _ in itertools.count() for batch in loader(dataset, workers, 0))
    count, round_ = 0, max(1, workers)
    for _ in range(round_):
        next(batches)
    began = time.perf_counter()
    while (now := time.perf_counter()) - began < seconds:
        for _ in range(round_):
            batch = next(batches)
            count += len(batch[0] if isinstance(batch, (list, tuple)) else batch)
    batches.close()
    return count / (now - began)


def speeds(found: dict[str, Loader], folder: Path, quick: bool) -> list[dict[str, Any]]:
    values = torch.arange(100_000 * 32, dtype=torch.float32).view(-1, 32)
    cases: list[tuple[str, Any, int]] = [
        ("tensors in memory", TensorDataset(values, values[:, 0]), 0),
        ("1 ms a sample", Working(100_000), 0),
        ("1 ms a sample", Working(100_000), 2),
    ]
    try:
        images = make_images(folder, 256)
        cases += [("images of a list file", images, 0), ("images of a list file", images, 2)]
    except ImportError:
        print("Pillow is not installed: no images", file=sys.stderr)
    rows = []
    for what, dataset, workers in cases:
        figures: dict[str, list[float]] = {name: [] for name in found}
        # Many short turns, each in another order, and the best of each loader's.
        for turn in range(1 if quick else 6):
            names = [*found][turn % len(found) :] + [*found][: turn % len(found)]
            for name, loader in ((name, found[name]) for name in names):
                figure = samples_per_s(loader, dataset, workers, 0.5)
                figures[name].append(figure)
        rows += [
            {"data": what, "workers": workers, "loader": name,
             "samples_per_s": max(figures[name])}
            for name in found
        ]  # fmt: skip
    return rows


def make_images(folder: Path, count: int) -> ListFile:
    """JPEGs of 160x120 with something in them, and a list that names each 40 times, so that no
    loader comes to the end of an epoch in the time of its turn."""
    from PIL import Image

    random = np.random.default_rng(0)
    lines = []
    for i in range(count):
        small = random.integers(0, 256, (12, 16, 3), np.uint8)
        Image.fromarray(small).resize((160, 120)).save(folder / f"an image {i}.jpg")
        lines.append(f"an image {i}.jpg {i % 10}\n")
    (folder / "list.txt").write_text("".join(lines * 40))
    return ListFile(folder / "list.txt")


def seeding(quick: bool) -> dict[str, float]:
    """Microseconds a sample that seeding torch, numpy and random for each sample adds."""
    costs = {"on": float("inf"), "off": float("inf")}
    for i in range(200 if quick else 2000):
        request = Request(0, list(range(i, i + BATCH)))
        for name, seed in (("on", 0), ("off", None)):
            fetcher = Fetcher(Numbers(10**6), None, seed)
            began = time.perf_counter()
            fetcher[request]
            costs[name] = min(costs[name], (time.perf_counter() - began) / BATCH * 1e6)
    on, off = costs["on"], costs["off"]
    return {"seed_samples_us": on, "without_us": off, "cost_us": on - off}


def table(title: str, rows: list[dict[str, Any]], by: list[str], value: str, fast: str) -> None:
    """One line a row, with how many times better the launcher is in the same case."""
    from rich.console import Console
    from rich.table import Table

    extra = [key for key in rows[0] if key not in (*by, "loader", value, "note")]
    out = Table(title=title, title_justify="left")
    for head in (*by, "loader", value, *extra, "launcher is"):
        out.add_column(head, justify="right" if head in (value, *extra) else "left")
    ours: float | None = None
    for row in rows:
        if row["loader"] == "launcher":
            ours = row[value]
            out.add_section()
        theirs, said = row[value], row.get("note", "")
        if theirs and ours and row["loader"] != "launcher":
            ratio = ours / theirs if fast == "more" else theirs / ours
            said = f"{ratio:,.2f} x" if ratio < 100 else f"{ratio:,.0f} x"
        cells = [f"{row[key]:,}" if isinstance(row[key], int) else row[key] for key in by]
        out.add_row(*cells, row["loader"], *(_number(row[key]) for key in (value, *extra)), said)
    Console(width=110 if not sys.stdout.isatty() else None).print(out)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if isinstance(value, int) or value >= 100 else f"{value:.4g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="half a minute, rougher figures")
    parser.add_argument("--json", action="store_true", help="an object instead of tables")
    options = parser.parse_args()
    began = time.perf_counter()
    found, notes = loaders()
    machine = {
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{
            name: importlib.metadata.version(name)
            for name in ("torch", "numpy", *(n for n in found if n not in ("launcher", "torch")))
        },
    }
    if os.getloadavg()[0] > machine["cpus"] / 2:
        notes.append(f"load average {os.getloadavg()[0]:.1f}: something else runs here too")
    # torchdata 0.11 calls a function that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", ".*set_vital.*")
    result: dict[str, Any] = {"machine": machine, "notes": notes, "batch": BATCH}
    # First what measures memory: the children start as small as this process is now.
    result["start_of_epoch"] = starts(found, options.quick)
    result["seek_to_the_middle"] = seeks(found, options.quick)
    with tempfile.TemporaryDirectory() as folder:
        result["samples_per_s"] = speeds(found, Path(folder), options.quick)
    result["seeding"] = seeding(options.quick)
    result["wall_s"] = time.perf_counter() - began
    if options.json:
        print(json.dumps(result, indent=2))
        return
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(*notes, sep="\n", end="\n" if notes else "")
    table("Start of an epoch: to the first batch, and peak memory", result["start_of_epoch"],
          ["samples"], "seconds", "less")  # fmt: skip
    table("Seek to the middle of an epoch at a resume", result["seek_to_the_middle"],
          ["samples"], "seconds", "less")  # fmt: skip
    table("Samples a second (the launcher seeds each sample; tensors have nothing to seed)",
          result["samples_per_s"], ["data", "workers"], "samples_per_s", "more")  # fmt: skip
    costs = result["seeding"]
    print(
        f"Seeding a sample costs {costs['cost_us']:.1f} microseconds "
        f"({costs['seed_samples_us']:.1f} with, {costs['without_us']:.1f} without)"
    )
    print(f"{result['wall_s']:.0f} s in all")


if __name__ == "__main__":
    main()
