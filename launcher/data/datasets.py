"""Small general data sets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.data import Dataset


class TensorData(Dataset):
    """Tensors of equal length as a data set; sample i is the tuple of their i-th rows.

    `batch` fetches many samples with one index operation a tensor, which is what the loader uses.
    """

    def __init__(self, *tensors: torch.Tensor) -> None:
        if not tensors or any(len(t) != len(tensors[0]) for t in tensors):
            raise ValueError("TensorData takes one or more tensors of equal length")
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        return tuple(t[index] for t in self.tensors)

    def batch(self, indices: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """The collated batch of these samples: one tensor of shape (B, ...) for each."""
        rows = torch.as_tensor(indices)
        return tuple(t[rows] for t in self.tensors)
