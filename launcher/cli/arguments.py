"""Options and config overrides in any order."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


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
    return parser.parse_args(options), overrides
