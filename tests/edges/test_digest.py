"""The digest tells any two models apart that differ in a bit, and no others."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from launcher.edges import digest as module
from launcher.edges.digest import CHUNK, MASK, Digest, words
from tests.edges.zoo import MODELS, Part


class Mixed(nn.Module):
    """Tensors of many types and sizes; some larger than a chunk, or empty."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.conv = nn.Conv2d(3, 5, 3)
        self.large = nn.Parameter(torch.randn(CHUNK + 77, generator=draw))
        for name, dtype in (("halves", torch.float16), ("brain", torch.bfloat16)):
            self.register_buffer(name, torch.randn(7, generator=draw).to(dtype))
        self.register_buffer("doubles", torch.randn(3, generator=draw).double())
        self.register_buffer("wave", torch.randn(4, dtype=torch.complex64, generator=draw))
        self.register_buffer("count", torch.tensor(12345678901))
        self.register_buffer("mask", torch.tensor([True, False, True]), persistent=False)
        self.register_buffer("bytes", torch.arange(5, dtype=torch.uint8))
        self.register_buffer("none", torch.zeros(0, 4))


def by_hand(model: nn.Module) -> int:
    """The sum written down as it is told of, in Python's own numbers."""
    tensors: dict[str, torch.Tensor] = dict([*model.named_parameters(), *model.named_buffers()])
    told = sorted(f"{n} {tuple(t.shape)} {t.dtype}\n" for n, t in tensors.items())
    salt = int.from_bytes(module.hashlib.sha256("".join(told).encode()).digest()[:6], "little")
    flat = np.concatenate([words(tensors[n]).numpy().astype(np.int64) for n in sorted(tensors)])
    table = np.random.PCG64(1).random_raw(CHUNK) | np.uint64(1)
    factors = np.atleast_1d(np.random.PCG64(2).random_raw(1 + len(flat) // CHUNK)) | np.uint64(1)
    total = salt
    for c in range(0, len(flat), CHUNK):
        part = flat[c : c + CHUNK].astype(np.uint64)
        total += int((part * table[: len(part)]).sum()) * int(factors[c // CHUNK])
    return total & MASK


def test_it_is_the_sum_that_is_told_of() -> None:
    model = Mixed()
    assert int(Digest(model)()) == by_hand(model)


def test_the_layout_does_not_matter() -> None:
    model = Mixed()
    before, first = Digest(model), int(Digest(model)())
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    assert not other.conv.weight.is_contiguous()
    other.large.data = torch.stack([other.large.data] * 2, 1)[:, 1]
    assert int(Digest(other)()) == first
    compiled: Any = torch.compile(model)
    assert int(Digest(compiled)()) == first
    model.mask = model.mask.clone()  # another tensor in its place
    assert int(before()) == first


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_bit_changes_it(data: st.DataObject) -> None:
    model = _mixed()
    digest = Digest(model)
    before = int(digest())
    tensors = [t for t in [*model.parameters(), *model.buffers()] if t.numel()]
    tensor = data.draw(st.sampled_from(tensors)).detach()
    raw = tensor.view(-1).view(torch.uint8) if tensor.dim() else tensor.view(1).view(torch.uint8)
    place = data.draw(st.integers(0, raw.numel() - 1))
    bit = 0 if tensor.dtype == torch.bool else data.draw(st.integers(0, 7))
    raw[place] ^= 1 << bit
    assert int(digest()) != before
    raw[place] ^= 1 << bit
    assert int(digest()) == before


_cached: list[Mixed] = []


def _mixed() -> Mixed:
    if not _cached:
        _cached.append(Mixed())
    return _cached[0]


def test_two_that_change_places_are_seen() -> None:
    model = nn.Linear(3, 2)
    before = int(Digest(model)())
    with torch.no_grad():
        model.weight.copy_(model.weight.flip(0))
    assert int(Digest(model)()) != before
    assert int(Digest(nn.ParameterDict({"other": model.weight, "bias": model.bias}))()) != before


@pytest.mark.parametrize("name", [name for name in MODELS if name != "lazy"])
def test_models_of_any_kind_have_one(name: str) -> None:
    model = Part(name)
    assert 0 <= int(Digest(model)()) == int(Digest(model)()) <= MASK


def test_nothing_waits_for_the_device() -> None:
    """On the meta device anything that asks for a number fails."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    assert Digest(model)().is_meta
