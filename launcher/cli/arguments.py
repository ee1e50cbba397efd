"""Options and config overrides in any order."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

from launcher.config.foreign import foreign
from launcher.config.keys import KEYS
from launcher.config.problem import Problem, nearest


def split_overrides(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """Parse the options; everything else is overrides: `KEY VALUE` pairs and `KEY=VALUE`.

    argparse alone would take a value such as -1e-3 for an option, and overrides only in one place.
    """
    actions = parser._option_string_actions
    options: list[str] = []
    overrides: list[str] = []
    tokens = list(reversed(argv))
    while tokens:
        token = tokens.pop()
        if token.startswith("-"):
            options.append(token)
            action = actions.get(token)
            if action is not None and action.nargs is None:
                options += [tokens.pop()] if tokens else []
        else:
            overrides.append(token)
            # The value, whatever it looks like, unless it is one of the options.
            if "=" not in token and tokens and tokens[-1] not in actions:
                overrides.append(tokens.pop())
    known, unknown = parser.parse_known_args(options)
    if unknown:
        lines = [f"unrecognized arguments: {' '.join(unknown)}"]
        lines += [_meant(word.partition("=")[0], actions) for word in unknown]
        parser.error("\n  ".join(dict.fromkeys(line for line in lines if line)))
    return known, overrides


def _meant(name: str, options: Iterable[str]) -> str:
    """What an unknown option most likely stands for: another launcher's, one of these, or a key."""
    word = foreign(name)
    known = [*options, *(key.name for key in KEYS)]
    more, hint = word.told if word else ("", nearest(name, known))
    if not more and not hint:
        return ""
    dashes = "" if more or hint.startswith("-") else "; a key has no dashes"
    return str(Problem("", name, f"unknown option{more}{dashes}", hint))
