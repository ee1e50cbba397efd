"""Batches of any class: a walk keeps their classes, and "meta" is the other device of a machine
without one."""

import dataclasses
from collections import OrderedDict, UserDict, UserList, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import default_collate
from torch.utils.data._utils.collate import default_collate_fn_map

from launcher.edges.batch import map_tensors, mover, nbytes, pinned, stacked
from launcher.errors import RunError


class Pair(NamedTuple):
    image: Any
    label: Any


@dataclasses.dataclass(frozen=True)
class Frozen:
    image: Any
    name: str = "frozen"


class Named(dict):
    """Not known to torch's own tree_map."""


class ReadOnly(Mapping[str, Any]):
    """No dict, and none of its items can be set."""

    def __init__(self, kept: dict[str, Any]) -> None:
        self.kept = kept

    def __getitem__(self, key: str) -> Any:
        return self.kept[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.kept)

    def __len__(self) -> int:
        return len(self.kept)

    def __repr__(self) -> str:
        return f"ReadOnly({self.kept})"


class Row(Sequence[Any]):
    def __init__(self, *items: Any) -> None:
        self.items = items

    def __getitem__(self, index: Any) -> Any:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)

    def __repr__(self) -> str:
        return f"Row{self.items}"


class Sample(tuple):
    """Made of other arguments than its items."""

    def __new__(cls, image: Any, label: Any) -> "Sample":
        return super().__new__(cls, (image, label))


class Attrs:
    """As attrs' decorator leaves a class with slots."""

    __attrs_attrs__ = (SimpleNamespace(name="image"), SimpleNamespace(name="name"))
    __slots__ = ("image", "name")

    def __init__(self, image: Any, name: str = "attrs") -> None:
        self.image, self.name = image, name

    def __repr__(self) -> str:
        return f"Attrs({self.image}, {self.name})"


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
    lambda x: MappingProxyType({"a": [x]}),
    lambda x: UserList([x, {"a": x}]),
    lambda x: ReadOnly({"a": x, "b": Row(x, "text")}),
    lambda x: Attrs(x),
    lambda x: Sample(x, 3),
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


class Moves:
    """Moved by its own method, as graphs, packed sequences and image lists are."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x, self.pins = x, 0

    def to(self, device: torch.device) -> "Moves":
        return Moves(self.x.to(device))

    def pin_memory(self) -> "Moves":
        self.pins += 1
        return self


class MovesInPlace:
    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def to(self, device: Any, non_blocking: bool = False, **more: Any) -> None:
        self.x, self.without_a_wait = self.x.to(device), non_blocking


class Opaque:
    def __init__(self, x: Any) -> None:
        self.x = x


META = torch.device("meta")


def test_what_moves_itself_does_so_as_a_whole() -> None:
    batch = {"a": Moves(torch.ones(2)), "b": [MovesInPlace(torch.ones(3))], "c": torch.ones(4)}
    moved = mover(META)(batch)
    assert moved["a"].x.is_meta and not batch["a"].x.is_meta
    assert moved["b"][0] is batch["b"][0] and moved["b"][0].x.is_meta
    assert moved["b"][0].without_a_wait and moved["c"].is_meta
    packed = mover(META)(pack_sequence([torch.ones(3), torch.ones(2)]))
    assert type(packed) is PackedSequence and packed.data.is_meta


def test_what_holds_tensors_and_cannot_be_moved_is_refused_by_name() -> None:
    with pytest.raises(RunError, match=r"tensors in a Opaque, .*to meta: .*method to\(device\)"):
        mover(META)({"a": [Opaque({"x": torch.ones(2)})]})
    plain = Opaque("no tensors")
    assert mover(META)([plain])[0] is plain
    there = Opaque(torch.ones(2))
    assert mover(torch.device("cpu"))([there])[0] is there


@pytest.mark.parametrize("nest", [*NESTS, Moves, Opaque], ids=lambda nest: type(nest(0)).__name__)
def test_tensors_are_measured_wherever_they_are(nest: Callable[[Any], Any]) -> None:
    """One tensor counts once, however often it stands in the batch."""
    batch = nest(torch.ones(3, dtype=torch.float64))
    # What cannot be pickled never comes from a worker, and only those are measured.
    assert nbytes(batch) == (0 if isinstance(batch, MappingProxyType) else 24)


def test_sparse_and_nested_tensors_are_measured_by_their_parts() -> None:
    sparse = torch.eye(4).to_sparse()  # 2 x 4 indices of 8 bytes, 4 values of 4
    assert nbytes([sparse]) == 80
    assert nbytes(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])) >= 20


def test_what_pins_itself_does_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self + 1)
    given = Moves(torch.ones(1))
    found = pinned({"a": given, "b": (torch.ones(1),)})
    assert found["a"] is given and given.pins == 1 and found["b"][0].tolist() == [2.0]


def test_a_tuple_of_cs_is_walked() -> None:
    found = map_tensors(torch.max(torch.ones(2, 3), 0), lambda tensor: tensor.shape)
    assert type(found) is torch.return_types.max and found.indices == (3,)


def test_what_a_tuple_holds_beside_its_items_stays() -> None:
    given = Sample(torch.ones(2), 3)
    given.name = "first"  # type: ignore[attr-defined]
    assert map_tensors(given, lambda tensor: tensor * 2).name == "first"


class Marked(torch.Tensor): ...


SAMPLES: dict[str, Callable[[int], Any]] = {
    "tensors": lambda i: (torch.full((2, 3), float(i)), torch.tensor(i)),
    "of other types": lambda i: (torch.tensor([1j * i]), torch.ones(2, dtype=torch.bool)),
    "with a gradient": lambda i: (torch.full((2,), float(i), requires_grad=True),),
    "not contiguous": lambda i: (torch.arange(6.0).reshape(2, 3).t() + i, torch.ones(1).expand(4)),
    "negative by a bit": lambda i: (
        torch.tensor([1 + 1j]).conj(),
        torch.tensor([1j]).imag._neg_view(),
    ),
    "and a number": lambda i: (torch.ones(2), i),
    "a list": lambda i: [torch.ones(2), torch.tensor(i)],
    "nested": lambda i: (torch.ones(2), (torch.tensor(i),)),
    "none": lambda i: (),
    "a class of tensors": lambda i: (torch.ones(2).as_subclass(Marked),),
    "of two shapes": lambda i: (torch.ones(1 + i % 2),),
    "of two lengths": lambda i: (torch.ones(1),) * (1 + i % 2),
    "of two kinds": lambda i: (torch.ones(1) if i != 1 else 1.0,),
    "sparse": lambda i: (torch.ones(2).to_sparse(),),
    "nested tensors": lambda i: (torch.nested.nested_tensor([torch.ones(2)]),),
}


def shown(batch: Any) -> Any:
    if isinstance(batch, torch.Tensor):
        told = type(batch), batch.dtype, batch.is_contiguous(), batch.requires_grad
        return (*told, batch.resolve_neg().resolve_conj().tolist())
    if isinstance(batch, list | tuple):
        return type(batch), [shown(part) for part in batch]
    return batch


@pytest.mark.parametrize("kind", SAMPLES)
def test_samples_are_put_together_as_torch_does(kind: str) -> None:
    samples = [SAMPLES[kind](i) for i in range(3)]
    try:
        theirs = default_collate(samples)
    except Exception as error:
        with pytest.raises(type(error)) as told:
            stacked(samples)
        assert str(told.value) == str(error)
    else:
        assert shown(stacked(samples)) == shown(theirs)


@pytest.mark.parametrize("kind", [torch.Tensor, tuple])
def test_what_somebody_has_told_torch_of_a_class_counts(
    monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    def first(batch: list[Any], *, collate_fn_map: Any = None) -> Any:
        return batch[0]

    monkeypatch.setitem(default_collate_fn_map, kind, first)
    samples = [SAMPLES["tensors"](i) for i in range(3)]
    assert shown(stacked(samples)) == shown(default_collate(samples))
    assert shown(stacked(samples)) != shown(
        [torch.stack(part) for part in zip(*samples, strict=True)]
    )
