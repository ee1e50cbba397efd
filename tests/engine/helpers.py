"""A small task whose right answers can be written down by hand."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from launcher.config import CfgNode, load_config
from launcher.data.order import Shuffle
from launcher.data.plan import Plan
from launcher.engine.run import build_state
from launcher.engine.step import TrainStep
from launcher.guard.guard import Guard
from launcher.runtime.cpu import CpuBudget
from launcher.runtime.process import Runtime
from launcher.runtime.progress import Progress
from launcher.runtime.topology import Topology
from launcher.telemetry.recorder import Recorder, Sink
from launcher.telemetry.rundir import RunDirectory
from launcher.telemetry.task_recorder import RunRecorder

LENGTH = 23
ALONE = Runtime(Topology(), torch.device("cpu"), CpuBudget(1, 1, 1, ""))
Weights = list[torch.Tensor]


def recording(runtime: Runtime = ALONE, sink: Sink | None = None) -> RunRecorder:
    """What a run gives a task to record with."""
    return RunRecorder(Recorder(runtime, sink), Progress(), runtime)


def config(*words: object) -> CfgNode:
    return load_config(None, [str(word) for word in words], require_task=False).cfg


def unwatched() -> Guard:
    """A guard whose thread does not run."""
    return Guard(config(), Topology(), RunDirectory("run"), Progress())


class Regression:
    """Least squares; with `weighted` every sample has a weight of its own."""

    def __init__(self, weighted: bool = False) -> None:
        self.weighted = weighted
        made = torch.Generator().manual_seed(5)
        self.x = torch.randn(LENGTH, 4, generator=made)
        self.y = torch.randn(LENGTH, 1, generator=made)
        self.w = torch.arange(LENGTH) % 4 + 0.5 if weighted else torch.ones(LENGTH)

    def build_model(self) -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def build_dataset(self, split: str = "train") -> TensorDataset:
        return TensorDataset(self.x, self.y, self.w)

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        x, y, w = batch
        errors = ((model(x) - y) ** 2).squeeze(1)
        total = w.sum()
        values = {"loss": (errors * w).sum() / total.clamp_min(1e-9), "error": errors.mean()}
        if self.weighted:
            values["weight"] = total
            # The mean that is recorded is weighted too.
            values["error"] = values["loss"].detach()
        return values

    def eval_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        x, y, w = batch
        errors = ((model(x) - y) ** 2).squeeze(1)
        return {"loss": errors, "small": errors < 1, "weight": w, "x": x}


class Trainer:
    """A TrainStep with what it works on; steps take their batches from the real order."""

    def __init__(
        self,
        task: Any,
        *words: object,
        runtime: Runtime = ALONE,
        batch_size: int = 8,
        micro_batch_size: int = 0,
    ) -> None:
        self.cfg = config("TRAIN.BATCH_SIZE", batch_size, *words)
        self.task, self.runtime = task, runtime
        self.state = build_state(self.cfg, task, runtime)
        self.step = TrainStep(self.cfg, task, self.state, runtime)
        self.plan = Plan(LENGTH, batch_size, False, runtime.world_size, micro_batch_size)
        self.data = task.build_dataset()

    def run(self, steps: int, asked: dict[int, frozenset[str]] | None = None) -> list[Any]:
        """Steps 0 to `steps`; the (skipped, seen) of each."""
        return [self.one(k, (asked or {}).get(k, frozenset())) for k in range(steps)]

    def one(self, step: int, asked: frozenset[str] = frozenset()) -> Any:
        epoch, k = divmod(step, self.plan.steps_per_epoch)
        cuts = self.plan.micro_batches(k, self.runtime.rank)
        batches: Iterator[Any] = (take(self.data, rows(epoch, *cut)) for cut in cuts)
        start, stop = self.plan.batch(k)
        sizes = [b - a for a, b in cuts]
        return self.step(lambda: next(batches), sizes, stop - start, asked)

    @property
    def weights(self) -> Weights:
        return [p.detach().clone() for p in self.state.model.parameters()]


def take(dataset: TensorDataset, indices: Sequence[int]) -> Any:
    """These samples as one batch."""
    return dataset[torch.as_tensor(indices)]


def rows(epoch: int, start: int, stop: int) -> list[int]:
    """The samples at these positions of an epoch."""
    return Shuffle(LENGTH, 0)(epoch, np.arange(start, stop)).tolist()


def by_hand(task: Regression, batch_size: int, steps: int, **sgd: Any) -> Weights:
    """The weights after steps of plain torch on whole batches."""
    model, plan = task.build_model(), Plan(LENGTH, batch_size)
    optimizer = torch.optim.SGD(model.parameters(), **sgd)
    for step in range(steps):
        epoch, k = divmod(step, plan.steps_per_epoch)
        x, y, w = take(task.build_dataset(), rows(epoch, *plan.batch(k)))
        loss = (w * ((model(x) - y) ** 2).squeeze(1)).sum() / w.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def assert_close(a: Weights, b: Weights) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
