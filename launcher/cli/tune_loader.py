"""`launcher tune-loader`: measure how loading goes fastest on this machine, and say the keys."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.cli.arguments import split_overrides
from launcher.config import CfgNode, load_config, parse_duration
from launcher.errors import UsageError
from launcher.runtime.topology import Topology
from launcher.tasks import resolve_task

# The first line of the files that this command writes, by which it knows them again.
MARK = "# Written by launcher tune-loader"
PREFETCH = (2, 4)
# A setting counts as no better than another within this share of its speed.
MARGIN = 0.05
# One setting is measured for this long at most.
MEASURE_S = 5.0


@dataclass(frozen=True)
class Setting:
    """What is tried. Prefetch means nothing without workers."""

    workers: int
    prefetch: int
    pin_memory: bool

    def __str__(self) -> str:
        text = f"{self.workers} worker{'s' * (self.workers != 1)}"
        text += f", prefetch {self.prefetch}" if self.workers else ""
        return text + (", pinned" if self.pin_memory else "")


@dataclass(frozen=True)
class Measured(Setting):
    """What came of it: speed, seconds to the first batch (the start of the workers in it), and
    memory that the workers alone hold."""

    samples_per_s: float
    start_s: float
    workers_mib: float


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="launcher tune-loader",
        usage="launcher tune-loader --config-file FILE [OPTIONS] [KEY VALUE | KEY=VALUE ...]",
        description="Load the config's training data with different numbers of workers, prefetch "
        "and pinning, without a model, and print the keys of the best.",
        allow_abbrev=False,
    )
    p.add_argument(
        "--config-file", metavar="FILE", help="the run's YAML config, or the name of one that ships"
    )
    p.add_argument(
        "--seconds", type=float, default=60.0, metavar="N", help="time to spend (default: 60)"
    )
    p.add_argument(
        "--ranks",
        type=int,
        default=0,
        metavar="N",
        help="ranks that a node will train with, which share its CPUs (default: one a GPU, or 1)",
    )
    p.add_argument(
        "-o", metavar="FILE", dest="output", help="write the best to a YAML file to name in _BASE_"
    )
    p.add_argument("--force", action="store_true", help="let -o replace any file")
    p.add_argument("--json", action="store_true", help="an object instead of a table")
    return p


def main(argv: list[str]) -> int:
    """Run `launcher tune-loader ARGV`; returns the exit code, raises UsageError."""
    options, overrides = split_overrides(parser(), argv)
    if not 0 < options.seconds < float("inf"):
        raise UsageError(f"--seconds must be above 0, not {options.seconds:g}")
    if options.ranks < 0:
        raise UsageError(f"--ranks must be at least 1, not {options.ranks}")
    config = load_config(options.config_file, overrides, resolve_task)
    output = Path(options.output) if options.output else None
    if output is not None:
        check_output(output, options.force)  # before the time is spent

    # From here on torch is needed, which takes seconds to import.
    from launcher.data.splits import Data
    from launcher.runtime.cpu import cpu_budget
    from launcher.runtime.process import Runtime, choose_device

    assert config.task is not None  # load_config demands one
    # One rank alone, whatever started this process; the CPUs are those of a rank of many.
    device = choose_device(Topology(), config.cfg.DIST.DEVICE)
    cpu = cpu_budget(options.ranks or _gpus(device))
    runtime, task = Runtime(Topology(), device, cpu), config.task(config.cfg)

    def make() -> Data:
        return Data(config.cfg, task, runtime, lambda phase: None)

    data = make()
    name, kind = type(data.datasets["train"]).__name__, data.kinds["train"]
    report: dict[str, Any] = {
        "dataset": name,
        "batch_size": data.train_plan.batch_size,
        "cpus": {"per_rank": cpu.per_rank, "usable": cpu.usable, "reason": cpu.reason},
        "settings": [],
        "best": None,
        "overrides": {},
        "notes": [],
    }
    if kind == "iterable":
        note = (
            f"{name} is an iterable data set. Nothing is measured: each worker "
            "would read the whole stream, so more than one only repeats the work; how long one "
            "read takes is the data set's own matter. DATALOADER.NUM_WORKERS -1 takes one worker."
        )
        if output is not None:
            raise UsageError(f"{note} Nothing to write to {output}.")
        report["notes"].append(note)
    elif kind == "tensors":
        report["notes"].append(
            "The data set is made of tensors: a batch is one index operation, faster than handing "
            "it over from a worker. 0 workers is right; nothing is measured."
        )
        report["overrides"] = {"DATALOADER.NUM_WORKERS": 0}
    else:
        tuner = Tuner(config.cfg, data, make, time.monotonic() + options.seconds)
        with _progress(options.seconds) as show:
            measured = tuner.run(cpu.per_rank, device.type == "cuda", show)
        if not measured:
            raise UsageError(
                f"{options.seconds:g} s were not enough for two batches of "
                f"{data.train_plan.batch_size} samples: give more --seconds"
            )
        best = choose(measured)
        report["settings"] = [{**asdict(m), "best": m is best} for m in measured]
        report["best"] = asdict(best)
        report["overrides"] = keys_of(best, device.type == "cuda")
        report["notes"] += tuner.notes
        if tuner.samples > data.train_plan.length:
            report["notes"].append(
                f"The {data.train_plan.length} samples were read "
                f"{tuner.samples / data.train_plan.length:.1f} times, so files may have come from "
                "the system's cache."
            )
        if device.type == "cpu" and best.workers:
            report["notes"].append(
                "Measured without a model: training on the CPU shares the CPUs with the workers."
            )
    if output is not None:
        write(output, report)
    print(json.dumps(report, indent=2)) if options.json else _print(report, output)
    return 0


def _gpus(device: Any) -> int:
    import torch

    return torch.cuda.device_count() if device.type == "cuda" else 1


def worker_counts(cpus: int) -> list[int]:
    """0, 1, 2, 4, ... and all CPUs of a rank."""
    powers = itertools.takewhile(lambda count: count < cpus, (2**i for i in itertools.count()))
    return [0, *powers, cpus]


def variants(first: Setting, cuda: bool) -> list[Setting]:
    """The other settings with the same number of workers."""
    prefetches = PREFETCH if first.workers else PREFETCH[:1]
    pins = (False, True) if cuda else (False,)
    every = [Setting(first.workers, prefetch, pin) for prefetch in prefetches for pin in pins]
    return every[1:]


def choose(measured: Sequence[Measured]) -> Measured:
    """The fewest workers within MARGIN of the fastest; of these the least prefetch and pinning."""
    fastest = max(m.samples_per_s for m in measured)
    good = [m for m in measured if m.samples_per_s >= (1 - MARGIN) * fastest]
    return min(good, key=lambda m: (m.workers, m.prefetch, m.pin_memory))


def keys_of(best: Setting, cuda: bool) -> dict[str, Any]:
    """The config keys of a setting."""
    keys: dict[str, Any] = {"DATALOADER.NUM_WORKERS": best.workers}
    if best.workers:
        keys["DATALOADER.PREFETCH_FACTOR"] = best.prefetch
    if cuda:
        keys["DATALOADER.PIN_MEMORY"] = str(best.pin_memory).lower()
    return keys


class Tuner:
    """Loads training batches, setting by setting, until a deadline (of time.monotonic)."""

    def __init__(self, cfg: CfgNode, data: Any, make: Callable[[], Any], deadline: float) -> None:
        """`make` makes data like `data`, for loading without workers: those that are forked later
        must not find the files that a data set opens on first use."""
        self.cfg, self.data, self.make, self.deadline = cfg, data, make, deadline
        self.notes: list[str] = []
        self.step = self.samples = 0
        # Bytes: of a batch, and of one worker, as far as they have been seen.
        self.batch_bytes = self.worker_bytes = 0
        self.overhead, self.why_not = 0.0, ""

    def run(self, cpus: int, cuda: bool, show: Any) -> list[Measured]:
        """Try workers first, until more do not help twice in a row, then the rest of the settings
        with the same workers, the fastest first: the deadline may come before the end."""
        ladder = [Setting(count, PREFETCH[0], False) for count in worker_counts(cpus)]
        rest = [v for first in ladder for v in variants(first, cuda)]
        measured: list[Measured] = []
        fastest, useless = 0.0, 0
        while ladder and useless < 2:
            result = self._try(ladder[0], len(ladder) + len(rest), show)
            if result is None:
                self._skip(ladder + rest)
                return measured
            ladder.pop(0)
            measured.append(result)
            useless = 0 if result.samples_per_s > (1 + MARGIN) * fastest else useless + 1
            fastest = max(fastest, result.samples_per_s)
        if ladder:
            self.why_not = "more workers did not help twice in a row"
            self._skip(ladder)
        fast_first = sorted(measured, key=lambda m: -m.samples_per_s)
        rest = [v for first in fast_first for v in variants(first, cuda)]
        while rest:
            result = self._try(rest[0], len(rest), show)
            if result is None:
                self._skip(rest)
                break
            rest.pop(0)
            measured.append(result)
        return sorted(measured, key=lambda m: (m.workers, m.prefetch, m.pin_memory))

    def _try(self, setting: Setting, left: int, show: Any) -> Measured | None:
        """Measure for this setting's share of the time; None, and `why_not`, where it cannot."""
        began = time.monotonic()
        seconds = self.deadline - began
        if seconds < self.overhead + 0.1:
            self.why_not = "the time is over"
            return None
        if not self._fits(setting):
            self.why_not = "they might not fit into memory or /dev/shm"
            return None
        show(str(setting), self.deadline)
        share = min(MEASURE_S, max(0.1, seconds / left - self.overhead))
        result = self._measure(setting, share)
        # What starting, warming up and ending the workers took.
        self.overhead = max(self.overhead, time.monotonic() - began - share)
        self.why_not = "the time is over"
        return result

    def _skip(self, settings: list[Setting]) -> None:
        if settings:
            listed = "; ".join(map(str, settings))
            self.notes.append(f"Not measured, as {self.why_not}: {listed}.")

    def _fits(self, setting: Setting) -> bool:
        """Whether a setting leaves half of the free memory and of the free /dev/shm."""
        from launcher.data.sizing import MEMORY_SHARE
        from launcher.runtime.memory import memory_budget

        free = memory_budget()
        in_flight = self.batch_bytes * setting.workers * setting.prefetch
        need = in_flight + self.worker_bytes * setting.workers
        shm_full = free.shm is not None and in_flight > MEMORY_SHARE * free.shm
        return need <= MEMORY_SHARE * free.available and not shm_full

    def _measure(self, setting: Setting, seconds: float) -> Measured | None:
        """Load for about `seconds`; None where the deadline came before a whole round.

        A round is one batch a worker: workers that start together finish together, so batches come
        in bursts, and part of a burst would flatter the figure. The first round is the warm-up.
        """
        import psutil

        from launcher.edges.batch import nbytes

        this = psutil.Process()
        others, sizes = set(this.children()), list[int]()
        began = time.monotonic()
        with self._batches(setting, sizes) as batches:
            first = next(batches)
            start_s = self._clock() - began
            self.batch_bytes = max(self.batch_bytes, nbytes(first))
            round_ = max(1, setting.workers)
            for _ in range(round_ - 1):
                next(batches)
            rate, taken = 0.0, round_
            counted_from = self._clock()
            while (now := self._clock()) < self.deadline and now - counted_from < seconds:
                for _ in range(round_):
                    if time.monotonic() >= self.deadline:
                        break
                    next(batches)
                else:
                    taken += round_
                    rate = sum(sizes[round_:taken]) / (self._clock() - counted_from)
            held = sum(map(_own_bytes, set(this.children()) - others))
        if setting.workers:
            self.worker_bytes = max(self.worker_bytes, held // setting.workers)
        if not rate:
            return None
        return Measured(**asdict(setting), samples_per_s=rate, start_s=start_s,
                        workers_mib=held / 2**20)  # fmt: skip

    @contextmanager
    def _batches(self, setting: Setting, sizes: list[int]) -> Iterator[Iterator[Any]]:
        """This rank's batches on its device, as in training; `sizes` gets what was asked for."""
        from launcher.data.loader import load, on_device
        from launcher.data.plan import ENDLESS, train_requests

        def noted() -> Iterator[Any]:
            # Each setting goes on where the last one ended, so that none profits from files that
            # another has just read. Seeking is free.
            plan, order = self.data.train_plan, self.data.order
            for request in train_requests(plan, order, 0, self.step, ENDLESS):
                sizes.append(len(request.samples))
                yield request

        timeout = parse_duration(self.cfg.DIST.TRAIN_TIMEOUT)
        assert timeout is not None  # the config check demands one
        fetcher = (self.data if setting.workers else self.make()).fetcher("train")
        answers = load(
            fetcher,
            noted(),
            setting.workers,
            setting.prefetch,
            setting.pin_memory,
            timeout.amount,
        )
        try:
            yield on_device(answers, self.data.runtime.device)
        finally:
            answers.close()  # this ends the workers
            self.step += len(sizes)
            self.samples += sum(sizes)

    def _clock(self) -> float:
        import torch

        if self.data.runtime.device.type == "cuda":
            torch.cuda.synchronize()  # what is counted has arrived
        return time.monotonic()


def _own_bytes(process: Any) -> int:
    """Memory that a process shares with nobody."""
    import psutil

    try:
        return process.memory_full_info().uss
    except psutil.Error:  # it has ended, or is not ours to ask
        return 0


@contextmanager
def _progress(seconds: float) -> Iterator[Any]:
    """A bar over the time on a terminal's stderr, nothing elsewhere; yields show(what, deadline).

    The bar moves by itself: a setting may wait long for a batch.
    """
    if not sys.stderr.isatty():
        yield lambda what, deadline: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    with Progress(
        TextColumn("{task.fields[what]}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TextColumn(f"of {seconds:g} s"),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    ) as bar:
        task = bar.add_task("", total=seconds, what="")

        def show(what: str, deadline: float) -> None:
            done = seconds - (deadline - time.monotonic())
            bar.update(task, what=what, completed=max(0.0, done))

        yield show


def check_output(path: Path, force: bool) -> None:
    """Refuse to replace a file that is not this command's, or to write where there is no folder."""
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"-o {path}: is a folder, or lies in none that exists")
    if force or not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        if not file.readline().startswith(MARK):
            raise UsageError(
                f"-o {path} exists and was not written by tune-loader: choose another name, or "
                "replace it with --force"
            )


def write(path: Path, report: dict[str, Any]) -> None:
    """Write the overrides as YAML, whole or not at all."""
    best = report["best"]
    speed = f": {best['samples_per_s']:.0f} samples/s" if best else ""
    lines = [
        f"{MARK} on {os.uname().nodename}, {report['cpus']['per_rank']} CPUs a rank, for",
        f"# {report['dataset']} in batches of {report['batch_size']}{speed}.",
        "# Name it in the _BASE_ of a config, or copy the keys.",
        "DATALOADER:",
        *(f"  {key.split('.')[1]}: {value}" for key, value in report["overrides"].items()),
    ]
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
        # mkstemp's files are for their owner alone; a config is for whoever may read its folder.
        os.umask(mask := os.umask(0))
        os.chmod(partial, 0o666 & ~mask)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def _print(report: dict[str, Any], output: Path | None) -> None:
    cpus = report["cpus"]
    if report["settings"]:
        from launcher.cli.config import _print_table

        rows = [
            (
                str(m["workers"]),
                str(m["prefetch"]) if m["workers"] else "-",
                "yes" if m["pin_memory"] else "no",
                f"{m['samples_per_s']:.1f}",
                f"{m['start_s']:.2f}",
                f"{m['workers_mib']:.0f}",
                "<- best" if m["best"] else "",
            )
            for m in report["settings"]
        ]
        head = ("workers", "prefetch", "pin", "samples/s", "start s", "memory of workers MiB", "")
        _print_table(head, rows)
        print(f"\n{cpus['per_rank']} of {cpus['usable']} usable CPUs a rank ({cpus['reason']})")
    for note in report["notes"]:
        print(note)
    if report["overrides"]:
        words = " ".join(f"{key} {value}" for key, value in report["overrides"].items())
        print(f"\nOverrides:\n{words}")
    if output is not None:
        print(f"\nWritten to {output}, which a config can name in _BASE_.")
