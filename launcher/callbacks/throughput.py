"""How much a run computes: FLOP/s, and its share of the devices' peak."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from launcher.callbacks import Run
from launcher.callbacks.model_summary import flops
from launcher.log import get_logger

logger = get_logger(__name__)
# Peak TFLOP/s without sparsity in 16 bits, TF32 and FP32, from the makers' data sheets. The first
# name that is part of the device's, as whole words, counts.
PEAKS = {
    "B200": (2250.0, 1100.0, 75.0),
    "H200": (989.0, 494.0, 67.0),
    "H100 NVL": (835.0, 417.0, 60.0),
    "H100 PCIe": (756.0, 378.0, 51.0),
    "H100": (989.0, 494.0, 67.0),
    "A100": (312.0, 156.0, 19.5),
    "L40S": (362.0, 183.0, 91.6),
    "L4": (121.0, 60.0, 30.3),
    "V100": (125.0, 15.7, 15.7),
    "T4": (65.0, 8.1, 8.1),
}


def peak(device: torch.device, precision: str, tflops: float = 0.0) -> float | None:
    """Peak FLOP/s of one device: LOG.PEAK_TFLOPS, else from PEAKS; None where it is unknown."""
    if tflops:
        return tflops * 1e12
    if device.type != "cuda":
        return None
    return known_peak(torch.cuda.get_device_name(device), precision)


def known_peak(name: str, precision: str) -> float | None:
    """Peak FLOP/s of a GPU by its name; None for one that is not known, or a part of one (MIG)."""
    column = {"tf32": 1, "fp32": 2}.get(precision, 0)
    for part, row in PEAKS.items():
        if re.search(rf"\b{part}\b", name) and "MIG" not in name:
            return row[column] * 1e12
    return None


class Throughput:
    """`perf/flops_per_s` and `perf/mfu` where the FLOPs of a sample are known: from the task's
    `flops`, or counted (LOG.COUNT_FLOPS) in an attempt's first step that has samples.

    The counter watches the operations of the step itself: nothing is computed for it, so no
    random state, weight or buffer is another one than without it.
    """

    def __init__(self, run: Run) -> None:
        log, told = run.cfg.LOG, getattr(run.task, "flops", None)
        self.model, self.tells = run.model, log.MODEL_SUMMARY and run.runtime.is_main
        self.per_sample = float(told()) if told is not None else None
        self.counting = self.per_sample is None and log.COUNT_FLOPS
        one = peak(run.runtime.device, run.cfg.TRAIN.PRECISION, log.PEAK_TFLOPS)
        self.peak = one * run.runtime.world_size if one else None
        self.counter: Any = None
        self.samples = 0

    def before_step(self, samples: int) -> None:
        self.on_step()  # of one that the gradient scaler skipped
        if self.counting and samples:
            from torch.utils.flop_counter import FlopCounterMode

            self.counting, self.samples = False, samples
            self.counter = FlopCounterMode(display=False)
            self.counter.__enter__()

    def on_step(self) -> None:
        if self.counter is not None:
            self.counter.__exit__(None, None, None)
            self.per_sample = self.counter.get_total_flops() / self.samples
            logger.info("%.4g FLOPs a sample, forward and backward, counted", self.per_sample)
            if self.tells:
                counts = self.counter.get_flop_counts()
                logger.info("%s", flops(counts, self.model, self.samples))
            self.counter = None

    def figures(self, record: Mapping[str, Any], ranks: Sequence[Any]) -> dict[str, float]:
        if not self.per_sample:
            return {}
        rate = self.per_sample * record["perf/samples_per_s"]
        share = {"perf/mfu": rate / self.peak} if self.peak else {}
        return {"perf/flops_per_s": rate, **share}
