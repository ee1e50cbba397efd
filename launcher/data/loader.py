"""A DataLoader that is handed requests and answers with batches, and their way to the device.

One iterator serves an attempt: epochs are part of the requests, so workers live on across them.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader

from launcher.data.plan import Request
from launcher.edges.loading import explain, named
from launcher.errors import UsageError
from launcher.log import get_logger
from launcher.runtime.memory import oom_kills
from launcher.runtime.nest import map_tensors

logger = get_logger(__name__)


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
    pending: deque[Request] = deque()  # handed out, and not answered yet

    def handed_out() -> Iterator[Request]:
        for request in requests:
            pending.append(request)
            yield request

    loader = DataLoader(
        fetcher,
        sampler=handed_out(),
        batch_size=None,  # a request is a whole batch already
        collate_fn=_as_is,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        timeout=timeout_s if workers else 0,
        # Not from the global generator: a resumed run would draw its base seed at another moment.
        generator=torch.Generator().manual_seed(0),
    )
    killed_before, handler = oom_kills(), signal.getsignal(signal.SIGCHLD)
    iterator = iter(loader)
    # torch's own handler raises wherever the training happens to be when a worker dies; the next
    # batch tells of it as well, within 5 s.
    signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
    processes: list[BaseProcess] = list(getattr(iterator, "_workers", []))
    try:
        for answer in iterator:
            pending.popleft()
            yield answer
    except (UsageError, RuntimeError) as error:
        if not workers:
            raise
        # torch puts a worker's whole traceback into the message: that is for the log file.
        logger.error("%s", error, extra={"file_only": True})
        due = named(pending[0] if pending else None)
        waited_for = f"{due} of data set {type(fetcher.dataset).__name__}"
        failure = explain(error, waited_for, timeout_s, processes, oom_kills() > killed_before)
        for process in processes:
            process.kill()  # nobody waits for what they are at
        raise failure from None
    finally:
        # Tells the workers to leave, and waits a while. What the iterator does when it is dropped
        # comes too late: an error's traceback keeps it.
        if workers:
            iterator._shutdown_workers()  # type: ignore[attr-defined]
        for process in processes:
            if process.is_alive():  # stuck in a read, say; it ignores SIGTERM
                process.kill()


def _as_is(batch: Any) -> Any:
    return batch


def _start_worker(worker_id: int) -> None:
    # A stop request is for the rank, which ends its workers itself once it has saved.
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    # torch itself gives a worker one thread; libraries that it loads later get one too.
    os.environ["OMP_NUM_THREADS"] = "1"


def nbytes(batch: Any) -> int:
    """Bytes of all tensors in a batch."""
    sizes: list[int] = []
    map_tensors(batch, lambda tensor: sizes.append(tensor.numel() * tensor.element_size()))
    return sum(sizes)


def on_device(batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """The batches on the device; on CUDA copied on a stream of their own, one batch ahead, so that
    the copy of the next batch runs beside the computation on this one."""

    def moved(batch: Any) -> Any:
        # A copy from pinned memory does not wait for the device.
        return map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))

    if device.type != "cuda":
        yield from map(moved, batches)
        return
    side = torch.cuda.Stream(device)
    ahead: list[tuple[Any, torch.cuda.Event]] = []
    for batch in batches:
        with torch.cuda.stream(side):
            ahead.append((moved(batch), side.record_event()))
        if len(ahead) > 1:  # a batch is handed out when the next one has come
            yield _ready(*ahead.pop(0), device)
    for last in ahead:
        yield _ready(*last, device)


def _ready(batch: Any, copied: torch.cuda.Event, device: torch.device) -> Any:
    current = torch.cuda.current_stream(device)
    # The device, not the host, waits for the copy.
    current.wait_event(copied)
    # The allocator must not hand this memory to the side stream while the current one uses it.
    map_tensors(batch, lambda tensor: tensor.record_stream(current))
    return batch
