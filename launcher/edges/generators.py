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
    states = [] if in_worker() else [generator.state() for generator in GENERATORS]
    try:
        yield
    finally:
        for generator, state in zip(GENERATORS, states, strict=False):
            generator.put(state)


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
        # The process's own states, and the marks they had.
        self._own: dict[Generator, Any] = {}
        self._marks: list[Any] = [None] * len(GENERATORS)

    def __call__(self, make: Callable[[Callable[[int], None] | None], T]) -> T:
        """What `make(seed)` gives, which is to call `seed(number)` before all that may draw, with
        the same numbers in every call. Nothing draws where it gets None."""
        before = _marks()
        if (here := not in_worker()) and before != self._marks:
            for generator, mark, known in zip(GENERATORS, before, self._marks, strict=True):
                if mark != known:
                    self._own[generator] = generator.state()
            self._marks = before
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
                # The only one itself, which saves a call a sample.
                made = make(used[0].seed if len(used) == 1 else self._seed if used else None)
                looked = zip(GENERATORS, before, _marks(), strict=True)
                moved = [g for g, mark, now in looked if now != mark or g in asked]
                moved = [g for g in moved if g not in used]
                if not moved:
                    return made
                self.used = used + moved
        finally:
            torch.initial_seed = initial_seed
            for generator in dict.fromkeys(moved + (self.used or [])) if here else ():
                generator.put(self._own[generator])

    def _seed(self, number: int) -> None:
        for generator in self.used or ():
            generator.seed(number)

    def _first(self, make: Callable[[Callable[[int], None]], T], asked: list[Generator]) -> T:
        marks, found = dict[Generator, Any](), dict[Generator, None]()

        def look() -> None:
            found.update({g: None for g, mark in marks.items() if g.mark() != mark})

        def seed(number: int) -> None:
            look()
            seed_generators(number)
            marks.update({g: g.mark() for g in GENERATORS if g not in found})

        made = make(seed)
        look()
        self.used = [g for g in GENERATORS if g in found or g in asked]
        return made

    def __reduce__(self) -> tuple[type[Seeding], tuple[()]]:
        return Seeding, ()  # a spawned worker finds out for itself


def _marks() -> list[Any]:
    return [generator.mark() for generator in GENERATORS]


class Generator:
    """One of the generators. `mark` is equal as long as its state is, and costs a microsecond."""

    def mark(self) -> Any:
        return pickle.dumps(self.state())

    def state(self) -> Any:
        raise NotImplementedError

    def put(self, state: Any) -> None:
        raise NotImplementedError

    def seed(self, number: int) -> None:
        raise NotImplementedError


class Torch(Generator):
    def mark(self) -> bytes:
        return self.state().numpy().tobytes()

    def state(self) -> torch.Tensor:
        return torch.default_generator.get_state()

    def put(self, state: torch.Tensor) -> None:
        torch.default_generator.set_state(state)

    def seed(self, number: int) -> None:
        # torch.manual_seed takes ten times as long, for it asks every device as well.
        torch.default_generator.manual_seed(number & 0x7FFFFFFFFFFFFFFF)


BYTES = 624 * 4 + 4  # of a Mersenne twister: its words and its position among them


class Numpy(Generator):
    def __init__(self) -> None:
        # The last one looked at, its memory where that is known, and a look at it at which no
        # second number of a pair was left over, which is no part of what lies there.
        self.generator: Any = self  # none of them
        self.memory, self.plain = None, b""

    def mark(self) -> Any:
        if (generator := numpys()) is not self.generator:
            self.generator, self.memory = generator, _memory(generator)
        if self.memory is None:
            return super().mark()
        if (found := self.memory.raw) != self.plain:
            *_, left, number = np.random.get_state()
            if left:
                return found, number
            self.plain = found
        return found

    def state(self) -> Any:
        return np.random.get_state(legacy=False)

    def put(self, state: Any) -> None:
        np.random.set_state(state)

    def seed(self, number: int) -> None:
        np.random.seed(number & 0xFFFFFFFF)


# That which numpy's functions draw from: None in a numpy that does not tell.
numpys = getattr(np.random, "get_bit_generator", lambda: None)


def _memory(generator: Any) -> Any:
    """Where the state of numpy's usual generator lies, as its `ctypes` says; None for others."""
    if not isinstance(generator, np.random.MT19937):
        return None
    memory = (ctypes.c_char * BYTES).from_address(generator.ctypes.state_address)
    state = generator.state["state"]
    told = np.array_equal(np.frombuffer(memory, np.uint32), [*state["key"], state["pos"]])
    return memory if told else None


class Python(Generator):
    def __init__(self) -> None:
        # CPython keeps the position and the words behind an object's head. Elsewhere: not known.
        twister, self.memory = random.Random.__base__, None
        if twister is not None and twister.__basicsize__ >= object.__basicsize__ + BYTES:
            address = id(random._inst) + object.__basicsize__  # type: ignore[attr-defined]
            memory = (ctypes.c_char * BYTES).from_address(address)
            *words, position = random.getstate()[1]
            found = np.frombuffer(memory, np.uint32).tolist()
            self.memory = memory if found == [position, *words] else None

    def mark(self) -> Any:
        if self.memory is None:
            return super().mark()
        return self.memory.raw, random._inst.gauss_next  # type: ignore[attr-defined]

    def state(self) -> Any:
        return random.getstate()

    def put(self, state: Any) -> None:
        random.setstate(state)

    def seed(self, number: int) -> None:
        random.seed(number)


GENERATORS: tuple[Generator, ...] = (Torch(), Numpy(), Python())
