"""From a request to a batch: what a sample draws is its own, fast paths change no value."""

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset, default_collate

from launcher.data.fetch import Fetcher
from launcher.data.loader import load
from launcher.data.plan import Request
from launcher.errors import RunError

GENERATORS = ("torch", "numpy", "random")


class Noise(Dataset):
    """A sample is its index and what it draws from the three generators."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[int, float, float, float]:
        return index, torch.rand(()).item(), np.random.rand(), random.random()


class Both(Noise):
    """Has `__getitems__`, which says so in its values."""

    deterministic = False

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def __getitems__(self, indices: list[int]) -> list[Any]:
        self.calls.append(indices)
        return [(index, "whole") for index in indices]


class Deterministic(Both):
    deterministic = True


class Bad(Dataset):
    """Samples 3, 4 and the last one cannot be read."""

    BAD = (3, 4, 9)

    def __init__(self, bad: tuple[int, ...] = BAD) -> None:
        self.bad = bad

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        if index in self.bad:
            raise OSError("truncated file")
        return index


def as_list(samples: list[Any]) -> list[Any]:
    return samples


def drawn(requests: list[Request], workers: int = 0, seed: int = 7) -> dict[tuple[int, int], Any]:
    """What every (epoch, sample) drew."""
    fetcher = Fetcher(Noise(), as_list, seed)
    found: dict[tuple[int, int], Any] = {}
    for request, samples in zip(
        requests, load(fetcher, requests, workers, 2, False, 60.0), strict=True
    ):
        found |= {(request.epoch, sample[0]): sample[1:] for sample in samples}
    return found


WHOLE = [Request(0, list(range(12)))]


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize(
    "requests",
    [
        [Request(0, [i]) for i in range(12)],
        [Request(0, [11, 3, 7]), Request(0, [0, 1, 2, 4, 5, 6]), Request(0, [10, 9, 8])],
        [Request(0, list(reversed(range(12))))],
    ],
    ids=["one by one", "in parts", "reversed"],
)
def test_a_sample_draws_the_same_whatever_surrounds_it(
    requests: list[Request], workers: int
) -> None:
    assert drawn(requests, workers) == drawn(WHOLE)


@pytest.mark.parametrize("generator", range(3), ids=GENERATORS)
def test_samples_epochs_and_seeds_draw_different_numbers(generator: int) -> None:
    requests = [Request(epoch, list(range(40))) for epoch in range(3)]
    values = [v[generator] for seed in (0, 1) for v in drawn(requests, seed=seed).values()]
    assert len(set(values)) == 40 * 3 * 2


def states() -> list[Any]:
    name, words, *rest = np.random.get_state()
    return [torch.get_rng_state().tolist(), name, list(words), rest, random.getstate()]


@pytest.mark.parametrize("dataset", [Noise(), Bad()], ids=["whole", "failing"])
def test_the_processs_own_generators_are_not_moved(dataset: Any) -> None:
    np.random.standard_normal()  # one is held back
    random.gauss(0, 1)
    before = states()
    try:
        Fetcher(dataset, as_list, 7)[Request(0, [1, 2, 3])]
    except RunError:
        assert isinstance(dataset, Bad)
    assert states() == before


@pytest.mark.parametrize(
    ("dataset", "seed", "whole"),
    [(Both(), 7, False), (Both(), None, True), (Deterministic(), 7, True)],
    ids=["seeded", "seeding off", "deterministic"],
)
def test_getitems_is_used_where_no_sample_is_seeded(
    dataset: Both, seed: int | None, whole: bool
) -> None:
    samples = Fetcher(dataset, as_list, seed)[Request(0, [3, 1])]
    assert dataset.calls == ([[3, 1]] if whole else [])
    assert [sample[0] for sample in samples] == [3, 1]
    assert (samples[0][1] == "whole") is whole


def test_without_seeding_samples_draw_from_the_processs_generators() -> None:
    torch.manual_seed(3)
    expected = [torch.rand(()).item() for _ in range(2)]
    torch.manual_seed(3)
    samples = Fetcher(Noise(), as_list, None)[Request(0, [5, 5])]
    assert [sample[1] for sample in samples] == expected


@pytest.mark.parametrize("indices", [[0], [4, 4, 1], list(range(20))], ids=len)
@pytest.mark.parametrize("seed", [None, 7])
def test_a_batch_of_tensors_equals_collated_samples(indices: list[int], seed: int | None) -> None:
    rows = torch.arange(20)
    data = TensorDataset(torch.randn(20, 3, 2), rows, rows % 2 == 0)
    batch = Fetcher(data, None, seed)[Request(0, indices)]
    collated = default_collate([data[i] for i in indices])
    assert type(batch) is type(collated) and len(batch) == len(collated)
    for a, b in zip(batch, collated, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_the_tasks_collate_wins_over_the_fast_path() -> None:
    fetcher = Fetcher(TensorDataset(torch.arange(5)), lambda s: ("mine", len(s)), 7)
    assert fetcher[Request(0, [1, 2])] == ("mine", 2)


def test_a_child_class_of_tensor_dataset_is_asked_sample_by_sample() -> None:
    class Doubled(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            return tuple(2 * tensor for tensor in super().__getitem__(index))

    (batch,) = Fetcher(Doubled(torch.arange(5)), None, 7)[Request(0, [1, 2])]
    assert batch.tolist() == [2, 4]


@pytest.mark.parametrize("seed", [None, 7])
def test_a_failing_sample_is_named(seed: int | None) -> None:
    with pytest.raises(RunError) as caught:
        Fetcher(Bad(), None, seed)[Request(0, [2, 3])]
    assert str(caught.value) == "sample 3 of data set Bad failed: OSError: truncated file"
    assert isinstance(caught.value.__cause__, OSError)


class BadWhole(Bad):
    deterministic = True

    def __getitems__(self, indices: list[int]) -> list[int]:
        return [self[index] for index in indices]


def test_a_failing_getitems_names_its_samples() -> None:
    with pytest.raises(RunError, match=r"samples \[2, 3\] of data set BadWhole failed: OSError"):
        Fetcher(BadWhole(), None, 7)[Request(0, [2, 3])]


@pytest.mark.parametrize("kind", [Bad, BadWhole])
@pytest.mark.parametrize("seed", [None, 7])
def test_a_bad_sample_is_skipped_for_the_next_good_one(
    kind: type[Bad], seed: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    fetcher = Fetcher(kind(), as_list, seed, skip_bad=True)
    # 3 and 4 give 5; the last one, 9, gives the first, 0.
    assert fetcher[Request(0, [2, 3, 4, 9])] == [2, 5, 5, 0]
    assert fetcher.skipped == 3
    told = [m for m in caplog.messages if "took sample" in m]
    assert told[0].startswith("sample 3 of data set") and "took sample 5" in told[0]
    assert told[-1].endswith("(3 so far in this process)")


def test_a_data_set_without_a_good_sample_ends() -> None:
    with pytest.raises(RunError, match="sample 1 of data set Bad failed"):
        Fetcher(Bad(tuple(range(10))), as_list, 7, skip_bad=True)[Request(0, [1])]


def mixing(samples: list[Any]) -> tuple[list[int], float, float, float]:
    """A collate that draws, as mix-up does."""
    return [s[0] for s in samples], torch.rand(()).item(), np.random.rand(), random.random()


def test_a_random_collate_is_reproducible_and_has_draws_of_its_own() -> None:
    requests = [Request(epoch, [i, i + 1]) for epoch in range(2) for i in range(0, 12, 2)]

    def answers(workers: int, seed: int = 7) -> list[Any]:
        return list(load(Fetcher(Noise(), mixing, seed), requests, workers, 2, False, 60.0))

    alone = answers(0)
    assert answers(0) == alone == answers(2)
    values = Counter(number for answer in alone for number in answer[1:])
    samples = Counter(n for v in drawn(requests).values() for n in v)
    assert max(values.values()) == 1
    assert not values.keys() & samples.keys()
    assert answers(0, seed=8) != alone
