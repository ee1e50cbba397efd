"""A config that is given as a Python object, and a task given as its class, as words of the command
line; so they are checked, and told of, as these are."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launcher.errors import UsageError


def as_words(settings: Mapping[str, Any]) -> list[str]:
    """KEY=VALUE words of a CfgNode or a dict, whose keys may be dotted, nested, or both."""
    return [f"{key}={_word(key, value)}" for key, value in _flat(settings, "")]


def _flat(settings: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if not isinstance(name, str):
            raise UsageError(f"config: {prefix}{name!r} is no key; write 'OPTIM.LR': 0.1")
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _word(key: str, value: Any) -> str:
    if isinstance(value, (list, tuple)):
        items = [_plain(key, item) for item in value]
        return json.dumps(items, ensure_ascii=False)  # which YAML reads
    found = _plain(key, value)
    return "null" if found is None else str(found)


def _plain(key: str, value: Any) -> Any:
    """A number of numpy's or torch's as Python's, a path as text."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if callable(getattr(value, "item", None)) and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise UsageError(f"config: {key} is a {type(value).__name__}, which is no value of a key")


def name_of(task: type) -> str:
    """TASK.NAME for a class: the name by which other processes find it, where they can.

    A class in a package goes by its module, any other by its file; one that was made in a notebook
    or inside a function by where it stands, which says what it was and leads nowhere.
    """
    module = sys.modules.get(task.__module__)
    spec, file = getattr(module, "__spec__", None), getattr(module, "__file__", None)
    name = spec.name if spec is not None else task.__module__  # of `python -m package.module`
    if file is None or "." in task.__qualname__:
        return f"{task.__module__}:{task.__qualname__}"
    return f"{name if '.' in name else Path(file).resolve()}:{task.__qualname__}"


def check_found_elsewhere(task: type) -> None:
    """Raise UsageError for a class that other processes cannot import."""
    if "<locals>" in task.__qualname__ or "." in task.__qualname__:
        raise UsageError(
            f"ranks start in processes of their own, which cannot import {task.__qualname__}: move "
            "the class to the top level of its file."
        )
    module = sys.modules.get(task.__module__)
    if getattr(module, "__file__", None) is None:
        raise UsageError(
            f"ranks start in processes of their own, and {task.__name__} was made in a notebook or "
            "at a prompt, where they cannot import it from. Begin its cell with `%%writefile "
            f"{task.__name__.lower()}.py`, run it, and write `from {task.__name__.lower()} import "
            f"{task.__name__}` in the next one; or leave ranks out, to train in this process."
        )
