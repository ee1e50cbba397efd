"""What a model consists of and what it takes, told in the log at the start."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from launcher.callbacks import Run
from launcher.edges.batch import is_dense, map_tensors
from launcher.log import get_logger

logger = get_logger(__name__)
DEPTH = 2  # of the modules that are told of
ROWS = 50  # where there are more, those of the first level alone


class ModelSummary:
    """Parameters by module at an attempt's start, by LOG.MODEL_SUMMARY; on CUDA how much memory the
    first forward pass leaves taken; what the optimiser keeps, measured after the first step.

    With LOG.COUNT_FLOPS also what that pass keeps by module: not by default, for a model that the
    task has compiled would in that step run as other code than in the rest.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.state: int | None = None  # bytes that the optimisers keep
        self.watches = run.cfg.LOG.COUNT_FLOPS
        self.saved: Saved | None = None
        self.hooks = ExitStack()
        self.device = run.runtime.device
        self.books = self.device.type == "cuda"  # whether the allocator's are still to be asked
        self.held: int | None = None
        if self.watches or self.books:  # hooks that cost something in every step
            self.before_step, self.on_backward = self._before_step, self._on_backward

    def on_start(self) -> None:
        model, optimizers = self.run.model, list(self.run.optimizers.values())
        self.state = measured(optimizers)  # of a run that goes on
        logger.info("%s", summary(model, keeps(optimizers, self.state)))

    def _before_step(self, samples: int) -> None:
        self.hooks.close()
        if self.books and samples:
            self.books, self.held = False, torch.cuda.memory_allocated(self.device)
        if self.watches and samples:
            self.watches = False
            self.saved = Saved(self.run.model, self.hooks)

    def _on_backward(self, loss: torch.Tensor) -> None:
        if self.held is not None:
            # The allocator's own books: no call to the device.
            more, self.held = torch.cuda.memory_allocated(self.device) - self.held, None
            words = (
                "batches and what is kept for the first backward pass take %s of the GPU's memory"
            )
            logger.info(words, size(more))
        if self.saved is not None:
            self.hooks.close()
            logger.info("%s", self.saved.told())
            self.saved = None

    def on_step(self) -> None:
        if self.state is None:
            optimizers = list(self.run.optimizers.values())
            self.state = measured(optimizers) or 0
            logger.info("%s", f"the optimiser keeps {size(self.state)}, as measured after a step")


class Saved:
    """What a forward pass keeps for the backward pass, by module: an estimate, for an operation
    may keep more than autograd's own saved tensors."""

    def __init__(self, model: nn.Module, hooks: ExitStack) -> None:
        """Watches until `hooks` is closed."""
        # Weights and buffers are there anyway.
        own = [*model.parameters(), *model.buffers()]
        self.own = {_place(tensor) for tensor in own if is_dense(tensor) and not is_lazy(tensor)}
        self.found: dict[str, dict[int, int]] = defaultdict(dict)  # storage -> bytes, by module
        self.inside = [""]
        hooks.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t))
        self.names = [name for name, _ in rows(model)]
        for name, module in rows(model):
            before = module.register_forward_pre_hook(lambda *_, n=name: self.inside.append(n))
            after = module.register_forward_hook(self._leave, always_call=True)
            hooks.callback(before.remove)
            hooks.callback(after.remove)

    def told(self) -> str:
        totals = {name: sum(found.values()) for name, found in self.found.items()}
        shown = (name for name in self.names if name in totals)
        lines = [f"  {name:<32}{size(totals[name]):>14}" for name in shown]
        head = (
            "kept for the backward pass of one micro-batch, weights left out (an estimate; what "
            "two modules keep stands at each): "
        )
        return "\n".join([head + size(totals.get("", 0)), *lines])

    def _leave(self, *_: Any) -> None:
        self.inside.pop()

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        with contextlib.suppress(Exception):  # a tensor without a storage of its own
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.own:
                for name in self.inside:
                    self.found[name][storage.data_ptr()] = storage.nbytes()
        return tensor


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def rows(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules to tell of, but for the model itself."""
    named = [(name, module) for name, module in model.named_modules() if name]
    deep = [pair for pair in named if pair[0].count(".") < DEPTH]
    return deep if len(deep) <= ROWS else [pair for pair in named if "." not in pair[0]][:ROWS]


def summary(model: nn.Module, optimiser: str) -> str:
    """Totals, and a line a module with its class, its parameters, and which of them train."""
    parameters = list(model.parameters())
    count, trains = _count(parameters), _count(p for p in parameters if p.requires_grad)
    weights, gradients = _nbytes(parameters), _nbytes(p for p in parameters if p.requires_grad)
    lines = [
        f"{type(model).__name__}: {count:,} parameters, {trains:,} of them trainable and "
        f"{count - trains:,} frozen; weights {size(weights)}, buffers "
        f"{size(_nbytes(model.buffers()))}, gradients {size(gradients)}, {optimiser}"
    ]
    lazy = sum(map(is_lazy, parameters))
    if lazy:
        lines.append(f"  {lazy} lazy ones have no shape yet, and are not counted")
    shown = rows(model)
    for name, module in shown:
        own = list(module.parameters())
        which = {p.requires_grad for p in own}
        how = "" if not own else "trainable" if which == {True} else "frozen"
        if len(which) == 2:
            how = f"{_count(p for p in own if p.requires_grad):,} trainable"
        lines.append(f"  {name:<32}{type(module).__name__:<24}{_count(own):>16,}  {how}".rstrip())
    left = sum("." not in name for name, _ in model.named_modules() if name) - sum(
        "." not in name for name, _ in shown
    )
    if left:
        lines.append(f"  and {left} modules more")
    return "\n".join(lines)


def keeps(optimizers: Sequence[Any], state: int | None) -> str:
    """What the optimisers keep, in words: measured, or by their classes before the first step."""
    if state is not None:
        return f"optimiser state {size(state)}"
    guesses = [guessed(optimizer) for optimizer in optimizers]
    if None in guesses:
        return "optimiser state known after the first step"
    return f"optimiser state about {size(sum(guess or 0 for guess in guesses))}"


def guessed(optimizer: Any) -> int | None:
    """Bytes that an optimiser of torch's own will keep; None for one that is not known."""
    kind, total = type(optimizer), 0
    if kind.__module__.split(".")[:2] != ["torch", "optim"]:
        return None
    for group in optimizer.param_groups:
        # Tensors of a weight's size that it keeps for each.
        copies = {
            "SGD": int(group.get("momentum", 0) != 0),
            "RMSprop": 1 + bool(group.get("momentum")) + bool(group.get("centered")),
            "Adagrad": 1,
            **dict.fromkeys(("Adam", "AdamW"), 2 + bool(group.get("amsgrad"))),
            **dict.fromkeys(("NAdam", "RAdam", "Adamax", "Adadelta"), 2),
        }.get(kind.__name__)
        if copies is None:
            return None
        total += copies * _nbytes(p for p in group["params"] if p.requires_grad)
    return total


def measured(optimizers: Sequence[Any]) -> int | None:
    """Bytes of all tensors in the optimisers' state; None where they have none yet."""
    found: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if is_dense(tensor):
            found[_place(tensor)] = tensor.untyped_storage().nbytes()
        else:
            found[id(tensor)] = tensor.numel() * tensor.element_size()
        return tensor

    for optimizer in optimizers:
        map_tensors(list(getattr(optimizer, "state", {}).values()), note)
    return sum(found.values()) if found else None


def flops(counts: Mapping[str, Mapping[Any, int]], model: nn.Module, samples: int) -> str:
    """What FlopCounterMode has counted in a step of so many samples: a line a module of the model,
    and one for what was computed outside of them."""
    by_name = {name: sum(found.values()) for name, found in counts.items()}
    # It names modules from the outermost on: the one that DDP wraps, which holds the model.
    under = [name for name in by_name if name.endswith(".model")]
    shown = [name for name, _ in rows(model)]
    found = {n: by_name[f"{u}.{n}"] for n in shown for u in under if f"{u}.{n}" in by_name}
    total = by_name.get("Global", 0)
    lines = [f"FLOPs of a sample by module, forward and backward: {total / samples:,.0f}"]
    lines += [f"  {name:<32}{found[name] / samples:>20,.0f}" for name in shown if name in found]
    if rest := total - sum(count for name, count in found.items() if "." not in name):
        lines.append(f"  {'elsewhere':<32}{rest / samples:>20,.0f}")
    return "\n".join(lines)


def size(count: float) -> str:
    """Bytes, for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"


def _count(parameters: Iterable[torch.Tensor]) -> int:
    return sum(p.numel() for p in parameters if not is_lazy(p))


def _nbytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if not is_lazy(t))
