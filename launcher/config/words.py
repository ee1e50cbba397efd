"""Arguments as words: `key=value`, values as in YAML."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import yaml

NO_POINT = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+")


def arguments(words: Iterable[str]) -> dict[str, Any]:
    """What `key=value` words say. Raises ValueError for another word."""
    found: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"{word!r} is no key=value")
        # YAML 1.1 takes 1e-3, which has no point, for text; a key of the config takes it for a
        # number.
        try:
            found[key] = float(text) if NO_POINT.fullmatch(text) else yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{word!r}: {error}") from None
    return found
