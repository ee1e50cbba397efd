"""The first steps of a config's run, from a fresh state, with the bits of all that comes by."""

from __future__ import annotations

import contextlib
import io
import pickle
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from launcher.callbacks import Callbacks
from launcher.data.plan import train_requests
from launcher.data.splits import Data
from launcher.debug.doctor.operators import Event, Operators, digest, row_digests
from launcher.edges.batch import is_dense
from launcher.edges.model import bits, model_state
from launcher.engine.run import Job, build_state
from launcher.engine.step import TrainStep
from launcher.errors import RunError
from launcher.models.init import start_weights
from launcher.runtime.gather import Gather
from launcher.runtime.process import Runtime, seed_everything
from launcher.runtime.progress import Progress
from launcher.runtime.topology import Topology
from launcher.shards.checks import check_shards
from launcher.tasks import make_task
from launcher.tasks.run import LiveRun
from launcher.telemetry.recorder import Recorder
from launcher.telemetry.writer import Writer


@dataclass
class Attempt:
    """What a run of the first steps has left, by step where it is a list."""

    lengths: dict[str, int]
    built: dict[str, int]  # the bits of the model's tensors before the first step
    samples: list[list[list[int]]] = field(default_factory=list)  # of each micro-batch
    batches: list[list[list[Any]]] = field(default_factory=list)  # digests of their tensors
    losses: list[dict[str, str]] = field(default_factory=list)  # what is recorded, to the last bit
    weights: list[dict[str, int]] = field(default_factory=list)  # as `built`
    events: list[Event] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)  # how many events there are after each step


def attempt(job: Job, runtime: Runtime, steps: int, fill: int) -> Attempt:
    """Run the first steps as `engine.run.run` does, but for the run directory and what ranks
    exchange. `fill` goes into memory that operators leave as it was."""
    seed_everything(job.cfg.SEED, runtime.rank)
    recorder = Recorder(runtime, Progress(), Writer())
    # One rank's share of a run of many gathers its own rows alone.
    gather = Gather(replace(runtime, topology=Topology()))
    told = LiveRun(recorder)
    task = make_task(job.task_class, job.cfg, recorder, told, gather)
    data = Data(job.cfg, task, runtime, lambda phase: None)
    told.begin(data)
    state = build_state(job, task, data, recorder, runtime)
    asked = {made for made, _ in job.callbacks}
    # The launcher's own have nothing to tell of a run without a directory.
    state.callbacks = Callbacks([c for c in state.callbacks.all if type(c) in asked], task)
    if job.cfg.TRAIN.SHARDS:
        check_shards(job.cfg, state, runtime, gather)
    start_weights(job.cfg, state.model)
    found = Attempt(dict(data.lengths), _bits(state.model))
    try:
        data.start(0)
        step = TrainStep(job.cfg, task, state, runtime, gather)
        state.callbacks.call("on_start")
        operators = Operators(state.model, [p.module for p in step.phases], fill)
        plan, progress = data.train_plan, state.progress
        for k, batch in enumerate(islice(data.batches(), steps)):
            requests = list(train_requests(plan, data.order, runtime.rank, k, k + 1))
            micro_batches = list(batch.batches)  # fetched here: loading is no part of the model
            found.samples.append([request.samples for request in requests])
            found.batches.append([tensors_of(one) for one in micro_batches])
            # Alone, this rank has all micro-batches that there are.
            count, taken = len(batch.sizes), iter(micro_batches)
            alone = replace(batch, batches=taken, rounds=count, full=count)
            operators.steps = {id(p.module) for p in step.phases}  # a thaw makes others
            with operators:
                done = step(alone, frozenset())
                if done is None:
                    raise RunError("out of memory: give TRAIN.MICRO_BATCH_SIZE a number for this")
                skipped, _ = done
                progress.advance(batch.count, plan.samples_per_epoch, skipped)
                if not skipped:
                    state.callbacks.call("on_step")
            means, _ = recorder.gather() or ({}, [])  # waits for the device
            found.losses.append({name: float(value).hex() for name, value in means.items()})
            found.weights.append(_bits(state.model))
            found.ends.append(len(operators.events))
        found.events = operators.events
    finally:
        data.close()
    return found


def _bits(model: torch.nn.Module) -> dict[str, int]:
    """Waits for the device."""
    state = model_state(model)
    return bits({name: t for name, t in state.items() if isinstance(t, torch.Tensor)})


def tensors_of(batch: Any) -> list[Any]:
    """A digest of each tensor and array in a batch, of any class that can be pickled: (type and
    shape, digests of its rows)."""
    found: list[Any] = []

    class Finder(pickle.Pickler):
        def persistent_id(self, value: Any) -> int | None:
            if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
                value = torch.from_numpy(np.array(value))
            if not isinstance(value, torch.Tensor) or value.is_nested or value.is_sparse:
                return None  # what it consists of is found
            found.append(_rows(value))
            return len(found)

    with contextlib.suppress(Exception):  # what follows is seen when the model takes it
        Finder(io.BytesIO(), pickle.HIGHEST_PROTOCOL).dump(batch)
    return found


def _rows(tensor: torch.Tensor) -> tuple[Any, list[int]]:
    if tensor.dim() == 0 or not is_dense(tensor):
        return digest(tensor), []
    what = str(tensor.dtype), tuple(tensor.shape)
    return what, row_digests(tensor.reshape(len(tensor), -1)) if tensor.numel() else []
