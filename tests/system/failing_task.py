"""A task in which one rank fails, in one of several ways, at one of its steps."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from launcher import CfgNode, Task

RANK = int(os.environ.get("RANK", "0"))
ALONE = os.environ.get("WORLD_SIZE", "1") == "1"
SLEEP = float(os.environ.get("LAUNCHER_TEST_SLEEP_ALONE" if ALONE else "", "0.02"))


class SlowToLoad(TensorDataset):
    """One rank takes long for each sample."""

    def __init__(self, rank: int, *tensors: torch.Tensor) -> None:
        super().__init__(*tensors)
        self.rank = rank

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        if self.rank == RANK:
            time.sleep(0.01)
        return super().__getitem__(index)


class Failing(Task):
    """FAILURE happens to RANK at its step AT; ONCE names a file that says it has happened."""

    @classmethod
    def defaults(cls) -> CfgNode:
        return CfgNode({"FAILURE": "", "RANK": 1, "AT": 6, "ONCE": "", "SLOW": ""})

    def build_model(self) -> nn.Module:
        self.steps = 0
        width = 17 if self._is_odd("model") else 16
        return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))

    def build_dataset(self, split: str) -> TensorDataset:
        if self._is_odd("start"):
            raise FileNotFoundError("no data here")
        length = 80 if self._is_odd("length") else 64
        x = torch.randn(length, 4, generator=torch.Generator().manual_seed(1))
        y = x.sum(1, keepdim=True)
        if self.cfg.TASK.SLOW == "data":
            return SlowToLoad(self.cfg.TASK.RANK, x, y)
        return TensorDataset(x, y)

    def _is_odd(self, what: str) -> bool:
        return what == self.cfg.TASK.FAILURE and self.cfg.TASK.RANK == RANK

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        x, y = batch
        self.steps += 1
        time.sleep(SLEEP)
        if self.cfg.TASK.SLOW == "train" and self.cfg.TASK.RANK == RANK:
            time.sleep(0.08)
        if self.steps == self.cfg.TASK.AT and self.cfg.TASK.RANK == RANK:
            self._fail()
        return {"loss": nn.functional.mse_loss(model(x), y)}

    def _fail(self) -> None:
        keys = self.cfg.TASK
        if keys.ONCE:
            if Path(keys.ONCE).exists():
                return
            Path(keys.ONCE).touch()
        if keys.FAILURE == "raise":
            raise ValueError("a planned failure")
        if keys.FAILURE == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if keys.FAILURE == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if keys.FAILURE == "abort":  # as a failed check of a C++ library
            print("from Python", file=sys.stderr)
            os.write(2, b"terminate called after throwing an instance of 'planned'\n")
            os.abort()
        if keys.FAILURE == "segv":
            ctypes.string_at(0)
        if keys.FAILURE == "bus":
            os.kill(os.getpid(), signal.SIGBUS)
        if keys.FAILURE == "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        if keys.FAILURE == "hang":
            time.sleep(1000)
        if keys.FAILURE == "gil":
            time.sleep(1.5)  # the timer is set anew only every half a second
            ctypes.PyDLL(None).sleep(1000)  # keeps Python's lock, so no thread of Python's runs

    def on_checkpoint(self) -> None:
        if self._is_odd("freeze before a save"):
            os.kill(os.getpid(), signal.SIGSTOP)

    def eval_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        x, y = batch
        if self.cfg.TASK.SLOW == "evaluation" and RANK == 0:
            time.sleep(2.5)
        if self.cfg.TASK.SLOW == "stuck" and self.cfg.TASK.RANK == RANK:
            time.sleep(1000)
        return {"loss": (model(x) - y).square().squeeze(1)}

    def summarize(self, outputs: dict[str, torch.Tensor]) -> dict[str, float]:
        if self.cfg.TASK.SLOW == "summary":
            time.sleep(12)
        return {}
