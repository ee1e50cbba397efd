"""Tasks whose first steps differ from run to run, each for one reason; some only look so."""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import library, nn
from torch.utils.data import Dataset

import launcher
from launcher import CfgNode

LENGTH = 24


@dataclass
class Batch:
    x: torch.Tensor
    y: torch.Tensor


class Numbers(Dataset):
    """Samples that are drawn from the generators that the launcher seeds, as augmentation does."""

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.full((4,), float(index)) + torch.rand(4) + float(np.random.rand())
        return x, x.sum(0, keepdim=True)


class Steady(launcher.Task):
    """With dropout, a batch of a class of its own, and a module that returns a dict: repeatable."""

    @classmethod
    def defaults(cls) -> CfgNode:
        return CfgNode({"FACTOR": 1.0})

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), self.middle(), nn.Linear(8, 1))

    def middle(self) -> nn.Module:
        return nn.Tanh()

    def build_dataset(self, split: str) -> Any:
        return Numbers()

    def collate(self, samples: Any) -> Batch:
        x, y = zip(*samples, strict=True)
        return Batch(torch.stack(x), torch.stack(y))

    def train_step(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        return {"loss": (model(batch.x) - batch.y).square().mean()}

    def eval_step(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        return {"loss": (model(batch.x) - batch.y).square().mean(1)}


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 8)
        self.head = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": self.head(self.inner(x)), "norm": x.norm()}


class TwoPhases(Steady):
    """Two optimisers, by phase, on one batch; a mean of the weights that the task keeps itself."""

    def build_model(self) -> nn.Module:
        return Named()

    def build_optimizer(self, model: Any) -> Any:
        return {
            "inner": torch.optim.AdamW(model.inner.parameters(), lr=1e-3),
            "head": torch.optim.SGD(model.head.parameters(), lr=1e-3, momentum=0.9),
        }

    def train_step(self, model: nn.Module, batch: Batch, phase: str = "") -> Any:
        return {"loss": (model(batch.x)["out"] - batch.y).square().mean()}


class FillsItself(Steady):
    """Writes all of the memory that torch.empty leaves, piece by piece."""

    def middle(self) -> nn.Module:
        return Pieces()


class Pieces(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        with torch.no_grad():
            out[:, torch.tensor([3, 4, 5, 6, 7])] = 2.0  # the rest is not written yet
            out[:, :3] = 1.0
        return x * out


class Noisy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        noise = int.from_bytes(os.urandom(4), "big") / 2**32
        return x * (1.0 + noise)


class FromOutside(Steady):
    """A number of the system's in the forward pass."""

    def middle(self) -> nn.Module:
        return nn.Sequential(nn.ReLU(), Noisy())


class Unseeded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()
        self.generator.seed()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand(x.shape, generator=self.generator)


class OwnGenerator(Steady):
    """A generator that nobody seeds."""

    def middle(self) -> nn.Module:
        return Unseeded()


class Uninitialised(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left = torch.empty_like(x)
        return x + left.nan_to_num(0.0).clamp(-1, 1)


class ReadsEmpty(Steady):
    """Memory that is read before it is written."""

    def middle(self) -> nn.Module:
        return Uninitialised()


class ReadsAfterFilling(Steady):
    """The same, behind a piece of memory that is filled as it should be."""

    def middle(self) -> nn.Module:
        return nn.Sequential(Pieces(), Uninitialised())


class NoisyGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return gradient * (1 + np.random.default_rng().random())


class Straight(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return NoisyGradient.apply(x)


class InBackward(Steady):
    """Noise in a backward pass alone: the losses of the first step are equal."""

    def middle(self) -> nn.Module:
        return Straight()


@library.custom_op("planted::jitter", mutates_args=())
def jitter(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(x.numpy() + np.random.default_rng().random())


jitter.register_autograd(lambda ctx, gradient: gradient)


class Jitter(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return jitter(x)


class Itself(Steady):
    """An operator that gives other results for the same input."""

    def middle(self) -> nn.Module:
        return Jitter()


class Drifting(Numbers):
    calls = 0  # of all data sets of this class: it stays in the process

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = super().__getitem__(index)
        if index % 12 == 5:
            Drifting.calls += 1
            x = x + Drifting.calls
        return x, y


class DataDiffers(Steady):
    """Two samples of the data set are others each time."""

    def build_dataset(self, split: str) -> Any:
        return Drifting()


class Shuffled(Numbers):
    def order(self, epoch: int, positions: Any) -> Any:
        return np.random.default_rng().permutation(LENGTH)[positions]


class OrderDiffers(Steady):
    """For TRAIN.SAMPLER dataset: an order that is no pure function."""

    def build_dataset(self, split: str) -> Any:
        return Shuffled()


class BuiltDiffers(Steady):
    """Weights from numpy's unseeded generator."""

    def build_model(self) -> nn.Module:
        model = super().build_model()
        random = torch.from_numpy(np.random.default_rng().random((1, 8)))
        with torch.no_grad():
            model[3].weight.copy_(random)
        return model


class OtherWay(Steady):
    """Every second run takes another activation."""

    runs = 0

    def build_model(self) -> nn.Module:
        OtherWay.runs += 1
        return super().build_model()

    def middle(self) -> nn.Module:
        return Turns(OtherWay.runs % 2 == 0)


class Turns(nn.Module):
    def __init__(self, even: bool) -> None:
        super().__init__()
        self.even = even

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) if self.even else torch.tanh(x)


class BehindTorch(Steady):
    """Weights that are changed by way of numpy."""

    model: Any = None

    def build_model(self) -> nn.Module:
        self.model = super().build_model()
        return self.model

    def on_step(self) -> None:
        self.model[3].bias.detach().numpy()[:] = np.random.default_rng().random()


class Fails(Steady):
    def train_step(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        raise ValueError("no such luck")
