"""All ranks' rows as one tensor, for losses that compare the samples of all ranks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from launcher.edges.batch import is_dense
from launcher.errors import RunError
from launcher.runtime.process import Runtime

HEADER_BYTES, MOST_DIMS = 256, 9
FORWARD, BACKWARD = "gathers", "sums the gradients of"
DONE, IDLE = "has ended its micro-batch", "has no micro-batch"


class Header(NamedTuple):
    """What a rank tells all others before each exchange."""

    kind: str
    rows: int = 0
    wants: bool = False  # a gradient for its own rows
    dtype: str = ""
    shape: Sequence[int] = ()  # of a row
    grad: bool = True  # whether autograd records

    @classmethod
    def of(cls, kind: str, tensor: torch.Tensor) -> Header:
        grad, dtype = torch.is_grad_enabled(), str(tensor.dtype).removeprefix("torch.")
        wants = grad and tensor.requires_grad
        return cls(kind, len(tensor), wants, dtype, tensor.shape[1:], grad)

    def __str__(self) -> str:
        how = ", without gradients" if self.kind == FORWARD and not self.grad else ""
        of = f" rows of {self.dtype}, each of shape {tuple(self.shape)}" if self.dtype else ""
        return f"{self.kind}{of}{how}"


class Gather:
    """A task's `self.gather`: (n, *shape) on each rank -> the rows of all, in rank order.

    n may differ between ranks, and be 0. The gradient is exact: of the sum of all ranks' losses.
    Raises RunError where ranks' rows do not fit together, and while `evaluates()`: batches are
    dealt out then, and ranks have different numbers. No other process may call it.

    A rank without a micro-batch follows, in `end_round`, the headers that come before each exchange
    of the others. All have a process group of their own, made by the first gather: on the default
    one DDP's all-reduces are under way in a backward pass, and ranks might mix the two differently.
    """

    def __init__(self, runtime: Runtime, evaluates: Callable[[], bool] = lambda: False) -> None:
        self.runtime, self.evaluates, self.pid = runtime, evaluates, os.getpid()
        self.refused = ""  # why, where it is
        self.begun = 0  # collectives, on either group
        self._group: dist.ProcessGroup | None = None  # None: the default one
        self._last: torch.Tensor | None = None  # 0, through all gathers since `begin`

    def __reduce__(self) -> Any:
        return partial, (_refuse, "in another process")  # with a task, to a spawned loader worker

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        if os.getpid() != self.pid:
            _refuse("in another process")
        if self.refused:
            raise RunError(self.refused)
        if self.evaluates():
            _refuse("in an evaluation: return values of each sample from eval_step instead")
        here = self.runtime.device
        if not is_dense(tensor) or tensor.device != here or not 1 <= tensor.dim() <= MOST_DIMS:
            given = getattr(tensor, "shape", None), getattr(tensor, "device", None)
            _refuse(
                f"with a {type(tensor).__name__} (shape {given[0]}, on {given[1]}): give it dense "
                f"rows, of shape (n, ...), on {here}"
            )
        if self.runtime.world_size == 1:
            return tensor
        headers = self._tell(Header.of(FORWARD, tensor))
        counts = [header.rows for header in headers]
        if not any(header.wants for header in headers):
            return self._rows(tensor.detach(), counts)
        if not tensor.requires_grad:  # this rank's loss still has a say in the others' gradients
            tensor = tensor.detach().requires_grad_()
        rows, self._last = _Rows.apply(self, counts, tensor, self._last)
        return rows

    def begin(self) -> None:
        """A micro-batch begins; its backward pass has to do with no gather before it."""
        self._last = None

    def tie(self, loss: torch.Tensor) -> torch.Tensor:
        """The same loss, whose backward pass goes through all gathers since `begin`, newest first:
        alike on all ranks, whatever each has used of them."""
        return loss if self._last is None else loss + self._last

    def end_round(self, idle: bool) -> None:
        """End a micro-batch that only some ranks have; an idle one takes part, with no rows, in all
        that the others gather. Every rank calls it, after its backward pass."""
        while True:
            headers = self._tell(Header(IDLE if idle else DONE))
            told = next(header for header in headers if header.kind != IDLE)
            if told.kind == DONE:
                return
            size = 0 if told.kind == FORWARD else told.rows, *told.shape
            nothing = torch.zeros(
                size, dtype=getattr(torch, told.dtype), device=self.runtime.device
            )
            if told.kind == FORWARD:
                self._rows(nothing, [header.rows for header in headers])
            else:
                self._sum(nothing)

    def _tell(self, mine: Header) -> list[Header]:
        """All ranks' headers. A collective, which the host waits for: by way of the hosts alone,
        but before the first gather, when there is the device's group only."""
        device = self.runtime.device if self._group is None else "cpu"
        words = json.dumps(mine).encode().ljust(HEADER_BYTES)
        sent = torch.frombuffer(bytearray(words), dtype=torch.uint8).to(device)
        received = [torch.empty_like(sent) for _ in range(self.runtime.world_size)]
        self._count()
        dist.all_gather(received, sent, group=self._group)
        headers = [Header(*json.loads(words.cpu().numpy().tobytes())) for words in received]
        found: dict[str, list[int]] = {}
        for rank, header in enumerate(headers):
            if header.kind != IDLE:
                found.setdefault(str(header), []).append(rank)
        if len(found) > 1:
            told = "; ".join(f"ranks {ranks}: {what}" for what, ranks in found.items())
            raise RunError(f"Task.gather is to be called alike on all ranks, but: {told}")
        return headers

    def _rows(self, mine: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Rows of all ranks, of which each has so many; each sends as many as the most."""
        if self._group is None:
            self._group = self._own_group()
        sent = mine.new_zeros((max(counts), *mine.shape[1:]))
        sent[: len(mine)] = mine
        received = [torch.empty_like(sent) for _ in counts]
        if sent.numel():  # on all ranks or none
            self._count()
            # A collective: as bytes, for backends do not know every type.
            parts = [part.flatten().view(torch.uint8) for part in received]
            dist.all_gather(parts, sent.flatten().view(torch.uint8), group=self._group)
        return torch.cat([part[:n] for part, n in zip(received, counts, strict=True)])

    def _sum(self, gradient: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks; that of half precision is rounded once."""
        half = gradient.dtype in (torch.float16, torch.bfloat16)
        total = torch.empty_like(gradient, memory_format=torch.contiguous_format)
        total = (total.float() if half else total).copy_(gradient)
        if total.numel():
            self._count()
            dist.all_reduce(total, group=self._group)  # a collective
        return total.to(gradient.dtype)

    def _own_group(self) -> dist.ProcessGroup:
        """A collective on the default group."""
        backend: str = dist.get_backend()
        if self.runtime.device.type == "cuda":
            backend = f"cpu:gloo,cuda:{backend}"  # headers go between hosts
        return dist.new_group(timeout=self.runtime.timeout, backend=backend)

    def _count(self) -> None:
        self.begun += 1
        self.runtime.beside.begun += self._group is not None


class _Rows(torch.autograd.Function):
    """The differentiable gather: (rows of all, 0 by way of this gather and those before)."""

    @staticmethod
    def forward(ctx: Any, gather: Gather, counts: list[int], mine: torch.Tensor, last: Any) -> Any:
        ctx.gather, ctx.counts = gather, counts
        return gather._rows(mine, counts), torch.zeros((), device=mine.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, last: torch.Tensor) -> Any:
        gather, counts = ctx.gather, ctx.counts
        gather._tell(Header.of(BACKWARD, gradient))
        mine = gather._sum(gradient).split(counts)[gather.runtime.rank]
        return None, None, mine, last if ctx.needs_input_grad[3] else None


def _refuse(where: str, tensor: Any = None) -> NoReturn:
    raise RunError(f"Task.gather was called {where}")
