"""What a task's methods return, taken as it comes: numbers of Python, numpy or torch, in any
mapping. What cannot be taken is refused with the method's name and what is needed."""

from __future__ import annotations

import contextlib
import functools
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from launcher.errors import RunError, UsageError

# What the launcher records itself, as train/<name>; so are all that begin with lr/.
TAKEN = ("lr", "grad_norm", "skipped_steps")


def check_name(name: str, who: str) -> None:
    """Raise RunError for a name of the launcher's own, or one that is no line of text."""
    if not isinstance(name, str) or not name or "\n" in name:
        raise RunError(f"{who} gave the name {name!r}: a name is a line of text")
    if name in TAKEN or name.startswith("lr/"):
        raise RunError(
            f"{who} gave {name!r}, a name that is taken: the launcher records train/"
            f"{', train/'.join(TAKEN)} and train/lr/... itself. Give it another name."
        )


check_name_once = functools.lru_cache(check_name)  # of keys, which are the same in each step


class calling:
    """A context in which an error of the user's own code is told with what was called."""

    def __init__(self, who: str) -> None:
        self.who = who

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception):
            self.note(error)

    def note(self, error: Exception) -> None:
        if not isinstance(error, UsageError):  # which says itself
            vars(error).setdefault("__notes__", []).append(f"in {self.who}")  # PEP 678


def number(value: Any) -> float | None:
    """A scalar of Python or numpy, as a float (whole numbers are exact up to 2^53); else None."""
    if isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0:
        value = value.item()
    with contextlib.suppress(OverflowError):  # a whole number beyond all floats
        return float(value) if isinstance(value, numbers.Real) else None
    return None


def real(name: str, value: Any) -> torch.Tensor | float:
    """A real scalar as a float, or a tensor without its graph. Raises ValueError for another."""
    if isinstance(value, torch.Tensor) and value.dim() == 0 and not value.is_complex():
        return value.detach()
    if (plain := number(value)) is None:
        raise ValueError(f"{name!r} is no scalar: its shape is {_kind(value)}")
    return plain


def on_device(value: torch.Tensor | float, device: torch.device) -> torch.Tensor:
    """A scalar as a tensor on the device, without waiting for it."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    # A fill on the device; a copy to it would wait.
    return torch.full((), value, dtype=torch.float64, device=device)


def scalars(values: Any, device: torch.device, who: str) -> dict[str, torch.Tensor]:
    """What a train_step returned, as tensors without dimensions on the device; it never waits for
    the device. Raises RunError unless it is a mapping of real scalars with a "loss" that has a
    gradient."""
    # A dict at once: to ask a Mapping runs Python.
    if not isinstance(values, (dict, Mapping)) or "loss" not in values:
        raise RunError(f"{who} must return a dict with a 'loss', not {type(values).__name__}")
    found = {}
    for key, value in values.items():
        check_name_once(key, who)
        if not isinstance(value, torch.Tensor) and (plain := number(value)) is not None:
            value = on_device(plain, device)
        if not isinstance(value, torch.Tensor) or value.dim() != 0 or value.is_complex():
            raise RunError(f"{who} must return real scalars; {key!r} is {_kind(value)}")
        found[key] = on_device(value, device)
    if not found["loss"].requires_grad:
        raise RunError(f"{who} returned a 'loss' that depends on no weight: it has no gradient")
    return found


def per_sample(output: Any, samples: int, who: str) -> dict[str, Any]:
    """What an eval_step returned for so many samples: tensors of shape (samples, ...), still on
    their device, and lists of `samples` things. Raises RunError for anything else."""
    if not isinstance(output, Mapping) or not output:
        raise RunError(f"{who} must return a dict of tensors, not {type(output).__name__}")
    found = {key: _as_tensor(value) for key, value in output.items()}
    if any(
        not (isinstance(v, list) or (isinstance(v, torch.Tensor) and v.dim())) or len(v) != samples
        for v in found.values()
    ):
        kinds = {key: _kind(value) for key, value in found.items()}
        raise RunError(
            f"{who} must return tensors of one value a sample, shape ({samples}, ...), or lists of "
            f"{samples}; it returned {kinds}. A loss needs reduction='none'."
        )
    return found


def same_names(
    output: Iterable[str], batch: int, first: Iterable[str], begun: int, who: str
) -> None:
    """Raise RunError where a batch has given other names than the one that was `begun` with."""
    if set(output) != set(first):
        raise RunError(
            f"{who} returned {', '.join(first)} for batch {begun + 1}, but "
            f"{', '.join(output) or 'nothing'} for batch {batch + 1}: the same names are needed"
        )


def joined(outputs: Sequence[Mapping[str, Any]], who: str) -> dict[str, Any]:
    """The values of all batches, in order, as one tensor or list a name. Raises RunError where
    batches differ in their kinds or, but for the first dimension, in their shapes."""
    whole: dict[str, Any] = {}
    for key in outputs[0]:
        parts = [output[key] for output in outputs]
        if all(isinstance(part, list) for part in parts):
            whole[key] = [item for part in parts for item in part]
            continue
        for i, part in enumerate(parts):
            if _row(part) != _row(parts[0]):
                raise RunError(
                    f"{who} returned {key!r} of shape {_kind(parts[0])} for the first batch, but "
                    f"{_kind(part)} for batch {i + 1}: they cannot be put together. Pad it to one "
                    "size in eval_step."
                )
        whole[key] = torch.cat(parts)
    return whole


def averages(output: dict[str, Any], who: str) -> list[tuple[str, Any, Any]]:
    """Of a batch the name, mean and weight, in float64, of each value that is one number a sample;
    `output` is left without its "weight", shape (B,). Never waits for the device. Raises RunError
    for a weight of another shape."""
    weight = output.pop("weight", None)
    if weight is not None and (isinstance(weight, list) or weight.dim() != 1):
        kind = _kind(weight)
        shape = ("B", *kind[1:]) if isinstance(kind, tuple) else kind
        raise RunError(
            f"{who} must return a 'weight' of shape (B,), one a sample; its shape is {shape}"
        )
    return [
        (key, *_mean(value.double(), weight))
        for key, value in output.items()
        if isinstance(value, torch.Tensor)
        and value.dim() == 1
        and (value.is_floating_point() or value.dtype == torch.bool)
    ]


def _mean(value: torch.Tensor, weight: torch.Tensor | None) -> tuple[Any, Any]:
    total: Any = len(value) if weight is None else weight.double().sum()
    mean = value.mean() if weight is None else (value * weight.double()).sum() / total
    if weight is not None:
        mean = torch.where(total == 0, 0.0, mean)  # counts for nothing
    # Equal ones give just that, however large.
    return torch.where((value == value[0]).all(), value[0], mean), total


def summarized(values: Any, who: str) -> dict[str, float]:
    """What a summarize returned, as floats. Raises RunError unless it is a mapping of scalars."""
    if not isinstance(values, Mapping):
        raise RunError(f"{who} must return a dict of numbers, not {type(values).__name__}")
    found = {}
    for key, value in values.items():
        if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex():
            value = value.item()
        if (plain := number(value)) is None:
            raise RunError(f"{who} must return numbers; {key!r} is {_kind(value)}")
        found[key] = plain
    return found


def own_schedule(task: Any, phase: str = "") -> Callable[[int, int], float] | None:
    """The task's `schedule(step, total)`, checked at each call; None where it has none."""
    if not callable(getattr(task, "schedule", None)):
        return None

    def factor(step: int, total: int) -> float:
        who = f"{type(task).__name__}.schedule({step}, {total})"
        with calling(who):
            value = task.schedule(step, total)
        return _rate_factor(value, phase, who)

    return factor


def _rate_factor(value: Any, phase: str, who: str) -> float:
    """What a schedule returned, for the optimiser of this phase ("" where there is but one): a
    number, or a dict of one a phase. Raises RunError for anything but a finite real number."""
    of_phase = isinstance(value, Mapping) and phase in value
    found = value[phase] if of_phase else value
    if isinstance(found, torch.Tensor) and found.numel() == 1 and not found.is_complex():
        found = found.item()
    if (plain := number(found)) is None or not math.isfinite(plain):
        needed = "a finite number" + (f", or a dict with one for {phase!r}" if phase else "")
        raise RunError(f"{who} returned {value!r}: the factor of the learning rate is {needed}")
    return plain


def _as_tensor(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.as_tensor(value)
    return value


def _row(values: Any) -> Any:
    return values.shape[1:] if isinstance(values, torch.Tensor) else type(values)


def _kind(value: Any) -> tuple[int, ...] | str:
    if isinstance(value, torch.Tensor):
        return f"a number of {value.dtype}" if value.is_complex() else tuple(value.shape)
    return type(value).__name__
