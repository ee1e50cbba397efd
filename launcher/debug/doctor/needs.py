"""What a config will need of this machine: its loaders' shared memory and files, its checkpoints'
disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from launcher.config.checks import evaluates, recorded_as
from launcher.data.plan import Request, train_requests
from launcher.data.sizing import size_loader
from launcher.data.splits import Data
from launcher.debug.doctor.findings import Finding, Machine, Topic, existing, size
from launcher.edges.batch import map_tensors, nbytes
from launcher.edges.model import model_state
from launcher.engine.run import Job, build_state
from launcher.errors import UsageError
from launcher.runtime.process import Runtime, seed_everything
from launcher.runtime.progress import Every, Progress, in_steps
from launcher.tasks import make_task
from launcher.tasks.run import LiveRun
from launcher.telemetry.recorder import Recorder
from launcher.telemetry.writer import Writer

TOPIC = Topic("config")
OTHER_FILES = 64  # that a process has open beside its loaders' tensors: logs, sockets, libraries


@dataclass(frozen=True)
class Loaders:
    """What the loader workers of one rank hold ahead of their use, of a split."""

    split: str
    workers: int
    prefetch: int
    batch: int  # bytes
    tensors: int  # of a batch
    reason: str = ""  # for the number of workers

    @property
    def shm(self) -> int:
        return self.workers * self.prefetch * self.batch

    @property
    def files(self) -> int:
        return self.workers * self.prefetch * self.tensors

    def __str__(self) -> str:
        workers = f"{self.workers} worker{'s' * (self.workers > 1)}"
        return f"{self.split}: {workers} x {self.prefetch} batches of {size(self.batch)}"


def needs(job: Job, runtime: Runtime, machine: Machine, output: Path) -> Iterator[Finding]:
    """Build what the config names, as every rank of a run does, and judge the machine by it, with
    checkpoints that go to `output`. What cannot be built is a finding too."""
    seed_everything(job.cfg.SEED, runtime.rank)
    recorder = Recorder(runtime, Progress(), Writer())
    told = LiveRun(recorder)
    try:
        task = make_task(job.task_class, job.cfg, recorder, told)
        data = Data(job.cfg, task, runtime, lambda phase: None)
        told.begin(data)
        splits = map(recorded_as, job.cfg.EVAL.SPLITS if evaluates(job.cfg) else ())
        found = [loaders(data, split, machine) for split in ("train", *splits)]
        state = build_state(job, task, data, recorder, runtime)
    except Exception as error:  # the user's own code
        yield failed("build", error)
        return
    ranks = runtime.topology.local_world_size
    yield enough_workers(data, found[0])
    yield shared_memory(found, machine, ranks)
    yield files(found, machine)
    bytes_ = checkpoint_bytes(state)
    kept = checkpoints_kept(job.cfg, data)
    yield disk(output, bytes_, kept, machine)


def failed(name: str, error: Exception) -> Finding:
    """What the user's own code, or a config that does not fit it, has raised."""
    said = f"{type(error).__name__}: {error}" if not isinstance(error, UsageError) else str(error)
    return TOPIC.problem(
        name, said, "a run fails likewise: see it in a debugger with launcher train --debug"
    )


def loaders(data: Data, split: str, machine: Machine) -> Loaders:
    """Fetch one batch of a split, in this process, to know how large it is."""
    if split == "train":
        plan = data.train_plan
        (request, *_) = train_requests(plan, data.order, 0, 0, 1)  # rank 0 has the largest share
    else:
        request = Request(0, list(range(*data.eval_plan(split).batch(0))))
    batch = data.fetcher(split)[request]
    tensors: list[torch.Tensor] = []
    map_tensors(batch, tensors.append)
    # As many as a run takes, which knows a batch's size from its first one.
    keys, of_batch = data.cfg.DATALOADER, nbytes(batch)
    own = psutil.Process().memory_full_info().uss
    size = size_loader(keys, data.runtime, data.kinds[split], machine.memory, own, of_batch)
    args = size.workers, keys.PREFETCH_FACTOR, of_batch, max(1, len(tensors))
    return Loaders(split, *args, size.reason)


def enough_workers(data: Data, train: Loaders) -> Finding:
    """Whether memory or /dev/shm leave the training fewer workers than its CPUs would."""
    if train.workers < data.size.workers:
        return TOPIC.warning(
            "loaders",
            f"{train.reason}; by its CPUs it would be {data.size.workers}",
            "enlarge what limits them (docker run --shm-size, or --ipc=host, for /dev/shm), or "
            "take smaller micro-batches",
        )
    return TOPIC.ok("loaders", train.reason)


def shared_memory(found: list[Loaders], machine: Machine, ranks: int) -> Finding:
    """/dev/shm against what is in flight: the training's queues stay full while a split is
    evaluated."""
    train, *splits = found
    more = max(splits, key=lambda one: one.shm, default=None)
    need = ranks * (train.shm + (more.shm if more else 0))
    told = " and ".join(str(one) for one in (train, more) if one is not None and one.workers)
    free = machine.memory.shm
    if not need or free is None:
        why = "no loader workers" if not need else "there is none; memory holds them"
        return TOPIC.ok("/dev/shm for loaders", f"{why}: no batch goes through /dev/shm")
    needed = f"{size(need)} for {ranks} rank{'s' * (ranks > 1)} ({told}), {size(free)} free"
    if need > free:
        return TOPIC.problem(
            "/dev/shm for loaders",
            f"needs {needed}",
            "enlarge /dev/shm (docker run --shm-size, or --ipc=host), or lower "
            "DATALOADER.NUM_WORKERS or DATALOADER.PREFETCH_FACTOR",
        )
    return TOPIC.ok("/dev/shm for loaders", f"needs {needed}")


def files(found: list[Loaders], machine: Machine) -> Finding:
    """The open-file limit against the tensors in flight, each of which is an open file."""
    need, limit = sum(one.files for one in found[:2]) + OTHER_FILES, machine.open_files
    told = f"about {need} a rank, of {limit if limit >= 0 else 'any number'}"
    if 0 <= limit < need:
        return TOPIC.problem(
            "open files for loaders",
            told,
            "raise the hard limit (ulimit -Hn), or lower DATALOADER.NUM_WORKERS or "
            "DATALOADER.PREFETCH_FACTOR",
        )
    return TOPIC.ok("open files for loaders", told)


def checkpoint_bytes(state: Any) -> int | None:
    """Bytes of a checkpoint's tensors, with what the optimisers hold after a first step: each takes
    one, with gradients of zero. None where an optimiser does not take that."""
    for optimizer in state.optimizers.values():
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.requires_grad and p.grad is None:
                    p.grad = torch.zeros_like(p)
        try:
            optimizer.step()
        except Exception:  # one of the user's, which wants more of a gradient
            return None
    ema: nn.Module | None = state.ema
    parts = [model_state(state.model), [o.state_dict() for o in state.optimizers.values()]]
    return nbytes(parts) + (nbytes(model_state(ema)) if ema is not None else 0)


def checkpoints_kept(cfg: Any, data: Data) -> int:
    """The most checkpoints that lie side by side at a run's end, one being written among them."""
    keys = cfg.CHECKPOINT
    kept: int = keys.KEEP_LAST + (keys.KEEP_BEST if evaluates(cfg) else 0)
    if every := in_steps(keys.KEEP_EVERY, data.train_plan.steps_per_epoch):
        kept += data.total_steps // every
    # None is let go before its successor is whole.
    times = Every(keys.EVERY)
    most = None if times.timed or not keys.EVERY else _saves(keys.EVERY, data)
    return min(kept, most) + 1 if most is not None else kept + 1


def _saves(every: str, data: Data) -> int:
    return max(1, -(-data.total_steps // in_steps(every, data.train_plan.steps_per_epoch)))


def disk(output: Path, each: int | None, count: int, machine: Machine) -> Finding:
    """The free disk against the checkpoints that are kept; those that lie there make room as they
    are replaced."""
    name = "disk for checkpoints"
    there = sum(p.stat().st_size for p in (output / "checkpoints").rglob("*") if p.is_file())
    free = machine.free(existing(output))
    room = f"{size(free)} free at {output}" + (f", {size(there)} in checkpoints" if there else "")
    if each is None:
        return TOPIC.warning(
            name,
            f"the optimiser takes no step with gradients of zero, so its state's size is not "
            f"known; {room}",
            "see what a first checkpoint takes, times CHECKPOINT.KEEP_LAST, KEEP_BEST and one more",
        )
    told = f"{size(each * count)} for {count} of {size(each)}, one being written; {room}"
    if each * count > free + there:
        return TOPIC.problem(
            name,
            f"needs {told}",
            "free some, set OUTPUT_DIR to a larger disk, or lower CHECKPOINT.KEEP_LAST and "
            "KEEP_BEST, or CHECKPOINT.KEEP_EVERY's number",
        )
    return TOPIC.ok(name, f"needs {told}")
