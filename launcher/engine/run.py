"""A run from its config to its end: what is built, and in which order.

config -> task -> data set -> order -> loader -> device -> step -> recorder and checkpoint
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from launcher.callbacks import Callbacks, Made, Run, shipped
from launcher.checkpoint.saver import Saver
from launcher.checkpoint.state import TrainingState
from launcher.checkpoint.store import CheckpointStore, Retention
from launcher.config import CfgNode
from launcher.config.changes import check_changes
from launcher.config.checks import averages
from launcher.data.splits import Data
from launcher.edges.model import (
    averaged,
    check_model,
    fill,
    load_model_state,
    model_layout,
    model_state,
    warn_of_one_sample,
)
from launcher.edges.state import check
from launcher.engine.evaluate import Evaluation
from launcher.engine.loop import Loop
from launcher.engine.resume import find
from launcher.engine.step import TrainStep
from launcher.errors import UsageError
from launcher.guard.guard import Guard
from launcher.guard.members import compare
from launcher.log import get_logger
from launcher.models.freezing import Freezing
from launcher.models.init import start_weights, starts_otherwise
from launcher.models.modes import set_modes
from launcher.optim.optimizers import build_optimizers
from launcher.provenance.code import Code
from launcher.provenance.environment import describe, this_rank
from launcher.runtime.gather import Gather
from launcher.runtime.process import Runtime
from launcher.shards.checks import check_shards, kind_of_machine
from launcher.shards.sums import Shards
from launcher.tasks import make_task
from launcher.tasks.run import LiveRun
from launcher.telemetry.logs import Logs
from launcher.telemetry.recorder import Recorder
from launcher.telemetry.rundir import RunDirectory, replace_json
from launcher.telemetry.sinks import JsonLines
from launcher.telemetry.writer import Writer

logger = get_logger(__name__)


@dataclass(frozen=True)
class Job:
    """What the command line asks for; the same on every rank."""

    cfg: CfgNode
    task_class: type
    directory: RunDirectory
    argv: Sequence[str] = ()
    resume: bool = False
    resume_from: Path | None = None
    allow: frozenset[str] = field(default_factory=frozenset)
    callbacks: Sequence[Made] = ()  # those of CALLBACKS
    checkpoint: str = "last"  # "last", "best" or a path; for --eval-only
    splits: Sequence[str] = ()  # for --eval-only: others than EVAL.SPLITS
    saves: bool = True  # checkpoints; a replay leaves none
    code: Code | None = None  # what is to be kept of the task's own files; on rank 0


def run(job: Job, runtime: Runtime, guard: Guard, logs: Logs) -> bool:
    """Train as the config says; False where it was asked to stop before the end. Called by every
    rank.

    Raises UsageError for what the user must mend, before the run directory is made or changed.
    """
    cfg, directory, writer = job.cfg, job.directory, Writer()
    recorder = Recorder(runtime, guard.progress, writer)
    gather = Gather(runtime, lambda: recorder.split != "train")
    told = LiveRun(recorder)  # what the task is told
    task = make_task(job.task_class, cfg, recorder, told, gather)
    data = Data(cfg, task, runtime, guard.enter)
    told.begin(data)
    state = build_state(job, task, data, recorder, runtime, logs.console)
    plan, progress = data.train_plan, state.progress
    found_here = {"the number of steps": data.total_steps, "the data sets' length": data.lengths}
    # A collective, as is every comparison of what the ranks have found.
    compare({**found_here, "the model's layout": model_layout(state.model)}, runtime)
    if cfg.TRAIN.SHARDS:
        check_shards(cfg, state, runtime, gather)
    # Collectives: where buffers are made of random numbers, rank 0's are everybody's.
    fill(state.model.buffers(), runtime.broadcast_state(list(state.model.buffers())))
    store = CheckpointStore(directory.checkpoints, Retention.from_config(cfg))
    found = find(store, job.resume, job.resume_from, runtime)
    differs: list[str] = []  # from the checkpoint that the run goes on from
    if found is not None:
        changed = check_changes(found.state, cfg, data.length, job.allow)
        differs = [*changed.values(), *state.restore(found.state, runtime, changed, job.allow)]
        if "TRAIN.DURATION" in changed:
            state.finished = ""  # whoever asks for another duration wants it to go on
        # Where batches are of another size now, the next one begins at its own boundary.
        epoch, k = divmod(plan.batches_in(progress.samples), plan.steps_per_epoch)
        begin = epoch * plan.samples_per_epoch + plan.batch(k)[0]
        progress.advance(begin - progress.samples, plan.samples_per_epoch, skipped=True)
        if state.is_finished() and not state.due:
            if found.step is None:
                raise UsageError(
                    f"--resume-from {job.resume_from} is complete, at step {progress.step}: there "
                    "is nothing to train. Raise TRAIN.DURATION, with --allow TRAIN.DURATION."
                )
            logger.info("this run is complete: step %d. Nothing to do.", progress.step)
            # Killed after its last checkpoint, it could not say so itself.
            if runtime.is_main and directory.read_status().get("state") != "completed":
                write_end(directory, state, None)
            return True
    elif starts_otherwise(cfg):
        # Collectives: rank 0 fills and loads, and the others get what it has.
        runtime.on_main(lambda: start_weights(cfg, state.model))
        load_model_state(state.model, runtime.broadcast_state(model_state(state.model)))
    check({**state.shared(), "rank": state.of_rank()}, UsageError)
    if plan.gives_one_sample:
        warn_of_one_sample(state.model)
    saver, completed = None, False
    try:
        data.start(progress.samples, found.state["stream"] if found else None, state.threads)
        if cfg.TRAIN.SHARDS:  # collectives
            compare(kind_of_machine(runtime, state.threads), runtime)
            state.shards = Shards(cfg, state.model, task, plan, runtime)
        resumed = found is not None and found.step is not None
        open_directory(job, state, runtime, resumed, differs)
        logs.open(directory.logs)
        guard.open(keep_stderr=runtime.distributed)  # where others can read it
        if runtime.is_main:
            store.clean(found.damaged if found else ())
            if found and found.step is not None:
                directory.rewind(found.state["files"], progress.step, found.damaged)

            def beat() -> None:
                directory.heartbeat(progress.as_dict())
                guard.look_for_stop_file()

            def saved(manifest: dict[str, Any], seconds: float, error: Exception | None) -> None:
                how: dict[str, Any] = {"seconds": seconds}
                if error is not None:
                    how = {"failed": f"{type(error).__name__}: {error}"}
                step = manifest["step"]
                directory.write_history("checkpoint", step, path=f"step_{step}", **how)
                guard.saved(seconds)
                if error is None:
                    state.callbacks.call("on_saved", seconds)

            sinks = [JsonLines(directory.metrics), *state.callbacks.sinks()]
            writer.open(sinks, directory.write_history, state.callbacks.late_figures, beat)
            saver = Saver(store, saved) if job.saves else None
        step = TrainStep(cfg, task, state, runtime, gather)
        evaluation = Evaluation(cfg, task, runtime, guard, data)
        stopped = Loop(runtime, guard, state, step, evaluation, saver).train()
        completed = stopped is None
    finally:
        guard.enter("save")
        data.close()
        if state.shards is not None:
            state.shards.close()
        if saver is not None:
            saver.close()  # a checkpoint that is being written is finished and told of
        writer.close(completed)
    if runtime.is_main:
        write_end(directory, state, stopped)
    return stopped is None


def build_state(
    job: Job, task: Any, data: Data, recorder: Recorder, runtime: Runtime, console: Any = None
) -> TrainingState:
    """The model, its optimiser and all else that a checkpoint holds, fresh."""
    cfg, ema = job.cfg, None
    model = task.build_model().to(runtime.device)
    check_model(model)
    if not model.training:  # as a pretrained one comes; a module in it keeps its mode
        model.train()
    if cfg.MODEL.SYNC_BN and runtime.distributed:
        if runtime.device.type != "cuda":
            raise UsageError("MODEL.SYNC_BN works on CUDA only: set it False, or DIST.DEVICE cuda.")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    set_modes(cfg, model)
    freezing = Freezing(cfg, model)
    optimizers = build_optimizers(cfg, task, model)
    freezing.begin(optimizers.values())
    if len(optimizers) > 1:  # what each phase gives; other names once two have
        recorder.phases |= {name: list(optimizers) for name in ("loss", "grad_norm")}
    if averages(cfg):
        ema = averaged(model, cfg.MODEL.EMA_DECAY, cfg.MODEL.EMA_WARMUP)
    # CUDA and CPU both have a scaler; it is off, and costs nothing, except in fp16.
    fp16, kind = cfg.TRAIN.PRECISION == "fp16", runtime.device.type
    scalers = {phase: torch.amp.GradScaler(kind, enabled=fp16) for phase in optimizers}
    made_of = cfg, task, model, optimizers, recorder, data, runtime, job.directory.path
    view = Run(*made_of, ema, console)
    callbacks = Callbacks(
        [
            *(made(view) for made in shipped(cfg, task, runtime)),
            *(made(view, **arguments) for made, arguments in job.callbacks),
        ],
        task,
    )
    parts = (model, optimizers, scalers, ema, freezing, recorder, data, callbacks)
    alike = getattr(task, "shared_buffers", ())
    return TrainingState(cfg, *parts, job.directory, alike=alike, task=task)


def open_directory(
    job: Job, state: TrainingState, runtime: Runtime, resumed: bool, differs: list[str]
) -> None:
    """Make the run directory, once every rank has built everything without a mistake."""
    cfg, directory, progress, data = job.cfg, job.directory, state.progress, state.data
    # A collective: rank 0 goes on only when all ranks have come this far.
    ranks = runtime.gather(this_rank(runtime.device))
    if ranks is not None:
        if not resumed and directory.holds_run():  # --overwrite, or --resume without a checkpoint
            directory.claim()  # or of a job that began while this one was built: refused
            logger.info("the old run directory is now %s", directory.set_aside())
        directory.begin()
        directory.config.write_text(state.config, encoding="utf-8")
        replace_json(
            directory.environment,
            {
                **describe(job.argv, job.code),
                "job": runtime.topology.job_id,
                "launched_by": runtime.topology.launched_by,
                "total_steps": data.total_steps,
                **{"lengths": data.lengths, "kinds": data.kinds, "ranks": ranks},
                "cpu": {**vars(runtime.cpu), "loader": vars(data.size)},
            },
        )
        directory.write_status("running", progress.as_dict())
        directory.write_history(
            "resume" if resumed else "start",
            progress.step,
            world_size=runtime.world_size,
            **({"from": str(job.resume_from)} if job.resume_from and not resumed else {}),
            **({"differs": differs} if differs else {}),
            **(job.code.keep(directory.path, progress.step, cfg.MODEL.WEIGHTS) if job.code else {}),
        )
    runtime.broadcast()  # a collective: the others wait for the directory


def write_end(directory: RunDirectory, state: TrainingState, stopped: str | None) -> None:
    """The last word of a run that is complete, or was asked to stop."""
    progress = state.progress
    if stopped is not None:
        status, event, reason = "stopped", "stop", stopped
        how = f"stopped ({reason}), to go on with --resume"
    else:
        reason = f"finished by {state.finished}" if state.finished else ""
        status, event, how = "completed", "finish", f"done ({reason})" if reason else "done"
    directory.write_status(status, progress.as_dict(), reason)
    told = {"reason": reason} if reason else {}
    directory.write_history(event, progress.step, epoch=progress.epoch, **told)
    where = (how, progress.step, progress.epoch, directory.path)
    logger.info("%s: %d steps, %d epochs. The run is in %s", *where)
