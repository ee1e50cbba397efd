"""Stochastic weight averaging: from MODEL.SWA_START on, the mean of the weights is what counts
(Izmailov et al. 2018, "Averaging weights leads to wider optima and better generalization")."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from launcher.callbacks import Run
from launcher.config import parse_duration, seconds
from launcher.data.loader import load, on_device
from launcher.data.plan import ENDLESS, Plan, train_requests
from launcher.edges.generators import random_state, set_random_state
from launcher.errors import UsageError
from launcher.log import get_logger
from launcher.runtime.process import seed_everything
from launcher.runtime.progress import Every

logger = get_logger(__name__)


class Swa:
    """Takes the weights into their mean every MODEL.SWA_EVERY, and gives the mean's batch-norm the
    statistics of training data under it (Wu and Johnson 2021, "Rethinking Batch in BatchNorm":
    precise ones), on every rank those of the same batches."""

    def __init__(self, run: Run) -> None:
        self.run, keys = run, run.cfg.MODEL
        assert run.average is not None
        self.average = run.average
        start, self.every = parse_duration(keys.SWA_START), Every(keys.SWA_EVERY or "1ep")
        assert start is not None  # else this callback is not made
        self.start = start
        self.before = run.progress.copy()
        if run.data.length == ENDLESS and not keys.SWA_EVERY:
            raise UsageError("MODEL.SWA_EVERY: this data has no epochs; give it in steps.")
        kind, wanted = nn.modules.batchnorm._BatchNorm, keys.SWA_BN_BATCHES > 0
        norms = [m for m in self.average.modules() if isinstance(m, kind)]
        self.norms = [m for m in norms if m.track_running_stats and wanted]
        if not self.norms:
            return
        remedy = "set MODEL.SWA_BN_BATCHES 0, and batch-norm has the model's own statistics"
        if not callable(getattr(run.task, "eval_step", None)):
            raise UsageError(
                f"MODEL.SWA_BN_BATCHES goes through eval_step; write one, or {remedy}."
            )
        run.data.open("train_eval")
        if run.data.kinds["train"] == "iterable":
            raise UsageError(f"MODEL.SWA_BN_BATCHES: an iterable data set is read once; {remedy}.")

    def on_start(self) -> None:
        self.before = self.run.progress.copy()

    def on_step(self) -> None:
        now = self.run.progress
        due = self.every.due(self.before, now) and now.reached(self.start)
        self.before = now.copy()
        if due:
            self.average.update_parameters(self.run.model)
            if self.norms:
                self._measure()

    def _measure(self) -> None:
        """As torch.optim.swa_utils.update_bn, of the data's first batches in the order of epoch 0,
        through the task's eval_step; what that draws leaves the training's random state."""
        before, momenta = random_state(), [norm.momentum for norm in self.norms]
        for norm in self.norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
            norm.train()
        with torch.no_grad(), self.run.recorder.evaluating("swa"):
            for k, batch in enumerate(self._batches()):
                self.run.data.enter("step")  # this may take long
                seed_everything(self.run.cfg.SEED, k)
                self.run.task.eval_step(self.average.module, batch)
                self.run.recorder.take()
        self.run.recorder.held.clear()
        for norm, momentum in zip(self.norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
        set_random_state(before)

    def _batches(self) -> Iterator[Any]:
        run, most = self.run, self.run.cfg.MODEL.SWA_BN_BATCHES
        size = min(run.cfg.EVAL.BATCH_SIZE, run.data.length)
        plan = Plan(run.data.length, size, drop_last=True)
        requests = train_requests(plan, run.data.order, 0, 0, min(most, plan.steps_per_epoch))
        keys = run.cfg.DATALOADER
        workers, timeout_s = run.data.size.workers, seconds(run.cfg.DIST.TRAIN_TIMEOUT)
        fetcher = run.data.fetcher("train_eval")
        answers = load(fetcher, requests, workers, keys.PREFETCH_FACTOR, False, timeout_s)
        yield from on_device(answers, run.runtime.device)
