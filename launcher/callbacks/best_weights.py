"""A run ends with its best weights in the model, not with its last.

Nothing imports this file but its name in CALLBACKS, so it may use the rooms behind this one.
"""

from __future__ import annotations

from launcher.callbacks import Run
from launcher.checkpoint.store import CheckpointStore, Retention
from launcher.config.checks import averages, evaluates
from launcher.edges.model import fill, load_model_state, model_state
from launcher.errors import UsageError
from launcher.log import get_logger
from launcher.models.weights import choose_checkpoint, load_weights
from launcher.telemetry.rundir import RunDirectory

logger = get_logger(__name__)


class BestWeights:
    """Once the run is complete, loads the weights of the checkpoint that is best by
    CHECKPOINT.METRIC into the model, averaged ones where there are, for whatever comes after: the
    task's on_end, or the code that started the run. What is saved stays as it is."""

    def __init__(self, run: Run) -> None:
        self.run = run
        if not evaluates(run.cfg) or not run.cfg.CHECKPOINT.KEEP_BEST:
            key = "CHECKPOINT.KEEP_BEST is 0" if evaluates(run.cfg) else "nothing is evaluated"
            raise UsageError(f"CALLBACKS: BestWeights: {key}, so no checkpoint is the best")

    def on_end(self) -> None:
        model, runtime = self.run.model, self.run.runtime
        # Collectives: rank 0 alone sees the checkpoints; its model is everybody's.
        if runtime.on_main(self._load):
            load_model_state(model, runtime.broadcast_state(model_state(model)))
            fill(model.buffers(), runtime.broadcast_state(list(model.buffers())))

    def _load(self) -> bool:
        cfg, metric = self.run.cfg, self.run.cfg.CHECKPOINT.METRIC
        directory = RunDirectory(self.run.directory).checkpoints
        store = CheckpointStore(directory, Retention.from_config(cfg))
        try:
            path = choose_checkpoint(store, "best")
        except UsageError as error:  # it was never finite, say
            logger.warning("the weights stay those of the run's end: %s", error)
            return False
        step = load_weights(path, self.run.model, ema=averages(cfg) or None)
        value = store.manifest(step)["metrics"][metric] if step is not None else None
        logger.info("the model has the weights of step %s, the best: %s %s", step, metric, value)
        return True
