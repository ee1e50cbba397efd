"""Moving a batch to the device keeps its nesting. "meta" is the other device of a CPU machine."""

from collections import OrderedDict, defaultdict
from typing import Any, NamedTuple

import pytest
import torch

from launcher.data.transfer import to_device

META = torch.device("meta")


class Pair(NamedTuple):
    image: Any
    label: Any


def defaults() -> Any:
    made: defaultdict[str, Any] = defaultdict(list)
    made["x"] = torch.ones(1)
    return made


def ones() -> torch.Tensor:
    return torch.ones(2)


@pytest.mark.parametrize(
    "batch",
    [
        ones(),
        {"a": ones(), "b": {"c": [ones(), "name"]}},
        [ones(), (ones(), [ones()])],
        (ones(), None),
        Pair(ones(), Pair(3, ones())),
        OrderedDict(b=ones(), a=ones()),
        defaults(),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_nesting_is_kept_and_every_tensor_moves(batch: Any) -> None:
    assert same_shape(batch, to_device(batch, META)) > 0


def same_shape(a: Any, b: Any) -> int:
    """Compare two nestings and count the tensors that moved."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert b.device == META and a.shape == b.shape
        return 1
    if isinstance(a, dict):
        assert list(a) == list(b)
        return sum(same_shape(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return sum(same_shape(x, y) for x, y in zip(a, b, strict=True))
    assert a is b
    return 0


@pytest.mark.parametrize("other", ["text", 3, None, b"bytes"], ids=repr)
def test_anything_else_is_left_as_it_is(other: Any) -> None:
    assert to_device(other, META) is other
