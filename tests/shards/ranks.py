"""One rank of tests/shards/test_sums.py: `python -m tests.shards.ranks RANK FOLDER PORT...`."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from launcher.data.plan import Plan
from launcher.errors import RunError
from launcher.runtime.process import Runtime
from launcher.shards.sums import GradientSums, Shards
from tests.engine.helpers import config
from tests.groups import serve

WORLDS = (4, 3, 2, 1)
SHARDS = 12
# Samples of global batches: more than one a shard, unevenly; fewer than shards; one.
COUNTS = (29, 12, 7, 1)


class Odd(nn.Module):
    """Weights of all kinds: tied, complex, in other types, by columns, unused by some shards or by
    all."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3)

        def weight(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, dtype=dtype, generator=draw))

        self.first = weight(6, 7)
        self.tied = self.first
        self.columns = nn.Parameter(weight(7, 5).t().contiguous().t())
        self.images = nn.Parameter(weight(3, 2, 5, 5).to(memory_format=torch.channels_last))
        self.wave = weight(5, dtype=torch.complex64)
        self.wide = weight(33, dtype=torch.float64)
        self.short = weight(9, dtype=torch.bfloat16)
        self.number = weight()
        self.sometimes, self.never = weight(4), weight(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = x @ self.first @ self.columns + (x.sum() * self.tied).sum()
        out = (hidden * self.wave.real + hidden.cos() * self.wave.imag).sum()
        out = out + (hidden.sum().double() * self.wide).sin().sum().float() * self.number
        out = out + (hidden.mean().bfloat16() * self.short).sum().float()
        out = out + (self.images * x.mean()).sin().sum()
        return out + (self.sometimes * x.sum()).sum() if x[0, 0] > 1.2 else out


def samples(count: int) -> torch.Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(count))


def sums_of(runtime: Runtime, model: nn.Module, bucket_mb: float) -> Any:
    plan = Plan(100, 50, world_size=runtime.world_size, micro_batch_size=2, shards=SHARDS)
    cfg = config("TRAIN.SHARDS", SHARDS, "DIST.BUCKET_MB", bucket_mb)
    task: Any = SimpleNamespace(recorder=SimpleNamespace())
    shards = Shards(cfg, model, task, plan, runtime)
    carrier = nn.Parameter(torch.zeros(8))
    return shards, plan, carrier, GradientSums(shards, list(model.parameters()), carrier, 0)


def found(runtime: Runtime) -> dict[str, Any]:
    """By size of buckets and batch: each weight's gradient, and what was drawn by shard."""
    answers: dict[str, Any] = {}
    for bucket_mb in (1.0, 1e-4):
        model = Odd()
        shards, plan, carrier, sums = sums_of(runtime, model, bucket_mb)
        for step, count in enumerate(COUNTS):
            x = samples(count)
            cuts = [cut for shard in shards.mine for cut in plan.cuts(count, shard)]
            for _, size in sums.rounds(count, step):
                start, stop = cuts.pop(0)
                assert stop - start == size
                said = torch.full((8,), float(size))
                carrier.grad = said if carrier.grad is None else carrier.grad + said
                model(x[start:stop]).backward()
            assert not cuts
            grads = {name: p.grad for name, p in model.named_parameters()}
            answers[f"{bucket_mb} {count}"] = {
                "grads": {n: None if g is None else g.clone() for n, g in grads.items()},
                "strides": {n: g.stride() for n, g in grads.items() if g is not None},
                "carrier": carrier.grad.clone(),
                "drawn": torch.rand(3),
                "buckets": len(sums.buckets),
                "kept": [len(bucket.spare) for bucket in sums.buckets],
            }
            for p in (*model.parameters(), carrier):
                p.grad = None
        shards.close()
    answers["twice"] = twice(runtime)
    return answers


def twice(runtime: Runtime) -> str:
    """What is told of a weight whose backward pass comes in two parts."""
    model = nn.Linear(6, 6)
    shards, _, _, sums = sums_of(runtime, model, 1e-9)
    told = "refused"
    with contextlib.suppress(RunError):
        for _, size in sums.rounds(12, 0):
            x = torch.randn(size, 6, requires_grad=True)
            inner = checkpoint(model, x, use_reentrant=True)
            checkpoint(model, inner, use_reentrant=True).sum().backward()
        told = "summed"
    shards.close()
    if shards.exchange is not None:
        shards.exchange.thread.join(60)  # what is under way with the others
    return told


if __name__ == "__main__":
    serve(WORLDS, found)
