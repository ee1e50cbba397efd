"""What a checkpoint may hold: plain values and tensors, which come back with nothing executed."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from launcher.edges.batch import is_dense, map_tensors
from launcher.errors import RunError, UsageError


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
