"""What a sample draws follows from the seed, the epoch and the sample alone."""

import contextlib
import functools
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from launcher.data.fetch import Fetcher, StreamFetcher
from launcher.data.loader import load
from launcher.data.plan import Request
from launcher.errors import RunError
from tests.data.helpers import Stream

LENGTH = 40
Make = Callable[[int | None], Any]


class Noise(Dataset):
    """A sample is its index and what it draws from the three generators."""

    def __getitem__(self, index: int) -> tuple[int, float, float, float]:
        return index, torch.rand(()).item(), np.random.rand(), random.random()


class NoiseStream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return map(Noise().__getitem__, range(LENGTH))


# From a seed to what reads the samples.
MAP = functools.partial(Fetcher, Noise(), list)
STREAM = functools.partial(StreamFetcher, NoiseStream(), list)
both = pytest.mark.parametrize("make", [MAP, STREAM], ids=["map-style", "iterable"])


def loaded(fetcher: Any, requests: list[Request], workers: int = 0) -> list[Any]:
    return list(load(fetcher, requests, workers, 2, False, 60.0))


def drawn(make: Make, requests: list[Request], workers: int = 0, seed: int = 7) -> dict[Any, Any]:
    """What every (epoch, sample) drew."""
    found: dict[Any, Any] = {}
    for request, samples in zip(requests, loaded(make(seed), requests, workers), strict=True):
        assert [sample[0] for sample in samples] == request.samples
        found |= {(request.epoch, sample[0]): sample[1:] for sample in samples}
    return found


def epochs(count: int) -> list[Request]:
    return [Request(epoch, list(range(LENGTH))) for epoch in range(count)]


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (MAP, [[i] for i in range(12)]),
        (MAP, [[11, 3, 7], [0, 1, 2, 4, 5, 6], [10, 9, 8]]),
        (MAP, [list(reversed(range(12)))]),
        (STREAM, [[i] for i in range(12)]),
        (STREAM, [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]),
        (STREAM, [[17, 18]]),
    ],
    ids=[
        "one by one",
        "in parts",
        "reversed",
        "stream one by one",
        "stream in parts",
        "its middle",
    ],
)
def test_a_sample_draws_the_same_whatever_surrounds_it(
    make: Make, parts: list[list[int]], workers: int
) -> None:
    found = drawn(make, [Request(0, part) for part in parts], workers)
    whole = drawn(make, epochs(1))
    assert found == {key: whole[key] for key in found}


@both
@pytest.mark.parametrize("generator", range(3), ids=["torch", "numpy", "random"])
def test_samples_epochs_and_seeds_draw_different_numbers(make: Make, generator: int) -> None:
    values = [v[generator] for seed in (0, 1) for v in drawn(make, epochs(3), seed=seed).values()]
    assert len(set(values)) == LENGTH * 3 * 2


def states() -> list[Any]:
    name, words, *rest = np.random.get_state()
    return [torch.get_rng_state().tolist(), name, list(words), rest, random.getstate()]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("fetcher", "fails"),
    [
        (MAP(7), False),
        (Fetcher([], list, 7), True),
        (STREAM(7), False),
        (StreamFetcher(Stream(), list, None), False),
    ],
    ids=["map-style", "failing", "iterable", "seeding off"],
)
def test_the_processs_own_generators_are_not_moved(fetcher: Any, fails: bool, workers: int) -> None:
    """Not even by the loader's start: a resumed run starts it at another moment."""
    np.random.standard_normal()  # one is held back
    random.gauss(0, 1)
    before = states()
    with pytest.raises(RunError) if fails else contextlib.nullcontext():
        loaded(fetcher, [Request(0, [1, 2, 3])], workers)
    assert states() == before


def test_without_seeding_samples_draw_from_the_processs_generators() -> None:
    """And a batch goes on where the last one was."""
    torch.manual_seed(3)
    expected = [torch.rand(()).item() for _ in range(3)]
    torch.manual_seed(3)
    samples = [MAP(None)[Request(0, indices)] for indices in ([5, 5], [5])]
    assert [sample[1] for sample in itertools.chain(*samples)] == expected


def mixing(samples: list[Any]) -> tuple[float, float, float]:
    """A collate that draws, as mix-up does."""
    return torch.rand(()).item(), np.random.rand(), random.random()


def test_a_random_collate_is_reproducible_and_has_draws_of_its_own() -> None:
    requests = [Request(epoch, [i, i + 1]) for epoch in range(2) for i in range(0, 12, 2)]
    fetcher, other = (Fetcher(Noise(), mixing, seed) for seed in (7, 8))
    alone = loaded(fetcher, requests)
    assert loaded(fetcher, requests) == alone == loaded(fetcher, requests, workers=2)
    assert loaded(other, requests) != alone
    values = Counter(number for numbers in alone for number in numbers)
    samples = {number for numbers in drawn(MAP, requests).values() for number in numbers}
    assert max(values.values()) == 1 and not values.keys() & samples
