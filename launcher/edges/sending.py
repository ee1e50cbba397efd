"""What passes between a loader worker and its rank, and what goes wrong on the way, with remedies.

A batch is pickled by the one who made it, not by a queue's own thread, which would print an error,
lose the batch, and let the rank wait for it.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing.util
import os
import pickle
import re
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from launcher.edges.batch import pinned
from launcher.errors import RunError, UsageError

TIMED_OUT = "DataLoader timed out"  # how torch begins to tell of it
# What to do about an error, by what stands in its message. The first that fits counts.
REMEDIES = {
    # A worker that has no file left to hand another out drops the connection.
    "Too many open files|ancdata|opened: EOFError": "Each tensor of a batch is an open file until "
    "it is used: stack them in collate, raise the limit (ulimit -n), or lower "
    "DATALOADER.PREFETCH_FACTOR; DATALOADER.NUM_WORKERS 0 needs none.",
    "shared memory|/torch_|sent.*No space left|SIGBUS": "/dev/shm is full: make it larger, or "
    "lower DATALOADER.NUM_WORKERS or DATALOADER.PREFETCH_FACTOR; 0 workers need none.",
    "sent.*requires_grad": "A tensor has a gradient: .detach() it, or make it in torch.no_grad().",
    "died.*(SIGKILL|memory)|temporarily unavailable|allocate memory": "The kernel does so when it "
    "is short of memory or processes: lower DATALOADER.NUM_WORKERS or DATALOADER.PREFETCH_FACTOR.",
    "longer than": "Is a file or a server that it reads from stuck?",
    "be (sent|opened)": "Only what can be pickled passes between processes: what a module defines "
    "by its name, no open file, lock or generator. Give plain values and tensors, open files on "
    "first use, or set DATALOADER.NUM_WORKERS 0.",
}


# Bytes of a tensor up to which they are sent as they are: shared memory costs half a millisecond,
# and an open file until it is used.
SMALL = 1 << 16


class Aliased(Exception):
    """Two tensors of one memory."""


class Pickler(ForkingPickler):
    """Tensors go through shared memory, as in any queue of torch, but for small plain ones, and for
    those of which torch keeps the conjugate or the negative. Raises Aliased where two small ones
    share their memory, which they then would no more."""

    def __init__(self, buffer: io.BytesIO) -> None:
        super().__init__(buffer, pickle.HIGHEST_PROTOCOL)
        self.taken: dict[int, Any] = {}  # by where its memory lies; kept, for that to stay so

    def reducer_override(self, thing: Any) -> Any:
        if type(thing) is not torch.Tensor or thing.requires_grad or thing.device.type != "cpu":
            return NotImplemented
        if thing.is_conj() or thing.is_neg():  # torch loses the sign; a copy has it
            thing = thing.clone(memory_format=torch.contiguous_format)
        elif not _is_plain(thing):
            return NotImplemented
        elif thing.numel() and self.taken.setdefault(thing.data_ptr(), thing) is not thing:
            raise Aliased
        content = torch.empty(0, dtype=torch.uint8).set_(thing.untyped_storage()).numpy().tobytes()
        return _tensor_of, (content, thing.dtype, tuple(thing.shape))


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is small, all of its memory, and no more than its numbers."""
    if tensor.layout is not torch.strided or tensor.is_quantized or not tensor.is_contiguous():
        return False
    return tensor.nbytes <= SMALL and tensor.untyped_storage().nbytes() == tensor.nbytes


def _tensor_of(content: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if not content:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(content), dtype=dtype).reshape(shape)


class Parcel:
    """A thing on its way between processes, pickled by whoever makes it."""

    def __init__(self, what: str, thing: Any) -> None:
        self.what, buffer = what, io.BytesIO()
        try:
            try:
                Pickler(buffer).dump(thing)
            except Aliased:
                buffer = io.BytesIO()
                ForkingPickler(buffer, pickle.HIGHEST_PROTOCOL).dump(thing)
        except Exception as error:
            raise told(f"{what} could not be sent between processes", error) from error
        self.content = buffer.getvalue()

    def open(self, then: Callable[[Any], Any] = lambda thing: thing) -> Any:
        try:
            return then(pickle.loads(self.content))
        except Exception as error:
            raise told(f"{self.what} could not be opened", error) from error

    def pin_memory(self) -> Any:
        """For torch's pinning thread."""
        return self.open(pinned)


class Workers(_MultiProcessingDataLoaderIter):
    """torch's own leaves the workers that it has where not all can be started, and asks which there
    are when it is collected: an error whenever the collector comes by, whatever runs then."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._workers_status = [False] * loader.num_workers
        self._workers: list[Any] = []
        try:
            super().__init__(loader)
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """At once: nobody waits for what they are at, and one stuck in a read ignores SIGTERM."""
        for process in self._workers:
            process.kill()


class Sender:
    """A fetcher in a loader worker: a map from a request to its batch as a Parcel."""

    def __init__(self, fetcher: Any) -> None:
        self.fetcher, self.name = fetcher, f"data set {type(fetcher.dataset).__name__}"

    def __getstate__(self) -> dict[str, Any]:
        # To a worker that is spawned; opened there by the first request, which tells of an error.
        return {"fetcher": Parcel(self.name, self.fetcher), "name": self.name}

    def __getitem__(self, request: Any) -> Parcel:
        if isinstance(self.fetcher, Parcel):
            self.fetcher = self.fetcher.open()
        return Parcel(f"{named(request)} of {self.name}", self.fetched(request))

    def fetched(self, request: Any) -> Any:
        try:
            return self.fetcher[request]
        except UsageError:
            raise
        except Exception as error:
            raise told(f"{named(request)} of {self.name} failed", error) from error


def make_room() -> None:
    """Room for batches, whose tensors come as open files through sockets."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError, OSError):  # "unlimited" may be more than the kernel takes
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # A socket's path may have 107 bytes.
    if len(os.fsencode(multiprocessing.util.get_temp_dir())) > 107 - len("/listener-12345678"):
        short = tempfile.mkdtemp(prefix="pymp-", dir="/tmp")
        multiprocessing.util.Finalize(None, shutil.rmtree, (short, True), exitpriority=-100)
        multiprocessing.current_process()._config["tempdir"] = short  # type: ignore[attr-defined]


def explained(
    error: Exception, due: str, timeout_s: float, processes: list[Any], oom: bool
) -> Exception:
    """What a DataLoader's own error means; an error that is not about its workers itself."""
    text, kind = str(error), type(error)
    if "be opened" in text:  # what a worker has sent is fetched from it
        for process in processes:
            process.join(1 / len(processes))
    codes = [p.exitcode for p in processes if p.exitcode is not None]
    if "exited unexpectedly" in text or ("be opened" in text and codes):
        signals = [signal.Signals(-code).name for code in codes if code < 0]
        cause = f"killed by {signals[0]}" if signals else f"it exited by itself, {codes}"
        if oom:
            cause = "the kernel killed it for memory (oom_kill of its cgroup rose)"
        return told(f"a loader worker died while {due} were due: {cause}")
    if text.startswith(TIMED_OUT):
        limit = f"{timeout_s:g} s (DIST.TRAIN_TIMEOUT)"
        return told(f"a loader worker took longer than {limit} for {due}")
    if isinstance(error, UsageError):
        return kind(text.rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2].strip())
    return error


def named(request: Any) -> str:
    """The samples of a request, if there is one."""
    samples = request.samples if request else []
    more = f", ... ({len(samples)} in all)" if len(samples) > 8 else ""
    return f"samples {', '.join(map(str, samples[:8]))}{more}"


def told(what: str, error: Exception | None = None) -> RunError:
    """An error for people: what, why, and what to do about it."""
    text = what
    if error is not None:
        text += f": {type(error).__name__}"
        with contextlib.suppress(Exception):  # of its own __str__
            text += f": {error}"
    remedy = next((f". {do}" for found, do in REMEDIES.items() if re.search(found, text)), "")
    return RunError(text + remedy)
