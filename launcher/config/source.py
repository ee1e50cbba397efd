"""Where settings come from: YAML files with their `_BASE_` files, and command-line overrides.

A file is parsed to nodes and no further, so every value keeps its line and no tag can run code.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from launcher.config.coerce import TAG, expand
from launcher.config.problem import Mistake, Problem, nearest, quote
from launcher.config.shipped import shipped

BASE = "_BASE_"
COMMAND_LINE = "command line"

# No set, omap, binary: a config holds what yacs can hold.
_TAGS = {
    TAG + name
    for name in (
        *("null", "bool", "int", "float", "str", "timestamp", "value"),
        *("seq", "map", "merge"),
    )
}
_BAD = "mistake already reported"
_CIRCLE = "an alias stands inside its own anchor"

Report = Callable[[Problem], None]


@dataclass(frozen=True)
class Setting:
    """A value given to a key: its dotted name, where it stands, and the value's YAML node."""

    key: str
    where: str
    node: yaml.Node
    typed: str | None = None  # the raw word, if from the command line


def read_file(path: str, report: Report) -> tuple[list[Setting], bool]:
    """All settings of a file, its bases' first, in merge order: the last one wins.

    Mistakes go to `report`. The flag says whether every file could be read: if not, a key that
    is missing may stand in the unread one.
    """
    return _read(path, [], path, "", report)


def read_overrides(
    words: Sequence[str], known: Iterable[str], report: Report, where: str = COMMAND_LINE
) -> list[Setting]:
    """Settings from `KEY VALUE` and `KEY=VALUE` words, which were given `where`. A known key is not
    taken for a value."""
    dotted = {key for key in known if "." in key}
    settings = []
    rest = list(words)
    while rest:
        key, equals, text = rest.pop(0).partition("=")
        if not equals:
            if not rest or rest[0].partition("=")[0] in dotted:
                report(Problem(where, key, "has no value; write KEY VALUE or KEY=VALUE"))
                continue
            text = rest.pop(0)
        tag = TAG + ("null" if text.lower() in ("null", "~") else "str")
        settings.append(Setting(key, where, yaml.ScalarNode(tag, text), typed=text))
    return settings


def parse_word(text: str) -> yaml.Node:
    """A command-line word as YAML, for lists and for keys without a type. Raises Mistake."""
    verbatim = yaml.ScalarNode(TAG + "str", text)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError):
        if text.startswith("["):
            raise Mistake(f"{quote(text)} is cut off; quote a list: '[a, b]'") from None
        return verbatim
    for _, message in _faults(node, set(), set()):
        raise Mistake(message)
    plain = isinstance(node, yaml.ScalarNode) and node.style is None
    if node is None or (plain and node.tag == TAG + "str"):
        return verbatim  # YAML would cut "a #b" to "a"
    return node


def _read(
    path: str, chain: list[str], where: str, key: str, report: Report
) -> tuple[list[Setting], bool]:
    """As read_file; `chain` is the files that led here, `where` and `key` what named this one."""
    name = f"{path}: " if chain else ""
    via = f" ({' -> '.join([*chain, path])})" if len(chain) > 1 else ""
    if not path or "\0" in path:
        report(Problem(where or COMMAND_LINE, key, f"{path!r} is not the name of a file"))
        return [], False
    if os.path.realpath(path) in [os.path.realpath(earlier) for earlier in chain]:
        cycle = " -> ".join([*chain, path])
        report(Problem(where, key, f"{cycle} goes round in a circle; take one {BASE} out"))
        return [], False
    try:
        root = _parse(path, is_base=bool(chain))
    except Mistake as mistake:
        report(Problem(where, key, f"{name}{mistake}{via}", mistake.hint))
        return [], False
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        at = f"{path}:{mark.line + 1}" if mark else path
        report(Problem(at, "", f"is not valid YAML: {reason}"))
        return [], False
    if root is None or root.tag == TAG + "null":
        return [], True
    if not isinstance(root, yaml.MappingNode):
        report(Problem(f"{path}:{_line(root)}", "", "a config is a mapping: KEY: VALUE lines"))
        return [], False

    faults = list(_faults(root, set(), set()))
    for node, message in faults:
        report(Problem(f"{path}:{_line(node)}", "", message))
    if root.tag == _BAD or _CIRCLE in [message for _, message in faults]:
        return [], False

    settings: list[Setting] = []
    lines: dict[str, int] = {}
    for dotted, key_node, node in _leaves(root, "", path, report):
        line = _line(key_node)
        if dotted in lines:
            report(_twice(path, dotted, lines[dotted], line))
        lines[dotted] = line
        settings.append(Setting(dotted, f"{path}:{line}", node))

    bases: list[Setting] = []
    complete = not faults
    for setting in [s for s in settings if s.key == BASE]:
        settings.remove(setting)
        for name in _base_names(setting, report):
            try:
                base = os.path.normpath(os.path.join(os.path.dirname(path), expand(name)))
            except Mistake as mistake:
                report(Problem(setting.where, BASE, str(mistake)))
                complete = False
                continue
            found, whole = _read(base, [*chain, path], setting.where, BASE, report)
            bases += found
            complete = complete and whole
    return bases + settings, complete


def _parse(path: str, is_base: bool) -> yaml.Node | None:
    """The root node of a file. Raises Mistake where it cannot be read, yaml.YAMLError if broken."""
    if path.endswith(".py"):
        raise Mistake("a config is YAML; Python files are not run as configs")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except FileNotFoundError:
        near = _similar_file(path)
        if is_base:
            raise Mistake("no such file", near) from None
        none = "" if os.path.dirname(path) else ", and no config of this name ships"
        near = near or nearest(Path(path).stem, shipped())
        raise Mistake(f"no such file{none} (see launcher config list)", near) from None
    except IsADirectoryError:
        raise Mistake("is a directory; name a YAML file") from None
    except UnicodeDecodeError as error:
        raise Mistake(f"is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise Mistake(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except RecursionError:
        raise Mistake("is nested too deeply") from None


def _similar_file(path: str) -> str:
    folder, name = os.path.split(path)
    try:
        others = [n for n in os.listdir(folder or ".") if n.endswith((".yaml", ".yml"))]
    except OSError:
        return ""
    close = difflib.get_close_matches(name, others, n=1)
    return os.path.join(folder, close[0]) if close else ""


def _faults(
    node: yaml.Node | None, above: set[int], seen: set[int]
) -> Iterator[tuple[yaml.Node, str]]:
    """What no key may hold: foreign tags (the node is marked _BAD) and values inside themselves."""
    if id(node) in above:
        assert node is not None
        yield node, _CIRCLE
    if node is None or id(node) in seen:
        return
    seen.add(id(node))
    if node.tag not in _TAGS:
        tag = node.tag.replace(TAG, "!!")
        node.tag = _BAD
        yield node, f"the YAML tag {tag} is not allowed: a config holds plain values only"
    if isinstance(node, yaml.ScalarNode):
        return
    is_mapping = isinstance(node, yaml.MappingNode)
    for child in [n for pair in node.value for n in pair] if is_mapping else node.value:
        yield from _faults(child, above | {id(node)}, seen)
        if child.tag == _BAD and not is_mapping:
            node.tag = _BAD  # a list with a bad item is not used; a section's other keys are


def _leaves(
    mapping: yaml.MappingNode, prefix: str, path: str, report: Report
) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    """(dotted key, key node, value node) of all values below; an empty section is a leaf too."""
    for name, (key_node, node) in _pairs(mapping, path, report).items():
        if node.tag == _BAD:
            continue
        if isinstance(node, yaml.MappingNode) and node.value:
            yield from _leaves(node, f"{prefix}{name}.", path, report)
        else:
            yield f"{prefix}{name}", key_node, node


def _pairs(
    mapping: yaml.MappingNode, path: str, report: Report
) -> dict[str, tuple[yaml.Node, yaml.Node]]:
    """A mapping's own pairs and those merged in by `<<`, which give way to its own."""
    own: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    for key, value in mapping.value:
        if key.tag == TAG + "merge":
            sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
            for source in reversed(sources):  # YAML: the first of a list wins
                if isinstance(source, yaml.MappingNode):
                    merged.update(_pairs(source, path, report))
                else:
                    report(Problem(f"{path}:{_line(key)}", "<<", "merges sections, not values"))
        elif not isinstance(key, yaml.ScalarNode):
            report(Problem(f"{path}:{_line(key)}", "", "a key is a name, not a list or section"))
        else:
            if key.value in own:
                report(_twice(path, key.value, _line(own[key.value][0]), _line(key)))
            own[key.value] = key, value
    return {**merged, **own}


def _twice(path: str, key: str, first: int, second: int) -> Problem:
    return Problem(f"{path}:{second}", key, f"given twice, in lines {first} and {second}; keep one")


def _base_names(setting: Setting, report: Report) -> list[str]:
    node = setting.node
    names = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if all(isinstance(name, yaml.ScalarNode) and name.value for name in names):
        return [name.value for name in names]
    report(Problem(setting.where, BASE, "takes a path or a list of paths of YAML files"))
    return []


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
