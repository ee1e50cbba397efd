"""TokenFile and TokenWindows: samples from one long file of tokens."""

import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launcher.data.fetch import Fetcher
from launcher.data.plan import Request
from launcher.datasets import TokenFile, TokenWindows
from launcher.errors import UsageError


def tokens(path: Path, count: int, dtype: str = "uint16") -> Path:
    np.arange(count, dtype=dtype).tofile(path)
    return path


def test_samples_are_shifted_by_one_token(tmp_path: Path) -> None:
    dataset = TokenFile(tokens(tmp_path / "t.bin", 11), length=5)
    assert len(dataset) == 2
    for i in range(2):
        inputs, targets = dataset[i]
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.tolist() == list(range(5 * i, 5 * i + 5))
        assert targets.tolist() == list(range(5 * i + 1, 5 * i + 6))
    # The last sample needs the token after it.
    assert len(TokenFile(tokens(tmp_path / "t.bin", 10), length=5)) == 1
    with pytest.raises(IndexError):
        dataset[2]


def test_large_tokens_and_npy(tmp_path: Path) -> None:
    np.array([65_535, 70_000, 2], np.uint32).tofile(tmp_path / "t.bin")
    assert TokenFile(tmp_path / "t.bin", 2, "uint32")[0][1].tolist() == [70_000, 2]
    np.save(tmp_path / "t.npy", np.array([7, -8, 9], np.int32))
    dataset = TokenFile(tmp_path / "t.npy", 2)
    assert dataset.dtype == np.int32 and dataset[0][0].tolist() == [7, -8]


def test_tokens_in_memory_are_as_those_of_a_file(tmp_path: Path) -> None:
    array = np.arange(23, dtype=np.uint8)[::2]
    array.tofile(tmp_path / "t.bin")
    for made in (TokenFile, lambda *args: TokenWindows(args[0], 3, 9, 7, *args[2:])):
        ours, theirs = made(array, 3), made(tmp_path / "t.bin", 3, "uint8")
        assert len(ours) == len(theirs)
        for copy in (ours, pickle.loads(pickle.dumps(ours))):
            for sample, expected in zip(copy, theirs, strict=True):
                assert all(map(torch.equal, sample, expected))
    for wrong, told in (
        (np.zeros((2, 3), np.int64), r"the array has the shape \(2, 3\)"),
        (np.zeros(9), "the array: tokens are integers, not float64"),
        (np.zeros(3, np.int8), "the array has 3 tokens; one sample of length 3 needs 4"),
    ):
        with pytest.raises(UsageError, match=told):
            TokenFile(wrong, 3)


def test_a_batch_is_fetched_in_one_call_and_needs_no_seeds(tmp_path: Path) -> None:
    dataset = TokenFile(tokens(tmp_path / "t.bin", 101), length=10)
    fetcher = Fetcher(dataset, None, seed=0)
    assert fetcher.whole is not None and fetcher.seed is None
    inputs, targets = fetcher[Request(0, [9, 0, 3])]
    assert inputs[:, 0].tolist() == [90, 0, 30] and torch.equal(inputs + 1, targets)


def test_it_is_mapped_late_and_survives_pickling_and_forks(tmp_path: Path) -> None:
    dataset = TokenFile(tokens(tmp_path / "t.bin", 100_001), length=10)
    dataset[0]
    text = pickle.dumps(dataset)
    assert len(text) < 1000
    assert pickle.loads(text)[9_999][1][-1] == 100_000 % 65_536
    for context in ("fork", "spawn"):
        with multiprocessing.get_context(context).Pool(1) as pool:
            assert pool.apply(_first, (dataset, 5_000)) == 50_000


def _first(dataset: TokenFile, index: int) -> int:
    return int(dataset[index][0][0])


@pytest.mark.parametrize(
    ("name", "content", "arguments", "told"),
    [
        ("t.bin", bytes(10), (5,), "has 5 tokens; one sample of length 5 needs 6"),
        ("t.bin", b"12345", (1,), "5 bytes, no multiple of the 2 of uint16"),
        ("t.bin", b"", (1,), "has 0 tokens"),
        ("t.bin", b"", (1, "float32"), "integers, not float32"),
        ("t.bin", b"", (1, "tokens"), "no type 'tokens'"),
        ("t.bin", b"", (0,), "length must be at least 1"),
        ("none/t.bin", None, (1,), r"t\.bin: No such file"),
        ("t.npy", np.zeros((2, 3), np.int64), (1,), r"shape \(2, 3\)"),
        ("t.npy", b"no numpy file", (1,), r"t\.npy is no \.npy file"),
    ],
)
def test_mistakes_in_token_files(
    tmp_path: Path, name: str, content: bytes | np.ndarray | None, arguments: Any, told: str
) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    with pytest.raises(UsageError, match=told):
        TokenFile(path, *arguments)


def starts(dataset: TokenWindows, epoch: int) -> list[int]:
    dataset.set_epoch(epoch)
    return [int(inputs[0]) for inputs, _ in dataset.__getitems__(list(range(len(dataset))))]


def test_windows_begin_anywhere_evenly(tmp_path: Path) -> None:
    """Each of the 12 places where a window of 9 tokens fits into 20, as nanoGPT's randint."""
    dataset = TokenWindows(tokens(tmp_path / "t.bin", 20), 8, samples=6000)
    assert len(dataset) == 6000
    found = np.bincount(starts(dataset, 0), minlength=12)
    assert len(found) == 12 and np.abs(found - 500).max() < 5 * 500**0.5
    inputs, targets = dataset[5]
    assert inputs.tolist() == list(range(inputs[0], inputs[0] + 8))
    assert torch.equal(targets, inputs + 1)
    with pytest.raises(IndexError):
        dataset[6000]
    # The least that holds one window.
    assert starts(TokenWindows(tokens(tmp_path / "t.bin", 9), 8, 3), 0) == [0, 0, 0]


def test_a_windows_place_follows_from_seed_epoch_and_index(tmp_path: Path) -> None:
    """However it is asked for, and in another process."""
    path, places = tokens(tmp_path / "t.bin", 60_000), {}
    for seed, epoch in [(0, 0), (0, 1), (1, 0)]:
        dataset = TokenWindows(path, 10, 50, seed)
        places[seed, epoch] = starts(dataset, epoch)
        assert [int(dataset[i][0][0]) for i in range(50)] == places[seed, epoch]
        other = pickle.loads(pickle.dumps(TokenWindows(path, 10, 50, seed)))
        assert starts(other, epoch)[::-1] == places[seed, epoch][::-1]
        fetcher = Fetcher(TokenWindows(path, 10, 50, seed), None, seed=3)
        assert fetcher.whole is not None
        inputs, _ = fetcher[Request(epoch, [49, 7])]
        assert inputs[:, 0].tolist() == [places[seed, epoch][49], places[seed, epoch][7]]
    assert len({tuple(found) for found in places.values()}) == 3


def test_mistakes_in_windows(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="samples must be at least 1, not 0"):
        TokenWindows(tokens(tmp_path / "t.bin", 20), 5, 0)
    with pytest.raises(UsageError, match="has 5 tokens; one sample of length 5 needs 6"):
        TokenWindows(tokens(tmp_path / "t.bin", 5), 5, 1)
