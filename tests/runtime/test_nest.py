"""A walk over a nest keeps its classes. "meta" is the other device of a CPU machine."""

import dataclasses
from collections import OrderedDict, UserDict, defaultdict
from typing import Any, NamedTuple

import pytest
import torch

from launcher.runtime.nest import map_tensors

META = torch.device("meta")


class Pair(NamedTuple):
    image: Any
    label: Any


@dataclasses.dataclass(frozen=True)
class Frozen:
    image: Any
    name: str = "frozen"


class Named(dict):
    """Not known to torch's own tree_map."""


def defaults() -> Any:
    made: defaultdict[str, Any] = defaultdict(list)
    made["x"] = torch.ones(1)
    return made


def ones() -> torch.Tensor:
    return torch.ones(2)


NESTS = [
    ones(),
    {"a": ones(), "b": {"c": [ones(), "name"]}},
    [ones(), (ones(), [ones()])],
    (ones(), None),
    Pair(ones(), Pair(3, ones())),
    OrderedDict(b=ones(), a=ones()),
    defaults(),
    Named(a=ones()),
    UserDict({"a": [ones()]}),
    Frozen({"a": ones()}),
]


@pytest.mark.parametrize("nest", NESTS, ids=lambda nest: type(nest).__name__)
def test_nesting_is_kept_and_every_tensor_moves(nest: Any) -> None:
    moved = same_shape(nest, map_tensors(nest, lambda tensor: tensor.to(META)))
    assert moved > 0
    seen: list[torch.Tensor] = []
    map_tensors(nest, seen.append)
    assert len(seen) == moved and {t.device.type for t in seen} == {"cpu"}  # not changed in place


def same_shape(a: Any, b: Any) -> int:
    """Compare two nestings and count the tensors that moved."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert b.device == META and a.shape == b.shape
        return 1
    if dataclasses.is_dataclass(a):
        return same_shape(vars(a), vars(b))
    if isinstance(a, (dict, UserDict)):
        assert list(a) == list(b)
        return sum(same_shape(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return sum(same_shape(x, y) for x, y in zip(a, b, strict=True))
    assert a is b
    return 0


@pytest.mark.parametrize("other", ["text", 3, None, b"bytes", Frozen], ids=repr)
def test_anything_else_is_left_as_it_is(other: Any) -> None:
    assert map_tensors(other, lambda tensor: None) is other
