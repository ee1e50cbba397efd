"""One whole number over all bits of a model, to tell whether two are the same."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import nn

WRAPPER = "_orig_mod."  # torch.compile's, before the names of what it wraps

# Words of 32 bits that are added up at once, and so the length of the table of their factors.
CHUNK = 1 << 20
# JSON's readers keep whole numbers up to 2^53 exactly, numpy's float64 as well.
MASK = (1 << 53) - 1


def plain_name(name: str) -> str:
    """The name of a weight in the model as it is written."""
    return name.replace(WRAPPER, "")


def words(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of a tensor as whole numbers of at most 32 bits, in the order of its elements and
    not of its memory; shape (n,)."""
    tensor = tensor.detach()
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    whole = {1: torch.int8, 2: torch.int16}.get(tensor.element_size(), torch.int32)
    return tensor.contiguous().view(-1).view(whole)


class Digest:
    """The sum of all words of a model's parameters and buffers, each times an odd factor that goes
    by its place, modulo 2^53: a single word that differs always changes it, whatever the device or
    memory layout.

    The place counts through the tensors in the order of their names. Names, shapes and types are
    part of it. Takes two small kernels for each 4 MiB, and one to put small tensors together.
    """

    def __init__(self, model: nn.Module) -> None:
        # Where each stands: modules may put another tensor in its place.
        places: dict[str, tuple[dict[str, Any], str]] = {}
        tensors = dict([*model.named_parameters(), *model.named_buffers()])
        for name in tensors:
            owner, _, own = name.rpartition(".")
            module = model.get_submodule(owner)
            at = module._parameters if own in module._parameters else module._buffers
            places[plain_name(name)] = at, own
        self._places = [places[name] for name in sorted(places)]
        told = (f"{n} {tuple(at[own].shape)} {at[own].dtype}\n" for n, (at, own) in places.items())
        hashed = hashlib.sha256("".join(sorted(told)).encode()).digest()
        self._salt = int.from_bytes(hashed[:6], "little")
        self._tables: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self) -> torch.Tensor:
        """The number, int64 on the model's device, of shape (). Never waits for the device."""
        flat = [words(at[own]) for at, own in self._places]
        if not flat:
            return torch.tensor(self._salt & MASK)
        device = flat[0].device  # a model over several: words come to the first one's
        flat = [f if f.device == device else f.to(device) for f in flat]
        sums = [self._sum(parts) for parts in _chunks(flat)]
        _, factors = self._tables_on(device, 0, len(sums))
        return ((torch.stack(sums) * factors[: len(sums)]).sum() + self._salt) & MASK

    def _sum(self, parts: list[torch.Tensor]) -> torch.Tensor:
        chunk = torch.cat(parts) if len(parts) > 1 else parts[0]
        table, _ = self._tables_on(chunk.device, chunk.numel())
        return (chunk * table[: chunk.numel()]).sum()

    def _tables_on(
        self, device: torch.device, words: int, chunks: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        table, factors = self._tables.get(device) or (_odd(1, 0, device), _odd(2, 0, device))
        if len(table) < words:
            table = _odd(1, words, device)
        if len(factors) < chunks:
            factors = _odd(2, chunks, device)
        self._tables[device] = table, factors
        return table, factors


def _odd(seed: int, count: int, device: torch.device) -> torch.Tensor:
    """So many odd numbers of 64 bits; the first ones are the same, however many are asked for."""
    raw = np.atleast_1d(np.random.PCG64(seed).random_raw(count)) if count else np.zeros(0, "u8")
    return torch.from_numpy((raw | np.uint64(1)).astype(np.uint64).view(np.int64)).to(device)


def _chunks(flat: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """All words in their order, in groups of CHUNK; the last one is smaller."""
    chunks: list[list[torch.Tensor]] = [[]]
    room = CHUNK
    for part in flat:
        while part.numel() > room:
            chunks[-1].append(part[:room])
            part, room = part[room:], CHUNK
            chunks.append([])
        chunks[-1].append(part)
        room -= part.numel()
    return chunks
