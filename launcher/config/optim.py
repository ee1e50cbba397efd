"""What OPTIM's keys mean together: entries of GROUPS, arguments, what each schedule needs."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any, NamedTuple

from yacs.config import CfgNode

from launcher.config.checks import check_value
from launcher.config.coerce import coerce
from launcher.config.keys import KEYS, Key
from launcher.config.problem import Mistake, nearest, quote
from launcher.config.source import parse_word
from launcher.config.units import Duration, parse_duration
from launcher.config.words import arguments

# The words of an entry of GROUPS: as the keys of the same name, and two of its own.
WORDS = {
    key.name.partition(".")[2]: key
    for key in KEYS
    if key.name in {f"OPTIM.{k}" for k in ("LR", "WEIGHT_DECAY", "MOMENTUM", "BETAS", "EPS")}
} | {
    "LR_SCALE": Key("LR_SCALE", 1.0, "", above=0),
    "MUON": Key("MUON", True, ""),
}
# What has a key of its own, and is no argument in ARGS.
KEYED = {
    **{"params": "GROUPS", "lr": "LR", "weight_decay": "WEIGHT_DECAY"},
    **{"momentum": "MOMENTUM", "nesterov": "NESTEROV", "betas": "BETAS", "eps": "EPS"},
}
ADAMS = ("adam", "adamw", "nadam", "radam")
# The keys besides LR and WEIGHT_DECAY that count for an optimiser; a class of one's own has ARGS.
COUNT = {
    **dict.fromkeys(ADAMS, ("BETAS", "EPS")),
    **{"sgd": ("MOMENTUM", "NESTEROV"), "muon": ("MOMENTUM", "NESTEROV")},
    **{"rmsprop": ("MOMENTUM", "EPS"), "adagrad": ("EPS",)},
}


class Entry(NamedTuple):
    """An entry of GROUPS: a pattern of weights, and their values by word."""

    pattern: str
    values: dict[str, Any]


def group_entry(text: str) -> Entry:
    """Read an entry: a pattern, then WORD=value. Raises Mistake."""
    try:
        pattern, *words = shlex.split(text) or [""]
    except ValueError as error:
        raise Mistake(f"{quote(text)}: {error}") from None
    if not words or "=" in pattern:
        raise Mistake(f"{quote(text)} is no group; write for example backbone.* LR_SCALE=0.1")
    values = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in WORDS:
            known = f"{quote(text)}: {quote(word)} is none of {'=, '.join(WORDS)}="
            raise Mistake(known, nearest(name, WORDS))
        key = WORDS[name]
        try:
            values[name] = coerce(parse_word(value), key.default, key.element)
            check_value(key, values[name])
        except Mistake as mistake:
            raise Mistake(f"{quote(text)}: {name}: {mistake}", mistake.hint) from None
    return Entry(pattern, values)


# Each check sees the whole config and answers with what is wrong, or None.


def _args(cfg: CfgNode) -> str | None:
    try:
        given = arguments(cfg.OPTIM.ARGS)
    except ValueError as error:
        return f"{error}; write for example [amsgrad=true]"
    count = {"params", "lr", "weight_decay", *(k.lower() for k in COUNT.get(cfg.OPTIM.NAME, ()))}
    if taken := sorted(given.keys() & count):
        return f"{taken[0]} has a key of its own: set OPTIM.{KEYED[taken[0]]}"
    return None


def _groups(cfg: CfgNode) -> str | None:
    for text in cfg.OPTIM.GROUPS:
        try:
            entry = group_entry(text)
        except Mistake as mistake:
            return str(mistake) + (f" (did you mean {mistake.hint}?)" if mistake.hint else "")
        muon = cfg.OPTIM.NAME == "muon"
        count = {"LR", "LR_SCALE", "WEIGHT_DECAY", *COUNT.get(cfg.OPTIM.NAME, ())}
        count |= {"MUON", "BETAS", "EPS"} if muon else set()
        if idle := sorted(entry.values.keys() - count):
            return f"{quote(text)}: {idle[0]} is nothing that OPTIM.NAME {cfg.OPTIM.NAME} takes"
    return None


def _scaling(cfg: CfgNode) -> str | None:
    if cfg.OPTIM.LR_SCALING and not cfg.OPTIM.LR_BATCH:
        return "needs OPTIM.LR_BATCH, the global batch that the rates are given for"
    return None


def _batch(cfg: CfgNode) -> str | None:
    if cfg.OPTIM.LR_BATCH and not cfg.OPTIM.LR_SCALING:
        return "counts only with OPTIM.LR_SCALING: set it to linear or sqrt"
    return None


def _nesterov(cfg: CfgNode) -> str | None:
    optim = cfg.OPTIM
    if optim.NESTEROV and ("NESTEROV" not in COUNT.get(optim.NAME, ()) or optim.MOMENTUM == 0):
        return "needs OPTIM.NAME sgd or muon, and OPTIM.MOMENTUM above 0"
    return None


def _needs(cfg: CfgNode) -> str | None:
    optim = cfg.OPTIM
    if optim.SCHEDULE in ("step", "multistep") and not optim.MILESTONES:
        if optim.SCHEDULE == "multistep" or not optim.PERIOD:
            other = "" if optim.SCHEDULE == "multistep" else ", or OPTIM.PERIOD"
            return f"{optim.SCHEDULE} needs OPTIM.MILESTONES, for example [5ep, 8ep]{other}"
    elif optim.SCHEDULE == "step" and optim.PERIOD:
        return "step takes OPTIM.MILESTONES or OPTIM.PERIOD, not both"
    if optim.SCHEDULE == "exponential" and not optim.PERIOD:
        return "exponential needs OPTIM.PERIOD: in each, LR is multiplied by OPTIM.GAMMA"
    if optim.SCHEDULE == "invsqrt" and not (optim.PERIOD or optim.WARMUP):
        return "invsqrt needs OPTIM.WARMUP or OPTIM.PERIOD: the steps from which the rate falls"
    if optim.SCHEDULE == "wsd" and not optim.DECAY:
        return "wsd needs OPTIM.DECAY, for example 2ep"
    return None


def _milestones(cfg: CfgNode) -> str | None:
    last: dict[str, float] = {}
    for text in cfg.OPTIM.MILESTONES:
        duration = parse_duration(text)
        assert duration is not None, "the key alone was checked before"
        if duration.amount <= last.get(duration.unit, 0):
            return f"{text} does not come after the one before it; put them in rising order"
        last[duration.unit] = duration.amount
    return None


def _longer(a: Duration | None, b: Duration | None) -> bool:
    """Whether one is longer than the other, as far as that is known without the data."""
    return bool(a and b and a.unit == b.unit and a.amount > b.amount)


def _end(cfg: CfgNode) -> tuple[str, Duration | None]:
    """The key that says when the schedule ends, and when that is."""
    key = "OPTIM.HORIZON" if cfg.OPTIM.HORIZON else "TRAIN.DURATION"
    return key, parse_duration(cfg.OPTIM.HORIZON or cfg.TRAIN.DURATION)


def _warmup(cfg: CfgNode) -> str | None:
    warmup, (key, end) = parse_duration(cfg.OPTIM.WARMUP), _end(cfg)
    return f"{warmup} is longer than {key} ({end})" if _longer(warmup, end) else None


def _decay(cfg: CfgNode) -> str | None:
    if cfg.OPTIM.SCHEDULE != "wsd":
        return None
    decay, warmup = parse_duration(cfg.OPTIM.DECAY), parse_duration(cfg.OPTIM.WARMUP)
    (key, end), told = _end(cfg), str(decay)
    if decay and warmup and decay.unit == warmup.unit:
        decay = Duration(decay.amount + warmup.amount, decay.unit)
        told += f", after OPTIM.WARMUP {warmup},"
    return f"{told} is longer than {key} ({end})" if _longer(decay, end) else None


def _momentum(cfg: CfgNode) -> str | None:
    optim = cfg.OPTIM
    if optim.MOMENTUM_SCHEDULE == "constant" or optim.NAME not in COUNT:
        return None
    base = optim.BETAS[0] if "BETAS" in COUNT[optim.NAME] else optim.MOMENTUM
    if base * optim.MOMENTUM_FACTOR >= 1:
        return f"{optim.MOMENTUM_FACTOR} times the momentum of {base} is not below 1"
    return None


# The keys a check reads; the first is the one reported. Skipped where one of them is wrong itself.
CHECKS: list[tuple[tuple[str, ...], Callable[[CfgNode], str | None]]] = [
    (("OPTIM.ARGS", "OPTIM.NAME"), _args),
    (("OPTIM.GROUPS", "OPTIM.NAME"), _groups),
    (("OPTIM.LR_SCALING", "OPTIM.LR_BATCH"), _scaling),
    (("OPTIM.LR_BATCH", "OPTIM.LR_SCALING"), _batch),
    (("OPTIM.NESTEROV", "OPTIM.NAME", "OPTIM.MOMENTUM"), _nesterov),
    (("OPTIM.SCHEDULE", "OPTIM.MILESTONES", "OPTIM.PERIOD", "OPTIM.WARMUP", "OPTIM.DECAY"), _needs),
    (("OPTIM.MILESTONES",), _milestones),
    (("OPTIM.WARMUP", "TRAIN.DURATION", "OPTIM.HORIZON"), _warmup),
    (("OPTIM.DECAY", "TRAIN.DURATION", "OPTIM.HORIZON", "OPTIM.WARMUP", "OPTIM.SCHEDULE"), _decay),
    (
        (
            *("OPTIM.MOMENTUM_FACTOR", "OPTIM.MOMENTUM_SCHEDULE", "OPTIM.MOMENTUM", "OPTIM.BETAS"),
            "OPTIM.NAME",
        ),
        _momentum,
    ),
]
