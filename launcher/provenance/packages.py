"""The versions of the packages that some source files import. Imports no torch."""

from __future__ import annotations

import ast
import contextlib
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, packages_distributions, version


def imported(sources: Iterable[bytes]) -> set[str]:
    """The top-level modules that source files import anywhere, Python's own left out. A file that
    cannot be parsed names none."""
    found = set()
    for source in sources:
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"launcher"}


def versions_of(modules: Iterable[str], known: Mapping[str, str]) -> dict[str, str]:
    """The versions of the distributions that these modules come from, but for those `known`. One
    that was not installed, as a task's own, has none."""
    asked = set(modules) - set(known)
    if not asked:  # looking through all that is installed takes tenths of a second
        return {}
    distributions, found = packages_distributions(), {}
    for name in sorted({one for module in asked for one in distributions.get(module, ())}):
        if name not in known:
            with contextlib.suppress(PackageNotFoundError):
                found[name] = version(name)
    return found
