"""Plans of any kind, and iterable data sets that remember what was read of them."""

from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st
from torch.utils.data import IterableDataset

from launcher.data.plan import Plan


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    batch_size = draw(st.integers(1, 40))
    drop_last = draw(st.booleans())
    length = draw(st.integers(batch_size if drop_last else 1, 120))
    world_size = draw(st.integers(1, 8))
    return Plan(length, batch_size, drop_last, world_size, draw(st.integers(0, 12)))


class Stream(IterableDataset):
    """Yields (epoch, position); tells no length."""

    def __init__(self, length: int = 23) -> None:
        self.length, self.epoch = length, 0
        self.made: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        return self.samples(0)

    def samples(self, first: int) -> Iterator[Any]:
        for i in range(first, self.length):
            self.made.append(i)
            yield self.epoch, i


class Resumable(Stream):
    """Tells its length and keeps its position; a resumed one goes on from there."""

    begin = 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        first, self.begin = self.begin, 0
        return self.samples(first)

    def state_dict(self) -> dict[str, int]:
        return {"at": self.made[-1] + 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.begin = state["at"]
