"""How many loader workers and threads a rank takes, and whether batches are pinned.

Workers come from the CPU budget, less the rank's own thread, and are capped by memory and by
/dev/shm, with the size of a real batch. The reason is told in one line.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.runtime.cpu import CpuBudget
from launcher.runtime.memory import MemoryBudget

# Handing a batch from one process to another costs about this much by itself.
HANDOVER_S = 0.002
# An epoch that takes less than this to fetch is not worth a process.
TINY_EPOCH_S = 0.1
# Share of the free memory, and of the free shared memory, that loading may take.
MEMORY_SHARE = 0.5


@dataclass(frozen=True)
class Batch:
    """What the first batch of a rank showed: seconds to fetch, bytes, and batches an epoch."""

    seconds: float
    nbytes: int
    per_epoch: float


@dataclass(frozen=True)
class LoaderSize:
    """Loader workers of a rank, threads left for its own compute, pinning; and why."""

    workers: int
    threads: int
    pin_memory: bool
    reason: str


def size_loader(
    wanted: int,
    prefetch: int,
    pin: str,
    cpu: CpuBudget,
    memory: MemoryBudget,
    local_ranks: int,
    cuda: bool,
    batch: Batch | None,
    own_memory: int,
    in_memory: bool = False,
    iterable: bool = False,
) -> LoaderSize:
    """Choose for one rank of `local_ranks`.

    `wanted` is DATALOADER.NUM_WORKERS: as it is, if not -1. `batch` is None for a rank without
    samples. `own_memory` is what one forked worker may come to copy, in bytes; `in_memory` says
    that the data set is made of tensors.
    """
    if wanted >= 0:
        workers, why = wanted, "DATALOADER.NUM_WORKERS"
    elif iterable:
        # Every worker would read the whole stream, so more than one only repeats the work.
        workers, why = min(1, cpu.per_rank - 1), "an iterable data set is read by one"
    elif in_memory or batch is None:
        workers, why = 0, "the data set is in memory" if in_memory else "no samples for this rank"
    elif batch.seconds < HANDOVER_S:
        workers, why = 0, f"a batch takes {batch.seconds * 1e3:.1f} ms, less than handing it over"
    elif batch.seconds * batch.per_epoch < TINY_EPOCH_S:
        workers, why = 0, f"an epoch takes {batch.seconds * batch.per_epoch * 1e3:.0f} ms"
    else:
        workers, why = _from_budget(prefetch, cpu, memory, local_ranks, cuda, batch, own_memory)
    in_flight = (batch.nbytes if batch else 0) * max(1, workers) * (prefetch + 1)
    pinned = cuda and pin.lower() == "true"
    if cuda and pin == "auto":
        # Page-locked memory cannot be swapped or given to anybody else.
        share = 0.1 * memory.available / local_ranks
        pinned = not memory.swapping and in_flight < share
    reason = f"{workers} worker{'s' * (workers != 1)} a rank: {why}"
    return LoaderSize(workers, max(1, cpu.per_rank - workers), pinned, reason)


def _from_budget(
    prefetch: int,
    cpu: CpuBudget,
    memory: MemoryBudget,
    local_ranks: int,
    cuda: bool,
    batch: Batch,
    own_memory: int,
) -> tuple[int, str]:
    # The rank's own thread takes one CPU; a model on the CPU takes half of them.
    workers = cpu.per_rank - 1 if cuda else cpu.per_rank // 2
    why = f"{cpu.usable} usable CPUs ({cpu.reason}), {local_ranks} local rank"
    why += "s" * (local_ranks > 1)
    each = own_memory + batch.nbytes * (prefetch + 1)
    caps = {f"{memory.reason} {memory.available / 2**30:.1f} GiB": (memory.available, each)}
    if memory.shm is not None:
        caps[f"/dev/shm {memory.shm / 2**30:.2f} GiB"] = (memory.shm, batch.nbytes * prefetch)
    for name, (free, need) in caps.items():
        fits = int(MEMORY_SHARE * free / local_ranks // max(need, 1))
        if fits < workers:
            workers = fits
            why = f"{name} free, {need / 2**20:.0f} MiB a worker, {local_ranks} local rank"
            why += "s" * (local_ranks > 1)
    return workers, why


def threads_set_by_user(env: Mapping[str, str], parent_environ: Path | None = None) -> bool:
    """Whether OMP_NUM_THREADS is the user's.

    torchrun sets it to 1 for its ranks where the user has not set it; the environment that torchrun
    itself was started with tells the two apart.
    """
    if "OMP_NUM_THREADS" not in env:
        return False
    if "TORCHELASTIC_RUN_ID" not in env:
        return True
    path = parent_environ or Path(f"/proc/{os.getppid()}/environ")
    try:
        return any(
            entry.startswith(b"OMP_NUM_THREADS=") for entry in path.read_bytes().split(b"\0")
        )
    except OSError:
        return True
