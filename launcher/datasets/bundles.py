"""A data set whose items are bundles of samples, bounded by their padded size."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import numpy as np
from torch.utils.data import Dataset, default_collate

from launcher.datasets.mixture import taken_of
from launcher.errors import UsageError


class Bundles(Dataset):
    """Lists of samples of similar length: count times longest is at most `most` (as max_tokens of
    fairseq bounds a batch). Each sample of the map-style data set is in exactly one.

    `lengths` holds one whole number a sample, its tokens; left out, the data set's own `lengths`.
    Which samples form a bundle follows from the lengths alone and is the same in every epoch; the
    launcher shuffles the bundles. For it a bundle is a sample: TRAIN.BATCH_SIZE n is n bundles a
    step over all ranks, and with TRAIN.MICRO_BATCH_SIZE 1 a rank puts one at a time through the
    model, so that memory is bounded. A train_step that returns the number of tokens as "weight"
    then has the gradient of the mean over all tokens of the step.

    `collate` here makes one batch of several bundles: of all their samples in one list, by the
    `collate` that is given, or the data set's own, or torch's default_collate.

    Raises UsageError for lengths that do not fit and for a sample that is longer than `most`.
    """

    def __init__(
        self,
        dataset: Any,
        lengths: Any = None,
        most: int = 0,
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        given = getattr(dataset, "lengths", None) if lengths is None else lengths
        values = np.asarray([] if given is None else given)
        if values.shape != (len(dataset),) or (values.size and values.dtype.kind not in "iu"):
            raise UsageError(
                "Bundles needs `lengths`, given or of the data set: one whole number for each of "
                f"its {len(dataset)} samples"
            )
        for bad in np.flatnonzero((values < 0) | (values > most))[:1]:
            raise UsageError(
                f"Bundles: sample {bad} has the length {values[bad]}; a bundle takes from 0 to "
                f"{most} (most)"
            )
        self.dataset = dataset
        self._collate = collate or getattr(dataset, "collate", None) or default_collate
        self.deterministic = getattr(dataset, "deterministic", False)
        self._samples = np.argsort(values, kind="stable")
        self._ends = _ends(values[self._samples].astype(np.int64), most)

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._ends)

    def samples(self, index: int) -> list[int]:
        """The indices in the data set of the samples of bundle `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"bundle {index} of {len(self)}")
        start = self._ends[index - 1] if index else 0
        return self._samples[start : self._ends[index]].tolist()

    def __getitem__(self, index: int) -> list[Any]:
        return taken_of(self.dataset, self.samples(index))

    def collate(self, bundles: list[list[Any]]) -> Any:
        return self._collate([*itertools.chain.from_iterable(bundles)])


def _ends(lengths: np.ndarray, most: int) -> np.ndarray:
    """Where bundles of these rising lengths end: each takes as many samples as fit."""
    ends, end = list[int](), 0
    while end < len(lengths):
        start = end
        # The padded size rises with the count.
        counts = range(1, len(lengths) - start + 1)
        end += bisect_right(counts, most, key=lambda n: n * int(lengths[start + n - 1]))
        ends.append(end)
    return np.array(ends, np.int64)
