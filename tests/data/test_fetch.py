"""From a request to a batch: fast paths change no value, a bad sample is named or replaced."""

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset, default_collate

from launcher.data.fetch import Fetcher
from launcher.data.plan import Request
from launcher.errors import RunError


class Both(Dataset):
    """A sample is its index and all that it was asked for with."""

    def __init__(self, deterministic: bool) -> None:
        self.deterministic = deterministic

    def __getitem__(self, index: int) -> tuple[int, list[int]]:
        return index, [index]

    def __getitems__(self, indices: list[int]) -> list[tuple[int, list[int]]]:
        return [(index, indices) for index in indices]


@pytest.mark.parametrize(
    ("deterministic", "seed", "samples"),
    [
        (False, 7, [(3, [3]), (1, [1])]),
        (False, None, [(3, [3, 1]), (1, [3, 1])]),
        (True, 7, [(3, [3, 1]), (1, [3, 1])]),
    ],
    ids=["seeded", "seeding off", "deterministic"],
)
def test_getitems_is_used_where_no_sample_is_seeded(
    deterministic: bool, seed: int | None, samples: list[Any]
) -> None:
    assert Fetcher(Both(deterministic), list, seed)[Request(0, [3, 1])] == samples


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
    class Told(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            return f"sample {index}"

    assert Fetcher(Told(torch.arange(5)), None, 7)[Request(0, [1, 2])] == ["sample 1", "sample 2"]


class Aged(Dataset):
    """A sample is its index and the epoch that was told; keeps all that is asked of it."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def set_epoch(self, epoch: int) -> None:
        self.epoch, self.drawn = epoch, (torch.rand(()).item(), random.random(), np.random.rand())
        self.asked.append(("epoch", epoch))

    def __getitem__(self, index: int) -> tuple[int, int]:
        self.asked.append(index)
        return index, self.epoch


@pytest.mark.parametrize("seed", [None, 7])
def test_an_epoch_is_told_once_before_its_samples(seed: int | None) -> None:
    dataset = Aged()
    fetcher = Fetcher(dataset, list, seed)
    requests = [(0, [3, 1]), (0, [2]), (1, [0]), (1, [5]), (0, [4])]
    for epoch, indices in requests:
        assert fetcher[Request(epoch, indices)] == [(index, epoch) for index in indices]
    epochs = [("epoch", 0), 3, 1, 2, ("epoch", 1), 0, 5, ("epoch", 0), 4]
    assert dataset.asked == epochs


def test_what_an_epoch_draws_follows_from_seed_and_epoch() -> None:
    """Whatever was drawn before, and it leaves the process's own states as they were."""
    drawn = {}
    for seed, epoch, noise in itertools.product((7, 8), (2, 3), (False, True)):
        if noise:
            torch.rand(9), random.random(), np.random.rand()
        before = torch.get_rng_state()
        fetcher = Fetcher(Aged(), list, seed)
        fetcher[Request(epoch, [0])]
        assert drawn.setdefault((seed, epoch), fetcher.dataset.drawn) == fetcher.dataset.drawn
        assert torch.equal(torch.get_rng_state(), before)
    assert len(set(drawn.values())) == 4


class Bad(Dataset):
    """Samples 3, 4 and the last one cannot be read."""

    def __init__(self, *bad: int) -> None:
        self.bad = bad or (3, 4, 9)

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        if index in self.bad:
            raise OSError("truncated file")
        return index


class BadWhole(Bad):
    deterministic = True

    def __getitems__(self, indices: list[int]) -> list[int]:
        return [self[index] for index in indices]


@pytest.mark.parametrize(
    ("dataset", "seed", "named"),
    [
        (Bad(), None, "sample 3 of data set Bad"),
        (Bad(), 7, "sample 3 of data set Bad"),
        (BadWhole(), 7, "samples [2, 3] of data set BadWhole"),
    ],
)
def test_a_failing_sample_is_named(dataset: Bad, seed: int | None, named: str) -> None:
    with pytest.raises(RunError) as caught:
        Fetcher(dataset, None, seed)[Request(0, [2, 3])]
    assert str(caught.value) == f"{named} failed: OSError: truncated file"
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("dataset", [Bad(), BadWhole()])
@pytest.mark.parametrize("seed", [None, 7])
def test_a_bad_sample_is_skipped_for_the_next_good_one(
    dataset: Bad, seed: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    fetcher = Fetcher(dataset, list, seed, skip_bad=True)
    # 3 and 4 give 5; the last one, 9, gives the first, 0.
    assert fetcher[Request(0, [2, 3, 4, 9])] == [2, 5, 5, 0]
    assert fetcher.skipped == 3
    told = [m for m in caplog.messages if "took sample" in m]
    assert told[0].startswith("sample 3 of data set") and "took sample 5" in told[0]
    assert told[-1].endswith("(3 so far in this process)")


def test_a_data_set_without_a_good_sample_ends() -> None:
    with pytest.raises(RunError, match="sample 1 of data set Bad failed"):
        Fetcher(Bad(*range(10)), list, 7, skip_bad=True)[Request(0, [1])]
