"""Data sets of token sequences from one long file or array: cut in order, or at random."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from launcher.data.order import replacement
from launcher.errors import UsageError


class TokenFile(Dataset):
    """Sequences of `length` tokens from one long file, for language models.

    The file is flat binary of `dtype`, as nanoGPT's prepare.py
    (https://github.com/karpathy/nanoGPT) and Megatron-LM's .bin files are, or one-dimensional
    .npy, which tells its own type. Sample i is (tokens[i * length : (i + 1) * length], the same
    one token further on), both int64 of shape (length,), for i below (tokens - 1) // length; what
    is left at the end is not used. The two overlap in memory: change neither in place. In place of
    a path it takes tokens that are in memory anyway, as a one-dimensional array of integers.

    Nothing but the pages that are read takes memory, and processes share them. The file is mapped
    when the first sample is taken, and again in each process that the data set is pickled to.

    Raises UsageError for a file that is missing, holds no integers, whose size is no multiple of
    its type's, or that is too small for one sample.
    """

    # No random numbers are drawn, so samples need no seeds and a batch is fetched in one call.
    deterministic = True

    def __init__(
        self, path: str | os.PathLike[str] | np.ndarray, length: int, dtype: str = "uint16"
    ) -> None:
        if length < 1:
            raise UsageError(f"TokenFile: length must be at least 1, not {length}")
        self._array = path if isinstance(path, np.ndarray) else None
        self.path = "the array" if isinstance(path, np.ndarray) else os.path.abspath(path)
        self.length = length
        try:
            self.dtype = np.dtype(dtype)
        except TypeError:
            raise UsageError(f"TokenFile: there is no type {dtype!r}; such as uint16") from None
        self._tokens: np.ndarray | None = None
        tokens = self._map()
        self.tokens = len(tokens)
        if self.tokens <= length:
            raise UsageError(
                f"{self.path} has {self.tokens} tokens; one sample of length {length} needs "
                f"{length + 1}"
            )

    def _map(self) -> np.ndarray:
        if self._tokens is None:
            self._tokens = self._open()
        return self._tokens

    def _open(self) -> np.ndarray:
        try:
            if self._array is not None or self.path.endswith(".npy"):
                tokens = self._array
                if tokens is None:
                    tokens = np.load(self.path, mmap_mode="r", allow_pickle=False)
                if tokens.ndim != 1:
                    raise UsageError(
                        f"{self.path} has the shape {tokens.shape}; tokens have one dimension"
                    )
                self.dtype = tokens.dtype
            else:
                size = os.path.getsize(self.path)
                if size % self.dtype.itemsize:
                    raise UsageError(
                        f"{self.path} has {size} bytes, no multiple of the {self.dtype.itemsize} "
                        f"of {self.dtype}: is dtype right, and the file complete?"
                    )
                # An empty file cannot be mapped; it is refused as too small.
                tokens = np.memmap(self.path, self.dtype, "r") if size else np.empty(0, self.dtype)
        except OSError as error:
            raise UsageError(f"the token file {self.path}: {error.strerror or error}") from error
        except ValueError as error:
            raise UsageError(f"{self.path} is no .npy file of numbers: {error}") from error
        if self.dtype.kind not in "iu":
            raise UsageError(f"{self.path}: tokens are integers, not {self.dtype}")
        return tokens

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memmap would be the whole file; the other process maps it for itself.
        return {**self.__dict__, "_tokens": None}

    def __len__(self) -> int:
        return (self.tokens - 1) // self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The samples at `indices`, copied and widened into one block."""
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(f"sample {index} of {len(self)}")
        tokens = self._map()
        rows = np.empty((len(indices), self.length + 1), np.int64)
        for row, start in zip(rows, self._starts(indices), strict=True):
            row[:] = tokens[start : start + self.length + 1]
        return [(row[:-1], row[1:]) for row in torch.from_numpy(rows)]

    def _starts(self, indices: list[int]) -> list[int]:
        """Where the samples' first tokens are."""
        return [index * self.length for index in indices]


class TokenWindows(TokenFile):
    """`samples` sequences an epoch that begin anywhere in the file, as nanoGPT's get_batch draws.

    Where sample i of an epoch begins is a pure function of (seed, epoch, i): uniform, each on its
    own, at any number of loader workers and after any resume; the launcher tells the epoch by
    `set_epoch`. Else as TokenFile.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | np.ndarray,
        length: int,
        samples: int,
        seed: int = 0,
        dtype: str = "uint16",
    ) -> None:
        if samples < 1:
            raise UsageError(f"TokenWindows: samples must be at least 1, not {samples}")
        super().__init__(path, length, dtype)
        self.samples, self.seed, self.epoch = samples, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.samples

    def _starts(self, indices: list[int]) -> list[int]:
        places = self.tokens - self.length
        return replacement(places, self.seed, self.epoch, np.asarray(indices, np.int64)).tolist()
