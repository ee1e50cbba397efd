"""The versions of the packages that some source files import. Imports no torch."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, distributions, version

from launcher.tasks.sources import imports


def imported(sources: Iterable[bytes]) -> set[str]:
    """The top-level modules that source files import anywhere, Python's own left out."""
    found = {parts[0] for source in sources for dots, parts in imports(source) if not dots}
    return found - sys.stdlib_module_names - {"launcher"}


def installed(names: Iterable[str]) -> dict[str, str]:
    """The versions of those distributions that are there."""
    found = {}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def versions_of(modules: Iterable[str], known: Mapping[str, str]) -> dict[str, str]:
    """The versions of the distributions that these modules come from, but for those `known`. One
    that was not installed, as a task's own, has none."""
    asked, names = set(modules) - set(known), set[str]()
    # packages_distributions takes tenths of a second: it parses what each has installed.
    for one in distributions() if asked else ():
        listed = f"\n{one.read_text('top_level.txt') or one.read_text('RECORD') or ''}\n"
        if any(f"\n{module}{end}" in listed for module in asked for end in ("\n", "/", ".py,")):
            names.add(one.name)
    return installed(sorted(names - set(known)))
