"""What a checkpoint may hold: plain values and tensors, which come back with nothing executed."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from launcher.edges.batch import is_dense, map_tensors, on_cpu
from launcher.edges.digest import words
from launcher.edges.returned import calling
from launcher.errors import RunError, UsageError
from launcher.log import get_logger

logger = get_logger(__name__)


def plain(value: Any) -> Any:
    """The same nest with Python's numbers for numpy's, and tensors for numpy's arrays of numbers:
    the one plain meaning that they have. Dicts keep their class, and tensors their memory."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.from_numpy(value.copy())
    if isinstance(value, dict):
        changed = {plain(key): plain(item) for key, item in value.items()}
        if type(value) is dict:
            return changed
        kept = copy.copy(value)  # its attributes too, as the versions beside a state_dict
        kept.clear()
        kept.update(changed)
        return kept
    if type(value) in (list, tuple):
        return type(value)(plain(item) for item in value)
    return value


def kinds(value: Any) -> int:
    """A number that is the same for nests of the same names and types."""
    return hash(tuple(_walk(value)))


def _walk(value: Any) -> Iterator[Any]:
    yield type(value)
    if isinstance(value, torch.Tensor):
        yield value.dtype, value.layout
    for key, item in _children(value):
        yield key
        yield from _walk(item)


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((str(key), item) for key, item in value.items())
    elif isinstance(value, (list, tuple)):
        yield from ((str(i), item) for i, item in enumerate(value))


def check(state: Any, error: type[UsageError] = RunError) -> None:
    """Raise `error` unless the loading that a resume uses takes this state, numpy's numbers and
    tensors aside."""
    if (part := _culprit(map_tensors(plain(state), _empty))) is not None:
        path, value = part
        kind = type(value)
        raise error(
            f"{path} is a {kind.__module__}.{kind.__qualname__}: it could be saved, but not loaded "
            "again, for nothing that a file holds is executed. Keep plain values instead (numbers, "
            "strings, lists, dicts) and tensors."
        )


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same kind, as small as can be."""
    return tensor.detach().new_empty(0) if is_dense(tensor) else tensor.detach()


def _culprit(value: Any, path: str = "") -> tuple[str, Any] | None:
    """The smallest part that does not come back, with its path."""
    try:
        file = io.BytesIO()
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:  # of whatever the value's own class raises
        parts = (_culprit(item, f"{path}/{key}" if path else key) for key, item in _children(value))
        return next((part for part in parts if part is not None), (path, value))
    return None


def keeps_state(task: Any) -> bool:
    """Whether a task has a state of its own to be saved. Raises UsageError for one that could be
    saved and not loaded again, or the other way round."""
    pair = ("state_dict", "load_state_dict")
    has = [name for name in pair if callable(getattr(type(task), name, None))]
    if len(has) == 1:
        lacks = next(name for name in pair if name not in has)
        raise UsageError(
            f"{type(task).__name__} has {has[0]} but no {lacks}: its state would be "
            "lost at a resume. Give it both, or neither."
        )
    return bool(has)


def state_of(task: Any) -> Any:
    """A task's own state, its tensors on the CPU; None where it keeps none."""
    if not keeps_state(task):
        return None
    with calling(f"{type(task).__name__}.state_dict"):
        return on_cpu(task.state_dict())


def alike(one: Any, other: Any) -> bool:
    """Whether two nests of plain values and tensors hold the same, NaN for NaN."""
    one, other = plain(one), plain(other)
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        kind = one.dtype, one.shape
        return kind == (other.dtype, other.shape) and torch.equal(words(one), words(other))
    if type(one) is not type(other):
        return False
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(alike, one, other))
    return bool(one == other or (one != one and other != other))


def load_state_of(task: Any, states: Sequence[Any], runtime: Any, may_begin: bool) -> list[str]:
    """Give a task the state that it had on this rank; `states` are those of all ranks, None for one
    without. Where it was the same on all, any number of ranks may have it.

    Returns what was not restored, in words: all of it on another number of ranks, or where the task
    keeps none any more, if this one `may_begin` afresh. Raises UsageError if not.
    """
    ranks, name = len(states), type(task).__name__
    if all(state is None for state in states):
        return []
    if ranks != runtime.world_size and all(alike(states[0], state) for state in states):
        ranks, states = runtime.world_size, [states[0]] * runtime.world_size
    if keeps_state(task) and ranks == runtime.world_size:
        if states[runtime.rank] is not None:
            with calling(f"{name}.load_state_dict"):
                task.load_state_dict(states[runtime.rank])
        return []
    told = f"the checkpoint has the state that {name} kept on {ranks} ranks"
    told += f", this run has {runtime.world_size}" if keeps_state(task) else ", it keeps none now"
    if not may_begin:
        raise UsageError(f"{told}. To go on without it: --allow TASK_STATE")
    logger.warning("%s: it is left out", told)
    return [f"{told}: it is left out"]


def foreign(path: Path) -> str:
    """What to do with a file whose pickle holds objects of other classes; "" for any other file."""
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # no file of torch's
        return ""
    take = "w = torch.load(p, 'cpu', weights_only=False); w = getattr(w, 'state_dict', lambda: w)()"
    keep = "w = next((w[k] for k in ('model', 'state_dict') if k in w), w)"
    code = f"import torch; p = {str(path)!r}; {take}; {keep}; torch.save(w, p + '.weights')"
    return (
        f"it holds {', '.join(found)}, and loading that would execute code. If you trust the file, "
        f'take its weights out:\n    python -c "{code}"'
        if found
        else ""
    )


def why(error: Exception) -> str:
    """The first line of what torch or the system says."""
    return getattr(error, "strerror", "") or str(error).partition("\n")[0]
