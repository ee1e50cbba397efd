"""Moving batches to the device, whatever their shape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from launcher.runtime.nest import map_tensors


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor on `device`. Copies from pinned memory do not wait for it."""
    return map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))


def nbytes(batch: Any) -> int:
    """Bytes of all tensors in a batch."""
    sizes: list[int] = []
    map_tensors(batch, lambda tensor: sizes.append(tensor.nbytes))
    return sum(sizes)


def on_device(batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """The batches on the device; on CUDA copied on a stream of their own, one batch ahead, so that
    the copy of the next batch runs beside the computation on this one."""
    if device.type != "cuda":
        yield from (to_device(batch, device) for batch in batches)
        return
    side = torch.cuda.Stream(device)
    ahead: list[tuple[Any, torch.cuda.Event]] = []
    for batch in batches:
        with torch.cuda.stream(side):
            ahead.append((to_device(batch, device), side.record_event()))
        if len(ahead) > 1:
            yield _ready(*ahead.pop(0), device)
    for last in ahead:
        yield _ready(*last, device)


def _ready(batch: Any, copied: torch.cuda.Event, device: torch.device) -> Any:
    current = torch.cuda.current_stream(device)
    # The device, not the host, waits for the copy.
    current.wait_event(copied)
    # The allocator must not hand this memory to the side stream while the current one uses it.
    map_tensors(batch, lambda tensor: tensor.record_stream(current))
    return batch
