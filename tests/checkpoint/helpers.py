"""A store of small checkpoints."""

from pathlib import Path
from typing import Any

import torch

from launcher.checkpoint.store import CheckpointStore
from launcher.telemetry.sinks import strict


def state_of(step: int) -> dict[str, Any]:
    return {
        "model": {"w": torch.full((64, 64), float(step))},
        "optimizer_made": {},
        "progress": {"step": step, "epoch": 0, "samples": 8 * step},
        "ranks": [{"random": [1, "text", None, 2.5, torch.arange(step)]}],
    }


def manifest_of(step: int, **metrics: float) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": step // 10,
        "samples": 8 * step,
        "world_size": 1,
        "metrics": strict(metrics),  # as the loop writes them
        "time": 1795258612.539 + step,
        "versions": {"torch": "2.6.0"},
    }


class Store(CheckpointStore):
    def save(self, step: int, **metrics: float) -> Path:
        return self.commit(state_of(step), manifest_of(step, **metrics))
