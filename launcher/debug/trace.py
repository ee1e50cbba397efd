"""The bits that go through a step, in the order in which they come about: for telling where two
runs part."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from launcher.callbacks import Run
from launcher.edges.batch import map_tensors
from launcher.edges.digest import Digest, words


def bits_of(nest: Any) -> str:
    """A hash of all tensors of a nest. Waits for the device."""
    found = hashlib.sha256()

    def add(tensor: torch.Tensor) -> torch.Tensor:
        found.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(words(tensor).cpu().numpy().tobytes())
        return tensor

    map_tensors(nest, add, other=lambda value: found.update(repr(type(value)).encode()))
    return found.hexdigest()[:16]


def rows_of(nest: Any, count: int) -> list[str] | None:
    """A hash for each of so many samples; None where the batch is not made of rows."""
    rows: list[Any] = [hashlib.sha256() for _ in range(count)]
    whole = True

    def add(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal whole
        if tensor.dim() == 0 or len(tensor) != count or tensor.layout is not torch.strided:
            whole = False
        else:
            for row, part in zip(rows, tensor, strict=True):
                row.update(words(part).cpu().numpy().tobytes())
        return tensor

    map_tensors(nest, add)
    return [row.hexdigest()[:16] for row in rows] if whole else None


class Trace:
    """Writes a line of JSON a step: `step`, `weights` before it (the digest), and `events`: what
    came about, in order, each as [kind, name, hash]."""

    def __init__(self, run: Run, path: Path, indices: Callable[[], list[list[int]]]) -> None:
        self.run, self.indices = run, indices
        self.file = path.open("w", encoding="utf-8")
        self.digest = Digest(run.model)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around a step."""
        task, method = self.run.task, type(self.run.task).train_step
        events: list[list[Any]] = []
        line = {"step": self.run.progress.step + 1, "weights": int(self.digest()), "events": events}
        left = [list(part) for part in self.indices()]

        def train_step(model: Any, batch: Any, *phase: str) -> Any:
            at = left.pop(0) if left else []
            rows = rows_of(batch, len(at)) if at else None
            for index, row in zip(at, rows or [], strict=False):
                events.append(["sample", index, row])
            events.append(["batch", "", bits_of(batch)])
            out = method(task, model, batch, *phase)
            events.append(["loss", "", bits_of(out)])
            return out

        handles = [
            module.register_forward_hook(
                lambda _, args, out, name=name: events.append(["output", name, bits_of(out)])
            )
            for name, module in self.run.model.named_modules()
        ]
        task.train_step = train_step
        try:
            yield
        finally:
            task.__dict__.pop("train_step", None)
            for handle in handles:
                handle.remove()
            for name, weight in self.run.model.named_parameters():
                if weight.requires_grad:
                    events.append(["update", name, bits_of(weight)])
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()


def read_trace(path: Path) -> dict[int, dict[str, Any]]:
    """step -> its line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return {line["step"]: line for line in map(json.loads, lines)}


def first_difference(
    ours: dict[int, dict[str, Any]], theirs: dict[int, dict[str, Any]]
) -> tuple[int, str, Any] | None:
    """The first thing that differs in steps that both have: step, kind and name; kinds are those
    of the events, and "weights" for those that the first of these steps begins with."""
    for step in sorted(ours.keys() & theirs.keys()):
        a, b = ours[step], theirs[step]
        if a["weights"] != b["weights"]:
            return step, "weights", ""
        for x, y in zip(a["events"], b["events"], strict=False):
            if x[:2] != y[:2]:
                other = x[0] == y[0] == "sample"
                return step, "order" if other else "path", (x[1] if other else x[0])
            if x[2] != y[2]:
                return step, x[0], x[1]
        if len(a["events"]) != len(b["events"]):
            return step, "path", ""
    return None
