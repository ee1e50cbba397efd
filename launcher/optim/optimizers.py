"""Optimisers from OPTIM.*."""

from __future__ import annotations

import difflib
import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from launcher.config import CfgNode
from launcher.config.keys import OPTIMIZERS
from launcher.config.optim import COUNT
from launcher.config.words import arguments
from launcher.edges.gradients import sparse_weights
from launcher.edges.optimizer import by_phase, check_optimizers, check_scheduled
from launcher.errors import UsageError
from launcher.log import get_logger
from launcher.optim.curves import others, scaled
from launcher.optim.groups import Weight, groups, weights
from launcher.optim.muon import MuonWithAdamW, takes
from launcher.tasks.resolve import resolve_class

logger = get_logger(__name__)

NAMES = ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adafactor", "Muon")
BUILTIN = {key: f"torch.optim:{name}" for key, name in zip(OPTIMIZERS, NAMES, strict=True)}
# Keys that go into the groups, or make them: of no effect where a task makes the optimiser itself.
UNUSED = ("ARGS", "GROUPS", "LAYER_DECAY", "SKIP_NORM_DECAY", "LR_SCALING")


def build_optimizers(cfg: CfgNode, task: Any, model: nn.Module) -> dict[str, Any]:
    """The task's own optimisers by phase if it builds any, else "", the one that OPTIM.* names."""
    optimizers = _built(cfg, task, model)
    check_scheduled(optimizers, others(cfg))
    return optimizers


def _built(cfg: CfgNode, task: Any, model: nn.Module) -> dict[str, Any]:
    if not hasattr(task, "build_optimizer"):
        return {"": from_config(cfg, model, task)}
    who = f"{type(task).__name__}.build_optimizer"
    if unused := [f"OPTIM.{key}" for key in UNUSED if cfg.OPTIM[key] not in ([], 1, False, "")]:
        told = who, " and ".join(unused)
        logger.warning("%s makes the optimiser: %s counts only where that reads it", *told)
    optimizers = by_phase(task.build_optimizer(model), who)
    check_optimizers(optimizers, model, who)
    if "" not in optimizers:
        try:
            inspect.signature(task.train_step).bind(model, None, "")
        except TypeError:
            raise UsageError(
                f"{who} gives the phases {', '.join(optimizers)}, so "
                f"{type(task).__name__}.train_step must take (model, batch, phase)"
            ) from None
    return optimizers


def from_config(cfg: CfgNode, model: nn.Module, task: Any = None) -> Optimizer:
    """The optimiser that OPTIM.* names, for the weights of a module that train. A task may call it
    in `build_optimizer`; it is asked for its `decay_layers`."""
    given = weights(cfg, model, task)
    if not given:
        raise UsageError(
            "The model has no parameter to train: every one is frozen, or none exists."
        )
    name, optim = cfg.OPTIM.NAME, cfg.OPTIM
    kind = optimizer_class(name)
    sparse = sparse_weights(model) & {id(one.parameter) for one in given}
    if sparse and name in BUILTIN and (name != "sgd" or _decays(cfg, given, sparse)):
        raise UsageError(
            "The model has embeddings with sparse gradients, which OPTIM.NAME sgd without "
            "OPTIM.WEIGHT_DECAY takes, and torch.optim.SparseAdam (in build_optimizer)."
        )
    if name != "muon":
        optimizer = _make(cfg, kind, name, groups(cfg, given, optim.LR), optim.LR, not sparse)
        if name not in BUILTIN:
            check_optimizers({"": optimizer}, model, f"OPTIM.NAME {name}")
        return optimizer
    for_muon = takes(model)
    matrices = [w for w in given if id(w.parameter) in for_muon and w.values.get("MUON", True)]
    taken = {id(w.parameter) for w in matrices}
    rest = [w for w in given if id(w.parameter) not in taken]
    _check_muon(given, for_muon, matrices)
    logger.info("muon: %d matrices; %d other weights go to adamw", len(matrices), len(rest))
    parts = [_make(cfg, kind, "muon", groups(cfg, matrices, optim.LR, "muon"), optim.LR)]
    if rest:
        rate = optim.ADAMW_LR
        parts.append(_make(cfg, torch.optim.AdamW, "adamw", groups(cfg, rest, rate, "adamw"), rate))
    return MuonWithAdamW(parts)


def optimizer_class(name: str) -> Any:
    """The class that OPTIM.NAME names. Raises UsageError."""
    place = BUILTIN.get(name, "").rpartition(":")[2]
    if place and not hasattr(torch.optim, place):
        raise UsageError(f"OPTIM.NAME {name}: torch {torch.__version__} has no {place} yet.")
    found = resolve_class(name, BUILTIN, "optimiser", [Path.cwd()])
    if not callable(getattr(found, "step", None)):
        raise UsageError(f"OPTIM.NAME {name} is no optimiser: it has no step()")
    return found


def _decays(cfg: CfgNode, given: list[Weight], sparse: set[int]) -> bool:
    """Whether some of the sparse weights have a weight decay."""
    decay = cfg.OPTIM.WEIGHT_DECAY
    found = [w.values.get("WEIGHT_DECAY", decay) for w in given if id(w.parameter) in sparse]
    return any(found)


def _check_muon(given: list[Weight], for_muon: set[int], matrices: list[Weight]) -> None:
    if wrong := [w for w in given if w.values.get("MUON") and id(w.parameter) not in for_muon]:
        shape = tuple(wrong[0].parameter.shape)
        raise UsageError(
            f"OPTIM.GROUPS: {wrong[0].labels[-1]} has MUON=true and a weight of shape {shape}: "
            "muon takes matrices alone, and none of an embedding"
        )
    if not matrices:
        raise UsageError("OPTIM.NAME muon: the model has no matrix for it; take adamw")
    if wrong := [w for w in matrices if w.values.keys() & {"BETAS", "EPS"}]:
        raise UsageError(
            f"OPTIM.GROUPS: {wrong[0].labels[-1]} has BETAS or EPS, which adamw alone takes: add "
            "MUON=false"
        )


def _make(
    cfg: CfgNode, kind: Any, name: str, given: list[dict[str, Any]], rate: float, dense: bool = True
) -> Any:
    """An optimiser of this class, which has this name or is somebody's own, with what OPTIM.* has
    for it. Raises UsageError where the class does not take that."""
    optim, own = cfg.OPTIM, name == cfg.OPTIM.NAME  # not the other part of muon
    options = {key.lower(): optim[key] for key in COUNT.get(name, ())}
    options |= {"betas": tuple(options["betas"])} if "betas" in options else {}
    known = inspect.signature(kind).parameters
    any_name = any(p.kind is p.VAR_KEYWORD for p in known.values())
    asked = {"lr": scaled(cfg, rate), "weight_decay": optim.WEIGHT_DECAY}
    if not optim.WEIGHT_DECAY and "weight_decay" not in known and not any_name:
        del asked["weight_decay"]
    asked |= arguments(optim.ARGS) if own else {}
    for key in [*asked, *(key for group in given for key in group.keys() - {"params", "name"})]:
        if key not in known and not any_name:
            near = difflib.get_close_matches(key, known, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UsageError(f"OPTIM.NAME {name}: {kind.__name__} takes no {key}{hint}")
    options |= asked
    if options.get("fused") and _unset(cfg, options, given):
        raise UsageError("OPTIM.ARGS: with fp16 or MODEL.THAW no fused=true for sgd with momentum")
    parameters: Any = given if len(given) > 1 or len(given[0]) > 1 else given[0]["params"]
    kernels = _kernels(cfg, options, known, given) if dense and name in BUILTIN else [{}]
    for kernel in kernels:
        try:
            return kind(parameters, **options, **kernel)
        except Exception as error:
            if kernel is not kernels[-1] and isinstance(error, RuntimeError):
                continue  # torch says so where a device or type has no such kernel
            given_to = ", ".join(f"{key}={value!r}" for key, value in options.items())
            raise UsageError(f"OPTIM.NAME {name}: {kind.__name__}({given_to}): {error}") from error


def _kernels(
    cfg: CfgNode, options: dict[str, Any], known: Any, given: list[dict[str, Any]]
) -> list[dict[str, bool]]:
    """The kernels to try, the best first: one for all parameters and operations (fused), or one an
    operation (foreach), which on the CPU saves nothing. What OPTIM.ARGS says counts."""
    if options.keys() & {"fused", "foreach"}:
        return [{}]
    parameters = [p for group in given for p in group["params"]]
    kinds = {p.device.type for p in parameters}
    fused = "fused" in known and kinds <= {"cpu", "cuda"}
    fused = fused and all(p.is_floating_point() for p in parameters)
    found = [{"fused": True}] if fused and not _unset(cfg, options, given) else []
    return [*found, {"foreach": True}] if "foreach" in known and kinds == {"cuda"} else [*found, {}]


def _unset(cfg: CfgNode, options: dict[str, Any], given: list[dict[str, Any]]) -> bool:
    """Whether a weight may be without its momentum: the fused kernel of SGD leaves it unset where
    the gradient scaler skips the first step, and takes no weights that have none yet beside others
    that have."""
    momenta = [group.get("momentum", options.get("momentum", 0)) for group in given]
    return any(momenta) and bool(cfg.TRAIN.PRECISION == "fp16" or cfg.MODEL.THAW)
