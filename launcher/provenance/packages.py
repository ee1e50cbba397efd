"""The versions of the packages that some source files import. Imports no torch."""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import distributions


def imported(sources: Iterable[bytes]) -> set[str]:
    """The top-level modules that source files import anywhere, Python's own left out. A file that
    cannot be parsed names none."""
    return set[str]().union(*map(_imported, sources)) - sys.stdlib_module_names - {"launcher"}


@functools.cache
def _imported(source: bytes) -> set[str]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return set()
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def versions_of(modules: Iterable[str], known: Mapping[str, str]) -> dict[str, str]:
    """The versions of the distributions that these modules come from, but for those `known`. One
    that was not installed, as a task's own, has none."""
    asked, found = set(modules) - set(known), dict[str, str]()
    # packages_distributions takes tenths of a second: it parses what each has installed.
    for one in distributions() if asked else ():
        listed = f"\n{one.read_text('top_level.txt') or one.read_text('RECORD') or ''}\n"
        if any(f"\n{module}{end}" in listed for module in asked for end in ("\n", "/", ".py,")):
            found.setdefault(one.name, one.version)  # the first on the path is imported
    return {name: found[name] for name in sorted(set(found) - set(known))}
