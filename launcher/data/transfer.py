"""Moving batches to the device, whatever their shape."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch


def map_tensors(batch: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """The same nesting of dicts, lists and (named) tuples with every tensor changed; anything else
    is left as it is."""
    if isinstance(batch, torch.Tensor):
        return change(batch)
    if isinstance(batch, dict):
        changed = copy.copy(batch)  # a defaultdict stays one
        changed.update({key: map_tensors(value, change) for key, value in batch.items()})
        return changed
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(value, change) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)([map_tensors(value, change) for value in batch])
    return batch


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor on `device`. Copies from pinned memory do not wait for it."""
    return map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))


def nbytes(batch: Any) -> int:
    """Bytes of all tensors in a batch."""
    total = 0

    def count(tensor: torch.Tensor) -> None:
        nonlocal total
        total += tensor.nbytes

    map_tensors(batch, count)
    return total


def on_device(batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """The batches on the device; on CUDA copied on a stream of their own, one batch ahead, so that
    the copy of the next batch runs beside the computation on this one."""
    if device.type != "cuda":
        yield from (to_device(batch, device) for batch in batches)
        return
    side = torch.cuda.Stream(device)
    ahead: list[Any] = []
    for batch in batches:
        with torch.cuda.stream(side):
            moved = to_device(batch, device)
            copied = torch.cuda.Event()
            copied.record(side)
        if ahead:
            yield _ready(ahead.pop(), device)
        ahead.append((moved, copied))
    if ahead:
        yield _ready(ahead.pop(), device)


def _ready(ahead: tuple[Any, torch.cuda.Event], device: torch.device) -> Any:
    batch, copied = ahead
    current = torch.cuda.current_stream(device)
    # The device, not the host, waits for the copy.
    current.wait_event(copied)
    # The allocator must not hand this memory to the side stream while the current one uses it.
    map_tensors(batch, lambda tensor: tensor.record_stream(current))
    return batch
