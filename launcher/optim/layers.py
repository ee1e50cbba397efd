"""The layers of a model from its input to its head, for a rate that falls from one to the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from launcher.edges.digest import plain_name
from launcher.edges.model import fitting, some
from launcher.errors import UsageError

Layers = list[list[nn.Parameter]]


def model_layers(model: nn.Module) -> Layers:
    """The weights of each layer, frozen ones as well, in the order in which modules are registered.

    A layer is an item of a stack, which is an nn.Sequential or nn.ModuleList with several items of
    one class; an item that is itself a stack of modules with modules (a stage of blocks) has a
    layer for each of its own. What comes between stacks, before the first and after the last, is
    one layer each. Without a stack the modules directly below the model are its layers. Norms
    belong to the layer before them.
    """
    while len(parts := list(_parts(model))) == 1 and not _own(model):
        (model,) = parts
    if not any(map(_holds_stack, model.modules())):
        return _joined([_own(model), *([*part.parameters()] for part in _parts(model))])
    return _joined(_layers(model, stacked=False))


def named_layers(model: nn.Module, patterns: Sequence[Any], who: str) -> Layers:
    """The layers that a task names: of each a pattern, or several. Raises UsageError unless every
    weight is in one of them."""
    weights = {plain_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    names, found, taken = {id(p): name for name, p in weights.items()}, Layers(), set[int]()
    for entry in patterns:
        several = [entry] if isinstance(entry, str) else entry
        layer = {id(p): p for pattern in several for p in fitting(weights, pattern, who)}
        if twice := taken & layer.keys():
            raise UsageError(f"{who}: {some([names[i] for i in twice])} is in two layers")
        taken |= layer.keys()
        found.append(list(layer.values()))
    if left := [name for i, name in names.items() if i not in taken]:
        raise UsageError(f"{who}: {some(left)} is in no layer")
    return found


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """The modules directly below that have weights."""
    return (child for child in module.children() if next(child.parameters(), None) is not None)


def _own(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters(recurse=False))


def _is_stack(module: nn.Module) -> bool:
    kinds = [type(part) for part in _parts(module)]
    return isinstance(module, (nn.Sequential, nn.ModuleList)) and len({*kinds}) < len(kinds)


def _holds_stack(module: nn.Module) -> bool:
    return any(map(_is_stack, module.modules()))


def _layers(module: nn.Module, stacked: bool) -> Layers:
    """`stacked`: it is an item of a stack."""
    parts = list(_parts(module))
    if _is_stack(module) and (not stacked or any([*_parts(part)] for part in parts)):
        return [_own(module), *(layer for part in parts for layer in _layers(part, True))]
    if stacked:
        return [list(module.parameters())]
    layers, between = [_own(module)], True
    for part in parts:
        if _holds_stack(part):
            layers += _layers(part, False)
        elif between:
            layers[-1] += part.parameters()
        else:
            layers.append(list(part.parameters()))
        between = not _holds_stack(part)
    return layers


def _joined(layers: Layers) -> Layers:
    """Each weight once, and what has no matrix with the layer before it, or the one after."""
    seen, found = set[int](), Layers()
    for layer in layers:
        new = [p for p in layer if id(p) not in seen]
        seen |= {id(p) for p in new}
        if found and (_flat(new) or _flat(found[-1])):
            found[-1] += new
        elif new:
            found.append(new)
    return found


def _flat(layer: list[nn.Parameter]) -> bool:
    return all(p.dim() <= 1 for p in layer)
