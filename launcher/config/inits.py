"""The entries of MODEL.INIT in parts: which weights, and how torch.nn.init fills them. Imports no
torch."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from typing import Any

from launcher.config.problem import Mistake, nearest, quote

# What torch.nn.init has, without the underscore at the end.
FILLS = (
    *("uniform", "normal", "trunc_normal", "constant", "ones", "zeros", "eye", "dirac"),
    *("xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal"),
    *("orthogonal", "sparse"),
)
FORM = "write for example Linear: xavier_uniform, or *.bias: constant(val=0.1)"


@dataclass(frozen=True)
class Init:
    """One entry: a type of modules, `Type.weight`, or a pattern of names; and what fills them."""

    text: str
    which: str
    fill: str
    args: list[Any] = field(default_factory=list)
    named: dict[str, Any] = field(default_factory=dict)


def parse_init(text: str) -> Init:
    """An entry from its text. Raises Mistake."""
    which, colon, how = (part.strip() for part in text.partition(":"))
    if not (which and colon and how):
        raise Mistake(f"{quote(text)} is no entry; {FORM}")
    try:
        call = ast.parse(how, mode="eval").body
    except (SyntaxError, ValueError):
        raise Mistake(f"{quote(text)}: {quote(how)} is no name(arguments); {FORM}") from None
    args, keywords = [], []
    if isinstance(call, ast.Call):
        args, keywords, call = call.args, call.keywords, call.func
    if not isinstance(call, ast.Name):
        raise Mistake(f"{quote(text)}: {quote(how)} is no name(arguments); {FORM}")
    name = call.id.removesuffix("_")
    if name not in FILLS:
        raise Mistake(f"{quote(name)} is none of {', '.join(FILLS)}", nearest(name, FILLS))
    try:
        named = {word.arg or "**": _value(word.value) for word in keywords}
        return Init(text, which, name, [_value(arg) for arg in args], named)
    except ValueError:
        raise Mistake(f"{quote(text)}: its arguments must be plain numbers and words") from None


def _value(node: ast.expr) -> Any:
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)  # mode=fan_out
