"""A small task whose right answers can be written down by hand."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from launcher.checkpoint.state import TrainingState
from launcher.config import CfgNode, load_config
from launcher.data.order import Shuffle
from launcher.data.plan import Plan
from launcher.data.splits import Data, GlobalBatch
from launcher.engine.evaluate import Evaluation
from launcher.engine.run import Job, build_state
from launcher.engine.step import TrainStep
from launcher.runtime.cpu import CpuBudget
from launcher.runtime.gather import Gather
from launcher.runtime.process import Runtime
from launcher.runtime.progress import Progress
from launcher.runtime.topology import Topology
from launcher.telemetry.recorder import Recorder
from launcher.telemetry.rundir import RunDirectory
from launcher.telemetry.writer import Writer

LENGTH = 23
ALONE = Runtime(Topology(), torch.device("cpu"), CpuBudget(1, 1, 1, ""))
Weights = list[torch.Tensor]


def recording(runtime: Runtime = ALONE) -> Recorder:
    """What a run gives a task to record with."""
    return Recorder(runtime, Progress(), Writer())


def config(*words: object) -> CfgNode:
    return load_config(None, [str(word) for word in words], require_task=False).cfg


class Regression:
    """Least squares; with `weighted` every sample has a weight of its own, some of 0."""

    def __init__(self, weighted: bool = False) -> None:
        self.weighted = weighted
        made = torch.Generator().manual_seed(5)
        self.x = torch.randn(LENGTH, 4, generator=made)
        self.y = torch.randn(LENGTH, 1, generator=made)
        self.w = (torch.arange(LENGTH) % 4).float() if weighted else torch.ones(LENGTH)

    def build_model(self) -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def build_dataset(self, split: str = "train") -> TensorDataset:
        return TensorDataset(self.x, self.y, self.w)

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        x, y, w = batch
        errors = ((model(x) - y) ** 2).squeeze(1)
        loss = (errors * w).sum() / w.sum().clamp_min(1e-9)
        weight = {"weight": w.sum()} if self.weighted else {}
        return {"loss": loss, "error": loss.detach(), **weight}

    def eval_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        x, y, w = batch
        errors = ((model(x) - y) ** 2).squeeze(1)
        return {"loss": errors, "small": errors < 1, "weight": w, "x": x}


def fresh(task: Any, *words: object, runtime: Runtime = ALONE) -> TrainingState:
    """The state of a run of this task that has not begun."""
    cfg, recorder = config(*words), recording(runtime)
    task.recorder = recorder
    data = Data(cfg, task, runtime, lambda phase: None)
    job = Job(cfg, type(task), RunDirectory("never made"))
    return build_state(job, task, data, recorder, runtime)


def unasked() -> Any:
    """In place of a guard: one that was not asked to stop."""
    return SimpleNamespace(enter=lambda phase: None, stop=None)


def evaluation(
    task: Any, batches: Any, plan: Plan, runtime: Runtime = ALONE, guard: Any = None
) -> Evaluation:
    """An evaluation of these batches, or of what they give for their numbers, of which all ranks
    together have those of the plan; call it with a model and ["val"]."""
    data: Any = SimpleNamespace(
        evaluation=lambda split, numbers: iter(batches(numbers) if callable(batches) else batches),
        eval_plan=lambda split: plan,
    )
    return Evaluation(config(), task, runtime, guard or unasked(), data)


class Trainer:
    """A TrainStep with what it works on; steps take their batches from the real order."""

    def __init__(
        self, task: Any, *words: object, runtime: Runtime = ALONE, batch: int = 8, micro: int = 0
    ) -> None:
        sizes = ("TRAIN.BATCH_SIZE", batch, "TRAIN.MICRO_BATCH_SIZE", micro)
        self.state = fresh(task, *sizes, *words, runtime=runtime)
        task.gather = Gather(runtime)
        self.step = TrainStep(self.state.cfg, task, self.state, runtime, task.gather)
        self.task, self.rank, self.plan = task, runtime.rank, self.state.data.train_plan

    def run(self, steps: int) -> list[Any]:
        """Steps 0 to `steps`; the (skipped, seen) of each."""
        return [self.one(k) for k in range(steps)]

    def one(self, step: int, asked: frozenset[str] = frozenset()) -> Any:
        epoch, k = divmod(step, self.plan.steps_per_epoch)
        cuts = self.plan.micro_batches(k, self.rank)
        start, stop = self.plan.batch(k)
        batches = (drawn(self.task, epoch, *cut) for cut in cuts)
        rounds = self.plan.rounds(k), self.plan.full_rounds(k)
        sizes = [b - a for a, b in cuts]
        return self.step(GlobalBatch(stop - start, sizes, batches, *rounds), asked)

    def recorded(self) -> dict[str, float]:
        """The means since the last call."""
        means, _ = self.state.recorder.gather() or ({}, [])
        return means

    @property
    def weights(self) -> Weights:
        return [p.detach().clone() for p in self.state.model.parameters()]


def drawn(task: Regression, epoch: int, start: int, stop: int) -> Any:
    """The samples at these positions of an epoch, as one batch."""
    return task.build_dataset()[Shuffle(LENGTH, 0)(epoch, np.arange(start, stop))]


def by_hand(task: Regression, batch_size: int, steps: int, **sgd: Any) -> Weights:
    """The weights after steps of plain torch on whole batches."""
    model, plan = task.build_model(), Plan(LENGTH, batch_size)
    optimizer = torch.optim.SGD(model.parameters(), **sgd)
    for step in range(steps):
        epoch, k = divmod(step, plan.steps_per_epoch)
        optimizer.zero_grad()
        task.train_step(model, drawn(task, epoch, *plan.batch(k)))["loss"].backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def assert_close(a: Weights, b: Weights, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def same(a: Any, b: Any) -> bool:
    """Whether they are equal to the last bit, tensors deep inside too."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)
