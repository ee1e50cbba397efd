"""Names in a file tell, without loading it, what torch's loading refuses."""

import collections
import datetime
import enum
import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from launcher.edges.pickled import strangers


class Colour(enum.Enum):
    RED = 1


class Pair(NamedTuple):
    a: int
    b: int


VALUES: dict[str, Any] = {
    "numpy scalar": np.float64(1),
    "numpy array": np.ones(3),
    "enum": Colour.RED,
    "named tuple": Pair(1, 2),
    "function": len,
    "partial": functools.partial(max, 1),
    "module": nn.Linear(2, 2),
    "path": Path("/tmp"),
    "class": Colour,
    "default dict": collections.defaultdict(dict, a={}),
    "deque": collections.deque([1]),
    "frozen set": frozenset([1]),
    "slice": slice(1, 2),
    "range": range(3),
    "time": datetime.datetime.now(),
    "byte array": bytearray(b"x"),
    "plain": {"a": [1, 2.5, "b", None, True, (3, 4j)], 5: {1, 2}},
    "counter": collections.Counter("aab"),
    "ordered": collections.OrderedDict(a=1),
    "bytes": b"\xff\x00" * 10,
    "parameter": nn.Parameter(torch.ones(2)),
    "module's state": nn.BatchNorm1d(3).state_dict(),
    "sparse": torch.eye(3).to_sparse(),
    "csr": torch.eye(3).to_sparse_csr(),
    "quantised": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "complex": torch.ones(2, dtype=torch.complex64),
    "bfloat16": torch.ones(2, dtype=torch.bfloat16),
    "size": torch.ones(2, 3).shape,
    "dtype": torch.float16,
    "device": torch.device("cpu"),
    "view": torch.ones(4, 4)[:, 1],
}


@pytest.mark.parametrize("name", VALUES)
def test_what_is_named_is_what_cannot_be_loaded(name: str, tmp_path: Path) -> None:
    torch.save({"some": [VALUES[name]]}, tmp_path / "state.pt")
    try:
        torch.load(tmp_path / "state.pt", weights_only=True)
        loads = True
    except Exception:
        loads = False
    assert (strangers(tmp_path / "state.pt") == []) is loads
