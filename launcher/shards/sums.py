"""Gradients of a rank's shards, taken one by one and summed over all shards in one order."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import nn

from launcher.config import CfgNode
from launcher.data.order import keys
from launcher.data.plan import Plan
from launcher.edges.generators import seed_generators
from launcher.edges.model import fill
from launcher.errors import RunError
from launcher.runtime.process import Runtime
from launcher.shards.checks import SPARSE, Watch, many_compilations
from launcher.shards.exchange import Exchange
from launcher.shards.tree import Node, grow, turns

FIRST_USE = 1024  # of `keys`: those below are others'
ALIGNED = 16  # elements between which weights begin in a vector
BUCKET_MB = 25.0


class Shards:
    """What a run with TRAIN.SHARDS knows of itself on a rank. Made by all ranks together."""

    def __init__(
        self, cfg: CfgNode, model: nn.Module, task: Any, plan: Plan, runtime: Runtime
    ) -> None:
        self.count, self.plan, self.runtime = cfg.TRAIN.SHARDS, plan, runtime
        self.model, self.task, self.recorder = model, task, task.recorder
        self.ends = contextlib.ExitStack()
        if cfg.MODEL.COMPILE:
            self.ends.enter_context(many_compilations())
        self.recorder.alike = True
        self.run_seed, self.bucket_mb = cfg.SEED, cfg.DIST.BUCKET_MB or BUCKET_MB
        each = self.count // runtime.world_size
        self.mine = range(runtime.rank * each, (runtime.rank + 1) * each)
        self.exchange = Exchange(runtime, self.count) if runtime.world_size > 1 else None
        # Collectives: where weights are made of random numbers, rank 0's are everybody's.
        fill(model.parameters(), runtime.broadcast_state(list(model.parameters())))

    def seed(self, step: int, phase: int = 0, shard: int = -1) -> None:
        """Seed all generators from (SEED, step, phase, shard), the same on any rank. Shard -1 is
        what comes before a step's first one, `count` what comes after a phase's last."""
        use = FIRST_USE + 1 + phase * (self.count + 1) + shard
        number = int(keys(self.run_seed, step, 1, use)[0])
        seed_generators(number)
        if self.runtime.device.type == "cuda":
            torch.cuda.manual_seed(number >> 1)

    def sums(
        self, weights: Sequence[torch.Tensor], carrier: torch.Tensor, phase: int
    ) -> GradientSums:
        """Of the phase of this number, which trains these weights; see there."""
        return GradientSums(self, weights, carrier, phase)

    def close(self) -> None:
        """End its thread."""
        self.ends.close()
        if self.exchange is not None:
            self.exchange.close()


class Sum:
    """A vector, and its parts as gradients of the weights."""

    def __init__(self, weights: Sequence[torch.Tensor], starts: Sequence[int], length: int) -> None:
        first = weights[0]
        kind = torch.empty(0, dtype=first.dtype).real.dtype
        self.vector = torch.zeros(length, dtype=kind, device=first.device)
        self.parts = [self._part(w, at) for w, at in zip(weights, starts, strict=True)]

    def _part(self, weight: torch.Tensor, at: int) -> torch.Tensor:
        part = self.vector[at : at + numbers(weight)]
        if weight.is_complex():
            part = torch.view_as_complex(part.view(-1, 2))
        # As the weight lies, which fused optimisers go by.
        if torch.empty_like(weight, device="meta").stride() == weight.stride():  # without gaps
            return part.as_strided(weight.shape, weight.stride(), part.storage_offset())
        return part.view(weight.shape)


def numbers(weight: torch.Tensor) -> int:
    return weight.numel() * (2 if weight.is_complex() else 1)


class Bucket:
    """Some weights, whose gradients are summed as one vector.

    Of this rank's shards it keeps one sum for each node of the tree that they have come to so far:
    as many as the tree is deep at most.
    """

    def __init__(self, weights: list[torch.Tensor], shards: int) -> None:
        self.weights, self.shards = weights, shards
        self.starts, self.length = list[int](), 0
        for weight in weights:
            self.starts.append(self.length)
            self.length += -(-numbers(weight) // ALIGNED) * ALIGNED
        self.nodes, self.sums, self.spare = list[Node](), list[Sum](), list[Sum]()
        self.waits_for = set[int]()  # the ids of weights without a gradient so far
        self.done: Future[None] | None = None

    def take(self, shard: int) -> None:
        """Take the weights' gradients, as those of a shard. A weight without one has zeros."""
        summed = grow(self.nodes, shard, self.shards)
        if not summed:
            room = self.spare.pop() if self.spare else Sum(self.weights, self.starts, self.length)
            self.sums.append(room)
        found = [(p, w.grad) for p, w in zip(self.sums[-1].parts, self.weights, strict=True)]
        parts, without = [p for p, g in found if g is not None], [p for p, g in found if g is None]
        grads = [g for _, g in found if g is not None]
        if any(g.layout is not torch.strided for g in grads):
            raise RunError(f"TRAIN.SHARDS: some weights {SPARSE}")
        if summed and grads:  # the sum of its left neighbours is there
            torch._foreach_add_(parts, grads)
        elif grads:
            torch._foreach_copy_(parts, grads)
        for part in without:  # as any sum with zeros: -0.0 becomes 0.0
            part.add_(0.0) if summed else part.zero_()
        for weight in self.weights:
            weight.grad = None
        for _ in range(summed - 1):
            right = self.sums.pop()
            self.sums[-1].vector.add_(right.vector)
            self.spare.append(right)

    def give(self, number: int) -> None:
        """One of its sums becomes the weights' gradients."""
        for weight, part in zip(self.weights, self.sums[number].parts, strict=True):
            weight.grad = part
        self.spare += self.sums  # that one too: gradients are gone when the next step begins
        self.nodes, self.sums, self.done = [], [], None


class GradientSums:
    """Those of one phase: `rounds` goes through a step's micro-batches, and leaves the gradients of
    the global batch.

    Buckets are exchanged while the last shard's backward pass goes on, in the order in which that
    is likely to come to them, as DDP does.
    """

    def __init__(
        self, shards: Shards, weights: Sequence[torch.Tensor], carrier: torch.Tensor, phase: int
    ) -> None:
        """`carrier` is one more weight, whose gradient is complete when all others are; `phase` the
        number of this one."""
        self.shards, self.weights, self.phase = shards, weights, phase
        self.watch = Watch(shards.model, shards.task, shards.runtime)
        # How many shards have given each weight a gradient.
        self.used = nn.Parameter(torch.zeros(len(weights), device=carrier.device))
        self.all = torch.ones_like(self.used, requires_grad=False)
        order = [*reversed(weights), carrier, self.used]
        self.buckets = [Bucket(one, shards.count) for one in cut(order, shards.bucket_mb)]
        self.of = {id(w): i for i, bucket in enumerate(self.buckets) for w in bucket.weights}
        self.handed = 0  # how many buckets of the last shard are taken, and on their way
        self.without = set[int]()  # the ids of weights that had no gradient in the shard at hand
        self.again = False  # whether a weight that was taken got another gradient

    def rounds(self, count: int, step: int) -> Iterator[tuple[int, int]]:
        """-1 and the samples of each micro-batch that this rank has of a global batch of `count`;
        its caller goes forward and backward before it asks for the next. Collectives, at the end.
        """
        shards, unused = self.shards, set(map(id, self.weights))
        self.handed, self.again = 0, False
        shards.recorder.alike = False
        with self.watch():
            for shard in shards.mine:
                shards.seed(step, self.phase, shard)
                yield from self._shard(shard, [b - a for a, b in shards.plan.cuts(count, shard)])
                unused &= self.without
        if self.again:
            raise RunError(
                "a weight got another gradient after its gradient was complete: parts of the model "
                "go through the backward pass twice, as with torch.utils.checkpoint and "
                "use_reentrant=True. Set that False, for TRAIN.SHARDS."
            )
        shards.recorder.alike = True
        self._settle(unused)
        shards.seed(step, self.phase, shards.count)  # what the update draws

    def _shard(self, shard: int, sizes: list[int]) -> Iterator[tuple[int, int]]:
        self.without.clear()
        for i, samples in enumerate(sizes):
            last = shard == self.shards.mine[-1] and i == len(sizes) - 1
            begun = self.watch.collectives()
            with self._watching(shard if last else None):
                yield -1, samples
            self.watch.check_collectives(begun)
        for bucket in self.buckets[self.handed :]:
            self._take(bucket, shard)

    def _take(self, bucket: Bucket, shard: int) -> None:
        self.without |= {id(w) for w in bucket.weights if w.grad is None}
        if bucket is self.buckets[-1]:
            flags = [float(id(w) not in self.without) for w in self.weights]
            self.used.grad = self.all
            if not all(flags):
                self.used.grad = torch.tensor(flags, device=self.used.device)
        bucket.take(shard)
        if self.shards.exchange is not None and shard == self.shards.mine[-1]:
            bucket.done = self.shards.exchange.sum([one.vector for one in bucket.sums])
            self.handed += 1

    @contextlib.contextmanager
    def _watching(self, last: int | None) -> Iterator[None]:
        """Around a backward pass; that of the `last` shard's takes buckets as they are complete,
        but for the last one, which has what is known at the end."""
        early = self.buckets[:-1] if last is not None and self.shards.exchange else []
        for bucket in early:
            bucket.waits_for = set(map(id, bucket.weights))
        complete = set[int]()

        def one_more(weight: torch.Tensor) -> None:
            number = self.of[id(weight)]
            self.again |= id(weight) in complete or number < self.handed
            complete.add(id(weight))
            self.buckets[number].waits_for.discard(id(weight))
            while last is not None and self.handed < len(early):
                if early[self.handed].waits_for:
                    break
                self._take(early[self.handed], last)

        watched = self.weights if self.watch.first else [w for one in early for w in one.weights]
        handles = [w.register_post_accumulate_grad_hook(one_more) for w in watched]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _settle(self, unused: set[int]) -> None:
        """The sums over all shards become the gradients; None for weights that no shard used, of
        which those `unused` here may be some."""
        shards = self.shards
        for bucket in self.buckets:
            number = 0
            if shards.exchange is not None:
                assert bucket.done is not None
                shards.exchange.settle(bucket.done)
                world = shards.count, shards.runtime.world_size, bucket.length
                number = turns(*world, shards.runtime.rank)[1]
            bucket.give(number)
        if unused:  # reading the sum waits for the device
            assert self.used.grad is not None
            for weight, shards_that in zip(self.weights, self.used.grad.tolist(), strict=True):
                if not shards_that:
                    weight.grad = None


def cut(weights: Sequence[torch.Tensor], megabytes: float) -> list[list[torch.Tensor]]:
    """The weights in their order, as buckets of one type and of about so many megabytes; those of
    the last one's type at the end."""
    kinds = dict.fromkeys(w.dtype for w in weights)
    kinds.pop(weights[-1].dtype)
    buckets = []
    for kind in [*kinds, weights[-1].dtype]:
        bucket, size = list[torch.Tensor](), 0
        for weight in (w for w in weights if w.dtype == kind):
            if size >= megabytes * 2**20:
                buckets.append(bucket)
                bucket, size = [], 0
            bucket.append(weight)
            size += weight.nbytes
        buckets.append(bucket)
    return buckets
