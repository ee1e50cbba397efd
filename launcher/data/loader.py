"""A DataLoader that is handed requests and answers with batches, and their way to the device.

One iterator serves an attempt: epochs are part of the requests, so workers live on across them.
"""

from __future__ import annotations

import gc
import itertools
import os
import signal
import time
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from launcher.data.plan import Request
from launcher.edges import sending
from launcher.edges.batch import mover, pinned
from launcher.log import get_logger
from launcher.runtime.memory import oom_kills

logger = get_logger(__name__)
POLL_S = 1.0  # how often a wait for a batch looks whether the workers live


def load(
    fetcher: Any,
    requests: Iterable[Request],
    workers: int,
    prefetch: int,
    pin_memory: bool,
    timeout_s: float,
) -> Generator[Any, None, None]:
    """The answers to the requests, in order, fetched by `workers` processes ahead of their use.

    Raises RunError that names the samples for a worker that failed, was killed, or took longer
    than `timeout_s` for one batch. Closing it ends the workers.
    """
    sender = sending.Sender(fetcher)
    if not workers:
        for batch in map(sender.fetched, requests):
            yield pinned(batch) if pin_memory else batch
        return
    requests, unanswered = itertools.tee(requests)
    loader: DataLoader[Any] = DataLoader(
        sender,  # type: ignore[arg-type]
        sampler=requests,
        batch_size=None,  # a request is a whole batch already
        num_workers=workers,
        prefetch_factor=prefetch,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        timeout=POLL_S,
        # Not from the global generator: a resumed run would draw its base seed at another moment.
        generator=torch.Generator().manual_seed(0),
    )
    killed_before, handler = oom_kills(), signal.getsignal(signal.SIGCHLD)
    iterator = None
    try:
        sending.make_room()
        try:
            iterator = sending.Workers(loader)
        except OSError as error:
            raise sending.told("the loader workers could not be started", error) from error
        # torch's own handler raises wherever the training happens to be when a worker dies; the
        # next batch tells of it as well.
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                answer = next(iterator)
            except StopIteration:
                return
            except RuntimeError as error:
                if time.monotonic() > deadline or not str(error).startswith(sending.TIMED_OUT):
                    raise
                continue
            # One that was to be pinned is open already.
            batch = answer.open() if isinstance(answer, sending.Parcel) else answer
            next(unanswered)
            yield batch
            deadline = time.monotonic() + timeout_s
    except Exception as error:
        # torch puts a worker's whole traceback into the message: that is for the log file.
        logger.error("%s", error, extra={"file_only": True})
        processes = [] if iterator is None else iterator._workers
        asked = sending.named(next(unanswered, None))
        due = f"{asked} of data set {type(fetcher.dataset).__name__}"
        failure = sending.explained(error, due, timeout_s, processes, oom_kills() > killed_before)
        if iterator is not None:
            iterator.kill()
        raise failure from None
    finally:
        # Tells the workers to leave, and waits a while. What the iterator does when it is dropped
        # comes too late: an error's traceback keeps it.
        if iterator is not None:
            iterator._shutdown_workers()
            iterator.kill()


def _start_worker(worker_id: int) -> None:
    gc.freeze()  # what the rank left behind, such as gloo's threads, cannot be taken down in a fork
    # A stop request is for the rank, which ends its workers itself once it has saved.
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    # torch itself gives a worker one thread; libraries that it loads later get one too.
    os.environ["OMP_NUM_THREADS"] = "1"
    sending.make_room()  # a fork server keeps the limits that it was started with


def on_device(batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """The batches on the device; on CUDA copied on a stream of their own, one batch ahead, so that
    the copy of the next batch runs beside the computation on this one."""
    moved = mover(device)
    if device.type != "cuda":
        yield from map(moved, batches)
        return
    side = torch.cuda.Stream(device)
    ahead: list[tuple[Any, torch.cuda.Event]] = []

    def ready() -> Any:
        batch, copied = ahead.pop(0)
        # The device, not the host, waits for the copy.
        torch.cuda.current_stream(device).wait_event(copied)
        return batch

    for batch in batches:
        # The device, not the host, waits for what is queued by now: it may use a batch that was let
        # go of, whose memory the copy takes.
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            ahead.append((moved(batch), side.record_event()))
        if len(ahead) > 1:  # a batch is handed out when the next one has come
            yield ready()
    while ahead:
        yield ready()
