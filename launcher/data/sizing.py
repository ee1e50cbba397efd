"""How many loader workers and threads a rank takes, and whether batches are pinned.

Both follow from the CPU budget; workers are capped by memory and /dev/shm, with the size of a real
batch once there is one. Nothing is measured in seconds: threads change how sums are rounded, and
two runs of one seed must choose alike. The reason is told in one line.
"""

from __future__ import annotations

from dataclasses import dataclass

from launcher.config import CfgNode
from launcher.runtime.memory import MemoryBudget
from launcher.runtime.process import Runtime

# Share of the free memory, and of the free shared memory, that loading may take.
MEMORY_SHARE = 0.5


@dataclass(frozen=True)
class LoaderSize:
    """Loader workers of a rank, threads left for its own compute, pinning; and why."""

    workers: int
    threads: int
    pin_memory: bool
    reason: str


def size_loader(
    keys: CfgNode, runtime: Runtime, kind: str, free: MemoryBudget, own_memory: int, nbytes: int = 0
) -> LoaderSize:
    """Choose for one rank. What the user sets wins.

    `keys` is DATALOADER; `kind` that of the data set: "iterable", "tensors" or "map-style"; `free`
    the node's memory and `own_memory` the bytes that a forked worker may come to copy, both from
    before there were workers; `nbytes` those of a batch, 0 where that is not known yet.
    """
    cpu, cuda = runtime.cpu, runtime.device.type == "cuda"
    local_ranks = runtime.topology.local_world_size
    among = f"{local_ranks} local rank{'s' * (local_ranks > 1)}"
    if keys.NUM_WORKERS >= 0:
        workers, why = keys.NUM_WORKERS, "DATALOADER.NUM_WORKERS"
    elif kind == "tensors":
        workers, why = 0, "the data set is in memory"
    elif kind == "iterable":
        # Every worker would read the whole stream, so more than one only repeats the work.
        workers, why = min(1, cpu.per_rank - 1), "an iterable data set is read by one"
    else:
        # The rank's own thread takes one CPU; a model on the CPU takes half of them.
        workers = cpu.per_rank - 1 if cuda else cpu.per_rank // 2
        why = f"{cpu.usable} usable CPUs ({cpu.reason}), {among}"
    threads = max(1, cpu.per_rank - workers)  # before memory, which differs from run to run
    caps = [(free.available, own_memory + nbytes * (keys.PREFETCH_FACTOR + 1), free.reason)]
    if free.shm is not None:
        caps.append((free.shm, nbytes * keys.PREFETCH_FACTOR, "/dev/shm"))
    for room, each, name in caps:
        fits = int(MEMORY_SHARE * room / local_ranks // max(each, 1))
        if keys.NUM_WORKERS < 0 and fits < workers:
            workers = fits
            why = f"{name} {room / 2**30:.2f} GiB free, {each / 2**20:.0f} MiB a worker, {among}"
    # Page-locked memory cannot be swapped or given to anybody else.
    pin = not free.swapping if keys.PIN_MEMORY == "auto" else keys.PIN_MEMORY.lower() == "true"
    reason = f"{workers} worker{'s' * (workers != 1)} a rank: {why}"
    return LoaderSize(workers, threads, cuda and pin, reason)
