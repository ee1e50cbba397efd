"""Optimisers of any make: all that have `step()` without a closure, groups and a state."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks as after_all
from torch.optim.optimizer import _global_optimizer_pre_hooks as before_all

from launcher.edges.digest import plain_name
from launcher.edges.model import some
from launcher.edges.state import plain
from launcher.errors import RunError, UsageError
from launcher.log import get_logger

logger = get_logger(__name__)


def by_phase(built: Any, who: str) -> dict[str, Any]:
    """What a build_optimizer returned, by the name of its phase: "" where there is one."""
    if not isinstance(built, Mapping):
        return {"": built}
    if not built or not all(isinstance(k, str) and k.isidentifier() for k in built):
        raise UsageError(
            f"{who} must return an optimiser, or a dict of optimisers by the name of their phase, "
            f"a word each; it returned a dict of {', '.join(map(repr, built)) or 'nothing'}"
        )
    return dict(built)


def check_optimizers(optimizers: Mapping[str, Any], model: nn.Module, who: str) -> None:
    """Raise UsageError for optimisers that cannot be taken, or that train the same weights."""
    for phase, optimizer in optimizers.items():
        _check(optimizer, model, f"{who} ({phase})" if phase else who)
    taken = {phase: {id(p) for p in weights_of(o)} for phase, o in optimizers.items()}
    left = []
    for name, p in model.named_parameters():
        by = [phase for phase, weights in taken.items() if id(p) in weights]
        if len(by) > 1:
            raise UsageError(
                f"{who}: {name} is trained by {' and '.join(by)}. A weight belongs to one phase: "
                "leave it out of the others."
            )
        if p.requires_grad and not by:
            left.append(name)
    if left:
        logger.warning("in no group of the optimiser, so never trained: %s", some(left))


def weights_of(optimizer: Any) -> list[torch.Tensor]:
    """Those of all its groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def _check(optimizer: Any, model: nn.Module, who: str) -> None:
    """Raise UsageError for what cannot be stepped once a batch, saved, or told apart from the
    model's weights; numpy's numbers in the groups become Python's."""
    lacks = [
        name
        for name in ("step", "param_groups", "state_dict", "load_state_dict")
        if not hasattr(optimizer, name)
    ]
    if lacks:
        kind = type(optimizer).__name__
        raise UsageError(
            f"{who} must return a torch.optim.Optimizer, or what has its methods, not {kind}: it "
            f"lacks {', '.join(lacks)}"
        )
    # That of its class: a scheduler of torch's puts a wrapper of its own on the object.
    _, *arguments = inspect.signature(type(optimizer).step).parameters.values()
    needed = [
        p
        for p in arguments
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if hasattr(optimizer, "first_step") or needed:
        raise UsageError(
            f"{type(optimizer).__name__} evaluates the model several times a step (a closure, or "
            "two passes), which a step over ranks and micro-batches does not do. Take an optimiser "
            "whose step() needs no argument."
        )
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        group.update({key: plain(v) for key, v in group.items() if key != "params"})
        foreign = [p for p in group["params"] if id(p) not in names]
        if foreign:
            raise UsageError(
                f"the optimiser trains {len(foreign)} weights that are not the model's (the first "
                f"has shape {tuple(foreign[0].shape)}): they would be neither saved nor sent to "
                "other ranks. Make what holds them a part of what build_model returns."
            )


def made(optimizer: Any, model: nn.Module) -> dict[str, Any]:
    """What whoever made an optimiser has chosen, before its first step: its class, its groups
    without their weights, how many weights are in each, and their names, a text a group."""
    chosen = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    groups = {"groups": copy.deepcopy(chosen), "sizes": _sizes(optimizer)}
    known = {id(p): plain_name(name) for name, p in model.named_parameters()}
    names = ["\n".join(known[id(p)] for p in group["params"]) for group in optimizer.param_groups]
    return {"class": type(optimizer).__name__, **groups, "names": names}


def _sizes(optimizer: Any) -> list[int]:
    return [len(group["params"]) for group in optimizer.param_groups]


def check_groups(optimizer: Any, at_first: dict[str, Any]) -> None:
    """Raise RunError where the groups hold other weights than when they were `made`."""
    if (sizes := _sizes(optimizer)) != at_first["sizes"]:
        raise RunError(
            f"the optimiser's groups have changed while training: {at_first['sizes']} weights, now "
            f"{sizes}. A resume could not load this: make all groups in build_optimizer."
        )


def load_optimizers(
    optimizers: Mapping[str, Any],
    now: Mapping[str, dict[str, Any]],
    states: Any,
    then: Any,
    may_begin: bool,
) -> list[str]:
    """Load the state_dicts of optimisers that were made as `then` says; both as `flat` gives them.
    These were made as `now` says. What is chosen otherwise for them takes effect; what training has
    changed in the groups stays.

    Returns what was not restored, in words: the state of another optimiser, where one `may_begin`
    afresh. Raises UsageError where not.
    """
    before = then if all(isinstance(made, dict) for made in then.values()) else {"": then}
    states = states if before is then else {"": states}
    told = []
    for phase, optimizer in optimizers.items():
        told += _load(optimizer, now[phase], states.get(phase, {}), before.get(phase), may_begin)
    if gone := [phase for phase in before if phase not in optimizers]:
        told.append(f"the checkpoint's phase {', '.join(gone)} is no more")
        if not may_begin:
            raise UsageError(f"{told[-1]}. To go on without it: --allow OPTIM.NAME")
    return told


def flat(parts: Mapping[str, Any]) -> Any:
    """What a checkpoint holds of parts by phase: the part itself where there is one phase."""
    return parts[""] if "" in parts else dict(parts)


def _load(
    optimizer: Any,
    now: dict[str, Any],
    state: dict[str, Any],
    then: dict[str, Any] | None,
    may_begin: bool,
) -> list[str]:
    try:
        if then is None:
            raise ValueError("its phase is new")
        if then["class"] != now["class"]:
            raise ValueError(f"{now['class']}, not {then['class']}")
        # An earlier version saved no names.
        regrouped = then.get("names", now["names"]) != now["names"]
        optimizer.load_state_dict(_regrouped(optimizer, now, state, then) if regrouped else state)
    except (ValueError, KeyError) as error:
        if not may_begin:
            raise UsageError(
                f"the optimiser of this run is another than the checkpoint's ({error}). To begin "
                "its state afresh: --allow OPTIM.NAME"
            ) from error
        told = f"another optimiser, whose state begins afresh: {error}"
        logger.warning("%s", told)
        return [told]
    if regrouped:
        told = "the optimiser's groups are others now, and begin with the values of this config"
        logger.warning("%s; the state of each weight goes on", told)
        return [told]
    assert then is not None
    for group, new, old in zip(optimizer.param_groups, now["groups"], then["groups"], strict=True):
        chosen = {k: v for k, v in new.items() if not (k in old and _same(v, old[k]))}
        if "lr_scale" in chosen:
            chosen["lr"] = new["lr"]  # what it is the scale of
        for key in chosen:
            group.pop(f"initial_{key}", None)  # the schedule's: of the value before
        group.update(chosen)
    return []


def _regrouped(
    optimizer: Any, now: dict[str, Any], state: dict[str, Any], then: dict[str, Any]
) -> dict[str, Any]:
    """A state_dict for groups that hold the same weights otherwise: each weight's state by its
    name. Raises ValueError for other weights."""
    before, after = ("\n".join(made["names"]).split("\n") for made in (then, now))
    if sorted(before) != sorted(after):
        new, gone = (sorted({*a} - {*b}) for a, b in ((after, before), (before, after)))
        raise ValueError(f"of other weights: {some([*new, *gone])}")
    groups, states = optimizer.state_dict()["param_groups"], state["state"]
    theirs = dict(zip(before, _numbers(state["param_groups"]), strict=True))
    ours = zip(after, _numbers(groups), strict=True)
    kept = {number: states[theirs[name]] for name, number in ours if theirs[name] in states}
    return {**state, "state": kept, "param_groups": groups}


def _numbers(groups: list[dict[str, Any]]) -> list[int]:
    """Those by which a state_dict calls the weights of its groups."""
    return [number for group in groups for number in group["params"]]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a.cpu(), b.cpu())
    return type(a) is type(b) and bool(a == b)


def set_rate(group: dict[str, Any], factor: float) -> None:
    """Set a group's rate from the one it was made with; a layer's own `lr_scale` (timm) counts. A
    group without a rate is left as it is."""
    if (rate := group.get("lr")) is None:
        return
    base = group.setdefault("initial_lr", float(rate))
    wanted = float(base) * factor * group.get("lr_scale", 1.0)
    if isinstance(rate, torch.Tensor):
        rate.fill_(wanted)  # in place, for a compiled or captured step
    else:
        group["lr"] = wanted


def set_value(group: dict[str, Any], key: str, factor: float) -> None:
    """Set what else a group has from the value it was made with; the momentum of one that has only
    betas is the first of these."""
    if key == "momentum" and key not in group:
        first, *rest = group.setdefault("initial_betas", group["betas"])
        group["betas"] = (first * factor, *rest)
    else:
        group[key] = group.setdefault(f"initial_{key}", group[key]) * factor


def check_scheduled(optimizers: Mapping[str, Any], courses: Mapping[str, Any]) -> None:
    """Raise UsageError where groups lack what has a course, or a momentum would reach 1."""
    for key in courses:
        name = f"OPTIM.{key.upper()}_SCHEDULE"
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                first = group["betas"][0] if "betas" in group and key == "momentum" else None
                base = group.get(key, first)
                if base is None:
                    raise UsageError(f"{name}: {type(optimizer).__name__} has no {key}")
                # The greatest value of a course is at one of its ends, or at its peak.
                if key == "momentum" and max(base * courses[key](i / 64) for i in range(65)) >= 1:
                    raise UsageError(f"{name}: {base} would get to 1: lower OPTIM.MOMENTUM_FACTOR")


def unscheduled(optimizer: Any) -> None:
    """Give each group the values that schedules went from: others, or none, go from them now."""
    for group in optimizer.param_groups:
        for name in ("lr", "momentum", "betas", "weight_decay"):
            base = group.pop(f"initial_{name}", None)
            if base is not None and isinstance(group.get(name), torch.Tensor):
                group[name].fill_(base)  # in place, as set_rate
            elif base is not None:
                group[name] = base


def rescale(optimizer: Any, factor: float, lowest: float = 0.0) -> None:
    """Multiply the rates of all groups, and those that a schedule goes from, for good; none that a
    schedule goes from gets below `lowest` by it. A group without a rate is left as it is."""
    for group in optimizer.param_groups:
        if (rate := group.get("lr")) is None:
            continue
        base = float(group.setdefault("initial_lr", float(rate)))
        group["initial_lr"] = wanted = max(base * factor, min(base, lowest))
        if isinstance(rate, torch.Tensor):
            rate.mul_(wanted / base if base else factor)  # in place, as set_rate
        else:  # in this order exact where the rate is the base
            group["lr"] = wanted * (rate / base) if base else rate * factor


def as_left(optimizer: Any) -> list[tuple[list[Any], Any]]:
    """The rate of each group, and the one that schedules go from; for `set_by_others`."""
    # In a list, which finds a tensor equal to itself without waiting for the device.
    return [([group.get("lr")], group.get("initial_lr")) for group in optimizer.param_groups]


def set_by_others(optimizer: Any, left: list[tuple[list[Any], Any]]) -> bool:
    """Whether a rate is another than `as_left`, though not by `rescale`."""
    now = as_left(optimizer)
    return now != left and any(
        rate != old_rate and base == old_base
        for (rate, base), (old_rate, old_base) in zip(now, left, strict=False)
    )


def rates(optimizers: Mapping[str, Any]) -> dict[str, float]:
    """`train/lr`, that of the first parameter group, and where the groups were made with different
    rates `train/lr/<name>` for each: its "name", or its number. Nothing where there is no rate.
    With phases `train/lr/<phase>` and `train/lr/<phase>/<name>`."""
    found: dict[str, float] = {}
    for phase, optimizer in optimizers.items():
        found |= _rates(optimizer, f"train/lr/{phase}" if phase else "train/lr")
    return found


def _rates(optimizer: Any, tag: str) -> dict[str, float]:
    groups = [group for group in optimizer.param_groups if group.get("lr") is not None]
    if not groups:
        return {}
    found = {tag: float(groups[0]["lr"])}
    made = {float(g.get("initial_lr", g["lr"])) * g.get("lr_scale", 1.0) for g in groups}
    if len(made) > 1:
        names = [str(group.get("name", number)) for number, group in enumerate(groups)]
        for number, (name, group) in enumerate(zip(names, groups, strict=True)):
            name = name if names.count(name) == 1 else f"{name}/{number}"
            found[f"{tag}/{name}"] = float(group["lr"])
    return found


@contextlib.contextmanager
def evaluated(optimizers: Mapping[str, Any]) -> Iterator[None]:
    """The weights that optimisers with modes of their own (schedule-free: Defazio et al., "The Road
    Less Scheduled", 2024) want evaluated; after that those of before, bit for bit."""
    moved = [optimizer for optimizer in optimizers.values() if has_modes(optimizer)]
    weights = [p for optimizer in moved for p in weights_of(optimizer)]
    before = [p.detach().clone() for p in weights]
    for optimizer in moved:
        optimizer.eval()
    try:
        yield
    finally:
        for optimizer in moved:
            optimizer.train()
        with torch.no_grad():
            for p, value in zip(weights, before, strict=True):
                p.copy_(value)


def update(optimizer: Any) -> None:
    """Its `step()`. That of torch's own optimisers without what torch puts around it for hooks and
    its profiler, where there is neither: around a small model's it takes longer than the update."""
    step = type(optimizer).step
    if (
        getattr(step, "__code__", None) is not AROUND
        or "step" in vars(optimizer)
        or _watched(optimizer)
    ):
        optimizer.step()
    else:
        step.__wrapped__(optimizer)


# The code of what torch puts around every step, whatever else anybody may have put around that.
AROUND = torch.optim.Optimizer.profile_hook_step(lambda _: None).__code__


def _watched(optimizer: Any) -> bool:
    own = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return bool(own or before_all or after_all or torch.autograd._profiler_enabled())


def has_modes(optimizer: Any) -> bool:
    return callable(getattr(optimizer, "eval", None)) and hasattr(optimizer, "train")
