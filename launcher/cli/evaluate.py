"""`launcher train --eval-only`: a checkpoint's metrics, beside any run."""

from __future__ import annotations

import json

from launcher.checkpoint.store import CheckpointStore, Retention
from launcher.config.checks import averages
from launcher.data.splits import Data
from launcher.edges.model import check_model, load_model_state, model_state
from launcher.engine.evaluate import Evaluation
from launcher.engine.run import Job
from launcher.guard.guard import Guard
from launcher.guard.members import compare
from launcher.log import get_logger
from launcher.models.weights import choose_checkpoint, load_weights
from launcher.runtime.gather import Gather
from launcher.runtime.process import Runtime
from launcher.tasks import make_task
from launcher.tasks.run import LiveRun
from launcher.telemetry.recorder import Recorder
from launcher.telemetry.sinks import strict
from launcher.telemetry.writer import Writer

logger = get_logger(__name__)


def evaluate_only(job: Job, runtime: Runtime, guard: Guard) -> bool:
    """Evaluate `job.checkpoint`, and write evaluations/<UTC time>.json; False where it was asked to
    stop before that was done.

    Raises UsageError where there is no such checkpoint.
    """
    cfg, directory = job.cfg, job.directory
    told = LiveRun(recorder := Recorder(runtime, guard.progress, Writer()))
    task = make_task(job.task_class, cfg, recorder, told, Gather(runtime, lambda: True))
    data = Data(cfg, task, runtime, guard.enter)
    told.begin(data)
    splits = list(job.splits or cfg.EVAL.SPLITS)
    for split in splits:
        data.eval_plan(split)
    model = task.build_model().to(runtime.device)
    check_model(model)
    compare({"the data sets' length": data.lengths}, runtime)
    data.set_threads()
    store = CheckpointStore(directory.checkpoints, Retention.from_config(cfg))
    # Collectives: rank 0 alone need see the checkpoints.
    path = runtime.on_main(lambda: choose_checkpoint(store, job.checkpoint))
    strict_names, ema = cfg.MODEL.WEIGHTS_STRICT, averages(cfg) or None
    saved = runtime.on_main(lambda: load_weights(path, model, strict_names, ema))
    # Collectives: the model of rank 0 is everybody's.
    load_model_state(model, runtime.broadcast_state(model_state(model)))
    metrics = Evaluation(cfg, task, runtime, guard, data)(model, splits, show=True)
    if metrics is None:
        logger.info("stopped (%s) before the evaluation was done", guard.stop)
        return False
    if runtime.is_main:
        directory.write_evaluation({"step": saved, "checkpoint": str(path), "metrics": metrics})
        print(json.dumps(strict(metrics), allow_nan=False))
    return True
