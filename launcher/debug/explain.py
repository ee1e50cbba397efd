"""An exception with the shapes of what the user's code was at, and a debugger on it."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import nn

import launcher

# Whose frames are not the user's.
LIBRARIES = (str(Path(launcher.__file__).parent), str(Path(torch.__file__).parent))
MOST = 8  # items of a nest, and locals of a frame, that are shown


@contextlib.contextmanager
def debugging() -> Iterator[None]:
    """Around a run: an exception is shown whole, with shapes, and where there is a terminal a
    debugger opens on it."""
    try:
        yield
    except Exception as error:
        traceback.print_exception(error)
        print("\n".join(["", *shapes(error.__traceback__)]), file=sys.stderr, flush=True)
        if sys.stdin is not None and sys.stdin.isatty() and sys.gettrace() is None:
            print("The debugger opens where it failed: u and d go up and down, q leaves.")
            import pdb  # which nobody else needs

            pdb.post_mortem(_of_user(error.__traceback__))
        raise


def shapes(trace: TracebackType | None) -> list[str]:
    """Lines on the batch, what the model was given, and the tensors in each frame of the user's."""
    lines, asked = [], False
    for frame in _frames(trace):
        own = frame.f_locals
        if isinstance(own.get("self"), nn.Module) and frame.f_code.co_name == "_call_impl":
            module = own["self"]
            if type(module).__module__.startswith("launcher.engine") or asked:
                continue
            asked = True
            given = [shape(value) for value in own.get("args", ())]
            given += [f"{name}={shape(value)}" for name, value in own.get("kwargs", {}).items()]
            lines.append(f"the model's input ({type(module).__name__}): {', '.join(given)}")
        elif _is_step(frame):
            lines.append(f"the batch: {shape(own.get('batch'))}")
        elif not frame.f_code.co_filename.startswith(LIBRARIES):
            found = [f"{n} {shape(v)}" for n, v in own.items() if _has_tensors(v)]
            if found:
                where = f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
                lines.append(f"{where}: {', '.join(found[:MOST])}")
    return lines


def shape(value: Any, depth: int = 0) -> str:
    """A value in short: types and shapes instead of numbers."""
    if isinstance(value, torch.Tensor):
        on = f" on {value.device}" if value.device.type != "cpu" else ""
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{on}"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{type(value).__name__} {value.dtype}{list(value.shape)}"
    if depth > 3:
        return "..."
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        items = [f"{key}: {shape(item, depth + 1)}" for key, item in value.items()]
        return "{" + _some(items) + "}"
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return "(" + _some([shape(item, depth + 1) for item in value[: MOST + 1]]) + ")"
    if isinstance(value, (int, float, bool, type(None))):
        return repr(value)
    return type(value).__name__


def _some(items: list[str]) -> str:
    return ", ".join(items[:MOST]) + (", ..." if len(items) > MOST else "")


def _has_tensors(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    if isinstance(value, Mapping):
        return any(map(_has_tensors, list(value.values())[:MOST]))
    return isinstance(value, (list, tuple)) and any(map(_has_tensors, value[:MOST]))


def _is_step(frame: FrameType) -> bool:
    """Whether it is where the launcher hands a batch to a task."""
    name, file = frame.f_code.co_name, Path(frame.f_code.co_filename)
    steps = {("step.py", "forward"), ("evaluate.py", "_batch")}
    return file.parent.name == "engine" and (file.name, name) in steps and "batch" in frame.f_locals


def _frames(trace: TracebackType | None) -> Iterator[FrameType]:
    while trace is not None:
        yield trace.tb_frame
        trace = trace.tb_next


def _of_user(trace: TracebackType | None) -> TracebackType | None:
    """The traceback, ended at the last frame of the user's own: pdb begins at the end."""
    last, at = None, trace
    while at is not None:
        if not at.tb_frame.f_code.co_filename.startswith(LIBRARIES):
            last = at
        at = at.tb_next
    if last is not None:
        last.tb_next = None
    return trace
