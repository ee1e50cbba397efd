"""Iterable data sets: one stream, read by any number of readers, each sample once and in order."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from launcher.data.fetch import Stated, StreamFetcher
from launcher.data.order import sequential
from launcher.data.plan import ENDLESS, Plan, Request, train_requests
from launcher.errors import RunError
from tests.data.helpers import Resumable, Stream


class Skipping(Stream):
    """Is its own iterator, which can skip."""

    def __iter__(self) -> Any:
        self.rest = iter(range(self.length))
        return self

    def __next__(self) -> Any:
        self.made.append(next(self.rest))
        return self.epoch, self.made[-1]

    def skip(self, count: int) -> int:
        return len(list(itertools.islice(self.rest, count)))


def fetcher(dataset: Any, **options: Any) -> StreamFetcher:
    return StreamFetcher(dataset, list, None, **options)


def span(epoch: int, start: int, stop: int) -> Request:
    return Request(epoch, list(range(start, stop)))


def requests(plan: Plan, rank: int, first: int, last: int) -> list[Request]:
    return list(train_requests(plan, sequential, rank, first, last))


def read(
    plan: Plan, kind: type, readers: int, first: int, last: int, **options: Any
) -> list[list[Any]]:
    """The global batches [first, last), from every rank with so many readers each; requests are
    dealt to these in turn, as torch's loader does."""
    batches: list[list[Any]] = [[] for _ in range(first, last)]
    for rank in range(plan.world_size):
        turns = itertools.cycle([fetcher(kind(), **options) for _ in range(readers)])
        for request in requests(plan, rank, first, last):
            step = request.epoch * plan.steps_per_epoch + request.samples[0] // plan.batch_size
            batches[step - first] += next(turns)[request]
    return batches


def expected(plan: Plan, first: int, last: int) -> list[list[Any]]:
    """The same written down the plain way."""
    return [
        [(step // plan.steps_per_epoch, i) for i in range(*plan.batch(step % plan.steps_per_epoch))]
        for step in range(first, last)
    ]


@pytest.mark.parametrize("kind", [Stream, Skipping, Resumable])
@pytest.mark.parametrize("readers", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("batch_size", "micro", "drop"), [(8, 0, False), (5, 2, True), (3, 0, False)]
)
def test_every_sample_once_in_the_streams_order(
    kind: type, readers: int, ranks: int, batch_size: int, micro: int, drop: bool
) -> None:
    """Whoever reads: three epochs, the last batch of each smaller or left out."""
    plan = Plan(23, batch_size, drop, ranks, micro)
    last = 3 * plan.steps_per_epoch
    assert read(plan, kind, readers, 0, last) == expected(plan, 0, last)


@pytest.mark.parametrize("kind", [Stream, Skipping, Resumable])
@pytest.mark.parametrize("first", [1, 2, 4, 7])
def test_a_start_in_the_middle_gives_the_same_samples(kind: type, first: int) -> None:
    plan = Plan(23, 8, world_size=2)
    assert read(plan, kind, 2, first, 9) == expected(plan, first, 9)


@pytest.mark.parametrize("kind", [Stream, Skipping])
@pytest.mark.parametrize("ranks", [2, 3])
def test_an_endless_stream_starts_again_where_it_ends(kind: type, ranks: int) -> None:
    """It is one epoch without end; each pass is told as an epoch of its own."""
    batches = read(Plan(ENDLESS, 4, world_size=ranks), kind, 1, 0, 15, endless=True)
    whole = [(turn, i) for turn in range(3) for i in range(23)]
    assert list(itertools.chain(*batches)) == whole[:60]


class Breaks(Stream):
    def __iter__(self) -> Iterator[Any]:
        yield from range(5)
        raise OSError("connection lost")


@pytest.mark.parametrize(
    ("reader", "told"),
    [
        (
            fetcher(Stream(10)),
            "data set Stream ended after 10 samples of epoch 2; its len() says there are more",
        ),
        (fetcher(Stream(0), endless=True), "data set Stream yields no samples"),
        (fetcher(Breaks()), "sample 5 of data set Breaks failed: OSError: connection lost"),
    ],
    ids=["shorter than its length", "endless without samples", "failing"],
)
def test_a_stream_that_gives_out_is_told(reader: StreamFetcher, told: str) -> None:
    with pytest.raises(RunError) as caught:
        reader[span(2, 0, 16)]
    assert str(caught.value) == told


@pytest.mark.parametrize(("kind", "first"), [(Stream, 0), (Skipping, 10)])
def test_what_a_reader_passes_over_is_skipped_where_the_stream_can(kind: type, first: int) -> None:
    dataset = kind()
    assert fetcher(dataset)[span(0, 10, 13)] == [(0, 10), (0, 11), (0, 12)]
    assert dataset.made == list(range(first, 13))


@pytest.mark.parametrize("cut", [1, 3, 5, 8])
@pytest.mark.parametrize("endless", [False, True])
def test_a_stream_with_a_state_goes_on_where_it_was(cut: int, endless: bool) -> None:
    """And reads nothing before that again."""
    asked = requests(Plan(ENDLESS if endless else 23, 4), 0, 0, 12)
    options = {"endless": endless, "state_every": 1}
    whole = fetcher(Resumable(), **options)
    answers = [whole[request] for request in asked]
    resumed = fetcher(Resumable(), **options, saved=answers[cut - 1].state)
    assert [resumed[request] for request in asked[cut:]] == answers[cut:]
    assert len(resumed.dataset.made) == sum(len(request.samples) for request in asked[cut:])


@pytest.mark.parametrize(
    ("kind", "rank", "starts"),
    [(Resumable, 0, [0, 320, 640, 960]), (Resumable, 1, []), (Stream, 0, [])],
)
def test_a_state_comes_with_a_batch_from_time_to_time(
    kind: type, rank: int, starts: list[int]
) -> None:
    """On one rank alone, at any split of the global batch, and where the data set has one."""
    made = fetcher(kind(10_000), state_every=320)
    asked = requests(Plan(10_000, 10, world_size=2, micro_batch_size=2), rank, 0, 100)
    assert [r.samples[0] for r in asked if isinstance(made[r], Stated)] == starts


def test_a_state_that_a_stream_goes_on_changing_is_taken_as_it_was() -> None:
    """A shuffle buffer, say, that `state_dict` gives as it lies there."""

    class Buffered(Resumable):
        def state_dict(self) -> dict[str, Any]:
            return {"buffer": self.made}

    made = fetcher(Buffered(), state_every=4)
    first = made[span(0, 0, 4)]
    made[span(0, 4, 8)]
    assert first.state["dataset"] == {"buffer": [0, 1, 2, 3]}
