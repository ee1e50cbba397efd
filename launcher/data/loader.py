"""Loaders: a DataLoader that is handed requests and answers with batches.

One iterator serves a whole attempt. Epochs are part of the requests, so workers live on across
them, the next epoch's first batch is fetched before this one ends, and nobody calls `set_epoch`.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from launcher.data.fetch import Request
from launcher.data.iterable import STATE_EVERY, Span
from launcher.data.order import Order
from launcher.data.plan import Plan
from launcher.errors import RunError
from launcher.runtime.memory import memory_budget, oom_kills

logger = logging.getLogger(__name__)
_RUN_ERROR = f"{RunError.__module__}.{RunError.__qualname__}"
# Indices are computed for about this many positions at a time: numpy's cost a call is then shared.
POSITIONS_AT_ONCE = 4096


def train_requests(plan: Plan, order: Order, rank: int, first: int, last: int) -> Iterator[Request]:
    """A rank's micro-batches of global batches [first, last), counted over all epochs.

    Seeking is arithmetic: nothing before `first` is computed or loaded.
    """
    step = first
    while step < last:
        epoch, k = divmod(step, plan.steps_per_epoch)
        # As many steps as make one good numpy call, up to the end of the epoch.
        many = max(1, POSITIONS_AT_ONCE * plan.world_size // plan.batch_size)
        count = min(many, plan.steps_per_epoch - k, last - step)
        cuts = [cut for i in range(count) for cut in plan.micro_batches(k + i, rank)]
        if cuts:
            positions = np.concatenate([np.arange(start, stop) for start, stop in cuts])
            indices = order(epoch, positions).tolist()
            at = 0
            for start, stop in cuts:
                yield Request(epoch, indices[at : at + stop - start])
                at += stop - start
        step += count


def stream_requests(plan: Plan, rank: int, first: int, last: int) -> Iterator[Span]:
    """The same for an iterable data set, whose order is its own."""
    for step in range(first, last):
        epoch, k = divmod(step, plan.steps_per_epoch)
        for i, (start, stop) in enumerate(plan.micro_batches(k, rank)):
            yield Span(epoch, start, stop, state=rank == 0 and i == 0 and k % STATE_EVERY == 0)


def eval_batches(plan: Plan, rank: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of a rank's batches of an evaluation: whole batches dealt in turn, nothing
    padded or dropped.

    A batch holds the same samples at any number of ranks, so each sample's result is the same to
    the last bit.
    """
    return (plan.batch(k) for k in range(rank, plan.steps_per_epoch, plan.world_size))


class _Requests(Sampler):
    """Hands out the requests once, and remembers those not answered yet."""

    def __init__(self, requests: Iterator[Any]) -> None:
        self.requests = requests
        self.pending: deque[Any] = deque()

    def __iter__(self) -> Iterator[Any]:
        for request in self.requests:
            self.pending.append(request)
            yield request


def load(
    fetcher: Dataset,
    requests: Iterable[Any],
    workers: int,
    prefetch: int,
    pin_memory: bool,
    timeout_s: float,
) -> Iterator[Any]:
    """The answers to the requests, in order, fetched by `workers` processes ahead of their use.

    Raises RunError that names the samples for a worker that failed, was killed, or took longer
    than `timeout_s` for one batch.
    """
    sampler = _Requests(iter(requests))
    loader = DataLoader(
        fetcher,
        sampler=sampler,
        batch_size=None,  # a request is a whole batch already
        collate_fn=_as_is,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        timeout=timeout_s if workers else 0,
        # Its base seed must not be drawn from the global generator: a resumed run would draw it
        # at another moment than the uninterrupted one.
        generator=torch.Generator().manual_seed(0),
    )
    killed_before, others = oom_kills(), set(multiprocessing.active_children())
    handler = signal.getsignal(signal.SIGCHLD)
    iterator = iter(loader)
    if threading.current_thread() is threading.main_thread():
        # torch's own handler raises wherever the training happens to be when a worker dies; the
        # next batch tells of it as well, within 5 s.
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
    processes = set(multiprocessing.active_children()) - others
    try:
        while True:
            failure = None
            try:
                answer = next(iterator)
            except StopIteration:
                return
            except (RunError, RuntimeError) as error:
                # torch puts a worker's whole traceback into the message: that is for the log file.
                logger.error("%s", error, extra={"file_only": True})
                if isinstance(error, RunError):
                    failure = str(error).rpartition(f"{_RUN_ERROR}: ")[2].strip()
                else:
                    failure = _explain(
                        str(error), fetcher, sampler.pending, timeout_s, killed_before, processes
                    )
                if failure is None:
                    raise
            if failure is not None:
                for process in processes:
                    process.kill()  # nobody waits for what they are at
                raise RunError(failure)
            sampler.pending.popleft()
            yield answer
    finally:
        # Tells the workers to leave, and waits for them a while. What the iterator does itself when
        # it is dropped comes too late: an error's traceback keeps it.
        shut_down = getattr(iterator, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()
        for process in processes:
            if process.is_alive():  # stuck in a read, say; it ignores SIGTERM
                process.kill()


def _explain(
    error: str,
    fetcher: Any,
    pending: deque[Any],
    timeout_s: float,
    killed_before: int,
    processes: set[BaseProcess],
) -> str | None:
    """What a DataLoader's own error means; None for an error that is not about its workers."""
    name = type(getattr(fetcher, "dataset", fetcher)).__name__
    waiting = _samples(pending[0]) if pending else "its batch"
    if "timed out" in error:
        return (
            f"a loader worker took longer than {timeout_s:g} s (DIST.TRAIN_TIMEOUT) for {waiting} "
            f"of data set {name}: is a file or a server it reads from stuck?"
        )
    if "exited unexpectedly" not in error and "killed by signal" not in error:
        return None
    memory = memory_budget()
    codes = [-p.exitcode for p in processes if p.exitcode is not None and p.exitcode < 0]
    cause = f"killed by {signal.Signals(codes[0]).name}" if codes else "it exited by itself"
    if oom_kills() > killed_before:
        cause = "the kernel killed it for memory (oom_kill of its cgroup rose)"
    elif signal.SIGBUS in codes or "Bus error" in error:
        cause = "bus error: /dev/shm is full"
    elif signal.SIGKILL in codes:
        cause += ", as the kernel does when memory is short"
    shm = "" if memory.shm is None else f", /dev/shm {memory.shm / 2**30:.2f} GiB"
    return (
        f"a loader worker died while {waiting} of data set {name} were due: {cause}. Free "
        f"now: memory {memory.available / 2**30:.1f} GiB{shm}. Fewer DATALOADER.NUM_WORKERS or a "
        "smaller DATALOADER.PREFETCH_FACTOR need less of both."
    )


def _samples(request: Any) -> str:
    if isinstance(request, Request):
        shown = ", ".join(map(str, request.indices[:8]))
        more = f", ... ({len(request.indices)} in all)" if len(request.indices) > 8 else ""
        return f"samples {shown}{more}"
    return f"samples {request.start} to {request.stop - 1}"


def _as_is(batch: Any) -> Any:
    return batch


def _start_worker(worker_id: int) -> None:
    # A stop request is for the rank, which ends its workers itself once it has saved.
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    # torch itself gives a worker one thread; libraries that it loads later get one too.
    os.environ["OMP_NUM_THREADS"] = "1"
