"""A small task whose evaluations give what TASK.TELLS says, for callbacks that watch them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from launcher import CfgNode, Task
from launcher.cli import main

FAIL_AT = "LAUNCHER_TEST_FAIL_AT"  # the step that fails, as a crash would
COMMON = (
    *("TRAIN.BATCH_SIZE", "4", "LOG.EVERY", "1step", "LOG.TENSORBOARD", "False"),
    *("EVAL.EVERY", "2step", "CHECKPOINT.EVERY", "2step", "CHECKPOINT.KEEP_LAST", "99"),
    *("OPTIM.LR", "0.08", "TRAIN.DURATION", "16step"),
)


class Scripted(Task):
    """Least squares; its n-th evaluation (EVAL.EVERY 2step) tells the n-th value, then the last."""

    @classmethod
    def defaults(cls) -> CfgNode:
        return CfgNode({"TELLS": ["1.0"]})

    def build_model(self) -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 1))

    def build_dataset(self, split: str) -> TensorDataset:
        draw = torch.Generator().manual_seed(4)
        return TensorDataset(torch.randn(20, 3, generator=draw), torch.randn(20, 1, generator=draw))

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        if self.recorder.step == int(os.environ.get(FAIL_AT, "-1")):
            raise RuntimeError("as a crash would")
        x, y = batch
        return {"loss": ((model(x) - y) ** 2).mean()}

    def eval_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        tells = [float(value) for value in self.cfg.TASK.TELLS]
        value = tells[min(self.recorder.step // 2, len(tells)) - 1]
        return {"loss": torch.full((len(batch[0]),), value)}


def words(run: Path, kind: str, tells: list[Any], *callbacks: str) -> list[str]:
    """`kind` is a class of a file, as FILE:Class, or one of this file's."""
    task = kind if ":" in kind else f"{__file__}:{kind}"
    script = ("TASK.TELLS", json.dumps([str(value) for value in tells]))
    asked = ("CALLBACKS", json.dumps(callbacks))
    return ["TASK.NAME", task, *script, *asked, *COMMON, "OUTPUT_DIR", str(run)]


def train(case: list[str], *more: str) -> int:
    return main(["train", *case, *more])
