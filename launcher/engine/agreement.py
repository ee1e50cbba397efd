"""How ranks agree on a step without a collective of their own.

Requests (a rank was told to stop; rank 0's clock says a checkpoint is due) ride as the gradient of
one small parameter in DDP's own all-reduce: what a rank asks for in step k, every rank sees after
step k, the same on all of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import nn

from launcher.guard.stop import LAG

# The last is no request: a loss or gradient was not finite on some rank (DEBUG.NONFINITE).
REQUESTS = ("stop", "finish", "record", "evaluate", "checkpoint", "nonfinite")
NONFINITE = REQUESTS.index("nonfinite")
# Two more passengers: whether the task weighs its batches, and the weight of the global batch.
WEIGHTED, WEIGHT = len(REQUESTS), len(REQUESTS) + 1


# An answer not read yet: a copy on its way to the host, or names.
Answer = tuple[torch.Tensor, torch.cuda.Event] | Sequence[str]


class Agreement:
    """The carrier of the requests and the reader of the answers, on one rank."""

    def __init__(
        self, device: torch.device, world_size: int, pending: deque[Answer], alone: bool = False
    ) -> None:
        """`pending` are the answers on their way, oldest first: those of all phases, and at first
        what `on_their_way` of an attempt before gave. `alone`: a process without a group."""
        self.carrier = nn.Parameter(torch.zeros(len(REQUESTS) + 2, device=device))
        self.world_size, self.alone, self._pending = world_size, alone, pending
        self._nothing = torch.zeros_like(self.carrier, requires_grad=False)

    def say(
        self,
        requests: frozenset[str],
        weight: torch.Tensor | float,
        weighted: bool,
        watched: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The carrier, and as its gradient what this rank has to say; also whether `watched`, of
        shape (), is finite. A process alone says it to itself: None."""
        passengers = self._nothing
        if requests or weighted or watched is not None:
            passengers = torch.zeros_like(self._nothing)
            for name in requests:
                passengers[REQUESTS.index(name)] = 1.0
            if weighted:
                passengers[WEIGHTED], passengers[WEIGHT] = 1.0, weight
            if watched is not None:
                passengers[NONFINITE] = ~watched.detach().isfinite()  # on the device
        elif self.alone:
            return None
        if not self.alone:
            # No leaf, for DDP looks for unused weights from what has a graph.
            return self.carrier.view_as(self.carrier), passengers
        before = self.carrier.grad
        self.carrier.grad = passengers if before is None else before + passengers
        return None

    @property
    def total_weight(self) -> torch.Tensor:
        """The global batch's weight, on the device (DDP averages over ranks)."""
        assert self.carrier.grad is not None
        return self.carrier.grad[WEIGHT] * self.world_size

    def any_weighted(self) -> bool:
        """Whether any rank's task weighs this batch. Waits for the device."""
        assert self.carrier.grad is not None
        return bool(self.carrier.grad[WEIGHTED].item() > 0)

    def watch(self, norm: torch.Tensor) -> None:
        """Say whether the norm of the gradients, the same on all ranks, is finite."""
        assert self.carrier.grad is not None  # whoever watches has watched the loss
        self.carrier.grad[NONFINITE] += ~norm.isfinite()

    def seen(self) -> frozenset[str]:
        """The requests that every rank sees after this step; call it once a step."""
        grad = self.carrier.grad
        if not self.carrier.is_cuda:
            return _names(grad) if grad is not None else frozenset()
        if grad is not None:
            host = torch.empty(grad.shape, pin_memory=True)
            host.copy_(grad, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        self._pending.append((host, done) if grad is not None else [])
        if len(self._pending) <= LAG:
            return frozenset()
        # LAG steps old: waits only where the host is that far ahead.
        return _read(self._pending.popleft())

    def on_their_way(self) -> list[list[str]]:
        """What is agreed and not seen yet, step by step, so that a resumed run sees it at the same
        step; stop requests are for this attempt alone. Waits for the device."""
        return [sorted(_read(answer) - {"stop"}) for answer in self._pending]


def _read(answer: Answer) -> frozenset[str]:
    if isinstance(answer, tuple):
        host, done = answer
        done.synchronize()
        return _names(host)
    return frozenset(answer)


def _names(answer: torch.Tensor) -> frozenset[str]:
    values = answer.tolist()
    return frozenset(name for name, value in zip(REQUESTS, values, strict=False) if value > 0)
