"""The task that system tests train. What its ranks do is written down outside the run directory.

The environment says what to do, so that two runs with different wishes have the same config:

LAUNCHER_TEST_NOTES  folder for the notes: which samples each rank saw and loaded, what it wrote
LAUNCHER_TEST_SLEEP  seconds that every train_step takes longer
LAUNCHER_TEST_LEASH  how far the run may go (leash.py)
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from launcher import CfgNode, Task
from tests.system.leash import obey

NOTES = os.environ.get("LAUNCHER_TEST_NOTES", "")
SLEEP = float(os.environ.get("LAUNCHER_TEST_SLEEP", "0"))
RANK = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
FEATURES = 6


class Notes:
    """A file of this rank: one line of JSON a call, at once on disk, shared with its workers."""

    def __init__(self, name: str) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self.file = os.open(Path(NOTES) / f"{name}.rank{RANK}", flags) if NOTES else None

    def __call__(self, value: object) -> None:
        if self.file is not None:
            os.write(self.file, (json.dumps(value) + "\n").encode())


def watch_writes() -> None:
    """Note every path that this process creates, opens for writing, renames or removes."""
    note = Notes("writes")
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    changing = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link")

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = args
            written = set(mode or "") & set("wax+") or (flags or 0) & writing
            if written and isinstance(path, (str, bytes, os.PathLike)):
                note([event, os.fsdecode(path)])
        elif event in changing:
            for path in args[:2]:
                if isinstance(path, (str, bytes)):
                    note([event, os.fsdecode(path)])

    sys.addaudithook(hook)
    # It opens its file in C++, which no audit hook sees.
    save = torch.save

    def noted_save(value: Any, place: Any, *args: Any, **options: Any) -> None:
        note(["torch.save", str(place)])
        save(value, place, *args, **options)

    torch.save = noted_save


if NOTES:
    watch_writes()


class Numbered(torch.utils.data.Dataset):
    """Samples (x, y, number), the same in every process."""

    def __init__(self, length: int, seed: int, split: str) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.x = torch.randn(length, FEATURES, generator=draw)
        self.y = self.x.sin().sum(1) + 0.1 * torch.randn(length, generator=draw)
        self.note = Notes(f"loaded-{split}")

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        self.note(index)
        return self.x[index], self.y[index], index


class Model(nn.Module):
    """One net that is trained, and one that never changes and so evaluates to the same bits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, 1))
        self.fixed = nn.Sequential(nn.Linear(FEATURES, 64), nn.Tanh(), nn.Linear(64, 1))
        self.fixed.requires_grad_(False)


class Noted(Task):
    """A regression with weighted samples, an evaluation of the fixed net, and a `summarize`."""

    @classmethod
    def defaults(cls) -> CfgNode:
        return CfgNode({"TRAIN_SAMPLES": 35, "VAL_SAMPLES": 21, "NAN": False})

    def build_model(self) -> nn.Module:
        self.note_samples, self.calls = Notes("samples"), 0
        # Every rank updates the weights once a global batch: this parts one from the next.
        register_optimizer_step_post_hook(lambda *_: self.note_samples("step"))
        return Model()

    def build_dataset(self, split: str) -> Numbered:
        keys = self.cfg.TASK
        if split == "train":
            return Numbered(keys.TRAIN_SAMPLES, 1, split)
        return Numbered(keys.VAL_SAMPLES, 2, split)

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        obey(self.recorder.step)
        x, y, number = batch
        self.note_samples(number.tolist())
        self.calls += 1
        time.sleep(SLEEP)
        error = (model.net(x).squeeze(1) - y) ** 2
        weights = 1.0 + number % 3
        weight = weights.sum()
        values = {"loss": (weights * error).sum() / weight, "weight": weight}
        if self.cfg.TASK.NAN:
            values["odd"] = torch.tensor(math.nan if self.calls % 2 else 1.0)
        return values

    def eval_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        x, y, number = batch
        error = (model.fixed(x).squeeze(1) - y) ** 2
        trained = (model.net(x).squeeze(1) - y) ** 2
        return {
            "loss": error,
            "trained": trained,
            "near": error < 1.0,
            "weight": 1.0 + number % 5,
            "number": number,
        }

    def summarize(self, outputs: dict[str, torch.Tensor]) -> dict[str, float]:
        inner = torch.quantile(outputs["loss"].double(), 0.3).item()
        split = torch.arange(self.cfg.TASK.VAL_SAMPLES)
        in_order = torch.equal(outputs["number"], split)
        return {"inner": inner, "in_order": float(in_order), "count": len(outputs["number"])}
