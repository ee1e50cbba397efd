"""A run from its config to its end: what is built, and in which order.

config -> task -> data set -> order -> loader -> device -> step -> recorder and checkpoint
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from launcher.checkpoint.saver import Saver
from launcher.checkpoint.state import TrainingState
from launcher.checkpoint.store import CheckpointStore, Retention
from launcher.checkpoint.weights import load_weights
from launcher.config import CfgNode, flatten, parse_duration
from launcher.data.splits import Data
from launcher.engine.evaluate import evaluate
from launcher.engine.failure import Failures
from launcher.engine.loop import Loop
from launcher.engine.members import compare, model_layout
from launcher.engine.optim import build_optimizer
from launcher.engine.resume import check_config, check_length, choose_checkpoint, find
from launcher.engine.schedule import build_schedule
from launcher.engine.stopping import StopMargin, deadlines
from launcher.runtime.process import Runtime
from launcher.runtime.progress import Progress
from launcher.telemetry.background import Background
from launcher.telemetry.console import Console
from launcher.telemetry.heartbeat import Heartbeat
from launcher.telemetry.logs import Logs
from launcher.telemetry.recorder import Recorder, Sink
from launcher.telemetry.rundir import RunDirectory
from launcher.telemetry.sinks import ConsoleLines, JsonLines, strict
from launcher.telemetry.system import SystemFigures, describe, this_rank
from launcher.telemetry.task_recorder import RunRecorder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """How a run starts: from the command line, the same on every rank."""

    argv: Sequence[str] = ()
    resume: bool = False
    resume_from: Path | None = None
    allow: frozenset[str] = field(default_factory=frozenset)


def run(
    cfg: CfgNode,
    task_class: type,
    runtime: Runtime,
    logs: Logs,
    directory: RunDirectory,
    start: Start,
    failures: Failures,
) -> bool:
    """Train `task_class` as the config says; False where it was asked to stop before the end.
    Called by every rank.

    Called within `watching`, which gives `failures`. Raises UsageError for what the user must mend,
    before the run directory is made or changed.
    """
    task = task_class(cfg)
    data = Data(cfg, task, runtime, runtime.watch.enter)
    state = build_state(cfg, task, runtime)
    failures.progress = state.progress
    task.recorder = RunRecorder(state.recorder, state.progress, runtime)
    schedule = build_schedule(cfg, data.train_plan)
    built = {
        **lengths(data),
        "the number of steps": schedule.total_steps,
        "the model's layout": model_layout(state.model),
    }
    compare(built, runtime)
    store = CheckpointStore(directory.checkpoints, Retention.from_config(cfg))
    found = find(store, start.resume, start.resume_from, runtime)
    if found is not None:
        check_config(found.state["config"], cfg, start.allow)
        check_length(found.state["dataset_length"], data.train_plan.length, start.allow)
        state.restore(found.state, runtime)
        duration = parse_duration(cfg.TRAIN.DURATION)
        if duration is not None and state.progress.reached(duration) and not state.due:
            logger.info("this run is complete: step %d. Nothing to do.", state.progress.step)
            # Killed after its last checkpoint, it could not say so itself.
            if runtime.is_main and directory.read_status().get("state") != "completed":
                _write_end(directory, state.progress, None)
            return True
    elif cfg.MODEL.WEIGHTS:
        load_weights(Path(cfg.MODEL.WEIGHTS), state.model, runtime, strict=cfg.MODEL.WEIGHTS_STRICT)
    stream = found.state["stream"] if found is not None else None
    data.start(state.progress.samples, stream, state.threads)
    resumed = found is not None and found.step is not None
    total = schedule.total_steps
    open_directory(cfg, directory, runtime, logs, data, start, state.progress, resumed, total)
    failures.open()
    console = Console(total, enabled=runtime.is_main)
    logs.attach(console)
    saver = heartbeat = None
    if runtime.is_main:
        if found is not None and resumed:
            store.clean(found.damaged)
            directory.rewind(found.state["files"], state.progress.step, found.damaged)
        else:
            store.clean()
        state.recorder.sink = Background(
            build_sinks(cfg, directory, console, state.progress),
            directory.write_history,
            SystemFigures(runtime.device, directory.path).latest,
        )
        margin = StopMargin(runtime, state.progress)

        def saved(manifest: dict[str, Any], seconds: float, error: Exception | None) -> None:
            directory.saved(manifest, seconds, error)
            margin.saved(seconds)

        saver = Saver(store, runtime.device, saved)
        ask = runtime.watch.request_stop
        heartbeat = Heartbeat(directory, state.progress, deadlines(cfg), margin, ask)
    try:
        console.start(state.progress.step)
        loop = Loop(cfg, task, runtime, directory, data, state, schedule, saver)
        stopped = loop.train()
        if stopped is None and state.recorder.sink is not None:
            state.recorder.sink.finish()
    finally:
        runtime.watch.enter("save")
        console.close()
        data.close()
        if saver is not None:
            saver.close()  # a checkpoint that is being written is finished and told of
        if state.recorder.sink is not None:
            state.recorder.sink.close()
        if heartbeat is not None:
            heartbeat.close()
    if runtime.is_main:
        _write_end(directory, state.progress, stopped)
    return stopped is None


def lengths(data: Data) -> dict[str, str]:
    told = ", ".join(f"{split} {length}" for split, length in data.lengths.items())
    return {"the length of the data sets": told}


def _write_end(directory: RunDirectory, progress: Progress, stopped: str | None) -> None:
    if stopped is None:
        directory.write_status("completed", progress.as_dict())
        directory.write_history("finish", progress.step, epoch=progress.epoch)
        how = "done"
    else:
        directory.write_status("stopped", progress.as_dict(), stopped)
        directory.write_history("stop", progress.step, epoch=progress.epoch, reason=stopped)
        how = f"stopped ({stopped}), to go on with --resume"
    told = (how, progress.step, progress.epoch, directory.path)
    logger.info("%s: %d steps, %d epochs. The run is in %s", *told)


def evaluate_only(
    cfg: CfgNode,
    task_class: type,
    runtime: Runtime,
    directory: RunDirectory,
    which: str,
) -> bool:
    """Evaluate a checkpoint ("last", "best" or a path) and write evaluations/<UTC time>.json; False
    where it was asked to stop before that was done.

    Raises UsageError where there is no such checkpoint.
    """
    task = task_class(cfg)
    data = Data(cfg, task, runtime, runtime.watch.enter)
    compare(lengths(data), runtime)
    model = task.build_model().to(runtime.device)
    task.recorder = RunRecorder(Recorder(runtime), Progress(), runtime)
    store = CheckpointStore(directory.checkpoints, Retention.from_config(cfg))
    path = choose_checkpoint(store, which) if runtime.is_main else None
    path = runtime.broadcast(path)  # a collective: rank 0 alone need see the checkpoints
    strict_names, ema = cfg.MODEL.WEIGHTS_STRICT, cfg.MODEL.EMA_DECAY > 0
    saved = load_weights(path, model, runtime, strict_names, ema)
    # A collective a tensor: the model of rank 0 is everybody's.
    runtime.broadcast_tensors(list(model.state_dict().values()))
    runtime.watch.started = True
    metrics = evaluate(cfg, task, model, data.evaluation(), data.val_plan, runtime)
    if metrics is None:
        logger.info("stopped (%s) before the evaluation was done", runtime.watch.stop)
        return False
    if runtime.is_main:
        values = {f"val/{key}": value for key, value in metrics.items()}
        directory.write_evaluation({"step": saved, "checkpoint": str(path), "metrics": values})
        print(json.dumps(strict(values), allow_nan=False))
    return True


def build_state(cfg: CfgNode, task: Any, runtime: Runtime) -> TrainingState:
    """The model, its optimiser and all else that a checkpoint holds, fresh."""
    model = task.build_model().to(runtime.device)
    ema = None
    if cfg.MODEL.EMA_DECAY > 0:
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(cfg.MODEL.EMA_DECAY))
        ema.eval()
    # CUDA and CPU both have a scaler; it is off, and costs nothing, except in fp16.
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=cfg.TRAIN.PRECISION == "fp16")
    return TrainingState(
        model=model,
        optimizer=build_optimizer(cfg, task, model),
        scaler=scaler,
        ema=ema,
        progress=Progress(),
        recorder=Recorder(runtime),
    )


def build_sinks(
    cfg: CfgNode, directory: RunDirectory, console: Console, progress: Progress
) -> list[Sink]:
    """Where rank 0's records go."""
    sinks: list[Sink] = [JsonLines(directory.metrics), ConsoleLines(console)]
    if cfg.LOG.TENSORBOARD:
        # Before any loader worker is forked: one that is forked while another thread imports a
        # module cannot import it.
        from launcher.telemetry.tensorboard import TensorBoard

        folder, first = directory.tensorboard, progress.step + 1
        sinks.append(TensorBoard(folder, first, cfg.dump(), flatten(cfg)))
    return sinks


def open_directory(
    cfg: CfgNode,
    directory: RunDirectory,
    runtime: Runtime,
    logs: Logs,
    data: Data,
    start: Start,
    progress: Progress,
    resumed: bool,
    total_steps: int,
) -> None:
    """Make the run directory, once every rank has built everything without a mistake."""
    # A collective: rank 0 goes on only when all ranks have come this far.
    ranks = runtime.gather(this_rank(runtime.device))
    if ranks is not None:
        if not resumed and directory.holds_run():  # --overwrite, or --resume without a checkpoint
            logger.info("the old run directory is now %s", directory.set_aside())
        directory.claim()
        directory.sign()
        # One from before asked the attempt of then to stop; who starts this one wants it to run.
        directory.stop.unlink(missing_ok=True)
        directory.config.write_text(cfg.dump(), encoding="utf-8")
        directory.write_environment(
            {
                **describe(start.argv),
                "job": runtime.topology.job_id,
                "launched_by": runtime.topology.launched_by,
                "total_steps": total_steps,
                "ranks": ranks,
                "cpu": {**vars(runtime.cpu), "loader": vars(data.size)},
            }
        )
        directory.write_status("running", progress.as_dict())
        directory.write_history(
            "resume" if resumed else "start",
            progress.step,
            world_size=runtime.world_size,
            **({"from": str(start.resume_from)} if start.resume_from and not resumed else {}),
        )
    runtime.broadcast()  # a collective: the others wait for the directory
    logs.open(directory.logs)
