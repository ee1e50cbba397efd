"""What goes wrong between a loader worker and the main process is told at once, with its remedy.

Each case runs in a process of its own, whose limits and start method are its own. The loader's
timeout is an hour: a case that waits for it never ends.
"""

import contextlib
import errno
import gc
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from launcher.data.fetch import Fetcher
from launcher.data.loader import load
from launcher.data.plan import Request
from launcher.edges.sending import SMALL, Parcel, explained
from launcher.edges.sending import told as sending_told


def slow(value: str) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


ROOT = Path(__file__).parents[2]
HOUR = 3600.0
# A worker has an open file for each of them, or more; so has the main process.
MANY = 400


class Refuses:
    def __reduce__(self) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Opens:
    """Pickled well, and opened by nobody."""

    def __reduce__(self) -> Any:
        return open, ("/no/such/file",)


class LocalError:
    @staticmethod
    def make() -> Exception:
        class Inside(Exception):
            pass

        return Inside("in a class of its own")


class Faulty(Dataset):
    """A sample is what `kind` says; the collate that comes with it is to keep it as it is."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        if kind == "unpicklable":
            self.lock = threading.Lock()

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        if index < 4 or self.kind == "unpicklable":
            return torch.tensor(index)
        made: Any = {
            "gradient": lambda: torch.ones(2, requires_grad=True) * 2,
            "generator": lambda: (i for i in range(3)),
            "local class": lambda: type("Nameless", (), {})(),
            "lambda": lambda: lambda: 1,
            "shm": Refuses,
            "opened": Opens,
            "many": lambda: [large([1]) for _ in range(MANY)],
            "exits": lambda: os._exit(3),
        }
        return made[self.kind]()


def large(samples: list[Any]) -> Any:
    """Too large to be sent but by shared memory."""
    return torch.nn.functional.pad(torch.tensor([float(samples[0])]), (0, SMALL))


def as_is(samples: list[Any]) -> Any:
    return samples


def failing(samples: list[Any]) -> Any:
    raise LocalError.make()


TOLD = {
    "gradient": ["samples 4, 5 of data set Faulty", "sent", "requires_grad", ".detach()"],
    "generator": ["samples 4, 5 of data set Faulty", "'generator'", "DATALOADER.NUM_WORKERS 0"],
    "local class": ["samples 4, 5 of data set Faulty", "Nameless", "DATALOADER.NUM_WORKERS 0"],
    "lambda": ["samples 4, 5 of data set Faulty", "lambda", "DATALOADER.NUM_WORKERS 0"],
    "shm": ["samples 4, 5 of data set Faulty", "No space left", "/dev/shm is full"],
    "opened": ["samples 4, 5 of data set Faulty could not be opened", "/no/such/file"],
    # The worker runs out of files as it makes these, or as it hands out those before.
    "many": ["of data set Faulty could not be", "open file", "ulimit -n", "stack"],
    "exits": ["worker died", "of data set Faulty were due", "exited by itself"],
    "error of a local class": ["samples 0, 1 of data set Faulty failed", "in a class of its own"],
}
ALIKE = ("generator", "lambda", "shm", "error of a local class")  # to others of these
RUN = """
import resource, sys
import torch.multiprocessing
from launcher.data.loader import load
from tests.edges import test_sending as cases
if __name__ == "__main__":
    kind, how = sys.argv[1:]
    torch.multiprocessing.set_start_method(how)
    if kind == "many":
        resource.setrlimit(resource.RLIMIT_NOFILE, (cases.MANY, cases.MANY))
    collate = cases.failing if kind == "error of a local class" else cases.as_is
    stream = load(*cases.asked(kind, collate), 2, 2, False, cases.HOUR)
    try:
        for batch in stream:
            print(batch)
    except Exception as error:
        print(type(error).__name__, error)
    stream = None
"""


def asked(kind: str, collate: Any = as_is) -> tuple[Fetcher, list[Request]]:
    return Fetcher(Faulty(kind), collate, 0), [Request(0, [i, i + 1]) for i in range(0, 8, 2)]


def outcome(script: str, *words: str, folder: Path, **env: str) -> str:
    """What a script printed, when it and all its workers have gone."""
    (folder / "case.py").write_text(script)
    with subprocess.Popen(
        [sys.executable, folder / "case.py", *words],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        start_new_session=True,
    ) as process:
        try:
            return process.communicate(timeout=300)[0]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("how", ["fork", slow("spawn")])
@pytest.mark.parametrize("kind", [k if k not in ALIKE else slow(k) for k in TOLD])
def test_an_error_between_two_processes_is_told_at_once(
    kind: str, how: str, tmp_path: Path
) -> None:
    *_, last = outcome(RUN, kind, how, folder=tmp_path).splitlines()
    assert last.startswith("RunError ")
    for words in TOLD[kind]:
        assert words in last


@pytest.mark.parametrize("how", ["spawn", slow("forkserver")])
def test_a_data_set_that_cannot_be_sent_to_its_workers_is_named(how: str, tmp_path: Path) -> None:
    told = outcome(RUN, "unpicklable", how, folder=tmp_path)
    assert told.startswith("RunError data set Faulty could not be sent")
    assert "lock" in told and "DATALOADER.NUM_WORKERS 0" in told
    assert told.count("Only what can be pickled") == 1


def test_a_data_set_that_a_spawned_worker_does_not_find_is_named(tmp_path: Path) -> None:
    here = "class Lost(cases.Faulty): pass\n\nif __name__"
    script = RUN.replace("if __name__", here, 1).replace("sys.argv[1:]", "sys.argv[1:]", 1)
    script = script.replace("stream = load", "Lost.__module__ = 'nowhere'; "
                            "sys.modules['nowhere'] = sys.modules['__main__']; "
                            "fetcher, requests = cases.asked(kind, collate); "
                            "fetcher.dataset = Lost(kind)\n    stream = load").replace(
                            "*cases.asked(kind, collate)", "fetcher, requests")  # fmt: skip
    told = outcome(script, "gradient", "spawn", folder=tmp_path)
    assert told.startswith("RunError data set Lost could not be opened: ModuleNotFoundError")
    assert "nowhere" in told


ROOM = """
import resource, sys
import torch.multiprocessing
from launcher.data.loader import load
from tests.edges import test_sending as cases
if __name__ == "__main__":
    torch.multiprocessing.set_start_method(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (cases.MANY, 4 * cases.MANY))
    requests = [cases.Request(0, [4]), cases.Request(0, [5])]
    fetcher = cases.Fetcher(cases.Faulty("many"), cases.as_is, 0)
    for batch in load(fetcher, requests, 1, 1, False, cases.HOUR):
        print(sum(int(tensor.sum()) for tensor in batch[0]))
"""


@pytest.mark.parametrize("how", ["fork", slow("spawn"), slow("forkserver")])
def test_batches_of_many_tensors_have_as_many_open_files_as_the_hard_limit_allows(
    how: str, tmp_path: Path
) -> None:
    assert outcome(ROOM, how, folder=tmp_path).split() == [str(MANY)] * 2


LONG = """
import sys, tempfile
import torch.multiprocessing
from launcher.data.loader import load
from tests.edges import test_sending as cases
if __name__ == "__main__":
    torch.multiprocessing.set_start_method(sys.argv[1])
    fetcher = cases.Fetcher(cases.Faulty("many"), None, 0)
    batches = load(fetcher, [cases.Request(0, [i, i + 1]) for i in (0, 2)], 1, 2, False, cases.HOUR)
    print([batch.tolist() for batch in batches], len(tempfile.gettempdir()))
"""


@pytest.mark.parametrize("how", ["fork", slow("spawn"), slow("forkserver")])
def test_a_long_path_of_temporary_files_is_no_hindrance(how: str, tmp_path: Path) -> None:
    long = tmp_path / ("t" * (120 - len(str(tmp_path)) - 1))
    long.mkdir()
    told = outcome(LONG, how, folder=tmp_path, TMPDIR=str(long))
    assert told == "[[0, 1], [2, 3]] 120\n"


def test_workers_that_cannot_be_started_leave_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two finds no room for a process."""
    process = torch.multiprocessing.Process
    started: list[Any] = []

    def start(self: Any) -> None:
        if started:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        started.append(self)
        begin(self)

    begin = process.start
    monkeypatch.setattr(process, "start", start)
    ignored: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    with pytest.raises(Exception, match="workers could not be started") as caught:
        next(load(*asked("gradient"), 2, 2, False, HOUR))
    assert "DATALOADER.NUM_WORKERS" in str(caught.value)
    started[0].join(60)
    assert started[0].exitcode == -signal.SIGKILL
    del caught  # and with the traceback the iterator that was begun
    gc.collect()
    assert not ignored


def test_what_the_main_process_cannot_open_is_told_with_the_remedy() -> None:
    """It has as many open files as it may."""
    stream = load(*asked("gradient", large), 1, 2, False, HOUR)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert next(stream)[0] == 0
    refused = pytest.raises(Exception, match=r"samples 2, 3 of .* could not be opened.*ulimit -n")
    with contextlib.ExitStack() as opened:
        opened.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
        with contextlib.suppress(OSError):
            while True:
                opened.enter_context(open(os.devnull))
        with refused:
            next(stream)


@pytest.mark.parametrize(
    ("exitcode", "told"),
    [
        (3, "it exited by itself, [3]"),
        (0, "it exited by itself, [0]"),
        (-9, "killed by SIGKILL. The kernel"),
        (None, "open file"),
    ],
)
def test_a_worker_that_is_gone_before_its_batch_is_fetched_is_told_of(
    exitcode: int | None, told: str
) -> None:
    """Fetching tells only that nobody answers; where the worker lives, it has no file left."""
    error = sending_told("samples 4 could not be opened", EOFError())
    worker = SimpleNamespace(exitcode=exitcode, join=lambda seconds: None)
    found = str(explained(error, "samples 4", 1.0, [worker], False))
    assert told in found and ("worker died" in found) is (exitcode is not None)


class Broken(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("error", "told"), [(StopIteration(), "StopIteration"), (Broken(), "Broken")]
)
def test_an_error_of_collate_names_the_samples(error: Exception, told: str, workers: int) -> None:
    def collate(samples: list[Any]) -> Any:
        raise error

    with pytest.raises(Exception, match=f"samples 0, 1 of data set Faulty failed: {told}"):
        next(load(*asked("gradient", collate), workers, 2, False, HOUR))


def test_tensors_go_through_shared_memory() -> None:
    parcel = Parcel("a batch", {"x": torch.arange(100_000)})
    assert len(parcel.content) < 1000
    assert parcel.open()["x"].tolist() == list(range(100_000))


PLAIN = {
    "floats": torch.arange(6.0).view(2, 3),
    "halves": torch.arange(6).to(torch.bfloat16),
    "complex": torch.tensor([1 + 2j, 3 - 1j]),
    "flags": torch.tensor([True, False]),
    "number": torch.tensor(7),
    "none": torch.empty(0, 3),
    "conjugate": torch.tensor([1 + 2j]).conj(),
    "negative": torch.tensor([[1 + 2j, 3 - 1j], [0j, 5j]]).t().conj().imag,
}
OTHERS = {
    "large": torch.arange(float(SMALL)),
    "part": torch.arange(12.0)[3:7],
    "turned": torch.arange(6.0).view(2, 3).t(),
    "sparse": torch.eye(3).to_sparse(),
    "weight": torch.nn.Parameter(torch.ones(2), requires_grad=False),
    "wide": torch.ones(1).expand(4),
}


@pytest.mark.parametrize("name", [*PLAIN, *OTHERS])
def test_small_tensors_are_sent_as_they_are(name: str) -> None:
    """Numbers, types and shapes of all arrive; of the small ones no file is left open, and what
    arrives may be written into."""
    tensor: Any = {**PLAIN, **OTHERS}[name]
    sent = Parcel("it", [tensor, {"again": tensor}])
    assert (b"_tensor_of" in sent.content) == (name in PLAIN)
    first, second = sent.open()
    assert type(first) is type(tensor) and first.dtype == tensor.dtype
    assert torch.equal(first.to_dense(), tensor.to_dense()) and first.shape == tensor.shape
    assert second["again"] is first
    if name in PLAIN and first.numel():
        first.zero_()
        assert tensor.to_dense().any()


def test_what_shares_its_memory_still_does() -> None:
    one = torch.arange(6.0)
    first, second = Parcel("it", [one, one.view(2, 3)]).open()
    first.fill_(5)
    assert (second == 5).all()
