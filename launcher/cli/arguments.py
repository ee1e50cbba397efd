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
    tokens = iter(argv)
    for token in tokens:
        if token.startswith("-"):
            options.append(token)
            action = actions.get(token)
            if action is not None and action.nargs is None:
                options += [value for value in [next(tokens, None)] if value is not None]
        else:
            overrides.append(token)
            if "=" not in token:
                # The value, whatever it looks like, unless it is one of the options.
                value = next(tokens, None)
                if value is not None and value in actions:
                    tokens = iter([value, *tokens])
                elif value is not None:
                    overrides.append(value)
    return parser.parse_args(options), overrides
