"""From `--grid` and `--random` to the points of a sweep: what each sets, as words."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from launcher.errors import UsageError

FORMS = "log(A,B), uniform(A,B), int(A,B) or choice(A,B,...)"
DIGITS = 4  # of a number that is drawn: what a person reads is what is trained with


def settings_of(grid: Sequence[str], draws: Sequence[str], seed: int) -> list[dict[str, str]]:
    """What each point sets. `grid` holds KEY=VALUE,VALUE words; `draws` a number, and KEY=FORM
    words that are drawn that many times. With both, each draw is taken at each point of the grid.

    Every key draws from a sequence of its own: another key, or more draws, changes none of them.
    Raises UsageError.
    """
    axes = [_axis(word, "--grid") for word in grid]
    count, *words = draws or ["1"]
    if not count.isdigit() or int(count) == 0 or (draws and not words):
        raise UsageError(f"--random {' '.join(draws)}: write --random N KEY=FORM ..., {FORMS}")
    forms = [_axis(word, "--random") for word in words]
    for key, times in Counter(key for key, _ in axes + forms).items():
        if times > 1:
            raise UsageError(f"{key} is given twice to the sweep; keep one")
    made = {key: (_draw(key, form), random.Random(f"{seed} {key}")) for key, form in forms}
    drawn = [
        {key: draw(source.random()) for key, (draw, source) in made.items()}
        for _ in range(int(count))
    ]
    values = [[(key, value) for value in split(text)] for key, text in axes]
    return [{**dict(chosen), **own} for chosen in itertools.product(*values) for own in drawn]


def split(text: str) -> list[str]:
    """The values of a list without brackets; commas in brackets, braces and quotes are theirs."""
    found, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter == "," and depth == 0:
            found.append("")
            continue
        depth += 0 if quote else (letter in "([{") - (letter in ")]}")
        found[-1] += letter
    return [value.strip() for value in found]


def _axis(word: str, option: str) -> tuple[str, str]:
    key, equals, text = word.partition("=")
    if not key or not equals:
        raise UsageError(f"{option} {word}: write KEY={'A,B' if option == '--grid' else 'FORM'}")
    return key, text


def _draw(key: str, form: str) -> Callable[[float], str]:
    """A form as a function of a number from 0 to below 1."""
    match = re.fullmatch(r"(log|uniform|int|choice)\((.*)\)", form.strip())
    if match is None:
        raise UsageError(f"--random {key}={form}: write {FORMS}, in quotes for the shell")
    kind, values = match[1], split(match[2])
    if kind == "choice":
        return lambda u: values[int(u * len(values))]
    try:
        low, high = map(float, values)
    except ValueError:
        raise UsageError(f"--random {key}={form}: {kind} takes two numbers") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UsageError(f"--random {key}={form}: the first number must be below the second")
    if kind == "int":
        if low != int(low) or high != int(high):
            raise UsageError(f"--random {key}={form}: int takes two whole numbers")
        return lambda u: str(int(low) + int(u * (int(high) - int(low) + 1)))
    if kind == "uniform":
        return lambda u: f"{low + u * (high - low):.{DIGITS}g}"
    if low <= 0:
        raise UsageError(f"--random {key}={form}: log takes numbers above 0")
    return lambda u: f"{math.exp(math.log(low) + u * math.log(high / low)):.{DIGITS}g}"


def names(count: int) -> Iterator[str]:
    """000, 001, ...: of one length, so that they sort as they count."""
    return (f"{number:0{max(3, len(str(count - 1)))}d}" for number in range(count))
