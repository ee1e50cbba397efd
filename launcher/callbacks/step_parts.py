"""Where the time of one step goes: marks at the borders of its parts, and what lies between them.

On CUDA a mark is an event on the training's stream, so a part is the device's time, its idling in
wait of the host included; the host's clock would only see how fast work is queued. On the CPU it
is the clock. The marks leave no gap: all parts together are the whole step.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from launcher.callbacks import Run

PARTS = {
    "data": "data wait",
    "copy": "copy to device",
    "forward": "forward",
    "backward": "backward",
    "exchange": "gradient exchange",
    "optimiser": "optimiser",
    "record": "recording",
    "other": "other",
}


class StepParts:
    """Marks one step, from when it is made to `end`. What it hooks into is undone by `release`, so
    that other steps pay nothing."""

    def __init__(self, run: Run) -> None:
        self.step, self.ended = run.progress.step + 1, False
        self.device, self.shards = run.runtime.device, run.cfg.TRAIN.SHARDS
        self.cuda = self.device.type == "cuda"
        self.stream = torch.cuda.current_stream(self.device) if self.cuda else None
        self.marks: list[tuple[str, Any]] = []  # a part, and when it begins
        self.hooks, self.copying = ExitStack(), ExitStack()
        self._wrap(run.data, "enter", self._enter)
        self._wrap(run.task, "train_step", self._forward)
        for optimizer in run.optimizers.values():
            self._wrap(optimizer, "step", self._optimise)
        self.mark("other")

    def mark(self, part: str) -> None:
        """This part begins here, and the one before ends."""
        self.marks.append((part, self._now()))

    def on_backward(self, loss: torch.Tensor) -> None:
        """A backward pass begins; its loss is known."""
        queue = torch.autograd.Variable._execution_engine.queue_callback

        def started(_: torch.Tensor) -> None:
            # As in launcher/callbacks/stragglers.py: asked for by the pass's first hook, this comes
            # before DDP's own callback, which waits for the other ranks' gradients.
            queue(own_part_is_done)

        def own_part_is_done() -> None:
            self.mark("exchange")
            if not self.shards:  # which are summed up to the next part
                queue(lambda: self.mark("other"))  # after DDP's, which was asked for in the pass

        loss.register_hook(started)
        self.mark("backward")

    def end(self) -> None:
        """The step ends here, or later, if this is called once more after another mark."""
        self.mark("end")
        self.ended = True
        self.release()

    def release(self) -> None:
        self.hooks.close()

    def milliseconds(self) -> dict[str, float]:
        """By part. On CUDA this waits for the last mark: only where the device is idle anyway."""
        if self.cuda:
            self.marks[-1][1].synchronize()
        found = dict.fromkeys(PARTS, 0.0)
        for (part, began), (_, ended) in zip(self.marks, self.marks[1:], strict=False):
            if part != "end":  # between two steps
                found[part] += began.elapsed_time(ended) if self.cuda else 1e3 * (ended - began)
        return found

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self.stream)  # not on that of a copy
        return event

    def _wrap(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        """Put `around(method, ...)` in the place of an object's method, until `release`."""
        if not hasattr(owner, "__dict__"):
            return  # what it does is told with the part before
        # Not by setattr, which a task may have a meaning of its own for, or refuse.
        attributes, method = vars(owner), getattr(owner, name)
        own = attributes.get(name)

        @functools.wraps(method)  # the gradient scaler looks at what a step takes
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return around(method, *args, **kwargs)

        attributes[name] = wrapped
        if own is None:
            self.hooks.callback(attributes.pop, name)
        else:
            self.hooks.callback(attributes.__setitem__, name, own)

    def _enter(self, enter: Callable[[str], None], phase: str) -> None:
        """Called before a batch is waited for, with "data", and after, with "step"."""
        if phase == "data":
            self.mark("data")
            self.copying.enter_context(_Copying(self.device, lambda: self.mark("copy")))
        elif phase == "step":
            self.copying.close()
            self.mark("forward")
        enter(phase)

    def _forward(self, train_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.mark("forward")
        return train_step(*args, **kwargs)

    def _optimise(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return step(*args, **kwargs)
        finally:
            self.mark("other")


class _Copying(TorchFunctionMode):
    """Tells when a batch that has come begins to be moved to the device. No other operation that a
    data set may use is told of: the device is known by the object that the loader passes."""

    def __init__(self, device: torch.device, begins: Callable[[], None]) -> None:
        super().__init__()
        self.moved_to, self.begins, self.begun = device, begins, False

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        to = (*args[1:], *kwargs.values()) if function is torch.Tensor.to else ()
        if not self.begun and any(given is self.moved_to for given in to):
            self.begun = True
            self.begins()
        return function(*args, **kwargs)
