"""The data of a run: its splits, and this rank's part of their batches."""

from __future__ import annotations

import copy
import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from launcher.config import CfgNode, parse_duration, seconds
from launcher.config.checks import evaluates, in_epochs, recorded_as
from launcher.data.fetch import Fetcher, Stated, StreamFetcher, collate_of, kind_of
from launcher.data.loader import load, on_device
from launcher.data.order import make_order
from launcher.data.plan import ENDLESS, Plan, Request, train_requests
from launcher.data.sizing import LoaderSize, size_loader
from launcher.datasets.part import shuffled_part
from launcher.edges.batch import nbytes
from launcher.errors import UsageError
from launcher.log import get_logger
from launcher.runtime.cpu import threads_set_by_user
from launcher.runtime.memory import memory_budget
from launcher.runtime.process import Runtime
from launcher.runtime.progress import in_steps

logger = get_logger(__name__)
# In global batches, how often a stream's state is taken along; a resume reads forward from there.
STATE_EVERY = 32


@dataclass(frozen=True)
class GlobalBatch:
    """What one optimiser step trains on, and this rank's part of it."""

    count: int  # samples over all ranks
    sizes: list[int]  # samples of this rank's micro-batches; empty for a rank without samples
    batches: Iterator[Any]  # these micro-batches on the device, fetched as they are taken
    rounds: int  # the most micro-batches of any rank
    full: int  # the fewest: rounds in which no rank is idle


class Data:
    """The data sets of a task, their plans, and the streams of batches over them.

    `start` before `batches`; `close` at the end. No sample is taken in this process where there
    are loader workers: a file that a data set opens on first use would be shared with all of them.
    `size` is how the training is loaded, settled by `start`; `waited` for how many seconds it has
    waited for batches.

    Raises UsageError for a data set that cannot be trained on. Whether `lengths` are the same on
    all ranks is for the caller to ask.
    """

    def __init__(
        self, cfg: CfgNode, task: Any, runtime: Runtime, enter: Callable[[str], None]
    ) -> None:
        """`enter` is called with "data" before a training batch is waited for, and with "step"
        after."""
        self.cfg, self.runtime, self.enter = cfg, runtime, enter
        self.collate, self._build = getattr(task, "collate", None), task.build_dataset
        self.datasets: dict[str, Any] = {}
        self.kinds, self.lengths = dict[str, str](), dict[str, int]()
        self.open("train")
        for split in cfg.EVAL.SPLITS if evaluates(cfg) else ():
            self.eval_plan(split)
        self.length, train = self.lengths["train"], cfg.TRAIN
        micro = 0 if train.MICRO_BATCH_SIZE == "auto" else train.MICRO_BATCH_SIZE
        sizes = train.BATCH_SIZE, train.DROP_LAST, runtime.world_size, micro, train.SHARDS
        self.train_plan = Plan(self.length, *sizes)
        self.total_steps = in_steps(train.DURATION, self.train_plan.steps_per_epoch)
        sampler, dataset = train.SAMPLER, self.datasets["train"]
        if self.kinds["train"] == "iterable":
            if sampler in ("dataset", "grouped"):
                name = type(dataset).__name__
                raise UsageError(f"TRAIN.SAMPLER {sampler}: {name} is iterable, its order its own")
            sampler = "sequential"
        self.order = make_order(sampler, dataset, self.length, cfg.SEED, train.BATCH_SIZE)
        # Before there are workers, whose memory would count as taken.
        own = psutil.Process().memory_full_info().uss if cfg.DATALOADER.NUM_WORKERS < 0 else 0
        self._memory = memory_budget(), own
        self._nbytes = dict[str, int]()  # of a batch, once one is known
        self.size = self._size("train")
        self.waited = 0.0
        self._first = self._last = 0  # global batches, counted over all epochs
        self._training: Iterator[Any] = iter(())
        # Newest last: it may be ahead of the training, by the batches that were prefetched.
        self._stream_states: deque[dict[str, Any] | None] = deque([None], maxlen=4)

    def open(self, split: str) -> None:
        """Build a split's data set, where that is not done; one that is evaluated may wait for
        that, for what is never evaluated need not exist. "train_eval" is the training data."""
        if split in self.datasets:
            return
        name = "train" if split == "train_eval" else split
        # A stream is read for one purpose only.
        shared = name != split and self.kinds[name] != "iterable"
        dataset = self.datasets[name] if shared else self._build(name)
        if (batches := self.cfg.DEBUG.OVERFIT_BATCHES) and name == "train" and not shared:
            most = batches * self.cfg.TRAIN.BATCH_SIZE
            dataset = shuffled_part(dataset, most, self.cfg.SEED)
        self.datasets[split] = dataset
        self.kinds[split] = kind_of(dataset, collate_of(dataset, self.collate))
        self.lengths[split] = self._length(split, name)

    def eval_plan(self, split: str) -> Plan:
        """The batches of an evaluation over all ranks, at most EVAL.SAMPLES samples."""
        self.open(split := recorded_as(split))
        keys, length = self.cfg.EVAL, self.lengths[split]
        most = min(length, keys.SAMPLES or length)
        return Plan(most, keys.BATCH_SIZE, world_size=self.runtime.world_size)

    def _length(self, split: str, name: str) -> int:
        dataset = self.datasets[split]
        try:
            length = len(dataset)
        except TypeError:
            iterable = self.kinds[split] == "iterable"
            if iterable and split != "train" and self.cfg.EVAL.SAMPLES:
                return self.cfg.EVAL.SAMPLES
            if split != "train" or not iterable:
                raise UsageError(
                    f"build_dataset({name!r}) returned a {type(dataset).__name__} without a "
                    "length; give it a __len__" + (", or set EVAL.SAMPLES" if iterable else "")
                ) from None
            if epochs := in_epochs(self.cfg):
                raise UsageError(
                    "The training data set tells no length, so it has no epochs: give "
                    f"{', '.join(epochs)} in steps, or the data set a __len__."
                ) from None
            return ENDLESS
        if length == 0:
            raise UsageError(f"build_dataset({name!r}) returned an empty data set.")
        return length

    def start(self, samples: int, stream: dict[str, Any] | None = None, threads: int = 0) -> None:
        """Start this rank's loader after `samples` consumed ones, and fetch its first micro-batch.

        `stream` is what `stream_state` gave for a checkpoint; `threads` as for `set_threads`.
        """
        plan, duration = self.train_plan, parse_duration(self.cfg.TRAIN.DURATION)
        # Steps that the gradient scaler skips are taken again from later data, so a run counted in
        # steps has no last batch that could be known beforehand.
        self._first, self._last = plan.batches_in(samples), ENDLESS
        if duration is not None and duration.unit == "ep":
            self._last = self.total_steps
        self.set_threads(threads)
        self._stream_states.append(stream)
        span = self.runtime.rank, self._first, self._last
        answers = self._load("train", lambda: train_requests(plan, self.order, *span))
        self.size = self._size("train")
        logger.info(self.size.reason)
        self._training = on_device(self._unwrapped(answers), self.runtime.device)

    def set_threads(self, threads: int = 0) -> None:
        """As many as before, or as the CPU budget grants; a user's OMP_NUM_THREADS wins."""
        if not threads_set_by_user(os.environ):
            torch.set_num_threads(threads or self.size.threads)

    def batches(self) -> Iterator[GlobalBatch]:
        """The global batches from where `start` began to the end of TRAIN.DURATION, if that is in
        epochs. This rank's part of each is to be taken whole before the next."""
        plan, parts = self.train_plan, dict[int, tuple[list[int], int, int]]()
        for step in range(self._first, self._last):
            k = step % plan.steps_per_epoch
            start, stop = plan.batch(k)
            if (count := stop - start) not in parts:  # the same for batches of one size
                sizes = [b - a for a, b in plan.micro_batches(k, self.runtime.rank)]
                parts[count] = sizes, plan.rounds(k), plan.full_rounds(k)
            sizes, *rounds = parts[count]
            yield GlobalBatch(count, sizes, self._take(len(sizes)), *rounds)

    def _take(self, count: int) -> Iterator[Any]:
        for _ in range(count):
            began = time.monotonic()
            self.enter("data")
            batch = next(self._training)
            self.enter("step")
            self.waited += time.monotonic() - began
            yield batch

    def evaluation(self, split: str, batches: Sequence[int]) -> Iterator[Any]:
        """Batches of these numbers of a split's evaluation, on the device. Its workers live as long
        as it, and meanwhile those of the training wait with full queues."""
        plan, split = self.eval_plan(split), recorded_as(split)
        # A single batch has nothing to be fetched beside.
        most = 0 if self.kinds[split] == "tensors" else max(0, len(batches) - 1)

        def requests() -> Iterator[Request]:
            return (Request(0, list(range(*plan.batch(k)))) for k in batches)

        yield from on_device(self._load(split, requests, most), self.runtime.device)

    def close(self) -> None:
        """End the loader workers."""
        self._training = iter(())

    def stream_state(self, samples: int) -> dict[str, Any] | None:
        """The newest known state of an iterable data set that is not past `samples` consumed."""
        epoch, in_epoch = divmod(samples, self.train_plan.samples_per_epoch)
        for state in reversed(self._stream_states):
            if state and state["epoch"] == epoch and state["position"] <= in_epoch:
                return state
        return None

    def fetcher(self, split: str) -> Fetcher | StreamFetcher:
        """What makes a split's batches from requests, here or in a worker."""
        dataset, keys = self.datasets[split], self.cfg.DATALOADER
        if split != "train" and dataset is self.datasets["train"]:
            dataset = copy.copy(dataset)  # which is told epochs of its own
        seed = self.cfg.SEED if keys.SEED_SAMPLES else None
        collate = collate_of(dataset, self.collate)
        if self.kinds[split] != "iterable":
            return Fetcher(dataset, collate, seed, keys.ON_BAD_SAMPLE == "skip")
        if split != "train":
            return StreamFetcher(dataset, collate, seed)
        endless, every = self.length == ENDLESS, STATE_EVERY * self.train_plan.batch_size
        begin, saved = self._first % self.train_plan.steps_per_epoch, self._stream_states[-1]
        begin = self.train_plan.batch(begin)[0]
        return StreamFetcher(dataset, collate, seed, endless, every, saved, begin)

    def _load(
        self, split: str, requests: Callable[[], Iterator[Request]], most: int = ENDLESS
    ) -> Iterator[Any]:
        """The answers to the requests, the first one already here; by `most` workers at most.

        Where the first that a worker brings shows that the batches in flight might not fit into
        memory, the loader starts over with fewer.
        """
        size, prefetch = self._size(split), self.cfg.DATALOADER.PREFETCH_FACTOR
        workers, fetcher = min(size.workers, most), self.fetcher(split)
        timeout_s = seconds(self.cfg.DIST.TRAIN_TIMEOUT)
        answers = load(fetcher, requests(), workers, prefetch, size.pin_memory, timeout_s)
        first = list(itertools.islice(answers, 1))
        if workers:
            self._nbytes[split] = nbytes(first)
            if self._size(split).workers < workers:
                answers.close()
                return self._load(split, requests, most)
        return itertools.chain(iter(first), answers)

    def _size(self, split: str) -> LoaderSize:
        keys, kind = self.cfg.DATALOADER, self.kinds[split]
        size = size_loader(keys, self.runtime, kind, *self._memory, self._nbytes.get(split, 0))
        # With shards whatever the ranks' number and the CPUs that each is bound to.
        return replace(size, threads=1) if self.cfg.TRAIN.SHARDS else size

    def _unwrapped(self, answers: Iterator[Any]) -> Iterator[Any]:
        """Batches, with the states that come along put aside."""
        for answer in answers:
            if isinstance(answer, Stated):
                self._stream_states.append(answer.state)
                answer = answer.batch
            yield answer
