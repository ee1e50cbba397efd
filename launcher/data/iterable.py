"""Iterable data sets, read by position so that they keep the promises of one global order.

Every reader (each worker of each rank) walks the same stream and keeps the positions it was asked
for, so the order depends neither on ranks nor on workers, and no sample is used twice. What a
reader passes over costs what producing it costs: a stream that can skip more cheaply says so with
a method `skip(count)`, called on the iterator; it returns how many it passed over, fewer than
`count` at its end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch.utils.data import Dataset, default_collate

from launcher.data.fetch import Collate, Seeds
from launcher.errors import RunError

# The length of a stream that does not tell its own: one endless epoch.
ENDLESS = 1 << 62
# How often, in global batches, the position of a stream with `state_dict` is taken along. A resume
# loads the last one and reads forward from there.
STATE_EVERY = 32


class Span(NamedTuple):
    """Positions [start, stop) of an epoch's stream as one batch; whether to return its state."""

    epoch: int
    start: int
    stop: int
    state: bool


class Stated(NamedTuple):
    """A batch, and the stream's state after `position` samples of `epoch`."""

    batch: Any
    saved: dict[str, Any]


class StreamFetcher(Dataset):
    """An iterable data set as a map from Spans, in rising order, to collated batches.

    With `state_dict` and `load_state_dict` the data set resumes where it was; without them it is
    read again from the epoch's start. `set_epoch(epoch)`, where it exists, is called at each start.
    """

    def __init__(
        self, dataset: Any, collate: Collate | None, seed: int | None, endless: bool
    ) -> None:
        self.dataset, self.collate, self.endless = dataset, collate or default_collate, endless
        self.seeds = Seeds(seed) if seed is not None else None
        self.saved: dict[str, Any] | None = None
        self.epoch, self.passes, self.position = -1, 0, 0
        self.iterator: Iterator[Any] = iter(())

    def __getitem__(self, span: Span) -> Any:
        with Seeds.kept():
            if self.epoch != span.epoch:
                self._begin(span.epoch)
            self._skip(span.start - self.position)
            samples = [self._next() for _ in range(span.stop - span.start)]
            batch = self.collate(samples)
        if not (span.state and hasattr(self.dataset, "state_dict")):
            return batch
        saved = {
            "epoch": self.epoch,
            "passes": self.passes,
            "position": self.position,
            "dataset": self.dataset.state_dict(),
        }
        return Stated(batch, saved)

    def _begin(self, epoch: int) -> None:
        self.epoch, self.passes, self.position = epoch, 0, 0
        saved = self.saved
        if saved is not None and saved["epoch"] == epoch:
            self.passes, self.position = saved["passes"], saved["position"]
            self._set_epoch()
            self.dataset.load_state_dict(saved["dataset"])
            self.iterator = iter(self.dataset)
        else:
            self._restart()

    def _restart(self) -> None:
        self._set_epoch()
        self.iterator = iter(self.dataset)

    def _set_epoch(self) -> None:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(self.epoch + self.passes)

    def _skip(self, count: int) -> None:
        if count > 0 and hasattr(self.iterator, "skip"):
            passed = self.iterator.skip(count)
            self.position += passed
            count -= passed
        # Where the stream cannot skip, or ended on the way.
        for _ in range(count):
            self._next()

    def _next(self) -> Any:
        if self.seeds is not None:
            self.seeds.set(self.seeds.of(self.epoch, [self.position])[0])
        name = type(self.dataset).__name__
        for _ in range(2):
            try:
                sample = next(self.iterator)
            except StopIteration:
                if not self.endless:
                    raise RunError(
                        f"data set {name} ended after {self.position} samples of epoch "
                        f"{self.epoch}; its len() says there are more"
                    ) from None
                self.passes += 1
                self._restart()
            except Exception as error:
                raise RunError(
                    f"sample {self.position} of data set {name} failed: "
                    f"{type(error).__name__}: {error}"
                ) from error
            else:
                self.position += 1
                return sample
        raise RunError(f"data set {name} yields no samples")
