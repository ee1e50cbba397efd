"""From the text of a YAML value to the type of a key's default, without loss.

The text itself is converted, not what YAML made of it: YAML reads 1e-3 as a string, 1.10 as 1.1
and yes as true, and a key that wants a number, a name or a flag must get what was written.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

import yaml

from launcher.config.problem import Mistake, quote

TAG = "tag:yaml.org,2002:"
_TRUE = {"true", "yes", "on", "1"}
_FALSE = {"false", "no", "off", "0"}


def coerce(node: yaml.Node, default: object, element: object = None) -> Any:
    """The node's value in the type of `default`; a default of None takes any plain YAML value.

    `element` is an example of a list's items, for lists whose default does not show one.
    Raises Mistake where the value does not fit or would lose something.
    """
    if default is None:
        return plain(node)
    is_list = isinstance(default, (list, tuple))
    if node.tag == TAG + "null":
        none = "[]" if is_list else '""' if isinstance(default, str) else ""
        advice = f"write {none} for none" if none else "leave the key out to use its default"
        raise Mistake(f"null is not a value here; {advice}")
    if isinstance(default, (list, tuple)):
        if not isinstance(node, yaml.SequenceNode):
            raise Mistake(f"{_written(node)} is not a list; write [a, b]")
        item = element if element is not None else _example(default)
        return type(default)(coerce(child, item) for child in node.value)
    if not isinstance(node, yaml.ScalarNode):
        raise Mistake(f"{_written(node)} is given where {_NAMES[type(default)]} is wanted")
    return _FROM_TEXT[type(default)](node.value)


def plain(node: yaml.Node) -> Any:
    """The node's value with YAML's own types: for keys whose default says no type."""
    if isinstance(node, yaml.MappingNode):
        raise Mistake("takes a value, not a section with keys of its own")
    try:
        return _Plain("").construct_object(node, deep=True)
    except Mistake:
        raise
    except (yaml.YAMLError, ValueError, KeyError, TypeError):
        raise Mistake(f"{_written(node)} cannot be read as YAML") from None


class _Plain(yaml.SafeLoader):
    """Safe YAML, less what a config cannot hold: dates stay text, numbers are finite."""

    def finite(self, node: yaml.ScalarNode) -> float:
        value = float(self.construct_yaml_float(node))
        if not math.isfinite(value):
            raise Mistake(f"{quote(node.value)} is not a finite number")
        return value


_Plain.add_constructor(TAG + "timestamp", lambda _, node: node.value)
_Plain.add_constructor(TAG + "float", _Plain.finite)


def _written(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return quote(node.value)
    return "a list" if isinstance(node, yaml.SequenceNode) else "a section"


def _example(items: Sequence[object]) -> object:
    """An item that shows the type of all, or None where they show none."""
    types = {type(item) for item in items}
    if len(types) == 1:
        return items[0]
    return 0.0 if types == {int, float} else None


def _whole(text: str) -> int | None:
    """The whole number that is written, as digits, 0x or 0b; None if it is something else."""
    if re.fullmatch(r"\s*[+-]?0[0-9_]*[1-9][0-9_]*\s*", text):
        # YAML reads 010 as 8, people read it as 10.
        raise Mistake(f"{quote(text)} has a leading zero, which YAML reads as octal; leave it out")
    try:
        return int(text, 0)
    except ValueError:
        return None


def _to_int(text: str) -> int:
    whole = _whole(text)
    if whole is not None:
        return whole
    try:
        number = Decimal(text)
    except InvalidOperation:
        number = Decimal("nan")
    if not number.is_finite():
        raise Mistake(f"{quote(text)} is not a whole number")
    if number != number.to_integral_value():
        raise Mistake(f"{quote(text)} is not a whole number: its fraction would be lost")
    if number.adjusted() > 30:  # 1e999999999 would take hours to write out
        raise Mistake(f"{quote(text)} is too large")
    return int(number)


def _to_float(text: str) -> float:
    whole = _whole(text)
    try:
        number = float(text) if whole is None else float(whole)
    except ValueError:
        if text.strip().lower().lstrip("+-") in (".inf", ".nan"):
            raise Mistake(f"{quote(text)} is not a finite number") from None
        raise Mistake(f"{quote(text)} is not a number") from None
    except OverflowError:
        raise Mistake(f"{quote(text)} is too large") from None
    if not math.isfinite(number):
        raise Mistake(f"{quote(text)} is not a finite number")
    if whole is not None and int(number) != whole:
        raise Mistake(f"{quote(text)} has more digits than a float holds; write {int(number)}")
    if number == 0 and Decimal(text.strip() if whole is None else whole) != 0:
        raise Mistake(f"{quote(text)} is too small: it would become 0")
    return number


def _to_bool(text: str) -> bool:
    word = text.strip().lower()
    if word in _TRUE or word in _FALSE:
        return word in _TRUE
    raise Mistake(f"{quote(text)} is neither true nor false")


_FROM_TEXT: dict[type, Callable[[str], object]] = {
    bool: _to_bool,
    int: _to_int,
    float: _to_float,
    str: str,
}
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def expand(value: Any) -> Any:
    """A path, or each of a list of them, with `~` and `$VARIABLES` put in. Raises Mistake for a
    variable that is not set."""
    if isinstance(value, (list, tuple)):
        return type(value)(expand(item) for item in value)
    expanded = os.path.expanduser(os.path.expandvars(value))
    if left := re.search(r"\$([A-Za-z_]\w*|\{[A-Za-z_]\w*\})", expanded):
        raise Mistake(f"{quote(value)}: the environment has no variable {left[1].strip('{}')}")
    return expanded
