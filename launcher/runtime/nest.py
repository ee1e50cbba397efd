"""One walk over nests of values, as batches and states are."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, MutableMapping
from typing import Any

import torch


def map_tensors(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """The same nest with `change(tensor)` in the place of every tensor, in one fixed order.

    Walks mappings, lists, (named) tuples and data classes, whose classes are kept; anything else is
    left as it is. The nest that is given is not changed. (torch's tree_map takes the children of
    dict, list and tuple that it was not told of for leaves.)
    """
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, MutableMapping):
        changed: Any = copy.copy(value)  # a defaultdict stays one
        for key, item in value.items():
            changed[key] = map_tensors(item, change)
        return changed
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, change) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)([map_tensors(item, change) for item in value])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = copy.copy(value)
        for field in dataclasses.fields(value):
            item = map_tensors(getattr(value, field.name), change)
            object.__setattr__(changed, field.name, item)  # a frozen one too
        return changed
    return value
