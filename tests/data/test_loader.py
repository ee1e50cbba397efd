"""The loader's workers: ahead of their use over epochs, and told of where they fail."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from launcher.data.fetch import Fetcher
from launcher.data.loader import load
from launcher.data.order import sequential
from launcher.data.plan import Plan, Request, train_requests


class Hostile(Dataset):
    """Sample 13 raises, or kills its process after some seconds (600: is stuck)."""

    def __init__(self, how: str, after_s: float) -> None:
        self.how, self.after_s = how, after_s

    def __getitem__(self, index: int) -> int:
        if index == 13:
            if self.how == "raises":
                raise KeyError("no such image")
            time.sleep(self.after_s)
            os.kill(os.getpid(), getattr(signal, self.how))
        return index


HOSTILE = """
import sys, time
from launcher.data.fetch import Fetcher
from launcher.data.loader import load
from launcher.data.plan import Request
from tests.data.test_loader import Hostile
requests = [Request(0, [i, i + 1]) for i in range(0, 50, 2)]
how, after_s, step_s = sys.argv[1], *map(float, sys.argv[2:])
stream = load(Fetcher(Hostile(how, after_s), None, 0), requests, 2, 2, False, 3.0)
try:
    for batch in stream:
        print(batch.tolist(), flush=True)
        time.sleep(step_s)
except Exception as error:
    kept = error  # its traceback holds the stream, as that of any error on its way out does
    print(type(error).__name__, error, flush=True)
stream = None  # as Data.close() does
"""


DIED = ["worker died", "of data set Hostile", "were due"]


@pytest.mark.parametrize(
    ("how", "after_s", "step_s", "told"),
    [
        ("raises", 0, 0, ["sample 13 of data set Hostile failed: KeyError: 'no such image'"]),
        ("SIGKILL", 1, 0, [*DIED, "samples 12, 13", "SIGKILL", "memory"]),
        ("SIGBUS", 1, 0, [*DIED, "samples 12, 13", "/dev/shm is full"]),
        pytest.param("SIGKILL", 0, 0.7, [*DIED, "SIGKILL", "memory"], id="SIGKILL in a step"),
        ("SIGKILL", 600, 0, ["longer than 3 s (DIST.TRAIN_TIMEOUT)", "samples 12, 13", "Hostile"]),
    ],
)
def test_a_worker_that_fails_is_explained_and_the_process_leaves(
    how: str, after_s: float, step_s: float, told: list[str]
) -> None:
    """Workers ignore SIGTERM, which is what Python ends them with at exit: it must not wait."""
    with subprocess.Popen(
        [sys.executable, "-c", HOSTILE, how, str(after_s), str(step_s)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        start_new_session=True,
    ) as process:
        try:
            out, _ = process.communicate(timeout=40)
            with pytest.raises(ProcessLookupError):  # no worker is left either
                os.killpg(process.pid, 0)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    *batches, last = out.splitlines()
    before = [[i, i + 1] for i in range(0, 12, 2)]
    assert [json.loads(batch) for batch in batches] == before[: len(batches)]
    assert last.startswith("RunError ")
    for words in told:
        assert words in last


class Pids(Dataset):
    """A sample is the process it was made in."""

    def __getitem__(self, index: int) -> int:
        time.sleep(0.01)
        return os.getpid()


def test_workers_outlive_epochs_and_stop_signals_and_leave_with_the_stream() -> None:
    requests = [Request(epoch, [i]) for epoch in range(3) for i in range(10)]
    stream = load(Fetcher(Pids(), None, 0), requests, 2, 2, False, 60.0)
    pids = {int(next(stream)) for _ in range(4)}
    assert len(pids) == 2 and os.getpid() not in pids
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        for pid in pids:
            os.kill(pid, name)
        # More than were fetched ahead, so that a worker that has left is missed.
        assert {int(next(stream)) for _ in range(8)} == pids
    stream.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_the_next_epochs_first_batch_is_asked_for_before_this_one_ends() -> None:
    asked = []

    def watched() -> Iterator[Request]:
        for request in train_requests(Plan(40, 10), sequential, 0, 0, 8):
            asked.append(request.epoch)
            yield request

    stream = load(Fetcher(TensorDataset(torch.arange(40)), None, 0), watched(), 1, 2, False, 60.0)
    batches = [next(stream) for _ in range(3)]
    assert asked[-1] == 1  # a batch of epoch 0 is still to come
    samples = torch.cat([batch for (batch,) in [*batches, *stream]])
    assert samples.tolist() == [*range(40), *range(40)]
