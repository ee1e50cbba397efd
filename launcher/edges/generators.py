"""The random generators of torch, numpy and Python: their states, and seeds for each sample."""

from __future__ import annotations

import contextlib
import ctypes
import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch

T = TypeVar("T")
Seed = Callable[[int], None]


def random_state() -> dict[str, Any]:
    """The states of torch's, numpy's and Python's generators of this process."""
    name, words, *rest = np.random.get_state()
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.from_numpy(np.asarray(words, np.int64)), *rest],
        # No list: a state is walked through at each save, and a list number by number.
        "python": [version, torch.tensor(internal), gauss],
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators where `random_state` found them."""
    torch.set_rng_state(state["torch"])
    name, words, *rest = state["numpy"]
    np.random.set_state((name, words.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_generators(number: int) -> None:
    """Seed torch's, numpy's and Python's generators on the CPU."""
    for generator in GENERATORS:
        generator.seed(number)


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Put the process's own random states back at the end. A worker's nobody else uses."""
    marks = [] if in_worker() else [generator.mark() for generator in GENERATORS]
    try:
        yield
    finally:
        for generator, mark in zip(GENERATORS, marks, strict=False):
            generator.put(mark)


def in_worker() -> bool:
    return torch.utils.data.get_worker_info() is not None


class Seeding:
    """Seeds the generators before each sample of a batch: only those from which the data set draws.

    Which these are is found out. The first batch is made with all three seeded, and they are looked
    at after each sample. Later the others are looked at once a batch: where one has moved, the
    batch is made again with that one seeded too. So what a sample draws is the same in any case,
    and a data set that draws nothing pays for two looks a batch.
    """

    def __init__(self) -> None:
        self.used: list[Generator] | None = None  # None: not known yet

    def __call__(self, make: Callable[[Seed | None, int], T]) -> T:
        """What `make(seed, mask)` gives, which is to call `seed(number & mask)` before all that may
        draw, with the same numbers in every call. Nothing draws where `seed` is None."""
        before = {generator: generator.mark() for generator in GENERATORS}
        moved, initial_seed, asked = list(GENERATORS), torch.initial_seed, list[Generator]()

        def asked_for() -> int:  # what is made of the answer is drawn, though nothing moves
            asked.append(GENERATORS[0])
            return initial_seed()

        try:
            torch.initial_seed = asked_for
            if self.used is None:
                return self._first(make, asked)
            while True:
                used = self.used
                if len(used) == 1:  # that one itself, which saves a call a sample
                    made = make(*used[0].seeding())
                else:
                    made = make(self._seed if used else None, ALL)
                others = [generator for generator in GENERATORS if generator not in used]
                moved = [g for g in others if g in asked or not g.is_at(before[g])]
                if not moved:
                    return made
                self.used = used + moved
        finally:
            torch.initial_seed = initial_seed
            touched = moved + (self.used or [])
            for generator in touched if touched and not in_worker() else ():
                generator.put(before[generator])

    def _seed(self, number: int) -> None:
        for generator in self.used or ():
            generator.seed(number)

    def _first(self, make: Callable[[Seed, int], T], asked: list[Generator]) -> T:
        marks, found = dict[Generator, Any](), dict[Generator, None]()

        def look() -> None:
            found.update({g: None for g, mark in marks.items() if not g.is_at(mark)})

        def seed(number: int) -> None:
            look()
            seed_generators(number)
            marks.update({g: g.mark() for g in GENERATORS if g not in found})

        made = make(seed, ALL)
        look()
        self.used = [g for g in GENERATORS if g in found or g in asked]
        return made

    def __reduce__(self) -> tuple[type[Seeding], tuple[()]]:
        return Seeding, ()  # a spawned worker finds out for itself


BYTES = 624 * 4 + 4  # of a Mersenne twister: its words and its position among them
SOME = 64  # of them tell one state from all others: the position, and 15 words that draws make anew
ALL = (1 << 64) - 1


class Generator:
    """One of the generators."""

    def __init__(self) -> None:
        self.last: tuple[Any, Any] = None, None  # a look, and the state that it was

    def look(self) -> Any:
        """Equal as long as nobody draws or seeds."""
        return pickle.dumps(self.state())

    def mark(self) -> tuple[Any, Any]:
        """A look, and the state. Costs little where that is the one of the last time."""
        if (found := self.look()) != self.last[0]:
            self.last = found, self.state()
        return self.last

    def is_at(self, mark: tuple[Any, Any]) -> bool:
        """Whether nobody has drawn or seeded since."""
        return self.look() == mark[0]

    def put(self, mark: tuple[Any, Any]) -> None:
        raise NotImplementedError

    def state(self) -> Any:
        raise NotImplementedError

    def seeding(self) -> tuple[Seed, int]:
        """What seeds it, and the bits that it takes."""
        raise NotImplementedError

    def seed(self, number: int) -> None:
        seed, mask = self.seeding()
        seed(number & mask)


class Torch(Generator):
    def mark(self) -> tuple[None, torch.Tensor]:
        return None, torch.default_generator.get_state()

    def is_at(self, mark: tuple[None, torch.Tensor]) -> bool:
        return torch.equal(torch.default_generator.get_state(), mark[1])

    def put(self, mark: tuple[None, torch.Tensor]) -> None:
        torch.default_generator.set_state(mark[1])

    def seeding(self) -> tuple[Seed, int]:
        # torch.manual_seed takes ten times as long, for it asks every device as well.
        return torch.default_generator.manual_seed, ALL >> 1  # type: ignore[return-value]


class Numpy(Generator):
    def __init__(self) -> None:
        super().__init__()
        # The last one looked at, some of its memory where that is known, and how that was at a look
        # at which no second number of a pair was left over, which is no part of what lies there.
        self.generator: Any = self  # none of them
        self.memory, self.plain = None, b""

    def look(self) -> Any:
        if (generator := numpys()) is not self.generator:
            self.generator, self.memory = generator, _memory(generator)
        if self.memory is None:
            return super().look()
        if (found := self.memory.raw) != self.plain:
            *_, left, number = np.random.get_state()
            if left:
                return found, number
            self.plain = found
        return found

    def put(self, mark: tuple[Any, Any]) -> None:
        np.random.set_state(mark[1])

    def state(self) -> Any:
        return np.random.get_state(legacy=False)

    def seeding(self) -> tuple[Seed, int]:
        return np.random.seed, 0xFFFFFFFF


# That which numpy's functions draw from: None in a numpy that does not tell.
numpys = getattr(np.random, "get_bit_generator", lambda: None)


def _memory(generator: Any) -> Any:
    """Where the state of numpy's usual generator lies, as its `ctypes` says: the last words and the
    position; None for others."""
    if not isinstance(generator, np.random.MT19937):
        return None
    address, state = generator.ctypes.state_address, generator.state["state"]
    words = np.frombuffer(ctypes.string_at(address, BYTES), np.uint32)
    told = np.array_equal(words, [*state["key"], state["pos"]])
    return (ctypes.c_char * SOME).from_address(address + BYTES - SOME) if told else None


class Python(Generator):
    def __init__(self) -> None:
        super().__init__()
        # CPython keeps the position and the words behind an object's head. Elsewhere: not known.
        twister, self.memory = random.Random.__base__, None
        if twister is not None and twister.__basicsize__ >= object.__basicsize__ + BYTES:
            address = id(random._inst) + object.__basicsize__  # type: ignore[attr-defined]
            words = np.frombuffer(ctypes.string_at(address, BYTES), np.uint32).tolist()
            *expected, position = random.getstate()[1]
            if words == [position, *expected]:
                self.memory = (ctypes.c_char * SOME).from_address(address)

    def look(self) -> Any:
        if self.memory is None:
            return super().look()
        return self.memory.raw, random._inst.gauss_next  # type: ignore[attr-defined]

    def put(self, mark: tuple[Any, Any]) -> None:
        random.setstate(mark[1])

    def state(self) -> Any:
        return random.getstate()

    def seeding(self) -> tuple[Seed, int]:
        return random.seed, ALL


GENERATORS: tuple[Generator, ...] = (Torch(), Numpy(), Python())
