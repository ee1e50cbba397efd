"""What a checkpoint may hold: what comes back from a file with nothing executed."""

from __future__ import annotations

import enum
from collections import OrderedDict, defaultdict
from typing import Any

import numpy as np
import pytest
import torch

from launcher.checkpoint.saver import Saver
from launcher.edges.state import check, kinds, plain
from launcher.errors import RunError


class Mode(enum.IntEnum):
    ON = 1


def test_numpy_becomes_plain_and_the_rest_stays() -> None:
    kept = torch.ones(2)
    state = {"a": np.float64(0.5), "b": [np.int8(3), (np.bool_(True), "x")], np.int64(4): kept}
    found = plain({**state, "c": np.arange(3), "d": OrderedDict(e=np.float32(2))})
    assert type(found["a"]) is float and found["b"] == [3, (True, "x")] and found[4] is kept
    assert torch.equal(found["c"], torch.arange(3)) and type(found["d"]) is OrderedDict
    check(found)


@pytest.mark.parametrize(
    ("value", "path", "kind"),
    [
        (Mode.ON, "x/0/y", "Mode"),
        (len, "x/0/y", "builtin_function_or_method"),
        (lambda: 1, "x/0/y", "function"),
        (defaultdict(lambda: 0), "x/0/y", "defaultdict"),
        ({"z": range(3)}, "x/0/y/z", "range"),
        (np.array(["text"]), "x/0/y", "numpy.ndarray"),
    ],
)
def test_what_does_not_come_back_is_told_with_its_path(value: Any, path: str, kind: str) -> None:
    with pytest.raises(RunError, match=rf"^{path} is a .*{kind}: it could be saved, but not"):
        check({"fine": 1, "x": [{"y": value}]})


def test_a_new_kind_of_state_is_another_and_new_numbers_are_not() -> None:
    state = {"a": [1, torch.ones(2)], "b": "x"}
    assert kinds(state) == kinds({"a": [7, torch.zeros(3)], "b": "y"})
    others: list[Any] = [{**state, "b": None}, {**state, "c": 1}, {"a": [1], "b": "x"}]
    assert kinds(state) not in map(kinds, others)


def test_what_joins_the_state_later_is_refused_at_its_first_save() -> None:
    """And a kind that is known is not looked at again."""
    saved: list[Any] = []
    store: Any = type("Store", (), {"commit": lambda self, state, manifest: saved.append(state)})()
    saver = Saver(store, lambda *_: None)
    saver.save({"a": np.float32(1.5)}, {"step": 1})
    saver.wait()
    assert saved == [{"a": 1.5}] and type(saved[0]["a"]) is float
    with pytest.raises(RunError, match=r"^a is a .*Mode"):
        saver.save({"a": Mode.ON}, {"step": 2})
    saver.close()
