"""A measured all-reduce: between two local processes, or between the ranks."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from launcher.debug.doctor.findings import Finding, Topic
from launcher.runtime.process import Runtime

TOPIC = Topic("exchange")
BYTES, ROUNDS = 16 * 2**20, 4
SLOW_MB_S = 10.0  # less than the slowest network that anybody trains over
PAIR_S, GROUP_S = 30.0, 60.0
BLOCKING = "TORCH_NCCL_BLOCKING_WAIT"
ADVICE = (
    "set GLOO_SOCKET_IFNAME to the network interface that the ranks are to use (lo for one host), "
    "and see that the host's own name can be resolved"
)


def pair() -> Iterator[Finding]:
    """Two short-lived processes of this host, over gloo."""
    if not dist.is_gloo_available():
        return  # told of with the builds
    # Forked, they have torch already; elsewhere than on Linux a fork is not safe.
    context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_one_of_pair, args=(rank, f"{folder}/store", sender))
            for rank in range(2)
        ]
        for process in processes:
            process.start()
        found = receiver.recv() if receiver.poll(PAIR_S) else f"no answer within {PAIR_S:.0f} s"
        for process in processes:
            process.join(5.0)
            process.kill()
    yield _judged("gloo all-reduce", "2 processes of this host", found)


def _one_of_pair(rank: int, store: str, sender: Any) -> None:
    # gloo prints to stdout, which may be for a program to read.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)  # a fork has none of the parent's threads
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, 2),
            rank=rank,
            world_size=2,
            timeout=timedelta(seconds=PAIR_S),
        )
        speed = measure(None, torch.device("cpu"))
        if rank == 0:
            sender.send(speed)
        dist.destroy_process_group()
    except RuntimeError as error:
        sender.send(str(error).splitlines()[0])


def between_ranks(runtime: Runtime, device: torch.device | None) -> Iterator[Finding]:
    """All ranks, over gloo and, where each has a GPU as `device`, NCCL. Collectives."""
    cuda = device is not None and device.type == "cuda" and dist.is_nccl_available()
    # A collective: all take part in NCCL's, or none.
    everywhere = all(runtime.broadcast(runtime.gather(cuda)))
    for backend in ("gloo", "nccl") if everywhere else ("gloo",):
        here = device if backend == "nccl" and device is not None else torch.device("cpu")
        found = _of_group(backend, here)
        slowest = runtime.gather(found)  # a collective
        if slowest is not None:
            failed = [f"rank {r}: {one}" for r, one in enumerate(slowest) if isinstance(one, str)]
            told = failed[0] if failed else min(slowest)
            yield _judged(f"{backend} all-reduce", f"{runtime.world_size} ranks", told)


def _of_group(backend: str, device: torch.device) -> float | str:
    """The speed of a new group of all ranks, or what went wrong. Its timeout is short: a dead
    network must not hold up the page. Collectives."""
    # Read when the group is made: what takes too long is raised here, in place of the watchdog's
    # end of the whole process.
    before = os.environ.get(BLOCKING)
    os.environ[BLOCKING] = "1"
    try:
        group = dist.new_group(timeout=timedelta(seconds=GROUP_S), backend=backend)
        return measure(group, device)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        os.environ.pop(BLOCKING)
        if before is not None:
            os.environ[BLOCKING] = before


def measure(group: dist.ProcessGroup | None, device: torch.device) -> float:
    """MB/s of an all-reduce: the bytes of the tensor over the time it took, best of some."""
    tensor, best = torch.zeros(BYTES // 4, device=device), float("inf")
    for _ in range(ROUNDS):
        began = time.perf_counter()
        dist.all_reduce(tensor, group=group)  # a collective, which is what is measured
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # NCCL only queues it
        best = min(best, time.perf_counter() - began)
    return BYTES / best / 1e6


def _judged(name: str, between: str, found: float | str) -> Finding:
    what = f"{BYTES // 2**20} MiB between {between}"
    if isinstance(found, str):
        nccl = "run again with NCCL_DEBUG=INFO, which tells what it tries"
        return TOPIC.problem(
            name, f"{what} failed: {found}", nccl if name.startswith("nccl") else ADVICE
        )
    told = f"{what}: {found:.0f} MB/s"
    if found < SLOW_MB_S:
        return TOPIC.warning(
            name,
            f"{told}, slower than any network that is meant for this",
            "look whether GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME name the fast interface",
        )
    return TOPIC.ok(name, told)


def offsets(runtime: Runtime) -> list[float] | None:
    """By how many seconds each rank's clock is ahead of rank 0's, on rank 0. Collectives.

    The broadcast reaches all at nearly the same time; of some rounds the one that was delayed
    least counts.
    """
    rounds: list[list[float]] = []
    for _ in range(3):
        runtime.gather(None)  # a collective: rank 0 goes on only when all have come
        runtime.broadcast()  # and all others right after it
        times = runtime.gather(time.time())
        if times is not None:
            rounds.append([one - times[0] for one in times])
    return [min(column, key=abs) for column in zip(*rounds, strict=True)] if rounds else None
