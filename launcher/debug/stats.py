"""What goes through each module of a model in a step: norms, ranges, what is not finite."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from launcher.edges.batch import map_tensors

HEADS = ("", "shape", "norm", "least", "greatest", "not finite")


class Stats:
    """A context: while it lasts, each module's inputs, outputs, weights and gradients are looked
    at. Waits for the device at the end alone."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.handles = model, list[Any]()
        # (module, what) -> shape, and sum of squares, least, greatest, count of each time.
        self.found: dict[tuple[str, str], tuple[tuple[int, ...], list[torch.Tensor]]] = {}

    def __enter__(self) -> Stats:
        for name, module in self.model.named_modules():
            self.handles.append(
                module.register_forward_hook(
                    lambda _, args, kwargs, out, name=name: self._forward(name, args, kwargs, out),
                    with_kwargs=True,
                )
            )
        for name, weight in self.model.named_parameters():
            owner, _, own = name.rpartition(".")
            self.note(owner, f"weight {own}", weight)
            if weight.requires_grad:
                self.handles.append(
                    weight.register_post_accumulate_grad_hook(
                        lambda p, owner=owner, own=own: self.replace(owner, f"gradient {own}", p)
                    )
                )
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _forward(self, name: str, args: Any, kwargs: Any, out: Any) -> None:
        for what, nest in (("input", (args, kwargs)), ("output", out)):
            tensors: list[torch.Tensor] = []
            map_tensors(nest, lambda t, into=tensors: into.append(t) or t)  # type: ignore[misc]
            for number, tensor in enumerate(tensors):
                place = what + (f" {number + 1}" if len(tensors) > 1 else "")
                self.note(name, place, tensor)
                if tensor.requires_grad and what == "output":
                    tensor.register_hook(
                        lambda grad, name=name, place=place: self.note(
                            name, f"gradient of {place}", grad
                        )
                    )

    def replace(self, name: str, what: str, parameter: torch.Tensor) -> None:
        """A gradient that grows from micro-batch to micro-batch: the last counts."""
        self.found.pop((name, what), None)
        assert parameter.grad is not None
        self.note(name, what, parameter.grad)

    def note(self, name: str, what: str, tensor: torch.Tensor) -> None:
        tensor = tensor.detach()
        if not (tensor.is_floating_point() or tensor.is_complex()) or not tensor.numel():
            return
        flat = (tensor.to_dense() if tensor.layout is not torch.strided else tensor).flatten()
        flat = torch.view_as_real(flat).flatten() if flat.is_complex() else flat
        finite = flat.isfinite()
        whole = torch.where(finite, flat, 0).double()
        row = torch.stack(
            [
                (whole * whole).sum(),
                torch.where(finite, flat, math.inf).min().double(),
                torch.where(finite, flat, -math.inf).max().double(),
                (~finite).sum().double(),
            ]
        )
        self.found.setdefault((name, what), (tuple(tensor.shape), []))[1].append(row)

    def rows(self) -> list[tuple[str, str, tuple[int, ...], float, float, float, int]]:
        """Module, what, shape, norm, least, greatest and how many are not finite; the first three
        numbers are of those that are. Waits for the device."""
        rows = []
        for (name, what), (shape, parts) in self.found.items():
            squares, least, greatest, count = torch.stack(parts).unbind(1)
            norm = math.sqrt(squares.sum().item())
            found = norm, least.min().item(), greatest.max().item(), int(count.sum().item())
            rows.append((name, what, shape, *found))
        return rows

    def table(self) -> str:
        """The modules in the order in which they ran, with those of which only weights are known
        last; and the first number that is not finite."""
        rows = self.rows()
        ran: dict[str, int] = {}
        for i, (name, what) in enumerate(self.found):
            if what.startswith(("input", "output")):
                ran.setdefault(name, i)
        names = sorted({row[0] for row in rows}, key=lambda n: ran.get(n, len(rows) + 1))
        lines: list[tuple[str, ...]] = [HEADS]
        for name in names:
            lines.append((name or "(the model)", "", "", "", "", ""))
            for _, what, shape, norm, least, greatest, count in (r for r in rows if r[0] == name):
                told = "x".join(map(str, shape)) or "1"
                lines.append(
                    (
                        f"  {what}",
                        told,
                        f"{norm:.4g}",
                        f"{least:.4g}",
                        f"{greatest:.4g}",
                        str(count),
                    )
                )
        text = aligned(lines)
        bad = next((row for row in rows if row[-1]), None)
        if bad is not None:
            text += f"\nthe first that is not finite: {bad[1]} of {bad[0] or 'the model'}"
        return text


def aligned(lines: list[tuple[str, ...]]) -> str:
    """Lines of cells as columns, the first two to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    told = []
    for line in lines:
        cells = [
            c.ljust(w) if i < 2 else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ]
        told.append("  ".join(cells).rstrip())
    return "\n".join(told)
