"""What TRAIN.SHARDS costs: `python benchmarks/shards.py [--ranks ...] [--rounds N]`.

A step of bytes-lm (1 million weights, 16 windows of 256 bytes) and of the digits (a small CNN, 64
images), by number of ranks, all on this machine: with 8 shards, with one for each rank, and without
any, in turns. Told are wall time and a rank's memory, as ratios to the run without.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CASES = {"bytes-lm-1m": 30, "digits": 150}  # steps
WARM = 10


def run(config: str, steps: int, ranks: int, shards: int) -> tuple[float, float]:
    """Seconds a step, the tenth percentile over records, and GiB of rank 0."""
    with tempfile.TemporaryDirectory(prefix="bench-") as out:
        start = [sys.executable]
        if ranks > 1:
            start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        words = ["--config-file", str(ROOT / f"configs/{config}.yaml"), "OUTPUT_DIR", f"{out}/run"]
        words += ["TRAIN.DURATION", f"{steps}step", "LOG.EVERY", "2step", "EVAL.EVERY", ""]
        words += ["OPTIM.WARMUP", "", "CHECKPOINT.EVERY", "", "LOG.TENSORBOARD", "False"]
        words += ["TRAIN.SHARDS", str(shards), "LOG.LEVEL", "WARNING", "CHECKPOINT.KEEP_BEST", "0"]
        command = [*start, str(ROOT / "tools/train.py"), *words]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        lines = Path(out, "run/metrics.jsonl").read_text().splitlines()
    records = [r for r in map(json.loads, lines) if "perf/step_s" in r and r["step"] > WARM]
    times = sorted(record["perf/step_s"] for record in records)
    return times[len(times) // 10], max(record["system/rss_gib"] for record in records)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    p.add_argument("--rounds", type=int, default=5)
    options = p.parse_args()
    for config, steps in CASES.items():
        print(f"\n**{config}**\n")
        print("| ranks | without: ms a step | 8 shards | a shard a rank | memory, 8 shards |")
        print("| --- | --- | --- | --- | --- |", flush=True)
        for ranks in options.ranks:
            kinds = dict.fromkeys((0, 8, ranks))
            found = [
                {kind: run(config, steps, ranks, kind) for kind in kinds}
                for _ in range(options.rounds)
            ]
            plain = statistics.median(one[0][0] for one in found)
            line = [str(ranks), f"{1000 * plain:.1f}"]
            for kind in (8, ranks):
                line.append(f"{statistics.median(one[kind][0] / one[0][0] for one in found):.2f}")
            line.append(f"{statistics.median(one[8][1] / one[0][1] for one in found):.2f}")
            print("| " + " | ".join(line) + " |", flush=True)


if __name__ == "__main__":
    main()
