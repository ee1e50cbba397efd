"""Values that one rank gives another: pickled, small ones in a parcel of fixed size."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

SIZE = 4096  # bytes of a parcel, the length in front included
HEAD = 8


def gathered(value: Any, device: torch.device) -> list[Any] | None:
    """Every rank's value in rank order on rank 0, None elsewhere. One collective, of a parcel a
    rank; from ranks whose value does not go into one, rank 0 receives the rest one by one."""
    sent, rest = packed(value, device)
    is_main = dist.get_rank() == 0
    parcels = [torch.empty_like(sent) for _ in range(dist.get_world_size())] if is_main else None
    dist.gather(sent, parcels)
    if parcels is None:
        if rest is not None:
            dist.send(rest, 0)
        return None

    def receive(rank: int) -> Callable[[int], torch.Tensor]:
        def so_many(size: int) -> torch.Tensor:
            room = torch.empty(size, dtype=torch.uint8, device=device)
            dist.recv(room, rank)
            return room

        return so_many

    return [value if r == 0 else unpacked(p, receive(r)) for r, p in enumerate(parcels)]


def packed(value: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A parcel, and what does not go into it, or None; on the device."""
    data = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    if len(data) > SIZE - HEAD:
        data = zlib.compress(data, 1)  # names in the main
    whole = bytearray(len(data).to_bytes(HEAD, "little") + data)
    whole += bytes(max(0, SIZE - len(whole)))
    sent = torch.frombuffer(whole, dtype=torch.uint8).to(device)  # waits for the device
    return sent[:SIZE], sent[SIZE:] if len(whole) > SIZE else None


def unpacked(parcel: torch.Tensor, receive: Callable[[int], torch.Tensor]) -> Any:
    """The value; `receive(n)` gives the n bytes that did not go into the parcel."""
    whole = parcel.cpu()  # waits for the device
    length = int.from_bytes(whole[:HEAD].numpy().tobytes(), "little")
    if (left := HEAD + length - SIZE) > 0:
        whole = torch.cat([whole, receive(left).cpu()])
    data = whole[HEAD : HEAD + length].numpy().tobytes()
    return pickle.loads(data if data[:1] == b"\x80" else zlib.decompress(data))
