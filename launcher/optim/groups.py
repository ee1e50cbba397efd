"""The weights that train in groups: each with the values that OPTIM.* gives it."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from launcher.config import CfgNode
from launcher.config.optim import group_entry
from launcher.edges.digest import plain_name
from launcher.edges.model import fitting, some
from launcher.errors import UsageError
from launcher.log import get_logger
from launcher.optim.curves import scaled
from launcher.optim.layers import Layers, model_layers, named_layers

logger = get_logger(__name__)

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class Weight(NamedTuple):
    """One that trains, with what it has of its own: by word of OPTIM.GROUPS, the factor of its rate
    and the names of all that gives it these."""

    parameter: nn.Parameter
    values: dict[str, Any]
    scale: float = 1.0
    labels: tuple[str, ...] = ()


def weights(cfg: CfgNode, model: nn.Module, task: Any = None) -> list[Weight]:
    """All weights that train, in the model's order. Raises UsageError for an entry of OPTIM.GROUPS
    that fits none of them."""
    optim = cfg.OPTIM
    named = {plain_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    trained = [p for p in model.parameters() if p.requires_grad]
    found = {id(p): Weight(p, {}) for p in trained}
    for number, layer in enumerate(layers := _layers(cfg, model, task)):
        scale = optim.LAYER_DECAY ** (len(layers) - 1 - number)
        for i in found.keys() & {id(p) for p in layer}:
            found[i] = found[i]._replace(scale=scale, labels=(f"layer_{number}",))
    for text in optim.GROUPS:
        pattern, values = group_entry(text)
        fits = [p for p in fitting(named, pattern, "OPTIM.GROUPS") if id(p) in found]
        if not fits:
            raise UsageError(
                f"OPTIM.GROUPS {text!r}: all that {pattern!r} fits is frozen. Take it out, or "
                "MODEL.FREEZE, or let it train later with MODEL.THAW."
            )
        for i in {id(p) for p in fits}:
            one = found[i]
            labels = *one.labels, pattern
            found[i] = one._replace(values={**one.values, **values}, labels=labels)
    for i in _norms(model) if optim.SKIP_NORM_DECAY else ():
        if i in found and "WEIGHT_DECAY" not in found[i].values:
            one = found[i]
            values, labels = {**one.values, "WEIGHT_DECAY": 0.0}, (*one.labels, "no_decay")
            found[i] = one._replace(values=values, labels=labels)
    return list(found.values())


def groups(cfg: CfgNode, given: list[Weight], rate: float, part: str = "") -> list[dict[str, Any]]:
    """Groups as torch takes them, of weights whose rate is `rate` but for what they have of their
    own. Those with that rate come first: it is the one recorded as train/lr. Their names begin with
    that of the `part` of the optimiser."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for one in given:
        values = {key.lower(): value for key, value in one.values.items()}
        lr = scaled(cfg, values.pop("lr", rate)) * values.pop("lr_scale", 1.0) * one.scale
        values |= {"betas": tuple(values["betas"])} if "betas" in values else {}
        values.pop("muon", None)  # which optimiser it goes to
        if lr != scaled(cfg, rate):
            values["lr"] = lr
        group = found.setdefault(one.labels, {"params": [], **values})
        group["params"].append(one.parameter)
    if part or len(found) > 1:
        for labels, group in found.items():
            group["name"] = "/".join(filter(None, (part, *labels))) or "rest"
    return sorted(found.values(), key=lambda group: "lr" in group)


def _layers(cfg: CfgNode, model: nn.Module, task: Any) -> Layers:
    """Those that OPTIM.LAYER_DECAY goes by."""
    if cfg.OPTIM.LAYER_DECAY == 1:
        return []
    who = f"{type(task).__name__}.decay_layers"
    own = getattr(task, "decay_layers", None)
    layers = named_layers(model, own(model), who) if callable(own) else model_layers(model)
    if len(layers) < 2:
        raise UsageError(
            f"OPTIM.LAYER_DECAY: {type(model).__name__} has no layers that could be told apart. "
            "Name them in the task's decay_layers(model): a list of patterns, the head's last."
        )
    names = {id(p): plain_name(name) for name, p in model.named_parameters()}
    for number, layer in enumerate(layers):
        scale = cfg.OPTIM.LAYER_DECAY ** (len(layers) - 1 - number)
        told = number, scale, some([names[id(p)] for p in layer])
        logger.info("OPTIM.LAYER_DECAY: layer %d has %.4g of the rate: %s", *told)
    return layers


def _norms(model: nn.Module) -> list[int]:
    """The ids of norms' weights, biases, and others of at most one dimension."""
    return [
        id(p)
        for module in model.modules()
        for name, p in module.named_parameters(recurse=False)
        if p.dim() <= 1 or name.endswith("bias") or isinstance(module, NORMS)
    ]
