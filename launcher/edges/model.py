"""What of a model goes out and comes back: its state under plain names, what is a rank's own."""

from __future__ import annotations

import copy
import difflib
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from launcher.edges.digest import plain_name, words
from launcher.errors import RunError, UsageError
from launcher.log import get_logger

logger = get_logger(__name__)

# Batch-norm's buffers: rank 0's count, as in DDP. Any other is its rank's own.
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def model_state(model: nn.Module) -> dict[str, Any]:
    """The state_dict under plain names. Tensors are the live ones."""
    return _renamed(model.state_dict(), plain_name)


def load_model_state(model: nn.Module, state: Mapping[str, Any], strict: bool = True) -> None:
    """Load what `model_state` gave, whether or not this model or that one is compiled."""
    live = model.state_dict()
    names = {plain_name(name): name for name in [*live, *_prefixes(live)]}
    how = {} if strict else {"strict": False}  # a module's own may take none
    model.load_state_dict(_renamed(state, lambda name: names.get(name, name)), **how)


class ModelState:
    """A model's state_dict, and what that leaves out and training may change: which modules are in
    eval mode, buffers that are not persistent (those that are not as they were at the start), and
    buffers in which each rank has values of its own (all but the statistics of norms, and those
    whose name matches a pattern of `alike`)."""

    def __init__(self, model: nn.Module, alike: Iterable[str] = ()) -> None:
        self.model, self.alike = model, alike
        self.layout = layout(model_state(model))
        self.start = bits(self._unsaved())

    def _unsaved(self) -> dict[str, torch.Tensor]:
        return {name: b for name, b in plain_buffers(self.model).items() if name not in self.layout}

    def beside(self) -> dict[str, Any]:
        """What is left out, and the same on all ranks."""
        buffers = self._unsaved()
        now = bits(buffers)
        return {
            "resting": [name for name, m in self.model.named_modules() if not m.training],
            "buffers": {name: buffers[name] for name in now if now[name] != self.start.get(name)},
        }

    def of_rank(self, runtime: Any, step: int) -> dict[str, torch.Tensor]:
        """This rank's own buffers, where they differ. Collectives. Raises RunError where the ranks'
        weights do, or the model has not the layout that it had at the start."""
        check_layout(model_state(self.model), self.layout)
        if not runtime.distributed:
            return {}
        weights = dict(self.model.named_parameters())
        own = own_buffers(self.model, self.alike)
        ranks = runtime.gather(bits({**weights, **own})) or []
        apart = runtime.broadcast(differing(ranks, weights, step))
        return {plain_name(name): own[name].cpu() for name in apart}

    def load(
        self, state: Mapping[str, Any], beside: Mapping[str, Any], own: Mapping[str, torch.Tensor]
    ) -> None:
        """Load the state_dict, and what `beside` and `of_rank` gave."""
        load_model_state(self.model, state)
        for name, module in self.model.named_modules():
            module.training = name not in beside["resting"]
        fill_named(self.model, {**beside["buffers"], **own})


def plain_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """All buffers by plain name, those that are not persistent as well."""
    return {plain_name(name): buffer for name, buffer in model.named_buffers()}


def fill_named(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Give buffers of these names their numbers, in place; those that the model has."""
    buffers = plain_buffers(model)
    names = [name for name in values if name in buffers]
    fill([buffers[name] for name in names], [values[name] for name in names])


def evaluated_model(model: nn.Module, ema: AveragedModel | None) -> nn.Module:
    """The average, if there is one, with what no average is made of: the model's extra state, and
    its buffers that are not persistent."""
    # Of no step yet, it is what this rank made; asking waits for the device.
    if ema is None or not ema.n_averaged.item():
        return model
    saved = model_state(model)
    fill_named(ema.module, {n: b for n, b in plain_buffers(model).items() if n not in saved})
    for theirs, ours in zip(ema.module.modules(), model.modules(), strict=True):
        if type(ours).get_extra_state is not nn.Module.get_extra_state:
            theirs.set_extra_state(copy.deepcopy(ours.get_extra_state()))
    return ema.module


def _prefixes(state: Any) -> dict[str, Any]:
    """The versions of the modules' states, which torch keeps beside a state_dict, by `prefix.`."""
    return {f"{prefix}.": version for prefix, version in getattr(state, "_metadata", {}).items()}


def _renamed(state: Mapping[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    if all(name == rename(name) for name in state):
        return state  # type: ignore[return-value]
    renamed: Any = OrderedDict((rename(name), value) for name, value in state.items())
    versions = _prefixes(state).items()
    renamed._metadata = OrderedDict((rename(p).removesuffix("."), v) for p, v in versions)
    return renamed


def check_model(model: nn.Module) -> None:
    """Raise UsageError for a model whose state could be saved, but not loaded again. Elements that
    share their memory get some each."""
    named = [*model.named_parameters(), *model.named_buffers()]
    lazy = [n for n, t in named if isinstance(t, (UninitializedParameter, UninitializedBuffer))]
    if lazy:
        raise UsageError(
            f"the model has lazy weights without a shape: {some(lazy)}. Call it once in "
            "build_model, on a batch of the right shape, before it is returned."
        )
    for _, tensor in named:
        if _is_spread(tensor):  # by expand: nothing could be loaded into it
            tensor.data = tensor.data.contiguous()
    try:
        # Into itself: nothing changes, but what a resume would stumble over shows.
        load_model_state(model, model_state(model))
    except Exception as error:
        raise UsageError(
            "the model does not take back its own state_dict, so it could be saved but never "
            f"resumed: {type(error).__name__}: {error}"
        ) from error


def _is_spread(tensor: torch.Tensor) -> bool:
    if tensor.layout is not torch.strided:
        return False
    return any(
        step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


def averaged(model: nn.Module, decay: float, warmup: bool = False) -> AveragedModel:
    """The moving average of a model's weights, in eval mode; with decay 0 their mean. `warmup`: the
    decay is at most (1 + n) / (10 + n) after n updates. Raises UsageError where the model cannot be
    copied."""

    def update(averages: Any, weights: Any, _: Any) -> None:
        n = int(ema.n_averaged)  # on the CPU
        now = min(decay, (1 + n) / (10 + n)) if warmup else decay
        get_ema_multi_avg_fn(now)(averages, weights, None)

    try:
        ema = AveragedModel(model, multi_avg_fn=update if decay else None)
    except Exception as error:
        raise UsageError(
            f"An average of the weights needs a copy of the model, which cannot be made ({error}). "
            'Use MODEL.EMA_DECAY 0 and MODEL.SWA_START "", or '
            "torch.nn.utils.parametrizations.weight_norm for the old one."
        ) from error
    return ema.eval()


def warn_of_one_sample(model: nn.Module) -> None:
    """Say so, before the first step, where batch-norm will get a micro-batch of one sample."""
    norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    if any(m.training or not model.training for m in norms):
        logger.warning(
            "an epoch's last global batch leaves a rank 1 sample, of which batch-norm has no "
            "variance: it fails there, unless a sample has several positions. TRAIN.DROP_LAST True "
            "leaves that batch out; or take another TRAIN.BATCH_SIZE or TRAIN.MICRO_BATCH_SIZE."
        )


def own_buffers(model: nn.Module, alike: Iterable[str] = ()) -> dict[str, torch.Tensor]:
    """By name the buffers in which each rank may have values of its own: all but the statistics of
    norms, and those whose name matches a pattern of `alike`."""
    return {
        name: buffer
        for name, buffer in model.named_buffers()
        if name.rpartition(".")[2] not in STATISTICS
        and not any(fnmatch(name, pattern) for pattern in alike)
    }


def layout(state: Mapping[str, Any]) -> dict[str, Any]:
    """Of what a model's state holds, by name: tensors' shapes and types, else classes."""
    return {
        name: (tuple(t.shape), t.dtype) if isinstance(t, torch.Tensor) else type(t).__name__
        for name, t in state.items()
    }


def model_layout(model: nn.Module) -> str:
    """A digest of the names, shapes and types of a model's parameters and buffers."""
    text = "\n".join(f"{name} {kind}" for name, kind in layout(model.state_dict()).items())
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def check_layout(state: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Raise RunError where a model's state has not the layout that it had at the start: what
    `build_model` makes could not take it."""
    now = layout(state)
    names = [n for n in (*before, *now) if before.get(n) != now.get(n) and "_extra_state" not in n]
    if names:
        raise RunError(
            f"{some(list(dict.fromkeys(names)))}: of another shape or type than at the start, new, "
            "or gone, so a resume could not load this. Make all that a model holds in build_model, "
            "in its final shape."
        )


def switched(model: nn.Module, trained: list[bool]) -> RunError:
    """What is told where requires_grad is not what it was at the start."""
    named = zip(model.named_parameters(), trained, strict=False)
    names = [name for (name, p), before in named if p.requires_grad != before]
    return RunError(
        f"requires_grad of {some(names)} was switched while training. The optimiser and DDP go by "
        "what it was at the start, so such weights would not be trained, or would drift apart "
        "between ranks. Set it in build_model; MODEL.THAW is to do it on the way."
    )


def differing(ranks: list[dict[str, int]], weights: Collection[str], step: int) -> list[str]:
    """The names of which ranks have other `bits` than the first one. Raises RunError where some are
    weights, which must be the same."""
    first = ranks[0] if ranks else {}
    names = [name for name in first if any(rank.get(name) != first[name] for rank in ranks)]
    if drifted := [name for name in names if name in weights]:
        raise RunError(
            f"the ranks' weights differ at step {step}: {some(drifted)}. A task that changes "
            "weights itself must do so alike on every rank, and may not switch requires_grad while "
            "training."
        )
    return names


def unused(model: nn.Module) -> RunError:
    """What is told where a step gives some weights no gradient, and DDP waits for them."""
    names = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    return RunError(
        f"a training step does not use {some(names) or 'some weights'}, so the ranks wait for "
        "gradients that never come. Set DIST.FIND_UNUSED_PARAMETERS True, freeze them with "
        "requires_grad_(False), or leave them out of the model."
    )


def fill(tensors: Iterable[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    """Give tensors the numbers of as many others, in place; none where there are no values."""
    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=False):
            tensor.copy_(value)


def bits(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """For each tensor the sum of its bits, read as whole numbers: the same for equal tensors of any
    memory layout. Waits for the device, once."""
    sums = [words(tensor).sum(dtype=torch.int64) for tensor in tensors.values()]
    return dict(zip(tensors, torch.stack(sums).tolist() if sums else [], strict=True))


def some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")


def fitting(weights: Mapping[str, torch.Tensor], pattern: str, key: str) -> list[Any]:
    """The weights that a pattern of this key names. Raises UsageError where there is none."""
    found = [p for name, p in weights.items() if fits(name, pattern)]
    if not found:
        modules = {name.rpartition(".")[0] for name in weights}
        told = near_or_all(pattern, [*weights, *modules], list(weights))
        raise UsageError(f"{key}: {pattern!r} fits no weight of the model; {told}")
    return found


def near_or_all(pattern: str, known: Sequence[str], there: list[str]) -> str:
    """What to try for a pattern that fits nothing: known names near it, or those that are there."""
    near = difflib.get_close_matches(pattern, known, 3)
    return f"near it are {', '.join(near)}" if near else f"it has {some(there)}"


def fits(name: str, pattern: str) -> bool:
    """Whether a pattern names a weight, or a module that it is in."""
    return fnmatch(name, pattern) or fnmatch(name, f"{pattern}.*")
