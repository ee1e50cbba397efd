"""The data of a run: every sample once an epoch, starts that load nothing before them, refusals."""

import copy
import itertools
import logging
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, TensorDataset
from torch.utils.data.datapipes.iter import IterableWrapper

from launcher.data import splits
from launcher.data.splits import Data
from launcher.errors import UsageError
from launcher.runtime.cpu import CpuBudget
from launcher.runtime.memory import MemoryBudget
from launcher.runtime.process import Runtime
from launcher.runtime.topology import Topology
from tests.data.helpers import Resumable, Stream
from tests.engine.helpers import ALONE, config, recording

LENGTH, VAL = 23, 11
MIB = 2**20
ONE_EPOCH = ("TRAIN.DURATION", "1ep")
# What a checkpoint holds of a Resumable.
RESUMED = {"epoch": 1, "passes": 0, "position": 8, "dataset": {"at": 8}}
MADE: list[Data] = []


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    """The threads; and no workers are left by a test that fails, for the process to wait for."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    while MADE:
        MADE.pop().close()


class Counted(Dataset):
    """Counts over all processes how often each sample was made."""

    def __init__(self, length: int) -> None:
        self.calls = torch.zeros(length, dtype=torch.int32).share_memory_()

    def __len__(self) -> int:
        return len(self.calls)

    def __getitem__(self, index: int) -> int:
        self.calls[index] += 1
        return index


class Fake:
    """A task of which only the data sets count."""

    def __init__(self, train: Any = None, val: Any = None) -> None:
        self.train = Counted(LENGTH) if train is None else train
        self.val = Counted(VAL) if val is None else val

    def build_dataset(self, split: str) -> Any:
        return self.train if split == "train" else self.val


class Collating(Fake):
    """Its collate is a method, so that workers which are not forked are sent the whole task."""

    def __init__(self, train: Any, val: Any = None) -> None:
        super().__init__(train, val)
        self.recorder = recording()

    def collate(self, samples: list[Any]) -> torch.Tensor:
        return torch.tensor(samples)


def data(task: Any, *words: object, workers: int = 0, runtime: Runtime = ALONE) -> Data:
    cfg = config("TRAIN.BATCH_SIZE", 8, "DATALOADER.NUM_WORKERS", workers, *words)
    MADE.append(Data(cfg, task, runtime, lambda phase: None))
    return MADE[-1]


def started(task: Any, *words: object, samples: int = 0, stream: Any = None, **more: Any) -> Data:
    made = data(task, *words, **more)
    made.start(samples, stream, threads=1)
    return made


def rest(made: Data) -> list[list[Any]]:
    """All micro-batches up to the run's end."""
    try:
        return [batch.tolist() for whole in made.batches() for batch in whole.batches]
    finally:
        made.close()


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize(
    ("micro", "samples"), [(0, 0), (3, 0), (0, 8), (0, 16), (0, LENGTH), (0, 31), (0, 62)]
)
def test_every_sample_once_an_epoch_and_a_start_loads_nothing_before_it(
    workers: int, micro: int, samples: int
) -> None:
    words = ("TRAIN.DURATION", "3ep", "TRAIN.MICRO_BATCH_SIZE", micro)
    whole, task = rest(started(Fake(), *words)), Fake()
    found = rest(started(task, *words, samples=samples, workers=workers))
    assert found == whole[-len(found) :] and sum(map(len, found)) == 3 * LENGTH - samples
    indices = [*itertools.chain(*whole)]
    for epoch in range(3):
        assert sorted(indices[epoch * LENGTH : (epoch + 1) * LENGTH]) == list(range(LENGTH))
    calls = torch.bincount(torch.tensor(indices[samples:]), minlength=LENGTH)
    assert task.train.calls.tolist() == calls.tolist()
    assert task.val.calls.sum() == 0


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_evaluation_takes_every_sample_once_in_order(workers: int) -> None:
    task = Fake()
    made = started(task, "EVAL.BATCH_SIZE", 4, workers=workers)
    for turn in (1, 2):
        batches = [batch.tolist() for batch in made.evaluation("val", [0, 1, 2])]
        assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
        assert task.val.calls.tolist() == [turn] * VAL


@pytest.mark.parametrize(
    ("task", "words", "told"),
    [
        (Fake(train=Counted(0)), (), r"build_dataset\('train'\) returned an empty"),
        (Fake(val=Counted(0)), (), r"build_dataset\('val'\) returned an empty"),
        (Fake(), ("TRAIN.BATCH_SIZE", 24, "TRAIN.DROP_LAST", True), r"23.*TRAIN\.DROP_LAST"),
        (Fake(train=Dataset()), (), r"build_dataset\('train'\) .* a Dataset without .*__len__"),
        (Fake(val=Stream()), (), r"build_dataset\('val'\) .* a Stream without .*__len__"),
        (Fake(), ("TRAIN.SAMPLER", "weighted"), r"TRAIN\.SAMPLER .*`weights`"),
        (Fake(), ("TRAIN.SAMPLER", "grouped"), r"TRAIN\.SAMPLER .*`groups`"),
        (Fake(), ("TRAIN.SAMPLER", "dataset"), r"TRAIN\.SAMPLER .*order\(epoch"),
        *(
            (Fake(Resumable()), ("TRAIN.SAMPLER", sampler), f"{sampler}: Resumable is iterable")
            for sampler in ("grouped", "dataset")
        ),
        (
            Fake(train=Stream()),
            (),
            r"give TRAIN\.DURATION, EVAL\.EVERY, CHECKPOINT\.EVERY in steps",
        ),
        (
            Fake(train=Stream()),
            ("TRAIN.DURATION", "9step", "EVAL.EVERY", "", "OPTIM.WARMUP", "1ep"),
            r"give OPTIM\.WARMUP, CHECKPOINT\.EVERY in steps",
        ),
    ],
)
def test_data_sets_that_cannot_be_trained_on(
    task: Fake, words: tuple[object, ...], told: str
) -> None:
    with pytest.raises(UsageError, match=told) as caught:
        data(task, *words)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("steps", [1, 2, 4, 5])
def test_a_stream_with_a_state_goes_on_exactly(workers: int, steps: int) -> None:
    words = ("TRAIN.DURATION", "3ep", "TRAIN.MICRO_BATCH_SIZE", 3)
    whole = started(Collating(Resumable()), *words, workers=workers)
    consumed = 0
    batches = whole.batches()
    for batch in itertools.islice(batches, steps):
        epoch, start = divmod(consumed, LENGTH)
        samples = [sample for part in batch.batches for sample in part.tolist()]
        assert samples == [[epoch, i] for i in range(start, start + batch.count)]
        consumed += batch.count
    saved = whole.stream_state(consumed)
    assert saved is not None
    assert saved["epoch"] * LENGTH + saved["position"] <= consumed
    expected = [part.tolist() for batch in batches for part in batch.batches]
    whole.close()
    resumed = started(
        Collating(Resumable()), *words, samples=consumed, stream=saved, workers=workers
    )
    assert resumed.stream_state(consumed) == saved  # for a checkpoint that comes at once
    assert rest(resumed) == expected


class Skipping(Stream):
    """Its iterator can skip."""

    def __iter__(self) -> Any:
        self.rest = iter(range(self.length))
        return self

    def __next__(self) -> tuple[int, int]:
        return self.epoch, next(self.rest)

    def skip(self, count: int) -> int:
        return len(list(itertools.islice(self.rest, count)))


@pytest.mark.parametrize(
    ("dataset", "samples", "stream", "warned"),
    [
        (Stream(), 8, None, 1),
        (Stream(), 0, None, 0),
        (Resumable(), LENGTH, None, 0),
        (Resumable(), LENGTH + 8, None, 1),
        (Skipping(), 8, None, 0),
        (Resumable(), LENGTH + 8, RESUMED, 0),
    ],
    ids=["no state", "at the start", "at an epoch's end", "no saved state", "skips", "saved"],
)
def test_a_stream_that_must_be_read_again_is_warned_of_once(
    dataset: Any, samples: int, stream: Any, warned: int, caplog: pytest.LogCaptureFixture
) -> None:
    """At the attempt's first batch; passing over what others read is no matter for a warning."""
    caplog.set_level(logging.WARNING, "launcher")
    words = ("TRAIN.DURATION", "9step", "EVAL.EVERY", "3step", "CHECKPOINT.EVERY", "")
    for rank in (0, 1):
        runtime = Runtime(Topology(rank=rank, world_size=2), torch.device("cpu"), ALONE.cpu)
        made = started(
            Fake(train=copy.deepcopy(dataset)),
            *words,
            samples=samples,
            stream=stream,
            runtime=runtime,
        )
        for batch in itertools.islice(made.batches(), 4):
            assert len([*batch.batches]) == 1
    assert caplog.text.count("is read again") == warned


@pytest.mark.parametrize(("kind", "warned"), [(Stream, 1), (Skipping, 0)])
def test_a_worker_tells_that_it_reads_again(kind: type, warned: int, tmp_path: Path) -> None:
    """And no iterator is made in the rank's own process."""
    handler, log = logging.FileHandler(tmp_path / "log"), logging.getLogger("launcher")
    log.addHandler(handler)
    try:
        dataset = kind()
        words = ("TRAIN.DURATION", "9step", "EVAL.EVERY", "3step", "CHECKPOINT.EVERY", "")
        made = started(Fake(train=dataset), *words, samples=8, workers=2)
        for batch in itertools.islice(made.batches(), 5):
            assert len([*batch.batches]) == 1
        made.close()
    finally:
        log.removeHandler(handler)
    assert (tmp_path / "log").read_text().count("is read again") == warned
    assert dataset.made == [] and not hasattr(dataset, "rest")


@pytest.mark.parametrize(
    ("env", "threads", "expected"), [({}, 3, 3), ({}, 0, 1), ({"OMP_NUM_THREADS": "2"}, 3, 2)]
)
def test_threads_of_the_rank(
    monkeypatch: pytest.MonkeyPatch, env: dict[str, str], threads: int, expected: int
) -> None:
    """What the run had before wins over the budget, and the user's value over both."""
    monkeypatch.setattr(os, "environ", env)
    torch.set_num_threads(2)
    data(Fake()).start(0, threads=threads)
    assert torch.get_num_threads() == expected


@pytest.mark.parametrize("rank", [0, 1])
def test_a_global_batch_is_the_same_on_all_ranks_but_for_their_parts(rank: int) -> None:
    """9 samples by 4: the last batch of an epoch has one, which is rank 0's."""
    runtime = Runtime(Topology(rank=rank, world_size=2), torch.device("cpu"), ALONE.cpu)
    words = ("TRAIN.DURATION", "2ep", "TRAIN.BATCH_SIZE", 4, "TRAIN.MICRO_BATCH_SIZE", 1)
    found = []
    for batch in started(Fake(Counted(9)), *words, samples=4, runtime=runtime).batches():
        found.append((batch.count, batch.sizes))
        assert [len(part) for part in batch.batches] == batch.sizes
    epoch = [(4, [1, 1]), (4, [1, 1]), (1, [1] if rank == 0 else [])]
    assert found == [*epoch, *epoch][1:]


class Slow(Counted):
    def __getitem__(self, index: int) -> int:
        time.sleep(0.01)
        return index


def test_waiting_for_data_is_told_and_timed() -> None:
    told: list[str] = []
    made = Data(config("TRAIN.BATCH_SIZE", 8), Fake(Slow(LENGTH)), ALONE, told.append)
    made.start(0, threads=1)
    batches = made.batches()
    for _ in range(2):
        (_,) = next(batches).batches
    assert told == ["data", "step"] * 2
    assert made.waited >= 0.08  # of the second batch: `start` waits for the first


class Pids(Counted):
    """A sample is its index and the process it was made in."""

    taken = 0  # in this process

    def __getitem__(self, index: int) -> tuple[int, int]:
        self.taken += 1
        return index, os.getpid()


@pytest.mark.parametrize(
    "how", ["fork", "spawn", pytest.param("forkserver", marks=pytest.mark.slow)]
)
def test_no_sample_is_taken_here_where_there_are_workers(how: str) -> None:
    """However they are started: what a data set opens on first use would be shared over a fork."""
    torch.multiprocessing.set_start_method(how, force=True)
    try:
        task = Collating(Pids(LENGTH), Pids(LENGTH))
        made = started(task, *ONE_EPOCH, "EVAL.BATCH_SIZE", 8, workers=1)
        train = [part for batch in made.batches() for part in batch.batches]
        val = list(made.evaluation("val", range(made.eval_plan("val").steps_per_epoch)))
        made.close()
    finally:
        torch.multiprocessing.set_start_method(None, force=True)
    assert (task.train.taken, task.val.taken) == (0, 0)
    for batches in (train, val):
        indices, pids = torch.cat(batches).T.tolist()
        assert sorted(indices) == list(range(LENGTH))
        assert len(set(pids)) == 1 and os.getpid() not in pids


def test_a_data_sets_own_collate_wins_over_the_tasks() -> None:
    """Each split by itself; what is in memory is then asked sample by sample."""
    own = TensorDataset(torch.arange(LENGTH))
    own.collate = lambda samples: ("own", [int(x) for (x,) in samples])
    task = Collating(own, Counted(VAL))
    made = started(task, *ONE_EPOCH, "TRAIN.SAMPLER", "sequential", "EVAL.BATCH_SIZE", 8)
    assert data(Fake(own)).kinds["train"] == "map-style"
    train = [part for batch in made.batches() for part in batch.batches]
    assert train[:2] == [("own", list(range(8))), ("own", list(range(8, 16)))]
    assert [batch.tolist() for batch in made.evaluation("val", [0, 1])] == [[*range(8)], [8, 9, 10]]
    stream = Resumable()
    stream.collate = len  # type: ignore[attr-defined]
    made = started(Collating(stream, own), *ONE_EPOCH)
    assert [part for batch in made.batches() for part in batch.batches] == [8, 8, 7]
    assert next(made.evaluation("val", [0])) == ("own", list(range(VAL + 12)))


def test_the_collate_of_a_data_pipe_is_another_thing() -> None:
    pipe = IterableWrapper(range(LENGTH))
    assert callable(pipe.collate)
    made = started(Collating(pipe, Counted(VAL)), *ONE_EPOCH)
    assert sorted(itertools.chain(*rest(made))) == list(range(LENGTH))


class Mebibytes(Counted):
    """1 MiB a sample."""

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((MIB // 8,), super().__getitem__(index), dtype=torch.int64)


@pytest.mark.parametrize(
    ("shm", "workers"), [(1000, 4), (64, 2), (20, 0)], ids=["all fit", "two fit", "none fits"]
)
def test_the_loader_starts_over_with_as_many_workers_as_the_first_batch_leaves_room_for(
    shm: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker has two batches of 8 MiB in half of /dev/shm. Threads follow from the CPUs alone."""
    free = MemoryBudget(2**40, shm * MIB, False, "free memory")
    monkeypatch.setattr(splits, "memory_budget", lambda: free)
    runtime = Runtime(Topology(), torch.device("cpu"), CpuBudget(8, 8, 8, "a test"))
    before = set(multiprocessing.active_children())
    made = data(Fake(Mebibytes(LENGTH)), *ONE_EPOCH, workers=-1, runtime=runtime)
    made.start(8)
    assert len(set(multiprocessing.active_children()) - before) == workers
    assert (made.size.workers, made.size.threads, torch.get_num_threads()) == (workers, 4, 4)
    assert ("/dev/shm" in made.size.reason) is (workers < 4)
    whole = rest(started(Fake(), *ONE_EPOCH, samples=8))
    assert [[sample[0] for sample in part] for part in rest(made)] == whole


def test_what_is_never_evaluated_need_not_exist() -> None:
    asked: list[str] = []

    class Only(Fake):
        def build_dataset(self, split: str) -> Any:
            asked.append(split)
            return super().build_dataset(split)

    made = data(Only(), "EVAL.EVERY", "", *ONE_EPOCH)
    assert asked == ["train"] and made.lengths == {"train": LENGTH}
    assert made.eval_plan("val").length == VAL and asked == ["train", "val"]
