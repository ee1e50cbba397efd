"""What a model's weights are before the first step: MODEL.INIT, MODEL.REINIT and MODEL.WEIGHTS."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from launcher.config import CfgNode
from launcher.config.inits import Init, parse_init
from launcher.edges.model import near_or_all, plain_name, some
from launcher.errors import UsageError
from launcher.log import get_logger
from launcher.models.freezing import fits
from launcher.models.weights import load_weights

logger = get_logger(__name__)

Weights = dict[str, nn.Parameter]


def starts_otherwise(cfg: CfgNode) -> bool:
    """Whether a run that begins has other weights than `build_model` gave it."""
    return bool(cfg.MODEL.INIT or cfg.MODEL.REINIT or cfg.MODEL.WEIGHTS)


def start_weights(cfg: CfgNode, model: nn.Module) -> None:
    """Give the model what a run begins with: fresh weights by MODEL.REINIT and MODEL.INIT, and over
    them those of MODEL.WEIGHTS, which leaves alone what REINIT names. Raises UsageError.

    Numbers are drawn on the CPU from torch's generator, seeded with SEED: they are the same on any
    device, and nothing else that is random moves.
    """
    keys, fresh = cfg.MODEL, set[str]()
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(cfg.SEED)
        if keys.REINIT:
            fresh = reset(model, keys.REINIT)
        if keys.INIT:
            initialise(model, [parse_init(text) for text in keys.INIT])
    if keys.WEIGHTS:
        load_weights(Path(keys.WEIGHTS), model, keys.WEIGHTS_STRICT, leave=fresh)


def initialise(model: nn.Module, entries: list[Init]) -> None:
    """Fill weights by torch.nn.init, in the model's order, each once: a tied one as well, and by
    the last entry that names it. Raises UsageError."""
    by: dict[int, Init] = {}
    for entry in entries:
        for p in _named_by(model, entry).values():
            by[id(p)] = entry
    used = {id(entry) for entry in by.values()}
    if idle := [entry.text for entry in entries if id(entry) not in used]:
        raise UsageError(
            f"MODEL.INIT {idle[0]!r} fills nothing: the entries after it name all of its weights, "
            "and the last one counts. Put it after them, or leave it out."
        )
    counts = dict.fromkeys((entry.text for entry in entries), 0)
    for name, p in model.named_parameters():
        if (chosen := by.get(id(p))) is not None:
            _fill(plain_name(name), p, chosen)
            counts[chosen.text] += 1
    told = (f"{text} ({count} weight{'s' * (count > 1)})" for text, count in counts.items())
    logger.info("initialised: %s", "; ".join(told))


def _fill(name: str, p: nn.Parameter, entry: Init) -> None:
    value = torch.empty(p.shape, dtype=p.dtype)
    try:
        getattr(nn.init, f"{entry.fill}_")(value, *entry.args, **entry.named)
    except Exception as error:  # arguments that it has not, or a shape or type that it cannot fill
        raise UsageError(
            f"MODEL.INIT {entry.text!r} cannot fill {name} {tuple(p.shape)}: {error}"
        ) from error
    with torch.no_grad():
        p.copy_(value)


def _named_by(model: nn.Module, entry: Init) -> Weights:
    """The weights of a type of modules (all but biases, or the one after the dot), or of a pattern
    of names. Raises UsageError where there are none."""
    kind, _, own = entry.which.partition(".")
    found: Weights = {}
    for path, module in model.named_modules():
        classes = [base for base in type(module).__mro__ if issubclass(base, nn.Module)]
        if kind not in (base.__name__ for base in classes[:-1]):  # the last one is Module itself
            continue
        if hasattr(module, "parametrizations"):
            raise UsageError(
                f"MODEL.INIT {entry.text!r}: {path} has a parametrised weight, which is computed. "
                "Name what it is computed from: "
                f"{some([n for n, _ in module.named_parameters(path) if 'parametrizations' in n])}"
            )
        for name, p in module.named_parameters(path, recurse=False):
            last = name.rpartition(".")[2]
            if last == own or (not own and "bias" not in last):
                found[plain_name(name)] = p
    weights = _weights(model)
    found = found or {name: p for name, p in weights.items() if fits(name, entry.which)}
    if not found:
        kinds = {type(module).__name__ for module in model.modules()}
        raise _nothing("MODEL.INIT", entry.text, entry.which, [*sorted(kinds), *weights])
    return found


def reset(model: nn.Module, patterns: list[str]) -> set[str]:
    """Give modules fresh weights by their own reset_parameters, the inner ones first, as when they
    were made; the names of all that is fresh. Raises UsageError."""
    weights = _weights(model)
    modules = {plain_name(path): module for path, module in model.named_modules()}
    named = {n for n in (*weights, *modules) if any(fits(n, pattern) for pattern in patterns)}
    for pattern in patterns:
        if not any(fits(name, pattern) for name in (*weights, *modules)):
            raise _nothing("MODEL.REINIT", pattern, pattern, [*modules, *weights])
    fresh = set[str]()
    for path, module in reversed(modules.items()):
        own = {plain_name(n) for n, _ in module.named_parameters(path, recurse=False)}
        if path not in named and not own & named:
            continue
        if left := sorted(own - named):
            raise UsageError(
                f"MODEL.REINIT names a part of {path}, but reset_parameters makes all of it anew: "
                f"name {path}, so that {some(left)} is meant as well."
            )
        method = getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))
        if method is None and own:
            raise UsageError(
                f"MODEL.REINIT: {path} ({type(module).__name__}) has no reset_parameters, which is "
                f"to fill {some(sorted(own))}. Give it one, or make them anew in build_model."
            )
        if method is not None:
            _reset(path, module, method)
            fresh |= own | {plain_name(n) for n, _ in module.named_buffers(path, recurse=False)}
    for name, p in weights.items():
        others = [other for other, q in weights.items() if q is p and other not in named]
        if name in named and others:
            raise UsageError(
                f"MODEL.REINIT: {name} is also {some(others)}, which is not named. Name all of "
                "them, or none."
            )
    logger.info("made anew by MODEL.REINIT: %s", some(sorted(fresh)))
    return fresh


def _reset(path: str, module: nn.Module, method: Callable[[], Any]) -> None:
    """Call it on the CPU, and see that it fills every weight."""
    own = dict(module.named_parameters(recurse=False))
    device = next((p.device for p in own.values()), torch.device("cpu"))
    module.cpu()
    with torch.no_grad():
        for p in own.values():
            if p.is_floating_point() or p.is_complex():
                p.fill_(math.nan)
        method()
    if left := [f"{path}.{name}" for name, p in own.items() if p.isnan().any()]:
        raise UsageError(
            f"MODEL.REINIT: reset_parameters of {path} ({type(module).__name__}) does not fill "
            f"{some(left)}. Leave it out, or make it anew in build_model."
        )
    module.to(device)


def _weights(model: nn.Module) -> Weights:
    """By plain names, a tied one under each of its names."""
    named = model.named_parameters(remove_duplicate=False)
    return {plain_name(name): p for name, p in named}


def _nothing(key: str, text: str, which: str, known: list[str]) -> UsageError:
    told = near_or_all(which.removesuffix(".*"), known, list(filter(None, known)))
    return UsageError(f"{key} {text!r} fits nothing of the model; {told}")
