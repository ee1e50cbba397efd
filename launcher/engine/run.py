"""A run from its config to its end: what is built, in which order, and the training loop.

config -> task -> data set -> order -> loader -> device -> step -> recorder and checkpoint
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from launcher.checkpoint.state import TrainingState
from launcher.checkpoint.store import CheckpointStore, Retention
from launcher.config import CfgNode, parse_duration
from launcher.data.splits import Data
from launcher.engine.evaluate import evaluate
from launcher.engine.optim import build_optimizer
from launcher.engine.schedule import Schedule, build_schedule
from launcher.engine.step import TrainStep
from launcher.errors import RunError, UsageError
from launcher.runtime.process import Runtime
from launcher.runtime.progress import Every, Progress
from launcher.telemetry.console import Console
from launcher.telemetry.logs import Logs
from launcher.telemetry.recorder import Recorder, Sink
from launcher.telemetry.rundir import RunDirectory
from launcher.telemetry.sinks import ConsoleLines, JsonLines, TensorBoard
from launcher.telemetry.system import SystemFigures, describe, this_rank

logger = logging.getLogger(__name__)


def run(
    cfg: CfgNode,
    task_class: type,
    runtime: Runtime,
    logs: Logs,
    directory: RunDirectory,
    argv: list[str],
    resume: bool,
    allow: frozenset[str],
) -> None:
    """Train `task_class` as the config says. Called by every rank.

    Raises UsageError for what the user must mend, before the run directory exists.
    """
    logger.info("%s on %s", runtime.topology, runtime.device)
    task = task_class(cfg)
    data = Data(cfg, task, runtime)
    state = build_state(cfg, task, runtime)
    schedule = build_schedule(cfg, data.train_plan)
    store = CheckpointStore(directory.checkpoints, Retention.from_config(cfg))
    # A collective: rank 0 alone need see the checkpoints, so it sends what it found.
    found = runtime.broadcast(store.newest() if resume and runtime.is_main else None)
    if found is not None:
        check_length(found[1]["dataset_length"], data, allow)
        state.restore(found[1], runtime)
        if state.progress.reached(duration_of(cfg)):
            logger.info("this run is complete: step %d. Nothing to do.", state.progress.step)
            return
    data.start(state.progress.samples, found[1]["stream"] if found is not None else None)
    step = TrainStep(cfg, task, state, runtime)
    open_directory(cfg, directory, runtime, logs, state.progress, data, argv, resumed=bool(found))
    console = Console(schedule.total_steps, enabled=runtime.is_main)
    logs.attach(console)
    if runtime.is_main:
        state.recorder.sinks = make_sinks(cfg, directory, console, state.progress.step)
    try:
        console.start(state.progress.step)
        train(cfg, task, runtime, data, state, schedule, step, store, directory)
    except BaseException as error:
        if runtime.is_main:
            reason = f"{type(error).__name__}: {error}".strip(": ")
            directory.write_status("failed", state.progress.as_dict(), reason)
            directory.write_history("failure", state.progress.step, reason=reason)
        raise
    finally:
        state.recorder.close()
        console.close()
    if runtime.is_main:
        directory.write_status("completed", state.progress.as_dict())
        directory.write_history("finish", state.progress.step, epoch=state.progress.epoch)
    logger.info("done: %d steps, %d epochs. The run is in %s",
                state.progress.step, state.progress.epoch, directory.path)  # fmt: skip


def check_length(saved: int, data: Data, allow: frozenset[str]) -> None:
    """Refuse to go on with a data set of another length: the order of its samples is another."""
    now = data.train_plan.length
    if saved != now and "DATASET_LENGTH" not in allow:
        raise UsageError(
            f"The training data set has {now} samples; the checkpoint was made with {saved}, so "
            "the run cannot go on exactly. To go on all the same: --allow DATASET_LENGTH"
        )


def duration_of(cfg: CfgNode) -> Any:
    """TRAIN.DURATION, in epochs or steps."""
    return parse_duration(cfg.TRAIN.DURATION)


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
        metrics={},
    )


def open_directory(
    cfg: CfgNode,
    directory: RunDirectory,
    runtime: Runtime,
    logs: Logs,
    progress: Progress,
    data: Data,
    argv: list[str],
    resumed: bool,
) -> None:
    """Make the run directory, once every rank has built everything without a mistake."""
    # A collective: rank 0 goes on only when all ranks have come this far.
    ranks = runtime.gather(this_rank(runtime.device))
    if ranks is not None:
        if not resumed and directory.holds_run():  # --overwrite, or --resume without a checkpoint
            logger.info("the old run directory is now %s", directory.set_aside())
        directory.create()
        directory.config.write_text(cfg.dump(), encoding="utf-8")
        directory.write_environment(
            {
                **describe(argv),
                "job": runtime.topology.job_id,
                "launched_by": runtime.topology.launched_by,
                "ranks": ranks,
                "cpu": {**vars(runtime.cpu), "loader": vars(data.size)},
            }
        )
        directory.write_status("running", progress.as_dict())
        directory.write_history("resume" if resumed else "start", progress.step,
                                world_size=runtime.world_size)  # fmt: skip
    runtime.broadcast()  # a collective: the others wait for the directory
    logs.open(directory.logs)


def make_sinks(cfg: CfgNode, directory: RunDirectory, console: Console, step: int) -> list[Sink]:
    sinks: list[Sink] = [JsonLines(directory.metrics), ConsoleLines(console)]
    if cfg.LOG.TENSORBOARD:
        sinks.append(TensorBoard(directory.tensorboard, purge_step=step + 1 if step else None))
    return sinks


@dataclass
class StopWatch:
    """Where this rank's time since the last record went, in seconds."""

    started: float
    data: float = 0.0
    away: float = 0.0  # evaluating and saving
    samples: int = 0
    steps: int = 0

    def seconds(self, now: float) -> float:
        """Time in steps, evaluations and saves left out."""
        return max(now - self.started - self.away, 1e-9)

    def figures(self, now: float) -> dict[str, float]:
        seconds = self.seconds(now)
        return {
            "perf/step_s": seconds / self.steps,
            "perf/data_s": self.data / self.steps,
            "perf/samples_per_s": self.samples / seconds,
        }


def advise(watch: StopWatch, now: float, data: Data) -> None:
    """One line, once an attempt, where training waits for data more than a fifth of its time."""
    share = watch.data / watch.seconds(now)
    if share > 0.2 and not data.advised and watch.seconds(now) > 1:
        data.advised = True
        logger.warning(
            "training waits for data %.0f %% of its time (perf/data_s %.4f of perf/step_s %.4f, "
            "%s). `launcher tune-loader` finds better settings.",
            100 * share,
            watch.data / watch.steps,
            watch.seconds(now) / watch.steps,
            data.size.reason if data.size else "",
        )


def train(
    cfg: CfgNode,
    task: Any,
    runtime: Runtime,
    data: Data,
    state: TrainingState,
    schedule: Schedule,
    step: TrainStep,
    store: CheckpointStore,
    directory: RunDirectory,
) -> None:
    """The loop: one global batch after the other, and after each what is due."""
    plan, progress, duration = data.train_plan, state.progress, duration_of(cfg)
    periods = {
        "record": Every(cfg.LOG.EVERY),
        "evaluate": Every(cfg.EVAL.EVERY),
        "checkpoint": Every(cfg.CHECKPOINT.EVERY),
    }
    if not cfg.EVAL.EVERY:
        logger.info("EVAL.EVERY is never: CHECKPOINT.METRIC %s is ignored", cfg.CHECKPOINT.METRIC)
    figures = SystemFigures(runtime.device)
    figures.read(time.monotonic())
    watch = StopWatch(time.monotonic())
    done_at: dict[str, int] = {}

    def next_batch() -> Any:
        began = time.monotonic()
        batch = data.next_batch()
        watch.data += time.monotonic() - began
        return batch

    def due(name: str) -> bool:
        # A step skipped by the scaler is no new step: nothing is written twice for it.
        wanted = name in seen or periods[name].due(before, progress)
        if name == "evaluate":
            wanted |= done and bool(cfg.EVAL.EVERY)
        else:
            wanted |= done
        return wanted and done_at.get(name) != progress.step

    done = False
    while not done:
        before = progress.copy()
        k = plan.batches_in(progress.samples) % plan.steps_per_epoch
        start, stop = plan.batch(k)
        sizes = [b - a for a, b in plan.micro_batches(k, runtime.rank)]
        rate = schedule.apply(state.optimizer, progress.step)
        asked = frozenset(n for n, p in periods.items() if runtime.is_main and p.elapsed())
        skipped, seen = step(next_batch, sizes, stop - start, asked)
        progress.advance(stop - start, plan.samples_per_epoch, skipped)
        done = progress.reached(duration)
        watch.steps += 1
        watch.samples += stop - start

        if due("record"):
            done_at["record"] = progress.step
            now = time.monotonic()
            extra = {"train/lr": rate, **watch.figures(now), **figures.read(now)}
            state.recorder.record(progress.as_dict(), extra)
            advise(watch, now, data)
            watch = StopWatch(time.monotonic())
            if runtime.is_main:
                directory.write_status("running", progress.as_dict())

        began = time.monotonic()
        best = False
        if due("evaluate"):
            done_at["evaluate"] = progress.step
            best = run_evaluation(cfg, task, runtime, data, state, store)
        if due("checkpoint") or best:
            done_at["checkpoint"] = progress.step
            save(runtime, state, data, store, directory)
        watch.away += time.monotonic() - began


def run_evaluation(
    cfg: CfgNode,
    task: Any,
    runtime: Runtime,
    data: Data,
    state: TrainingState,
    store: CheckpointStore,
) -> bool:
    """Evaluate, with the averaged weights where there are, and say whether it is a new best."""
    model = state.model if state.ema is None else state.ema.module
    metrics = evaluate(cfg, task, model, data.evaluation(), data.val_plan, runtime)
    state.metrics = {f"val/{key}": value for key, value in metrics.items()}
    state.recorder.write(state.progress.as_dict(), state.metrics)
    if cfg.CHECKPOINT.KEEP_BEST and cfg.CHECKPOINT.METRIC not in state.metrics:
        raise RunError(
            f"CHECKPOINT.METRIC {cfg.CHECKPOINT.METRIC} is none of what the evaluation gave: "
            f"{', '.join(state.metrics)}. Set it to one of these, or CHECKPOINT.KEEP_BEST 0."
        )
    # A collective: rank 0 alone sees the checkpoints.
    return runtime.broadcast(store.is_best(state.metrics) if runtime.is_main else None)


def save(
    runtime: Runtime,
    state: TrainingState,
    data: Data,
    store: CheckpointStore,
    directory: RunDirectory,
) -> None:
    """Commit a checkpoint of this step boundary. A collective."""
    began = time.monotonic()
    captured = state.capture(runtime)
    if captured is None:
        return
    position = state.progress.as_dict()
    captured["dataset_length"] = data.train_plan.length
    captured["stream"] = data.stream_state(state.progress.samples)
    manifest = {
        **position,
        "world_size": runtime.world_size,
        "metrics": state.metrics,
        "time": time.time(),
    }
    path = store.commit(captured, manifest)
    seconds = time.monotonic() - began
    logger.info("checkpoint %s (%.2f s)", path.name, seconds)
    directory.write_history("checkpoint", position["step"], path=path.name, seconds=seconds)
