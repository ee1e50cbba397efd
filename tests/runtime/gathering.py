"""One rank of test_gather.py: `python -m tests.runtime.gathering RANK FOLDER PORT...`.

The same processes make one group after the other, of 3 and then of 2 ranks, one for each port.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from launcher.data.plan import Plan
from launcher.errors import RunError
from launcher.runtime.gather import Gather
from launcher.runtime.process import Runtime
from tests.engine.helpers import LENGTH, Regression, Trainer, Weights, drawn
from tests.groups import serve

WORLDS = (3, 2)
# Rows of each rank.
PARTS = [(3, 1, 2), (2, 0, 4), (0, 0, 1), (0, 0, 0), (2, 2, 2)]
DTYPES = ("int64", "bool", "uint8", "float16", "bfloat16", "float64", "complex64")
# (batch size, micro-batch size): 7 of 23 samples leave a last batch of 2, 11 one of 1.
CASES = [(7, 2), (11, 3), (9, 4), (8, 0)]
STEPS = 5
Shared = Callable[[torch.Tensor], torch.Tensor]


def rows(rank: int, n: int, *shape: int, seed: int = 0) -> torch.Tensor:
    made = torch.Generator().manual_seed(100 * seed + rank)
    return torch.randn(n, *shape, generator=made, dtype=torch.float64)


# Losses of one rank, as (its number, its rows, gather); those of `unequal` use not all they gather.


def plain(rank: int, x: torch.Tensor, gather: Shared) -> torch.Tensor:
    return (gather(x) * (rank + 1)).sin().sum()


def interdependent(rank: int, x: torch.Tensor, gather: Shared) -> torch.Tensor:
    everyone = gather(x)
    again = gather(x.tanh() * everyone.sum(0))
    third = gather(again[: len(x)] + x)
    return ((everyone @ again.T).sin() * (rank + 1)).sum() + third.square().sum()


def unused(rank: int, x: torch.Tensor, gather: Shared) -> torch.Tensor:
    gather(2 * x)
    return (gather(x) ** 3).sum() + gather(x.detach()).sum()


def unequal(rank: int, x: torch.Tensor, gather: Shared) -> torch.Tensor:
    first, second = gather(x.sin()), gather(x.cos())
    return [first, second, x][rank].sum()


def without_gradients(rank: int, x: torch.Tensor, gather: Shared) -> torch.Tensor:
    with torch.no_grad():
        keys = gather(x * 2)
    return (x @ keys.T).exp().sum()


def of_rank_0(rank: int, x: torch.Tensor, gather: Shared) -> torch.Tensor:
    return (gather(x if rank == 0 else x.detach()) * (rank + 1)).exp().sum()


LOSSES = {f.__name__: f for f in (plain, interdependent, unused, unequal, without_gradients)}
LOSSES["of_rank_0"] = of_rank_0


def gradient(runtime: Runtime, gather: Gather, loss: Any, n: int) -> list[torch.Tensor]:
    """A rank's loss, and its gradient by the rank's rows."""
    x = rows(runtime.rank, n, 3).requires_grad_()
    gather.begin()
    mine = loss(runtime.rank, x, gather)
    gather.tie(mine + 0.0 * x.sum()).backward()
    assert x.grad is not None
    return [mine.detach(), x.grad]


def refused(act: Callable[[], Any]) -> str:
    try:
        act()
    except RunError as error:
        return str(error)
    return ""


def given(rank: int, gather: Gather) -> dict[str, str]:
    """The words for what does not fit; each is told to all ranks, which can then go on."""
    x = torch.ones(2, 3, requires_grad=True)

    def switched_off() -> None:
        with torch.set_grad_enabled(rank != 1):
            gather(x)

    mistakes: dict[str, Callable[[], Any]] = {
        "dtype": lambda: gather(torch.ones(2, dtype=torch.float64 if rank == 1 else None)),
        "shape": lambda: gather(torch.ones(2 + rank, 3 if rank else 4)),
        "no_grad": switched_off,
        "over": lambda: gather.end_round(False) if rank == 1 else gather(x),
    }
    return {name: refused(act) for name, act in mistakes.items()}


def served(runtime: Runtime, gather: Gather) -> Any:
    """What rank 0 finds alone in its micro-batch, the others idle."""
    found = None
    if runtime.rank == 0:
        found = gradient(runtime, gather, interdependent, 3)
        gather(torch.ones(4, dtype=torch.bool))
    gather.end_round(idle=runtime.rank > 0)
    return found


class Contrast(Regression):
    """Two views of each sample; those of all ranks are compared, and with a queue of keys."""

    shared_buffers = ("queue",)
    gather: Any

    def build_model(self) -> nn.Module:
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 6))
        model.register_buffer("queue", torch.zeros(5, 6))
        return model

    def views(self, model: nn.Module, batch: Any) -> Sequence[torch.Tensor]:
        x, names, _ = batch
        made = (nn.functional.normalize(model(view), dim=1) for view in (x, x.flip(1).sin()))
        return *made, names

    def contrast(
        self,
        a: torch.Tensor,
        names: torch.Tensor,
        b: torch.Tensor,
        all_names: torch.Tensor,
        queue: Any,
    ) -> torch.Tensor:
        likeness = torch.cat([a @ b.T, a @ queue.T], 1).div(0.2).log_softmax(1)
        return -likeness[:, : len(b)][names == all_names.T].mean()

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        a, b, names = self.views(model, batch)
        b, all_names = self.gather(b), self.gather(names)
        loss = self.contrast(a, names, b, all_names, model.queue)
        with torch.no_grad():
            model.queue = torch.cat([self.gather(a), model.queue])[:5]
        return {"loss": loss}


def contrast_by_hand(world_size: int, batch: int, micro: int) -> Weights:
    """The weights that `Contrast` has after STEPS, from one process: the losses of all ranks' parts
    of a round, each with all parts."""
    task, plan = Contrast(), Plan(LENGTH, batch, False, world_size, micro)
    model = task.build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        epoch, k = divmod(step, plan.steps_per_epoch)
        start, stop = plan.batch(k)
        optimizer.zero_grad()
        queues = [model.queue] * world_size  # at a step's begin all have rank 0's
        for i in range(plan.rounds(k)):
            cuts = {r: plan.micro_batches(k, r)[i : i + 1] for r in range(world_size)}
            parts = {r: drawn(task, epoch, *cut[0]) for r, cut in cuts.items() if cut}
            views = {r: task.views(model, part) for r, part in parts.items()}
            a, b, names = (torch.cat(of) for of in zip(*views.values(), strict=True))
            for r, (mine, _, mine_names) in views.items():
                loss = task.contrast(mine, mine_names, b, names, queues[r])
                (loss * len(mine) / (stop - start)).backward(retain_graph=True)
                queues[r] = torch.cat([a.detach(), queues[r]])[:5]
        model.queue = queues[0]
        optimizer.step()
    return [p.detach() for p in model.parameters()]


class Own(Contrast):
    """Begins a collective of its own, beside those of `gather`."""

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        dist.all_reduce(torch.ones(1))
        return super().train_step(model, batch)


class Alone(Contrast):
    """Each for itself."""

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        return {"loss": self.views(model, batch)[0][:, 0].mean()}


class SomeUse(Alone):
    """What is gathered has gradients on some ranks alone, of zero."""

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        loss = super().train_step(model, batch)["loss"]
        rows = self.gather(self.views(model, batch)[1])
        return {"loss": loss if dist.get_rank() == 1 else loss + 0.0 * rows.sum()}


def trained(runtime: Runtime, batch: int, micro: int, task: type[Contrast] = Contrast) -> Weights:
    trainer = Trainer(task(), runtime=runtime, batch=batch, micro=micro)
    trainer.run(STEPS)
    return trainer.weights


# Bytes of a value, on each rank; such as can be compressed, and such as cannot.
VALUES = [
    (sizes, compressible)
    for sizes in ((3, 3, 3), (0, 4050, 4070), (100_000, 5, 5), (5, 5, 300_000), (9000, 8000, 7000))
    for compressible in (True, False)
]


def value_of(case: tuple[tuple[int, ...], bool], rank: int) -> tuple[int, str]:
    size = case[0][rank]
    return rank, "loss" * (size // 4) if case[1] else random.Random(rank).randbytes(size).hex()


def values(runtime: Runtime, case: tuple[tuple[int, ...], bool]) -> tuple[Any, int]:
    """What `Runtime.gather` gives of values of any size, and how many collectives it counts."""
    before = runtime.collectives()
    gathered = runtime.gather(value_of(case, runtime.rank))
    return gathered, runtime.collectives() - before


def found(runtime: Runtime) -> dict[Any, Any]:
    rank, world_size = runtime.rank, runtime.world_size
    results: dict[Any, Any] = {}
    # The first of a run, of which idle ranks learn when they serve; the group is made for it.
    results["served first"] = served(runtime, Gather(runtime))
    gather = Gather(runtime)
    for parts in PARTS:
        for name, loss in LOSSES.items():
            results[parts, name] = gradient(runtime, gather, loss, parts[rank])
        for dtype in DTYPES:
            x = (3 * rows(rank, parts[rank], 2, 2)).to(getattr(torch, dtype))
            results[parts, dtype] = gather(x)
            results[parts, dtype, "flat"] = gather(x[:, 0, 0])
    results["no numbers"] = gather(torch.ones(2, 0))
    half = rows(rank, 4, 3).half().requires_grad_()
    (gather(half) * rows(rank, 4 * world_size, 3, seed=1).half()).sum().backward()
    results["half"] = half.grad
    results["served"] = served(runtime, gather)
    before, begun = runtime.collectives(), gather.begun
    results["refused"] = given(rank, gather)
    results["counted"] = runtime.collectives() - before, gather.begun - begun
    for case in CASES:
        results[case] = trained(runtime, *case)
        results["some use", case] = [trained(runtime, *case, task) for task in (SomeUse, Alone)]
    results["values"] = [values(runtime, case) for case in VALUES]
    results["own"] = refused(lambda: Trainer(Own(), runtime=runtime, batch=11, micro=3).one(0))
    return results


if __name__ == "__main__":
    serve(WORLDS, found)
