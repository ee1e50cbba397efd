"""Bundles: batches bounded by their tokens, and the update that of all tokens at once."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import Dataset

from launcher.data.splits import Data
from launcher.datasets import Bundles
from launcher.errors import UsageError
from launcher.runtime.gather import Gather
from launcher.runtime.process import Runtime
from launcher.runtime.topology import Topology
from tests.engine.helpers import ALONE, assert_close, config, fresh

law = settings(deadline=None, max_examples=80)


class Sentences(Dataset):
    """Sample i has `lengths[i]` tokens, all of them i."""

    def __init__(self, lengths: Any) -> None:
        self.lengths, self.epoch = lengths, -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((int(self.lengths[index]),), index)


@law
@given(st.lists(st.integers(0, 12), max_size=150), st.integers(12, 40))
def test_each_sample_is_in_one_bundle_that_is_full_and_within_bounds(
    lengths: list[int], most: int
) -> None:
    bundles = Bundles(Sentences(lengths), most=most)
    members = [bundles.samples(i) for i in range(len(bundles))]
    assert sorted(index for bundle in members for index in bundle) == list(range(len(lengths)))
    sizes = [[lengths[index] for index in bundle] for bundle in members]
    assert all(len(bundle) * max(bundle) <= most for bundle in sizes)
    # Of similar length: none has one that belongs into another; and the next would not fit in.
    for one, after in itertools.pairwise(sizes):
        assert max(one) <= min(after) and (len(one) + 1) * min(after) > most


def test_a_bundle_holds_its_samples_and_bundles_are_collated_as_one_list() -> None:
    dataset = Sentences([3, 1, 2, 1, 3])
    bundles = Bundles(dataset, most=4)
    assert [bundles.samples(i) for i in range(len(bundles))] == [[1, 3], [2], [0], [4]]
    assert [sample.tolist() for sample in bundles[0]] == [[1], [3]]
    assert torch.equal(bundles.collate([bundles[0]]), torch.tensor([[1], [3]]))
    joined = Bundles(dataset, [3, 1, 2, 1, 3], 4, torch.cat)
    assert joined.collate([joined[2], joined[0]]).tolist() == [0, 0, 0, 1, 3]
    dataset.collate = len  # type: ignore[attr-defined]
    assert Bundles(dataset, most=4).collate([bundles[0], bundles[1]]) == 3
    bundles.set_epoch(4)
    assert dataset.epoch == 4
    for index in (-1, 4):
        with pytest.raises(IndexError):
            bundles[index]


@pytest.mark.parametrize(
    ("lengths", "most", "told"),
    [
        ([1, 2, 9, 3], 8, r"sample 2 has the length 9; .* 0 to 8 \(most\)"),
        ([1, -2, 9, 3], 8, "sample 1 has the length -2"),
        ([1, 2, 3], 8, "one whole number for each of its 4 samples"),
        ([1.0, 2.0, 3.0, 4.0], 8, "one whole number"),
        ([1, 2, 9, 3], 0, "sample 0 has the length 1"),
    ],
)
def test_lengths_that_do_not_fit(lengths: Any, most: int, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Bundles(Sentences([1, 1, 1, 1]), lengths, most)
    with pytest.raises(UsageError, match=r"Bundles needs `lengths`"):
        Bundles(list(range(4)), most=8)


LENGTHS = (np.arange(40) * 7) % 11 + 1


class Model(nn.Module):
    """The next token from the one before it, without dropout or anything that couples samples."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table, self.head = nn.Embedding(41, 8), nn.Linear(8, 41)

    def loss(self, padded: torch.Tensor) -> torch.Tensor:
        """The sum over all tokens; padding is -1."""
        kept = padded[padded >= 0]
        return nn.functional.cross_entropy(self.head(self.table(kept)), kept, reduction="sum")


class Language:
    """Trains on bundles; the weight is the number of tokens."""

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int]] = []

    def build_model(self) -> nn.Module:
        return Model()

    def build_dataset(self, split: str) -> Bundles:
        padded = lambda samples: nn.utils.rnn.pad_sequence(samples, True, -1)  # noqa: E731
        return Bundles(Sentences(LENGTHS), most=30, collate=padded)

    def train_step(self, model: Any, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        self.sizes.append(tuple(batch.shape))  # type: ignore[arg-type]
        tokens = (batch >= 0).sum()
        return {"loss": model.loss(batch) / tokens, "weight": tokens.float()}


@pytest.mark.parametrize("micro", [0, 1, 2])
def test_the_update_is_that_of_the_mean_over_all_tokens(micro: int) -> None:
    """With micro-batches of any size, beside plain torch on all the step's sentences at once."""
    from launcher.engine.step import TrainStep

    task = Language()
    words = ("TRAIN.BATCH_SIZE", 5, "TRAIN.MICRO_BATCH_SIZE", micro, "OPTIM.MOMENTUM", 0.0)
    state = fresh(task, *words, "EVAL.EVERY", "", "TRAIN.DURATION", "2ep")
    step, data = TrainStep(state.cfg, task, state, ALONE, Gather(ALONE)), state.data
    data.start(0, threads=1)
    model, bundles = Model(), task.build_dataset("train")
    optimiser, plan = torch.optim.SGD(model.parameters(), lr=0.1), data.train_plan
    for k, batch in enumerate(data.batches()):
        step(batch, frozenset())
        epoch, place = divmod(k, plan.steps_per_epoch)
        indices = data.order(epoch, np.arange(*plan.batch(place))).tolist()
        sentences = [s for index in indices for s in bundles[index]]
        whole = torch.cat(sentences)
        optimiser.zero_grad()
        (model.loss(whole) / len(whole)).backward()
        optimiser.step()
    data.close()
    assert_close([p.detach() for p in state.model.parameters()], [*model.parameters()])
    if micro == 1:
        assert max(rows * columns for rows, columns in task.sizes) <= 30
        assert len(task.sizes) == 2 * len(bundles)


def test_every_sentence_once_an_epoch_at_any_number_of_ranks() -> None:
    found = []
    for ranks in (1, 3):
        tokens: list[int] = []
        for rank in range(ranks):
            runtime = Runtime(Topology(rank=rank, world_size=ranks), torch.device("cpu"), ALONE.cpu)
            cfg = config("TRAIN.BATCH_SIZE", 4, "EVAL.EVERY", "", "TRAIN.DURATION", "1ep")
            data = Data(cfg, Language(), runtime, lambda phase: None)
            data.start(0, threads=1)
            for batch in data.batches():
                tokens += [int(row[0]) for part in batch.batches for row in part]
            data.close()
        found.append(sorted(tokens))
    assert found == [list(range(len(LENGTHS)))] * 2
