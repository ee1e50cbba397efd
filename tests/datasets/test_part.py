"""A part of a data set: which samples, with what of the data set's own, and as a run sees it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from launcher.config import defaults
from launcher.data.splits import Data
from launcher.datasets.part import Part, shuffled_part
from launcher.runtime.cpu import CpuBudget
from launcher.runtime.process import Runtime
from launcher.runtime.topology import Topology


class Listed(Dataset):
    """Notes what it is asked for."""

    def __init__(self, length: int) -> None:
        self.length, self.asked, self.epoch = length, list[int](), -1

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        self.asked.append(index)
        return index

    def collate(self, samples: list[int]) -> dict[str, Any]:
        return {"numbers": torch.tensor(samples)}

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(range(100, 200))


class Task:
    collate = None

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def build_dataset(self, split: str) -> Any:
        return self.dataset


def data_of(dataset: Any, rank: int = 0, ranks: int = 1) -> Data:
    cfg = defaults()
    cfg.DEBUG.OVERFIT_BATCHES, cfg.TRAIN.BATCH_SIZE, cfg.TRAIN.SAMPLER = 2, 4, "sequential"
    cfg.EVAL.SPLITS, cfg.DATALOADER.NUM_WORKERS, cfg.TRAIN.DURATION = ["train"], 0, "3ep"
    topology = Topology(rank, rank, ranks, ranks)
    runtime = Runtime(topology, torch.device("cpu"), CpuBudget(1, 1, 1, ""))
    return Data(cfg, Task(dataset), runtime, lambda phase: None)


def numbers(batches: Any) -> list[int]:
    return [n for batch in batches for part in batch.batches for n in part["numbers"].tolist()]


def test_a_run_trains_and_evaluates_on_the_same_batches() -> None:
    dataset = Listed(50)
    data = data_of(dataset)
    data.start(0)
    seen = numbers(data.batches())
    first = seen[:8]
    assert seen == first * 3 and len(set(first)) == 8 and first != sorted(first)
    evaluated = [n for b in data.evaluation("train", [0]) for n in b["numbers"].tolist()]
    assert evaluated == first and set(dataset.asked) == set(first)
    both = []
    for rank in range(2):
        part = data_of(Listed(50), rank, 2)
        part.start(0)
        both.append(numbers(part.batches()))
    assert sorted(both[0] + both[1]) == sorted(seen)  # the same samples over ranks


def test_what_a_data_set_has_of_its_own_stays() -> None:
    part = shuffled_part(dataset := Listed(9), 4, 0)
    part.set_epoch(3)  # type: ignore[attr-defined]
    assert dataset.epoch == 3 and list(part.collate([1])) == ["numbers"]  # type: ignore[attr-defined]
    assert not hasattr(shuffled_part(TensorDataset(torch.arange(9)), 4, 0), "set_epoch")


@pytest.mark.parametrize(("length", "most"), [(3, 8), (8, 8), (50, 8), (1, 1)])
def test_each_sample_stands_once(length: int, most: int) -> None:
    part = shuffled_part(Listed(length), most, 7)
    found = [part[i] for i in range(len(part))]
    assert len(set(found)) == len(found) == min(length, most)


def test_of_a_stream_the_first_ones_are_kept() -> None:
    part = shuffled_part(Stream(), 6, 0)
    assert [part[i] for i in range(len(part))] == list(range(100, 106))
    assert isinstance(part, Part)
