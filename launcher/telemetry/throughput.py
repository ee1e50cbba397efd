"""How much a run computes: FLOP/s, its share of the devices' peak, and the time to the end."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from typing import Any

import torch

from launcher.config import CfgNode

logger = logging.getLogger(__name__)
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
    `flops`, or counted (LOG.COUNT_FLOPS) in an attempt's first step that has samples."""

    def __init__(self, cfg: CfgNode, task: Any, device: torch.device, world_size: int) -> None:
        told = getattr(task, "flops", None)
        self.per_sample = float(told()) if told is not None else None
        self.counting = self.per_sample is None and cfg.LOG.COUNT_FLOPS
        one = peak(device, cfg.TRAIN.PRECISION, cfg.LOG.PEAK_TFLOPS)
        self.peak = one * world_size if one else None

    @contextlib.contextmanager
    def step(self, samples: int) -> Iterator[None]:
        """Around a step in which this rank has so many samples.

        The counter watches the operations of the step itself: nothing is computed for it, so no
        random state, weight or buffer is another one than without it.
        """
        if not self.counting or samples == 0:
            yield
            return
        from torch.utils.flop_counter import FlopCounterMode

        self.counting = False
        with FlopCounterMode(display=False) as counter:
            yield
        self.per_sample = counter.get_total_flops() / samples
        logger.info("%.4g FLOPs a sample, forward and backward, counted", self.per_sample)

    def figures(self, samples_per_s: float) -> dict[str, float]:
        if not self.per_sample:
            return {}
        rate = self.per_sample * samples_per_s
        share = {"perf/mfu": rate / self.peak} if self.peak else {}
        return {"perf/flops_per_s": rate, **share}


class Eta:
    """`perf/eta_s`: the steps that are left at the mean speed of this attempt, evaluations and
    saves included."""

    def __init__(self, total_steps: int, step: int, now: float) -> None:
        self.total, self.first, self.began = total_steps, step, now

    def figures(self, step: int, now: float) -> dict[str, float]:
        if step <= self.first:
            return {}
        a_step = (now - self.began) / (step - self.first)
        return {"perf/eta_s": max(self.total - step, 0) * a_step}
