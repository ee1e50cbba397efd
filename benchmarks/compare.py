"""The launcher beside a loop written by hand and its peers: one table a call.

    python benchmarks/compare.py TABLE [--quick] [--only NAME ...]

Every figure is a ratio to the loop written by hand (benchmarks/loops/by_hand.py) in the same run:
rounds in which all take turns, each in a process of its own; below 1 is better than by hand. Where
steps are compared they take turns every quarter of a second. Told are the median and the tenth
percentile of a step, in CPU time of the training thread and in wall time, as the median over
rounds, with the least and the most of them.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

LOOPS = Path(__file__).parent / "loops"
# Each script, and the package that it needs.
TRAINERS = {
    "by_hand": "torch",
    "launcher_run": "launcher",
    "ignite_engine": "pytorch-ignite",
    "accelerate_loop": "accelerate",
    "fabric_loop": "lightning",
    "lightning_trainer": "lightning",
    "hf_trainer": "transformers",
}
WARM = 40  # steps before a step's time counts
SLICE_S = 0.25
Told = dict[str, Any]


def begin(out: str, trainer: str, ranks: int = 1, restarts: int = 0, **asked: Any) -> Any:
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        start += [f"--max-restarts={restarts}"]
    command = [*start, str(LOOPS / f"{trainer}.py"), json.dumps({**asked, "out": out})]
    # One thread a rank, as torchrun has it: the same for all.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with Path(out, "output").open("w") as output:
        return subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)


def ended(out: str, trainer: str, code: int) -> Told:
    if code:
        sys.exit(f"{trainer} failed:\n{Path(out, 'output').read_text()[-6000:]}")
    return json.loads(Path(out, "told.json").read_text())


def call(trainer: str, ranks: int = 1, **asked: Any) -> Told:
    """Run a loop to its end; what it tells."""
    with tempfile.TemporaryDirectory(prefix="bench-") as out:
        return call_in(out, trainer, ranks, **asked)


def call_in(out: str, trainer: str, ranks: int = 1, **asked: Any) -> Told:
    return ended(out, trainer, begin(out, trainer, ranks, **asked).wait())


def together(trainers: list[str], ranks: int, **asked: Any) -> dict[str, Told]:
    """Run loops side by side, each for a slice of time while the others are stopped: whatever else
    the machine does meets all of them alike."""
    told = {}
    with contextlib.ExitStack() as stack:
        running = {}
        for name in trainers:
            out = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))
            running[name] = out, begin(out, name, ranks, **asked)
            send(running[name][1].pid, signal.SIGSTOP)
        while running:
            for name, (out, process) in list(running.items()):
                send(process.pid, signal.SIGCONT)
                try:
                    told[name] = ended(out, name, process.wait(SLICE_S))
                    del running[name]
                except subprocess.TimeoutExpired:
                    send(process.pid, signal.SIGSTOP)
    return told


def send(pid: int, number: int) -> None:
    """A signal to a process and all its descendants."""
    first = psutil.Process(pid)
    for process in (first, *first.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def of_steps(told: Told) -> dict[str, float]:
    """Microseconds a step: percentiles of CPU time of the training thread and of wall time."""
    noted = told["steps"][WARM:]
    found = {}
    for i, name in enumerate(("wall", "cpu")):
        steps = sorted(1e6 * (b[i] - a[i]) for a, b in itertools.pairwise(noted))
        found[f"{name} p10"] = steps[len(steps) // 10]
        found[f"{name} median"] = steps[len(steps) // 2]
    return found


def whole(told: Told) -> dict[str, float]:
    return {name: told[name] for name in ("first", "whole", "cpu", "peak")}


def rounds(
    trainers: list[str], count: int, of: Any, ranks: int = 1, **asked: Any
) -> dict[str, list[dict[str, float]]]:
    """The trainers in turn, as often; of each round what `of` makes of what they tell."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in trainers}
    for _ in range(count):
        for name in trainers:
            found[name].append(of(call(name, ranks, **asked)))
    return found


def slices(
    trainers: list[str], count: int, of: Any, ranks: int = 1, **asked: Any
) -> dict[str, list[dict[str, float]]]:
    """As `rounds`, in slices of a round."""
    each = [together(trainers, ranks, **asked) for _ in range(count)]
    return {name: [of(told[name]) for told in each] for name in trainers}


def ratios(found: dict[str, list[dict[str, float]]], names: list[str]) -> list[list[str]]:
    """A line a trainer: of each figure the ratio to the loop by hand, round by round."""
    lines = []
    for trainer, measured in found.items():
        line = [trainer]
        for name in names:
            pairs = zip(measured, found["by_hand"], strict=True)
            each = sorted(ours[name] / theirs[name] for ours, theirs in pairs)
            line.append(f"{statistics.median(each):.2f} ({each[0]:.2f}-{each[-1]:.2f})")
        lines.append(line)
    base = [statistics.median(m[name] for m in found["by_hand"]) for name in names]
    lines[0] = ["by_hand", *(f"{value:,.4g}" for value in base)]
    return lines


def table(title: str, head: list[str], lines: list[list[str]]) -> None:
    print(f"\n**{title}**\n", flush=True)
    print("| | " + " | ".join(head) + " |")
    print("| --- |" + " --- |" * len(head))
    for line in lines:
        print("| " + " | ".join(line) + " |", flush=True)


STEP = ["cpu p10", "cpu median", "wall p10", "wall median"]


def step(trainers: list[str], quick: bool) -> None:
    count, steps = (2, 1500) if quick else (5, 3000)  # many turns of each
    cases: list[tuple[str, dict[str, Any]]] = [
        ("tensors in memory", {"data": "tensors"}),
        ("tensors in memory, 2 ranks", {"data": "tensors", "ranks": 2}),
        ("a Dataset that draws nothing", {"data": "plain"}),
        ("a Dataset that draws a number a sample", {"data": "draws"}),
        ("a Dataset that draws nothing, 1 worker", {"data": "plain", "workers": 1}),
        ("a Dataset of 1 ms a sample, 1 worker", {"data": "slow", "workers": 1, "steps": 80}),
    ]
    for title, case in cases:
        found = slices(trainers, count, of_steps, **{"steps": steps, **case})
        table(f"A step: {title} (microseconds by hand)", STEP, ratios(found, STEP))


def start(trainers: list[str], quick: bool) -> None:
    names = ["first", "cpu", "peak"]
    for ranks in (1,) if quick else (1, 2):
        found = rounds(trainers, 3 if quick else 7, whole, ranks, steps=3)
        title = f"Start to first step, {ranks} rank{'s' * (ranks > 1)}"
        heads = ["seconds to the second forward pass", "CPU seconds of 3 steps", "peak MiB"]
        table(title, heads, ratios(found, names))


def run(trainers: list[str], quick: bool) -> None:
    found = rounds(trainers, 3 if quick else 5, whole, epochs=20)
    names = ["whole", "cpu", "peak"]
    heads = ["seconds", "CPU seconds", "peak MiB"]
    table("20 epochs of digits with a checkpoint each", heads, ratios(found, names))


def resume(trainers: list[str], quick: bool) -> None:
    """The launcher alone: from far into an epoch, beside a fresh start."""
    for samples in (20_032, 10**8):
        case = {"data": "plain", "length": 10**9, "steps": 3}
        again = {"steps": 4, "options": ["--resume", "--allow", "TRAIN.DURATION"]}
        found: dict[str, list[dict[str, float]]] = {"by_hand": [], "resumed": []}
        for _ in range(3 if quick else 7):
            with tempfile.TemporaryDirectory(prefix="bench-") as out:
                found["by_hand"].append(whole(call("launcher_run", **case)))
                call_in(out, "launcher_run", **{**case, "steps": 1, "jump": samples})
                found["resumed"].append(whole(call_in(out, "launcher_run", **{**case, **again})))
        lines = ratios(found, ["first"])
        lines[0][0] = "a fresh start"
        table(f"The launcher's resume at sample {samples:,}", ["seconds to the first step"], lines)


def kill(trainers: list[str], quick: bool) -> None:
    """From a rank's SIGKILL to the next step of the restarted job, beside start to first step."""
    lines = []
    for name in (n for n in trainers if n in ("by_hand", "launcher_run", "accelerate_loop")):
        found, count = [], 3 if quick else 5
        for _ in range(count):
            first = call(name, 2, epochs=1)["first"]
            with tempfile.TemporaryDirectory(prefix="bench-") as out:
                job = begin(out, name, 2, restarts=1, epochs=3, kill=40)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    job.wait(20 * first)
                if job.poll() is None:  # it hangs
                    send(job.pid, signal.SIGKILL)
                if job.wait() != 0:
                    continue
                times = [float(Path(out, part).read_text()) for part in ("killed", "again")]
            found.append((times[1] - times[0], first))
        each = sorted(a / b for a, b in found) or [math.nan]
        told = f"{statistics.median(each):.2f} ({each[0]:.2f}-{each[-1]:.2f})"
        seconds = statistics.median(a for a, _ in found) if found else math.nan
        lines.append([name, f"{seconds:.2f} s", told, f"{len(found)} of {count}"])
    heads = ["seconds", "times a start to the first step", "came back"]
    table("From SIGKILL to the next step", heads, lines)


def growth(trainers: list[str], quick: bool) -> None:
    """What grows with the ranks, all of them on this machine."""
    for ranks in (1, 2, 4) if quick else (1, 2, 4, 8):
        pair = ["by_hand", "launcher_run"]
        found = slices(pair, 2, of_steps, ranks, steps=1000)
        for name, more in rounds(pair, 2, whole, ranks, steps=3).items():
            found[name] = [a | b for a, b in zip(found[name], more, strict=True)]
        names = ["cpu p10", "first", "peak"]
        heads = ["CPU of a step, tenth percentile", "seconds to the first step", "peak MiB"]
        table(f"{ranks} ranks", heads, ratios(found, names))


def gpu(trainers: list[str], quick: bool) -> None:
    """A network so small that its step is the launching of its kernels."""
    pair = ["by_hand", "launcher_run"]
    for kind, workers in (("tensors", 0), ("plain", 0), ("plain", 1)):
        case = {"steps": 600, "data": kind, "workers": workers, "device": "cuda"}
        found = slices(pair, 3 if quick else 7, of_steps, **case)
        table(f"A step on a GPU: {kind}, {workers} workers", STEP, ratios(found, STEP))


TABLES = {
    "gpu": gpu,
    "step": step,
    "start": start,
    "run": run,
    "resume": resume,
    "kill": kill,
    "growth": growth,
}


def installed(package: str) -> str:
    """Its version; "" where it is not here."""
    with contextlib.suppress(PackageNotFoundError):
        return version(package)
    return "of this checkout" if package == "launcher" else ""


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("table", choices=TABLES)
    p.add_argument("--quick", action="store_true", help="fewer rounds and cases: minutes")
    p.add_argument("--only", nargs="*", choices=TRAINERS, help="these beside the loop by hand")
    options = p.parse_args()
    chosen = ["by_hand", *(n for n in options.only or TRAINERS if n != "by_hand")]
    missing = [name for name in chosen if not installed(TRAINERS[name])]
    for name in missing:
        print(f"not measured: {name}, for {TRAINERS[name]} is not installed")
    if options.table == "gpu":
        if not torch.cuda.is_available():
            sys.exit("not measured: no GPU here")
        print(torch.cuda.get_device_name(0))
    versions = {name: TRAINERS[name] for name in chosen if name not in missing}
    packages = [f"{name} {installed(name)}" for name in dict.fromkeys(versions.values())]
    print(f"Python {platform.python_version()}, {os.cpu_count()} CPUs, {', '.join(packages)}")
    TABLES[options.table](list(versions), options.quick)


if __name__ == "__main__":
    main()
