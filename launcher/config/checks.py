"""Whether a value of the right type makes sense: alone, and together with other keys."""

from __future__ import annotations

from collections.abc import Callable

from yacs.config import CfgNode

from launcher.config.inits import parse_init
from launcher.config.keys import KEYS, Key, flatten
from launcher.config.problem import Mistake, nearest, quote
from launcher.config.units import parse_duration


def check_value(key: Key, value: object) -> None:
    """Raise Mistake where the value is none that `key` takes."""
    if not isinstance(value, (list, tuple)):
        _check_item(key, value)
        return
    if key.length is not None and len(value) != key.length:
        raise Mistake(f"takes {key.length} values, not {len(value)}")
    for item in value:
        _check_item(key, item)


def bounds(key: Key) -> str:
    """The range of a number in words, or "" where it has none."""
    limits = {
        "at least": key.at_least,
        "above": key.above,
        "at most": key.at_most,
        "below": key.below,
    }
    return ", ".join(f"{words} {limit}" for words, limit in limits.items() if limit is not None)


def evaluates(cfg: CfgNode) -> bool:
    """Whether a run has evaluations."""
    return bool(cfg.EVAL.EVERY and cfg.EVAL.SPLITS)


def averages(cfg: CfgNode) -> bool:
    """Whether a run keeps an average of its weights."""
    return bool(cfg.MODEL.EMA_DECAY or cfg.MODEL.SWA_START)


def recorded_as(split: str) -> str:
    """The name under which the metrics of a split stand; `train/` are the training's own."""
    return "train_eval" if split == "train" else split


def in_epochs(cfg: CfgNode) -> list[str]:
    """The keys whose durations or periods are given in epochs."""

    def counts(value: object) -> bool:
        items = value if isinstance(value, (list, tuple)) else [value]
        durations = [parse_duration(str(item)) for item in items]
        return any(duration is not None and duration.unit == "ep" for duration in durations)

    values = flatten(cfg)
    return [key.name for key in KEYS if key.unit and counts(values[key.name])]


def _check_item(key: Key, value: object) -> None:
    if key.unit:
        _check_duration(key, str(value))
    if key.choices and value not in key.choices and not (key.own and ":" in str(value)):
        names = ", ".join(choice or '""' for choice in key.choices)
        names += ", and no module:Class" if key.own else ""
        raise Mistake(f"{quote(value)} is not one of {names}", nearest(str(value), key.choices))
    if isinstance(value, (int, float)) and not (
        (key.at_least is None or value >= key.at_least)
        and (key.above is None or value > key.above)
        and (key.at_most is None or value <= key.at_most)
        and (key.below is None or value < key.below)
    ):
        raise Mistake(f"{value} is out of range: it must be {bounds(key)}")


def _check_duration(key: Key, text: str) -> None:
    try:
        duration = parse_duration(text)
    except ValueError as error:
        raise Mistake(str(error)) from None
    counts = " or ".join(unit for unit in key.unit if unit != "s")
    examples = ", ".join(
        example
        for unit, example in {"ep": "20ep", "step": "500step", "s": "90s, 30min, 24h"}.items()
        if unit in key.unit
    )
    if duration is None:
        if not key.never:
            raise Mistake(f"must not be empty; write for example {examples}")
    elif duration.unit not in key.unit:
        why = key.not_time if counts else "this is a time"
        raise Mistake(f"{quote(text)}: {why}; write for example {examples}")


# Each check sees the whole config and answers with what is wrong, or None.


def _thaw(cfg: CfgNode) -> str | None:
    for entry in cfg.MODEL.THAW:
        pattern, at, when = entry.rpartition("@")
        try:
            duration = parse_duration(when) if pattern and at else None
        except ValueError as error:
            return f"{quote(entry)}: {error}"
        if duration is None or duration.unit == "s":
            return f"{quote(entry)} is no moment; write for example backbone.layer4@5ep"
    return None


def _init(cfg: CfgNode) -> str | None:
    try:
        for text in cfg.MODEL.INIT:
            parse_init(text)
    except Mistake as mistake:
        return f"{mistake} (did you mean {mistake.hint}?)" if mistake.hint else str(mistake)
    if cfg.MODEL.INIT and cfg.MODEL.WEIGHTS and cfg.MODEL.WEIGHTS_STRICT and not cfg.MODEL.REINIT:
        return (
            "has no effect where MODEL.WEIGHTS give every weight; name those that it is to fill in "
            "MODEL.REINIT, or set MODEL.WEIGHTS_STRICT False"
        )
    return None


def _at_start(cfg: CfgNode) -> str | None:
    if cfg.EVAL.AT_START and not evaluates(cfg):
        return "needs EVAL.EVERY and EVAL.SPLITS: nothing is evaluated without them"
    return None


def _splits(cfg: CfgNode) -> str | None:
    splits, taken = cfg.EVAL.SPLITS, ("train_eval", "perf", "system")
    for name in splits:
        if not name or not all(part.isalnum() for part in name.replace("-", "_").split("_")):
            return f"{quote(name)} is no name: take letters, digits, - and _"
        if name in taken or splits.count(name) > 1 or f"{name}_raw" in splits:
            return f"{quote(name)} stands twice in what is recorded, or is the launcher's own"
    return None


def _averages(cfg: CfgNode) -> str | None:
    if cfg.MODEL.SWA_START and cfg.MODEL.EMA_DECAY:
        return "weights are averaged in one way: take MODEL.EMA_DECAY 0, or leave this empty"
    return None


def _ema_warmup(cfg: CfgNode) -> str | None:
    if cfg.MODEL.EMA_WARMUP and not cfg.MODEL.EMA_DECAY:
        return "needs MODEL.EMA_DECAY"
    return None


def _clip_skip(cfg: CfgNode) -> str | None:
    if cfg.TRAIN.GRAD_CLIP_SKIP and cfg.TRAIN.GRAD_CLIP_BY == "norm":
        return "is for TRAIN.GRAD_CLIP_BY value and adaptive: a norm is that of all gradients"
    return None


def _static_graph(cfg: CfgNode) -> str | None:
    if cfg.DIST.STATIC_GRAPH and cfg.DIST.FIND_UNUSED_PARAMETERS:
        return "and DIST.FIND_UNUSED_PARAMETERS exclude each other: leave one of them False"
    return None


def _shards(cfg: CfgNode) -> str | None:
    if not cfg.TRAIN.SHARDS:
        return None
    if cfg.TRAIN.MICRO_BATCH_SIZE == "auto":
        return "is exact: give TRAIN.MICRO_BATCH_SIZE a number, for auto goes by a GPU's memory"
    if not cfg.DATALOADER.SEED_SAMPLES:
        return "needs DATALOADER.SEED_SAMPLES True: else samples draw otherwise on other ranks"
    if cfg.MODEL.COMPILE_MODE.startswith("max-autotune") and cfg.MODEL.COMPILE:
        return "is exact, and MODEL.COMPILE_MODE max-autotune chooses by time; take default"
    if cfg.MODEL.COMPILE_DYNAMIC and cfg.MODEL.COMPILE:
        return "is exact, and MODEL.COMPILE_DYNAMIC goes by the shape that comes first on a rank"
    used = {
        "MODEL.SYNC_BN": "batch-norm over all ranks; take GroupNorm",
        "DIST.GRADIENT_COMPRESSION": "an option of DDP's all-reduce, which is not used",
        "DIST.STATIC_GRAPH": "an option of DDP, which is not used",
        "DIST.FIND_UNUSED_PARAMETERS": "not needed: weights that a step does not use are found",
    }
    for key, why in used.items():
        node, _, name = key.partition(".")
        if cfg[node][name]:
            return f"does not go with {key}: {why}"
    return None


def _backend(cfg: CfgNode) -> str | None:
    if cfg.DIST.BACKEND == "nccl" and cfg.DIST.DEVICE == "cpu":
        return "nccl works on CUDA only; use gloo, or DIST.DEVICE cuda"
    return None


# The keys a check reads; the first is the one reported. Skipped where one of them is wrong itself.
CHECKS: list[tuple[tuple[str, ...], Callable[[CfgNode], str | None]]] = [
    (("DIST.BACKEND", "DIST.DEVICE"), _backend),
    (("MODEL.THAW",), _thaw),
    (("MODEL.SWA_START", "MODEL.EMA_DECAY"), _averages),
    (("MODEL.EMA_WARMUP", "MODEL.EMA_DECAY"), _ema_warmup),
    (("TRAIN.GRAD_CLIP_SKIP", "TRAIN.GRAD_CLIP_BY"), _clip_skip),
    (("DIST.STATIC_GRAPH", "DIST.FIND_UNUSED_PARAMETERS"), _static_graph),
    (("MODEL.INIT", "MODEL.WEIGHTS", "MODEL.WEIGHTS_STRICT", "MODEL.REINIT"), _init),
    (
        (
            *("TRAIN.SHARDS", "TRAIN.MICRO_BATCH_SIZE", "DATALOADER.SEED_SAMPLES"),
            *("MODEL.COMPILE", "MODEL.COMPILE_MODE", "MODEL.COMPILE_DYNAMIC", "MODEL.SYNC_BN"),
            *("DIST.GRADIENT_COMPRESSION", "DIST.STATIC_GRAPH", "DIST.FIND_UNUSED_PARAMETERS"),
        ),
        _shards,
    ),
    (("EVAL.SPLITS",), _splits),
    (("EVAL.AT_START", "EVAL.EVERY", "EVAL.SPLITS"), _at_start),
]
