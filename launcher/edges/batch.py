"""Batches of any class: one walk over nests of values, as batches and states are."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch.utils.data import default_collate
from torch.utils.data._utils.collate import collate_tensor_fn, default_collate_fn_map

from launcher.errors import RunError

# Of these nothing could change; some are sequences, but no nests.
LEAVES = (str, bytes, bytearray, memoryview, range, int, float, type(None))


def map_tensors(
    value: Any,
    change: Callable[[Any], Any],
    method: str = "",
    other: Callable[[Any], Any] = lambda value: value,
) -> Any:
    """The same nest with `change(tensor)` in the place of every tensor, in one fixed order.

    Walks mappings, sequences, (named) tuples and data classes (attrs' too), whose classes are kept.
    What has a `method` of this name is changed as a whole, as a tensor is; anything else becomes
    `other(value)`. The nest that is given is not changed. (torch's tree_map takes the children of
    dict, list and tuple that it was not told of for leaves.)
    """

    def walk(value: Any) -> Any:
        if type(value) is list:  # as most batches are
            return [walk(item) for item in value]
        if isinstance(value, LEAVES):
            return value
        if isinstance(value, torch.Tensor) or callable(getattr(type(value), method, None)):
            return change(value)
        if isinstance(value, tuple):
            return _tuple(value, [walk(item) for item in value])
        if isinstance(value, (dict, list)):
            made: Any = copy.copy(value)  # a defaultdict stays one
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                made[key] = walk(item)
            return made
        if isinstance(value, MappingProxyType):
            return MappingProxyType(walk(dict(value)))
        items = {id(item): walk(item) for item in _items(value)}
        # Whatever holds the items is copied along, with the changed ones in their place.
        return copy.deepcopy(value, items) if items else other(value)

    return walk(value)


def _tuple(value: Any, items: list[Any]) -> Any:
    try:
        # Not by the class, which may take other arguments.
        changed = tuple.__new__(type(value), items)
    except TypeError:  # one of C's, as torch.max returns
        return type(value)(items)
    if getattr(value, "__dict__", None):
        vars(changed).update(vars(value))
    return changed


def _items(value: Any) -> list[Any]:
    """What another mapping or sequence, or a data class, consists of."""
    if isinstance(value, Mapping):
        return [*value, *value.values()]
    if isinstance(value, Sequence):
        return list(value)
    data = dataclasses.is_dataclass(type(value))
    fields = dataclasses.fields(value) if data else getattr(type(value), "__attrs_attrs__", ())
    names = [field.name for field in fields]
    names += [name for name in getattr(value, "__dict__", ()) if names and name not in names]
    return [getattr(value, name) for name in names if hasattr(value, name)]


def on_cpu(nest: Any) -> Any:
    """The nest with its tensors on the CPU, without their graphs."""
    return map_tensors(nest, lambda tensor: tensor.detach().cpu())


def is_dense(value: Any) -> bool:
    """Whether this is a tensor that is no more than its numbers: neither sparse nor quantised."""
    if not isinstance(value, torch.Tensor):
        return False
    return value.layout is torch.strided and not value.is_quantized


def nbytes(batch: Any) -> int:
    """Bytes of all tensors in a batch, of any class that can be pickled."""
    found: dict[int, torch.Tensor] = {}

    class Finder(pickle.Pickler):
        def persistent_id(self, value: Any) -> int | None:
            if not isinstance(value, torch.Tensor) or value.is_nested or value.is_sparse:
                return None  # those that it consists of are found
            return id(found.setdefault(id(value), value))

    with contextlib.suppress(Exception):
        Finder(io.BytesIO(), pickle.HIGHEST_PROTOCOL).dump(batch)
    return sum(tensor.numel() * tensor.element_size() for tensor in found.values())


def pinned(batch: Any) -> Any:
    """The batch in page-locked memory, by its own `pin_memory` where it has one."""
    return map_tensors(batch, lambda part: part.pin_memory(), "pin_memory")


def mover(device: torch.device) -> Callable[[Any], Any]:
    """A function that gives a batch on the device, moved by its own `.to` where it has one.

    It raises RunError for what holds tensors and cannot be moved; on the CPU that is left alone.
    """
    options: dict[type, dict[str, bool]] = {}  # of the `.to` of each class
    plain: set[type] = set()  # classes whose objects hold no tensors

    def move(part: Any) -> Any:
        if isinstance(part, torch.Tensor):
            return part.to(device, non_blocking=True)  # from pinned memory it waits for nothing
        if (kind := type(part)) not in options:
            options[kind] = {}
            with contextlib.suppress(TypeError, ValueError):  # it takes none, or does not tell
                inspect.signature(kind.to).bind(part, device, non_blocking=True)
                options[kind] = {"non_blocking": True}
        moved = part.to(device, **options[kind])
        return part if moved is None else moved  # in place

    def leave(part: Any) -> Any:
        if device.type != "cpu" and (kind := type(part)) not in plain:
            if nbytes(part):
                raise RunError(
                    f"a batch holds tensors in a {kind.__name__}, which cannot be moved to "
                    f"{device}: give the class a method to(device), or return a dict of them."
                )
            plain.add(kind)
        return part

    def moved(batch: Any) -> Any:
        here = device.type == "cpu" and type(batch) is list  # as most are
        if here and all(type(part) is torch.Tensor and part.is_cpu for part in batch):
            return batch
        return map_tensors(batch, move, "to", leave)

    return moved


# What default_collate does by the class of a sample, which anybody may change; None where somebody
# had told it another way for plain tensors or tuples.
KNOWN = default_collate_fn_map.get(torch.Tensor) is collate_tensor_fn and not any(
    issubclass(tuple, kind) for kind in default_collate_fn_map
)
USUAL = dict(default_collate_fn_map) if KNOWN else None


def stacked(samples: list[Any]) -> Any:
    """torch's default_collate. Tuples of plain tensors, as most samples are, are put together in
    three quarters of its time, but in a loader worker, where it saves a copy."""
    first = samples[0]
    if (
        type(first) is tuple
        and all(type(p) is torch.Tensor and is_dense(p) and not p.is_nested for p in first)
        and torch.utils.data.get_worker_info() is None
        and default_collate_fn_map == USUAL
    ):
        with contextlib.suppress(ValueError):  # of another length: it says so
            return [torch.stack(parts) for parts in zip(*samples, strict=True)]
    return default_collate(samples)
