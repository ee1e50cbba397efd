"""Iterable data sets: one stream, read by any number of readers, each sample once and in order."""

import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

from launcher.data.fetch import Stated, StreamFetcher
from launcher.data.loader import load
from launcher.data.order import sequential
from launcher.data.plan import ENDLESS, Plan, Request, train_requests
from launcher.errors import RunError


class Stream(IterableDataset):
    """Yields (pass, position) and remembers what it was asked for."""

    def __init__(self, length: int = 23) -> None:
        self.length, self.epoch, self.read = length, 0, 0
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.epochs.append(epoch)

    def __iter__(self) -> Iterator[Any]:
        for i in range(self.length):
            self.read += 1
            yield self.epoch, i


class Skipping(Stream):
    """Its iterator can skip."""

    def __iter__(self) -> Any:
        return Skips(self)


class Skips:
    """The iterator of Skipping."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.at = stream, 0

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        if self.at >= self.stream.length:
            raise StopIteration
        self.at += 1
        self.stream.read += 1
        return self.stream.epoch, self.at - 1

    def skip(self, count: int) -> int:
        passed = min(count, self.stream.length - self.at)
        self.at += passed
        return passed


class Resumable(Stream):
    """Keeps its position; a resumed one goes on from there."""

    def __init__(self, length: int = 23) -> None:
        super().__init__(length)
        self.at = self.begin = 0

    def __iter__(self) -> Iterator[Any]:
        first, self.begin = self.begin, 0
        for i in range(first, self.length):
            self.at = i + 1
            self.read += 1
            yield self.epoch, i

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.begin = state["at"]


class Noise(IterableDataset):
    """What is drawn while a sample is made."""

    def __iter__(self) -> Iterator[Any]:
        for i in range(23):
            yield i, torch.rand(()).item(), np.random.rand(), random.random()


def as_list(samples: list[Any]) -> list[Any]:
    return samples


def fetcher(dataset: Any, seed: int | None = None, **options: Any) -> StreamFetcher:
    return StreamFetcher(dataset, as_list, seed, **options)


def span(epoch: int, start: int, stop: int) -> Request:
    return Request(epoch, list(range(start, stop)))


def requests(plan: Plan, rank: int, first: int, last: int) -> list[Request]:
    return list(train_requests(plan, sequential, rank, first, last))


def read(
    plan: Plan, kind: type, workers: int, first: int, last: int, **options: Any
) -> list[list[Any]]:
    """The global batches [first, last), from every rank with `workers` readers each; requests are
    dealt to these in turn, as torch's loader does. 0 workers are one reader too."""
    batches: list[list[Any]] = [[] for _ in range(first, last)]
    for rank in range(plan.world_size):
        readers = [fetcher(kind(), **options) for _ in range(max(1, workers))]
        turn = itertools.cycle(readers)
        for request in requests(plan, rank, first, last):
            step = request.epoch * plan.steps_per_epoch + request.samples[0] // plan.batch_size
            batches[step - first] += next(turn)[request]
    return batches


def expected(plan: Plan, first: int, last: int) -> list[list[Any]]:
    """The same written down the plain way."""
    return [
        [(step // plan.steps_per_epoch, i) for i in range(*plan.batch(step % plan.steps_per_epoch))]
        for step in range(first, last)
    ]


@pytest.mark.parametrize("kind", [Stream, Skipping, Resumable])
@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize(("batch_size", "micro", "drop"), [(8, 0, False), (5, 2, True), (3, 0, 0)])
def test_every_sample_once_in_the_streams_order(
    kind: type, workers: int, ranks: int, batch_size: int, micro: int, drop: bool
) -> None:
    """Whoever reads: three epochs, the last batch of each smaller or left out."""
    plan = Plan(23, batch_size, bool(drop), ranks, micro)
    last = 3 * plan.steps_per_epoch
    assert read(plan, kind, workers, 0, last) == expected(plan, 0, last)


@pytest.mark.parametrize("kind", [Stream, Skipping, Resumable])
@pytest.mark.parametrize("first", [1, 2, 4, 7])
def test_a_start_in_the_middle_gives_the_same_samples(kind: type, first: int) -> None:
    plan = Plan(23, 8, world_size=2)
    assert read(plan, kind, 2, first, 9) == expected(plan, first, 9)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_loader_reads_as_one_reader_does(workers: int) -> None:
    plan = Plan(23, 4, micro_batch_size=2)
    whole = requests(plan, 0, 0, 2 * plan.steps_per_epoch)
    answers = list(load(fetcher(Stream()), whole, workers, 2, False, 60.0))
    assert list(itertools.chain(*answers)) == [(e, i) for e in (0, 1) for i in range(23)]


@pytest.mark.parametrize("kind", [Stream, Skipping])
@pytest.mark.parametrize("readers", [2, 3])
def test_an_endless_stream_starts_again_where_it_ends(kind: type, readers: int) -> None:
    """It is one epoch without end; each pass is told as an epoch of its own."""
    plan = Plan(ENDLESS, 4, world_size=readers)
    batches = read(plan, kind, 0, 0, 15, endless=True)
    whole = [(turn, i) for turn in range(3) for i in range(23)]
    assert list(itertools.chain(*batches)) == whole[:60]


def test_a_stream_shorter_than_its_length_is_told() -> None:
    made = fetcher(Stream(10))
    assert len(made[span(2, 0, 8)]) == 8
    with pytest.raises(RunError, match=r"Stream ended after 10 samples of epoch 2; its len\(\)"):
        made[span(2, 8, 16)]


def test_an_endless_stream_without_samples_is_told() -> None:
    with pytest.raises(RunError, match="Stream yields no samples"):
        fetcher(Stream(0), endless=True)[span(0, 0, 1)]


class Breaks(Stream):
    def __iter__(self) -> Iterator[Any]:
        yield from range(5)
        raise OSError("connection lost")


def test_a_failing_stream_names_the_position() -> None:
    with pytest.raises(RunError, match="sample 5 of data set Breaks failed: OSError: connection"):
        fetcher(Breaks())[span(0, 0, 8)]


@pytest.mark.parametrize(("kind", "made"), [(Stream, 13), (Skipping, 3)])
def test_what_a_reader_passes_over_is_skipped_where_the_stream_can(kind: type, made: int) -> None:
    dataset = kind()
    assert fetcher(dataset)[span(0, 10, 13)] == [(0, 10), (0, 11), (0, 12)]
    assert dataset.read == made


def stated(answers: list[Any]) -> Any:
    """The last state that came along with a batch."""
    return [answer.saved for answer in answers if isinstance(answer, Stated)][-1]


@pytest.mark.parametrize("cut", [1, 3, 5, 8])
@pytest.mark.parametrize("endless", [False, True])
def test_a_stream_with_a_state_goes_on_where_it_was(cut: int, endless: bool) -> None:
    """And reads nothing before that again."""
    plan = Plan(ENDLESS if endless else 23, 4)
    asked = requests(plan, 0, 0, 12)
    options = {"endless": endless, "state_every": 1}
    whole = fetcher(Resumable(), **options)
    answers = [whole[request] for request in asked]
    resumed = fetcher(Resumable(), **options, saved=answers[cut - 1].state)
    assert [resumed[request] for request in asked[cut:]] == answers[cut:]
    in_epoch = [r for r in asked[cut:] if r.epoch >= asked[cut].epoch]
    assert resumed.dataset.read == sum(len(r.samples) for r in in_epoch)


def test_a_state_comes_with_a_batch_from_time_to_time() -> None:
    """On one rank alone, at any split of the global batch, and where the data set has one."""
    plan = Plan(10_000, 10, world_size=2, micro_batch_size=2)
    for kind, rank, starts in [
        (Resumable, 0, [0, 320, 640, 960]),
        (Resumable, 1, []),
        (Stream, 0, []),
    ]:
        made = fetcher(kind(10_000), state_every=320)
        asked = requests(plan, rank, 0, 100)
        assert [r.samples[0] for r in asked if isinstance(made[r], Stated)] == starts


def test_a_stream_without_a_state_is_read_again() -> None:
    plan, made = Plan(23, 4), fetcher(Stream())
    answers = [made[span] for span in requests(plan, 0, 3, 6)]
    assert list(itertools.chain(*answers)) == [(0, i) for i in range(12, 23)]
    assert made.dataset.read == 23


def noise(size: int, seed: int, epoch: int = 0) -> dict[int, Any]:
    made = fetcher(Noise(), seed)
    starts = range(0, 23, size)
    samples = [s for a in starts for s in made[span(epoch, a, min(a + size, 23))]]
    return {sample[0]: sample[1:] for sample in samples}


@pytest.mark.parametrize("size", [1, 4, 5])
def test_what_a_sample_draws_depends_on_its_position_alone(size: int) -> None:
    assert noise(size, 7) == noise(23, 7)
    some = fetcher(Noise(), 7)[span(0, 17, 19)]  # a reader that passed over 17 samples
    assert {sample[0]: sample[1:] for sample in some} == {i: noise(23, 7)[i] for i in (17, 18)}


def test_epochs_seeds_and_positions_draw_different_numbers() -> None:
    found = [noise(23, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for generator in range(3):
        assert len({v[generator] for one in found for v in one.values()}) == 4 * 23


@pytest.mark.parametrize("seed", [None, 7])
def test_the_processs_own_generators_are_not_moved(seed: int | None) -> None:
    made = fetcher(Noise() if seed else Stream(), seed)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    made[span(0, 0, 9)]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]


def test_a_state_that_a_stream_goes_on_changing_is_taken_as_it_was() -> None:
    """A shuffle buffer, say, that `state_dict` gives as it lies there."""

    class Buffered(Resumable):
        def __init__(self) -> None:
            super().__init__()
            self.buffer: list[int] = []

        def __iter__(self) -> Iterator[Any]:
            for sample in super().__iter__():
                self.buffer.append(sample[1])
                yield sample

        def state_dict(self) -> dict[str, Any]:
            return {"buffer": self.buffer}

    made = fetcher(Buffered(), state_every=4)
    first = made[span(0, 0, 4)]
    made[span(0, 4, 8)]
    assert first.state["dataset"] == {"buffer": [0, 1, 2, 3]}
