"""A task that uses what a task may: hooks, a state and a schedule of its own, and self.run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from launcher import CfgNode, Task

FAIL_AT = "LAUNCHER_TEST_FAIL_AT"  # the step that fails, as a crash would


class Told(Dataset):
    """Samples that tell what self.run says where they are fetched."""

    def __init__(self, task: Any, length: int) -> None:
        self.run, self.length = task.run, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        run = self.run
        holds = [run.total_steps, run.steps_per_epoch, run.rank, run.world_size]
        return torch.full((3,), index / 10), torch.tensor([*holds, fails(lambda: run.done)])


def fails(ask: Any) -> bool:
    try:
        ask()
    except RuntimeError:
        return True
    return False


class Hooked(Task):
    """Asks for the end on TASK.RANK once its own count of batches, a state, is TASK.ENOUGH."""

    @classmethod
    def defaults(cls) -> CfgNode:
        return CfgNode({"ENOUGH": 1000, "RANK": 0, "HALF": False, "ODD": False})

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg, self.reason = cfg, ""
        self.count = torch.tensor([0, 100 * self.run.rank])
        assert fails(lambda: self.run.total_steps) and fails(lambda: self.run.steps_per_epoch)
        assert self.run.recorder is self.recorder and self.run.split == "train"

    def build_model(self) -> nn.Module:
        assert self.run.total_steps == 12 and self.run.steps_per_epoch == 3
        torch.manual_seed(3)
        return nn.Linear(3, 1).to(self.run.device)

    def build_dataset(self, split: str) -> Told:
        assert fails(lambda: self.run.total_steps)
        return Told(self, 20)

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        x, told = batch
        progress, run = self.run.progress, self.run
        if self.recorder.step == int(os.environ.get(FAIL_AT, "-1")):
            raise RuntimeError("as a crash would")
        assert (run.split, progress.step) == ("train", self.recorder.step - 1)
        self.count = self.count + 1
        row = told[0].tolist()
        assert row[:4] == [12, 3, run.rank, run.world_size], row
        in_worker = self.cfg.DATALOADER.NUM_WORKERS != 0
        assert bool(row[4]) is in_worker
        seen = {"epochs": progress.epoch, "taken": progress.samples, "done": run.done}
        return {"loss": (model(x) ** 2).mean(), **seen, "count": self.count.sum()}

    def eval_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        ones = torch.ones(len(batch[0]))
        return {"loss": ones * self.run.progress.step, "split": ones * (self.run.split == "val")}

    def schedule(self, step: int, total: int) -> float:
        return 1 - step / total

    def _note(self, word: str) -> None:
        with Path(self.cfg.OUTPUT_DIR, f"notes{self.run.rank}").open("a") as file:
            file.write(f"{word} {self.run.progress.step}\n")

    def on_start(self) -> None:
        self._note("start")

    def on_step(self) -> str | None:
        if self.run.rank != self.cfg.TASK.RANK or int(self.count[0]) != self.cfg.TASK.ENOUGH:
            return None
        self.reason = f"{self.cfg.TASK.ENOUGH} batches are enough"
        return "finish"

    def on_record(self, record: dict[str, float] | None) -> None:
        assert (record is None) == (self.run.rank > 0)
        self._note("record")

    def on_evaluation(self, metrics: dict[str, float]) -> None:
        self._note(f"evaluation of {json.dumps(sorted(metrics))}")

    def on_checkpoint(self) -> None:
        self._note("checkpoint")

    def on_end(self) -> None:
        self._note("end")

    def state_dict(self) -> dict[str, Any]:
        odd = {"how": Path("/")} if self.cfg.TASK.ODD else {}
        return {"count": self.count, **odd}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class Half(Hooked):
    load_state_dict = None  # type: ignore[assignment]
