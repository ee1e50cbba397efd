"""A walk over a nest keeps its classes."""

import dataclasses
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from launcher.runtime.nest import map_tensors


class Pair(NamedTuple):
    image: Any
    label: Any


@dataclasses.dataclass(frozen=True)
class Frozen:
    image: Any
    name: str = "frozen"


class Named(dict):
    """Not known to torch's own tree_map."""


# Nests around anything.
NESTS: list[Callable[[Any], Any]] = [
    lambda x: x,
    lambda x: {"a": x, "b": {"c": [x, "name"]}},
    lambda x: [x, (x, [x])],
    lambda x: (x, None),
    lambda x: Pair(x, Pair(3, x)),
    lambda x: OrderedDict(b=x, a=x),
    lambda x: defaultdict(list, x=x),
    lambda x: Named(a=x),
    lambda x: UserDict({"a": [x]}),
    lambda x: Frozen({"a": x}),
]


@pytest.mark.parametrize("nest", NESTS, ids=lambda nest: type(nest(0)).__name__)
def test_nesting_is_kept_and_every_tensor_is_changed(nest: Callable[[Any], Any]) -> None:
    given = nest(torch.ones(2))
    before = repr(given)
    found, expected = map_tensors(given, lambda tensor: tensor.tolist()), nest([1.0, 1.0])
    assert type(found) is type(expected) and repr(found) == repr(expected)
    assert repr(given) == before  # not changed in place


@pytest.mark.parametrize("other", ["text", 3, None, b"bytes", Frozen], ids=repr)
def test_anything_else_is_left_as_it_is(other: Any) -> None:
    assert map_tensors(other, lambda tensor: None) is other
