"""How long `launcher runs` takes over many and over long runs, beside TensorBoard's own reader.

    python benchmarks/runs.py [--quick] [--json] [--folder DIR]

Records of 13 keys, about 300 bytes each. Every figure is a whole command in a process of its own,
its start included, with an index in a cache directory of this benchmark's. TensorBoard's
EventAccumulator, which keeps every value (size_guidance 0), reads the event files of one of these
runs, as our sink wrote them, in a process of its own too. The files were just written, so they come
from memory where there is enough of it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
METRICS = (
    *("train/loss", "train/accuracy", "train/grad_norm", "train/lr"),
    *("perf/step_s", "perf/data_s", "perf/samples_per_s", "system/rss_gib", "system/cpu_percent"),
)
MIB = 2**20
ACCUMULATE = """
import sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1], size_guidance={"scalars": 0})
events.Reload()
tags = events.Tags()
found = sum(len(events.Scalars(tag)) for tag in tags["scalars"])
sys.exit(f"{found} values" if found != int(sys.argv[2]) else 0)
"""


def record(number: int) -> dict[str, Any]:
    """A record like those of a training run, its values to eight digits."""
    values = {key: round(random.random(), 8) for key in METRICS}
    position = {"step": 10 * number, "epoch": number // 100, "samples": 640 * number}
    return {**position, "time": round(1.795e9 + 0.3 * number, 6), **values}


def write_run(path: Path, lines: list[str]) -> None:
    path.mkdir(parents=True)
    with (path / "metrics.jsonl").open("w") as file:
        file.writelines(lines)
    status = {"state": "completed", "step": 10 * len(lines), "epoch": 0, "updated": time.time()}
    (path / "status.json").write_text(json.dumps(status))
    config = "CHECKPOINT:\n  METRIC: train/accuracy\n  MODE: max\nTRAIN:\n  DURATION: 100ep\n"
    (path / "config.yaml").write_text(config)


def measure(command: Sequence[str], env: dict[str, str]) -> dict[str, float]:
    """Seconds, seconds of CPU time, and the most memory in MiB, of the process and those that it
    started together."""
    began, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process = psutil.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    most = 0
    while process.poll() is None:
        try:
            family = [process, *process.children(recursive=True)]
            most = max(most, sum(one.memory_info().rss for one in family))
        except psutil.Error:  # one that ended just now
            pass
        time.sleep(0.1)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = spent.ru_utime + spent.ru_stime - used.ru_utime - used.ru_stime
    return {"s": seconds, "cpu_s": cpu, "mib": most / MIB}


def compare(runs: int, records: int, long: int, repeats: int, folder: Path) -> dict[str, Any]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")}
    runs_command = [sys.executable, "-m", "launcher", "runs"]
    random.seed(0)
    lines = [json.dumps(record(number)) + "\n" for number in range(1, records + 1)]
    few, many, one = folder / "few", folder / "many", folder / "one"
    for number in range(runs):
        write_run(many / f"run-{number}", lines)
    for number in range(max(1, runs // 10)):
        write_run(few / f"run-{number}", lines)
    more = [json.dumps(record(number)) + "\n" for number in range(records + 1, long + 1)]
    write_run(one, lines + more)
    rows: list[dict[str, Any]] = []

    def add(name: str, *command: object, times: int = 1) -> None:
        found = [measure([*runs_command, *map(str, command)], env) for _ in range(times)]
        seconds = [row["s"] for row in found]
        rows.append(
            {
                "what": name,
                "s": statistics.median(seconds),
                "range_s": [min(seconds), max(seconds)],
                "cpu_s": statistics.median(row["cpu_s"] for row in found),
                "mib": max(row["mib"] for row in found),
            }
        )

    add("--help", "--help", times=repeats)
    add(f"list {max(1, runs // 10)} runs, first time", "list", few)
    add(f"list {runs} runs, first time", "list", many)
    add(f"list {runs} runs, indexed", "list", many, times=repeats)
    for path in many.iterdir():
        with (path / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps(record(records + n)) + "\n" for n in range(1, 11))
    add(f"list {runs} runs, 10 new records each", "list", many)
    add(f"show {long} records, first time", "show", one)
    add(f"show {long} records, indexed", "show", one, times=repeats)
    add(f"plot {long} records", "plot", one, "--key", "train/loss", "-o", folder / "x.png")
    add(f"export {records} records as CSV", "export", few / "run-0", "-o", folder / "x.csv")

    from launcher.callbacks.tensorboard import EventFile
    from launcher.config import defaults

    sink = EventFile(folder / "events", 1, defaults())
    sink.write([json.loads(line) for line in lines])
    sink.close(False)
    values = str(len(METRICS) * len(lines))
    reader = [sys.executable, "-c", ACCUMULATE, str(folder / "events"), values]
    name = f"EventAccumulator, 1 run of {records} records"
    found = measure(reader, env)
    rows.append({"what": name, "range_s": [found["s"]] * 2, **found})
    return {
        "runs": runs,
        "records": records,
        "bytes_a_record": sum(map(len, lines)) / len(lines),
        "cpus": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "index_mib": sum(p.stat().st_size for p in (folder / "cache").rglob("*") if p.is_file())
        / MIB,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a hundredth of the records")
    parser.add_argument("--folder", type=Path, help="needs 4 GB (default: TMPDIR)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench_runs_", dir=options.folder))
    records, long = (1_000, 10_000) if options.quick else (100_000, 1_000_000)
    try:
        result = compare(100, records, long, 5, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if options.json:
        print(json.dumps(result, indent=2))
        return
    print(
        f"{result['bytes_a_record']:.0f} bytes a record, {result['cpus']} CPUs, load average "
        f"{result['load_average']:.1f}; indexes {result['index_mib']:.0f} MiB"
    )
    for row in result["rows"]:
        low, high = row["range_s"]
        spread = f"({low:.2f} to {high:.2f})" if high > low else ""
        wall, cpu = f"{row['s']:8.2f} s {spread:<18}", f"{row['cpu_s']:8.2f} s CPU"
        print(f"{row['what']:<45} {wall} {cpu} {row['mib']:6.0f} MiB")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
