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


ONES = torch.ones(2)
NESTS = [
    ONES,
    {"a": ONES, "b": {"c": [ONES, "name"]}},
    [ONES, (ONES, [ONES])],
    (ONES, None),
    Pair(ONES, Pair(3, ONES)),
    OrderedDict(b=ONES, a=ONES),
    defaultdict(list, x=ONES),
    Named(a=ONES),
    UserDict({"a": [ONES]}),
    Frozen({"a": ONES}),
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
