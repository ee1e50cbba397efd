"""Sums over all ranks in the order of the tree, in a thread beside the backward pass."""

from __future__ import annotations

import contextlib
import queue
import threading
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist

from launcher.runtime.process import Runtime
from launcher.shards.tree import turns

# What goes to or comes from a rank, under a tag that is the same for both.
Message = tuple[int, int, torch.Tensor]


def summing(
    shards: int, ranks: int, rank: int, vectors: Sequence[torch.Tensor]
) -> Iterator[tuple[list[Message], list[Message]]]:
    """Sum `vectors`, of shape (length,), those of this rank's nodes, over the ranks. Yields what to
    send and what to receive before it goes on; in the end the vector `turns` tells has the sum."""
    rounds, result = turns(shards, ranks, len(vectors[0]), rank)
    for mine in rounds:
        kept = [vectors[turn.mine][turn.keep] for turn in mine]
        other = [
            vectors[turn.other][turn.keep] if turn.peer == rank else torch.empty_like(part)
            for turn, part in zip(mine, kept, strict=True)
        ]
        received = [(t.peer, t.tag, into) for t, into in zip(mine, other, strict=True)]
        sent = [(t.peer, t.tag, vectors[t.mine][t.give]) for t in mine]
        yield away(rank, sent), away(rank, received)
        for turn, part, theirs in zip(mine, kept, other, strict=True):
            torch.add(part, theirs, out=vectors[turn.out][turn.keep])
    whole = vectors[result]
    for mine in reversed(rounds):
        sent = [(t.peer, t.tag, whole[t.keep]) for t in mine]
        yield away(rank, sent), away(rank, [(t.peer, t.tag, whole[t.give]) for t in mine])


def away(rank: int, messages: list[Message]) -> list[Message]:
    """Those that go to or come from another rank, and are not empty."""
    return [message for message in messages if message[0] != rank and message[2].numel()]


class Exchange:
    """Sums vectors over the ranks one after the other, in the order in which they are given, which
    is to be the same on all ranks. Made by all ranks together."""

    def __init__(self, runtime: Runtime, shards: int) -> None:
        self.runtime, self.shards = runtime, shards
        # A collective. A group of its own: others may be under way on the default one.
        group = dist.new_group(timeout=runtime.timeout)
        # torch keeps it until all groups are taken down: gloo's threads abort a process that still
        # has one at its end.
        self.group = weakref.ref(group)
        cuda = runtime.device.type == "cuda"
        self.stream = torch.cuda.Stream(runtime.device) if cuda else None
        # gloo sends only what lies on the host.
        self.by_host = cuda and dist.get_backend(group) == "gloo"
        self.jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, daemon=True, name="shards")
        self.thread.start()

    def sum(self, vectors: Sequence[torch.Tensor]) -> Future[None]:
        """Begin to sum what this rank's nodes hold, of shape (length,) each, and is written to."""
        self.runtime.beside.begun += 1  # the hang watch counts it as a collective of all ranks
        done: Future[None] = Future()
        ready = None if self.stream is None else torch.cuda.current_stream().record_event()
        self.jobs.put((done, ready, list(vectors)))
        return done

    def settle(self, done: Future[None]) -> None:
        """The sum is there. The host waits for the other ranks; with NCCL the device alone does."""
        done.result()
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)

    def close(self) -> None:
        """End the thread, once it has done all that it was given."""
        self.jobs.put(None)

    @torch.no_grad()
    def _work(self) -> None:
        if self.stream is not None:
            torch.cuda.set_device(self.runtime.device)
        while (job := self.jobs.get()) is not None:
            self._do(*job)
            del job  # memory that is not needed while it waits for more

    def _do(self, done: Future[None], ready: Any, vectors: list[torch.Tensor]) -> None:
        # No stream is asked for on a CPU, which would make a context on a GPU that is there.
        with contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            try:
                if self.stream is not None:
                    self.stream.wait_event(ready)
                world = self.shards, self.runtime.world_size, self.runtime.rank
                for sent, received in summing(*world, vectors):
                    self._swap(sent, received)
                done.set_result(None)
            except BaseException as error:  # for whoever waits for it
                done.set_exception(error)

    def _swap(self, sent: list[Message], received: list[Message]) -> None:
        """Point to point, all at the same time, each waited for."""
        if self.by_host:  # which waits for the device
            sent = [(rank, tag, tensor.cpu()) for rank, tag, tensor in sent]
        into = [(rank, tag, t.cpu() if self.by_host else t) for rank, tag, t in received]
        ways = ((dist.isend, sent), (dist.irecv, into))
        works = [
            dist.P2POp(way, tensor, rank, self.group(), tag)
            for way, messages in ways
            for rank, tag, tensor in messages
        ]
        for work in dist.batch_isend_irecv(works) if works else ():
            work.wait()
        for (*_, tensor), (*_, host) in zip(received, into, strict=True) if self.by_host else ():
            tensor.copy_(host)
