"""How a model is run, with its weights and their names as they are: MODEL.CHANNELS_LAST,
MODEL.ACTIVATION_CHECKPOINT and MODEL.COMPILE."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from launcher.config import CfgNode
from launcher.edges.batch import map_tensors
from launcher.edges.digest import plain_name
from launcher.edges.model import some
from launcher.errors import UsageError

# Without a forward of their own, so whoever trains them calls what is in them.
CONTAINERS = (nn.ModuleDict, nn.ModuleList)


def set_modes(cfg: CfgNode, model: nn.Module) -> None:
    """Have a fresh model run as the config says. Raises UsageError for a pattern that fits no
    module."""
    if cfg.MODEL.CHANNELS_LAST:
        _channels_last(model)
    for module in _outermost(model, cfg.MODEL.ACTIVATION_CHECKPOINT):
        _recompute(module)
    if cfg.MODEL.COMPILE:
        for module in compiled_parts(model):
            # In place: no wrapper, so no other name. One graph for each shape, or one for all,
            # never the one that follows from which shape came first: that is another after a
            # resume, and may round otherwise.
            _compile(module, mode=cfg.MODEL.COMPILE_MODE, dynamic=cfg.MODEL.COMPILE_DYNAMIC)


def _compile(module: nn.Module, **how: Any) -> None:
    """As module.compile(), which compiles no frame of torch's own modules: of an nn.Sequential of
    such nothing at all. A frame that is not torch's is compiled with all that it calls."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)

    module._compiled_call_impl = torch.compile(call, **how)


def compiled_parts(model: nn.Module) -> list[nn.Module]:
    """What MODEL.COMPILE compiles: the model, or what a container holds."""
    if isinstance(model, CONTAINERS):
        return [part for child in model.children() for part in compiled_parts(child)]
    return [model]


def _channels_last(model: nn.Module) -> None:
    """Weights and images, of shape (N, C, H, W), with a pixel's channels side by side in memory."""
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for part in compiled_parts(model):
        part.register_forward_pre_hook(_images_channels_last, with_kwargs=True)


def _images_channels_last(module: nn.Module, args: Any, kwargs: Any) -> Any:
    def laid_out(value: Any) -> Any:
        is_image = isinstance(value, torch.Tensor) and value.dim() == 4
        return value.contiguous(memory_format=torch.channels_last) if is_image else value

    return map_tensors((args, kwargs), laid_out)


def _outermost(model: nn.Module, patterns: list[str]) -> list[nn.Module]:
    """The modules whose name fits a pattern, but for those inside another one that does."""
    named = {plain_name(name): module for name, module in model.named_modules() if name}
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in named):
            raise UsageError(
                f"MODEL.ACTIVATION_CHECKPOINT {pattern}: no module has such a name. There are "
                f"{some(list(named))}."
            )
    names = [n for n in named if any(fnmatch(n, pattern) for pattern in patterns)]
    inside = [n for n in names if any(n.startswith(f"{other}.") for other in names)]
    return [named[name] for name in names if name not in inside]


def _recompute(module: nn.Module) -> None:
    """Have a module keep its inputs alone, and run its forward pass once more in the backward pass
    (Chen et al. 2016, "Training deep nets with sublinear memory cost"; torch.utils.checkpoint)."""
    module.forward = _Recomputed(module.forward)  # type: ignore[method-assign]


class _Recomputed:
    """A module's forward. Dropout draws the same again, and buffers, such as batch-norm's, are for
    the second time what they were for the first, and are moved once."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward  # of a copy of the module, where that is copied: it is its method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module: nn.Module = getattr(self.forward, "__self__")  # noqa: B009
        if not (torch.is_grad_enabled() and module.training):
            return self.forward(*args, **kwargs)
        how: dict[str, Any] = {}
        if any(True for _ in module.buffers()):
            how["context_fn"] = lambda: _passes(module)
        return checkpoint(self.forward, *args, use_reentrant=False, **how, **kwargs)


def _passes(module: nn.Module) -> tuple[Any, Any]:
    """What surrounds the first and the second forward pass."""
    before: list[tuple[dict[str, Any], str, torch.Tensor]] = []

    @contextlib.contextmanager
    def first() -> Iterator[None]:
        for part in module.modules():
            held = part._buffers
            before.extend((held, n, b.clone()) for n, b in held.items() if b is not None)
        yield

    @contextlib.contextmanager
    def second() -> Iterator[None]:
        now = [(held, name, held[name]) for held, name, _ in before]
        # Others in their place, not other values in them: what is saved for the backward pass are
        # the second pass's own.
        for held, name, buffer in before:
            held[name] = buffer
        try:
            yield
        finally:
            for held, name, kept in now:
                held[name] = kept

    return first(), second()
