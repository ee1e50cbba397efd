"""`launcher config list`, `launcher config keys` and `launcher config diff`."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from typing import Any

from launcher.config import KEYS, Key, flatten, load_config
from launcher.config.checks import bounds
from launcher.config.shipped import first_comment, shipped
from launcher.errors import UsageError

_MARKDOWN_HEAD = """\
# Config keys

Made by `launcher config keys --markdown`; change `launcher/config/keys.py`, not this page.

Set a key in a YAML file or on the command line (`KEY VALUE` or `KEY=VALUE`). Order: defaults, the
files under `_BASE_`, the file, the command line; the last one wins. A duration is one string with
a unit: `20ep`, `500step`, `90s`, `30min`, `24h`. Keys that a task adds live under `TASK`; see them
with `launcher config keys --config-file FILE`.
"""


def main(argv: list[str]) -> int:
    """Run `launcher config ARGV`; returns the exit code, raises UsageError."""
    commands = {"list": listed, "keys": keys, "diff": diff}
    parser = argparse.ArgumentParser(
        prog="launcher config",
        description="list: the configs that ship. keys: every key, its value and where it comes "
        "from. diff: the keys in which two configs or runs differ.",
    )
    parser.add_argument("command", choices=commands, help="add --help for its options")
    return commands[parser.parse_args(argv[:1]).command](argv[1:])


def listed(argv: list[str]) -> int:
    """Print the configs that ship, with the first line of each one's comment."""
    parser = argparse.ArgumentParser(
        prog="launcher config list",
        description="The configs that ship: --config-file takes their names.",
    )
    parser.add_argument("--json", action="store_true", help="a list of objects instead of a table")
    args = parser.parse_args(argv)
    rows = [
        {"name": name, "comment": first_comment(path), "path": str(path)}
        for name, path in shipped().items()
    ]
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        _print_table(("name", "comment"), [(row["name"], row["comment"]) for row in rows])
    return 0


def keys(argv: list[str]) -> int:
    """Print every key with its value, its origin and its comment."""
    parser = argparse.ArgumentParser(
        prog="launcher config keys",
        description="Every key with its value, where that comes from, and what it means.",
    )
    parser.add_argument(
        "--config-file", metavar="FILE", help="a YAML file, or a name that `list` has"
    )
    parser.add_argument("--json", action="store_true", help="a list of objects instead of a table")
    parser.add_argument(
        "--markdown", action="store_true", help="the page docs/config.md (defaults only)"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="overrides, as in train")
    args = parser.parse_intermixed_args(argv)
    if args.markdown:
        if args.config_file or args.overrides or args.json:
            parser.error("--markdown shows the defaults; give it alone")
        print(markdown(), end="")
        return 0

    from launcher.tasks import resolve_task

    config = load_config(args.config_file, args.overrides, resolve_task, require_task=False)
    comments = {key.name: key.comment for key in KEYS}
    task = f"Declared by {config.task.__name__}" if config.task else ""
    values = flatten(config.cfg)
    if args.json:
        rows = [
            {
                "key": name,
                "value": value,
                "origin": config.origins[name],
                "comment": comments.get(name, task),
            }
            for name, value in values.items()
        ]
        print(json.dumps(rows, indent=2))
        return 0
    _print_table(
        ("key", "value", "origin", "comment"),
        [
            (name, _text(value), config.origins[name], comments.get(name, task))
            for name, value in values.items()
        ],
    )
    return 0


def diff(argv: list[str]) -> int:
    """Print the keys in which two configs differ; 0 also where they do."""
    parser = argparse.ArgumentParser(
        prog="launcher config diff",
        description="The keys in which two configs differ, with both values.",
    )
    parser.add_argument("a", metavar="A", help="a config file or a run directory")
    parser.add_argument("b", metavar="B", help="another one")
    parser.add_argument("--json", action="store_true", help="a list of objects instead of a table")
    args = parser.parse_args(argv)
    a, b = _read(args.a), _read(args.b)
    absent = object()  # None is a value
    names = [name for name in {**a, **b} if a.get(name, absent) != b.get(name, absent)]
    if args.json:
        rows = []
        for name in names:
            sides = {side: tree[name] for side, tree in (("a", a), ("b", b)) if name in tree}
            rows.append({"key": name, **sides})
        print(json.dumps(rows, indent=2))
    elif names:

        def shown(tree: dict[str, Any], name: str) -> str:
            return _text(tree[name]) if name in tree else "(no such key)"

        table = [(name, shown(a, name), shown(b, name)) for name in names]
        _print_table(("key", args.a, args.b), table)
    else:
        print("no key differs")
    return 0


def markdown() -> str:
    """The page docs/config.md: a table a section, from KEYS."""
    sections: dict[str, list[Key]] = {}
    for key in KEYS:
        sections.setdefault(key.name.rpartition(".")[0], []).append(key)
    lines = [_MARKDOWN_HEAD.rstrip("\n")]
    for section, members in sections.items():
        lines += ["", f"## {section or 'The run'}", ""]
        lines += ["| key | default | values | meaning |", "| --- | --- | --- | --- |"]
        for key in members:
            comment = key.comment.replace("<", "&lt;").replace("|", "\\|")
            lines.append(f"| `{key.name}` | `{_text(key.default)}` | {_values(key)} | {comment} |")
    return "\n".join(lines) + "\n"


def _values(key: Key) -> str:
    """Which values a key takes, in a few words."""
    if key.choices:
        names = [f"`{choice or _text(choice)}`" for choice in key.choices]
        return ", ".join([*names, "`module:Class`"] if key.own else names)
    if key.unit:
        units = " or ".join("a time" if unit == "s" else f"`{unit}`" for unit in key.unit)
        return ("list of " if isinstance(key.default, list) else "") + (
            f'{units}, or `""`' if key.never else units
        )
    kind = {bool: "true or false", int: "whole number", float: "number", str: "text"}
    if key.element is not None:
        name = "list of texts"
    elif isinstance(key.default, list):
        name = f"list of {key.length} numbers"
    else:
        name = kind[type(key.default)]
    name += f" or `{key.word}`" if key.word else ""
    return f"{name}, {bounds(key)}" if bounds(key) else name


def _read(path: str) -> dict[str, Any]:
    """All values of a config file, or of a run directory's config.yaml."""
    if os.path.isdir(path):
        path = os.path.join(path, "config.yaml")
        if not os.path.exists(path):
            raise UsageError(f"{os.path.dirname(path)} is no run directory: it has no config.yaml")
    return flatten(load_config(path, require_task=False).cfg)


def _text(value: object) -> str:
    return '""' if value == "" else str(value)


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table for eyes on a terminal; elsewhere aligned plain text, nothing cut off."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if console.is_terminal:
        table = Table(*head)
        for row in rows:
            table.add_row(*(Text(cell, overflow="fold") for cell in row))
        console.print(table)
        return
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in [head, *rows]:
        print(
            "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        )
