"""The data of a run: its two splits, and this rank's batches of each."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset

from launcher.config import CfgNode, parse_duration
from launcher.data.fetch import Fetcher, Request, is_tensors
from launcher.data.iterable import ENDLESS, Span, Stated, StreamFetcher
from launcher.data.loader import eval_batches, load, stream_requests, train_requests
from launcher.data.order import make_order
from launcher.data.plan import Plan
from launcher.data.sizing import Batch, LoaderSize, size_loader, threads_set_by_user
from launcher.data.transfer import nbytes, on_device
from launcher.errors import RunError, UsageError
from launcher.runtime.memory import memory_budget, own_memory
from launcher.runtime.process import Runtime

logger = logging.getLogger(__name__)


class Data:
    """The data sets of a task, their plans, and the streams of batches over them.

    Raises UsageError for a data set that cannot be trained on, RunError for one whose length
    differs between ranks.
    """

    def __init__(self, cfg: CfgNode, task: Any, runtime: Runtime) -> None:
        self.cfg, self.runtime = cfg, runtime
        self.datasets = {split: task.build_dataset(split) for split in ("train", "val")}
        self.collate = getattr(task, "collate", None)
        lengths = {split: self._length(split) for split in self.datasets}
        self._compare(lengths)
        self.train_plan = Plan(
            lengths["train"],
            cfg.TRAIN.BATCH_SIZE,
            cfg.TRAIN.DROP_LAST,
            runtime.world_size,
            cfg.TRAIN.MICRO_BATCH_SIZE,
        )
        self.val_plan = Plan(lengths["val"], cfg.EVAL.BATCH_SIZE, world_size=runtime.world_size)
        self.order = make_order(
            cfg.TRAIN.SAMPLER, self.datasets["train"], lengths["train"], cfg.SEED
        )
        self.size: LoaderSize | None = None
        self._training: Iterator[Any] = iter(())
        self._stream_states: list[dict[str, Any]] = []

    def _length(self, split: str) -> int:
        dataset = self.datasets[split]
        try:
            length = len(dataset)
        except TypeError:
            if split == "train" and isinstance(dataset, IterableDataset):
                self._check_steps()
                return ENDLESS
            raise UsageError(
                f"build_dataset({split!r}) returned a {type(dataset).__name__} without a length; "
                "give it a __len__"
            ) from None
        if length == 0:
            raise UsageError(f"build_dataset({split!r}) returned an empty data set.")
        return length

    def _check_steps(self) -> None:
        cfg = self.cfg
        texts = {
            "TRAIN.DURATION": cfg.TRAIN.DURATION,
            "EVAL.EVERY": cfg.EVAL.EVERY,
            "CHECKPOINT.EVERY": cfg.CHECKPOINT.EVERY,
            "CHECKPOINT.KEEP_EVERY": cfg.CHECKPOINT.KEEP_EVERY,
            "LOG.EVERY": cfg.LOG.EVERY,
            "OPTIM.WARMUP": cfg.OPTIM.WARMUP,
        }
        epochs = [k for k, v in texts.items() if (d := parse_duration(v)) and d.unit == "ep"]
        if epochs:
            raise UsageError(
                "The training data set tells no length, so it has no epochs: give "
                f"{', '.join(epochs)} in steps, or the data set a __len__."
            )

    def _compare(self, lengths: dict[str, int]) -> None:
        # A collective, before the first step: ranks that disagree would wait for each other later.
        everywhere = self.runtime.all_gather((os.uname().nodename, lengths))
        if any(other != lengths for _, other in everywhere):
            told = "; ".join(
                f"rank {rank} on {host}: " + ", ".join(f"{k} {v}" for k, v in found.items())
                for rank, (host, found) in enumerate(everywhere)
            )
            raise RunError(
                "The data set has another length on another rank: do all nodes hold the same "
                f"files? {told}"
            )

    def start(self, consumed: int, saved: dict[str, Any] | None = None, threads: int = 0) -> None:
        """Fetch this rank's first micro-batch after `consumed` samples and size the loader by it.

        `saved` is the state of an iterable data set, from a checkpoint; `threads` what this rank
        computed with before, or 0. A user's OMP_NUM_THREADS wins.
        """
        cfg, plan, dataset = self.cfg, self.train_plan, self.datasets["train"]
        first, duration = plan.batches_in(consumed), parse_duration(cfg.TRAIN.DURATION)
        # Steps that the gradient scaler skips are taken again from later data, so a run counted in
        # steps has no last batch that could be known beforehand.
        last = 1 << 62
        if duration is not None and duration.unit == "ep":
            last = int(duration.amount) * plan.steps_per_epoch
        requests: Iterator[Request | Span]
        if isinstance(dataset, IterableDataset):
            requests = stream_requests(plan, self.runtime.rank, first, last)
        else:
            requests = train_requests(plan, self.order, self.runtime.rank, first, last)
        # An iterable data set is not read here: its workers must find it at its start.
        probe = 0 if isinstance(dataset, IterableDataset) else 1
        fetcher = self._fetcher("train", saved)
        mid_epoch = consumed % plan.samples_per_epoch > 0
        if mid_epoch and isinstance(fetcher, StreamFetcher) and saved is None:
            logger.warning(
                "data set %s has no state_dict and load_state_dict: it is read again from the "
                "epoch's start up to where the run was, which is exact only if it yields the same "
                "samples each time",
                type(dataset).__name__,
            )
        began = time.monotonic()
        first_answers = [fetcher[request] for request in itertools.islice(requests, probe)]
        seconds = time.monotonic() - began
        self.size = self._choose(first_answers, seconds)
        logger.info(self.size.reason)
        if not threads_set_by_user(os.environ):
            torch.set_num_threads(threads or self.size.threads)
        rest = self._load(fetcher, requests, self.size.workers)
        answers = itertools.chain(first_answers, rest)
        self._training = on_device(self._unwrapped(answers), self.runtime.device)

    def start_evaluation(self) -> None:
        """Size the loader by a first batch of the val split, where nothing is trained."""
        dataset, answers = self.datasets["val"], []
        began = time.monotonic()
        if not isinstance(dataset, IterableDataset):
            for start, stop in itertools.islice(eval_batches(self.val_plan, self.runtime.rank), 1):
                answers.append(self._fetcher("val")[Request(0, list(range(start, stop)))])
        self.size = self._choose(answers, time.monotonic() - began)

    def next_batch(self) -> Any:
        """This rank's next micro-batch, on the device."""
        return next(self._training)

    def close(self) -> None:
        """End the loader workers."""
        self._training = iter(())

    def evaluation(self) -> Iterator[Any]:
        """This rank's batches of the val split, on the device. Its workers live as long as it, and
        meanwhile those of the training wait with full queues."""
        assert self.size is not None
        cuts = list(eval_batches(self.val_plan, self.runtime.rank))
        dataset = self.datasets["val"]
        requests: list[Request | Span]
        if isinstance(dataset, IterableDataset):
            requests = [Span(0, start, stop, False) for start, stop in cuts]
        else:
            requests = [Request(0, list(range(start, stop))) for start, stop in cuts]
        # A single batch has nothing to be fetched beside.
        alongside = max(0, len(cuts) - 1)
        workers = 0 if is_tensors(dataset, self.collate) else min(self.size.workers, alongside)
        answers = self._load(self._fetcher("val"), requests, workers)
        return on_device(answers, self.runtime.device)

    def stream_state(self, consumed: int) -> dict[str, Any] | None:
        """The newest known state of an iterable data set that is not past `consumed` samples."""
        in_epoch = consumed % self.train_plan.samples_per_epoch
        epoch = consumed // self.train_plan.samples_per_epoch
        known = [
            s for s in self._stream_states if s["epoch"] == epoch and s["position"] <= in_epoch
        ]
        return known[-1] if known else None

    def _fetcher(self, split: str, saved: dict[str, Any] | None = None) -> Any:
        dataset = self.datasets[split]
        seed = self.cfg.SEED if self.cfg.DATALOADER.SEED_SAMPLES else None
        if isinstance(dataset, IterableDataset):
            endless = split == "train" and self.train_plan.length == ENDLESS
            fetcher = StreamFetcher(dataset, self.collate, seed, endless)
            fetcher.saved = saved
            return fetcher
        skip_bad = self.cfg.DATALOADER.ON_BAD_SAMPLE == "skip"
        return Fetcher(dataset, self.collate, seed, skip_bad)

    def _load(self, fetcher: Any, requests: Any, workers: int) -> Iterator[Any]:
        assert self.size is not None
        timeout = parse_duration(self.cfg.DIST.TRAIN_TIMEOUT)
        assert timeout is not None  # the config check demands one
        prefetch = self.cfg.DATALOADER.PREFETCH_FACTOR
        return load(fetcher, requests, workers, prefetch, self.size.pin_memory, timeout.amount)

    def _choose(self, answers: list[Any], seconds: float) -> LoaderSize:
        cfg, plan, runtime = self.cfg, self.train_plan, self.runtime
        batch = None
        if answers:
            # This rank's micro-batches an epoch, by its share of the first global batch.
            per_epoch = plan.steps_per_epoch * len(plan.micro_batches(0, runtime.rank))
            batch = Batch(seconds, nbytes(answers[0]), per_epoch)
        return size_loader(
            cfg.DATALOADER.NUM_WORKERS,
            cfg.DATALOADER.PREFETCH_FACTOR,
            cfg.DATALOADER.PIN_MEMORY,
            runtime.cpu,
            memory_budget(),
            runtime.topology.local_world_size,
            runtime.device.type == "cuda",
            batch,
            own_memory(),
            in_memory=is_tensors(self.datasets["train"], self.collate),
            iterable=isinstance(self.datasets["train"], IterableDataset),
        )

    def _unwrapped(self, answers: Iterator[Any]) -> Iterator[Any]:
        """Batches, with the states that come along put aside."""
        for answer in answers:
            if isinstance(answer, Stated):
                # The newest may be ahead of the training by the batches prefetched to the device.
                self._stream_states = [*self._stream_states[-3:], answer.saved]
                answer = answer.batch
            yield answer
