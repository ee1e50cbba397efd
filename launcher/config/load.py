"""One config from defaults, files and command line: merged, checked as a whole, frozen."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from launcher.config.checks import CHECKS, check_value, evaluates, recorded_as
from launcher.config.coerce import coerce, expand, plain
from launcher.config.foreign import foreign
from launcher.config.keys import KEYS, Key, defaults, flatten, put
from launcher.config.optim import CHECKS as OPTIM_CHECKS
from launcher.config.problem import ConfigError, Mistake, Problem, nearest, nearest_key, quote
from launcher.config.shipped import found
from launcher.config.source import (
    COMMAND_LINE,
    Report,
    Setting,
    parse_word,
    read_file,
    read_overrides,
)
from launcher.errors import UsageError

# (name, folders to search, only built-in tasks) -> the class; None for a task that is not built in
# where only those were asked for. Raises UsageError where there is no such task.
ResolveTask = Callable[[str, "list[Path]", bool], "type | None"]

_BELOW = "lies below a key that takes a value, not a section"
_UNCHECKED = "Keys under TASK are not checked yet: the task is loaded once the rest is right."


@dataclass(frozen=True)
class Config:
    """A resolved config.

    `origins` says for each dotted key "default", "<file>:<line>" or "command line"; `task` is the
    task's class, or None where none was resolved.
    """

    cfg: CfgNode
    origins: dict[str, str]
    task: type | None


def load_config(
    config_file: str | None,
    overrides: Sequence[str] = (),
    resolve_task: ResolveTask | None = None,
    require_task: bool = True,
    typed: str = COMMAND_LINE,
) -> Config:
    """Merge the defaults, the file with its bases, and the overrides; the last one wins.

    `config_file` is a path, or the name of a config that ships where no such file exists.
    `overrides` are the words of the command line, `KEY VALUE` or `KEY=VALUE`, or of where else they
    were `typed`, as messages call it. Without
    `resolve_task` the keys under TASK are kept as YAML has them, unchecked.
    Raises ConfigError with every mistake that was found.
    """
    problems: list[Problem] = []
    keys = {key.name: key for key in KEYS}
    settings: list[Setting] = []
    complete = True
    if config_file is not None:
        config_file = found(config_file)
        settings, complete = read_file(config_file, problems.append)
    settings += read_overrides(overrides, keys, problems.append, typed)
    of_task = [s for s in settings if re.match(r"TASK\.(?!NAME(\.|$))", s.key)]

    merge = _Merge(defaults(), problems.append)
    for setting in settings:
        if setting not in of_task:
            merge.take(setting, keys)
    merge.check_together()

    cfg = merge.cfg
    name = cfg.TASK.NAME
    task: type | None = None
    if not name and require_task and complete and "TASK.NAME" not in merge.wrong:
        problems.append(Problem(config_file or typed, "TASK.NAME", _no_task(resolve_task)))
    if resolve_task and name and "TASK.NAME" not in merge.wrong:
        task = _resolve(resolve_task, name, config_file, merge, bool(problems))
    if task is not None:
        merge.take_task(task, of_task)
    elif not problems:
        for setting in of_task:
            merge.take_plain(setting)
    if problems:
        unchecked = resolve_task is not None and task is None and bool(name or of_task)
        raise ConfigError(problems, _UNCHECKED if unchecked else "")

    cfg.TASK.NAME = _from_here(name, config_file)
    cfg.OPTIM.NAME = _from_here(cfg.OPTIM.NAME, config_file)
    if not cfg.OUTPUT_DIR and (config_file or name):
        run = Path(config_file).stem if config_file else re.split("[:/.]", name)[-1]
        cfg.OUTPUT_DIR = f"runs/{run}"
    cfg.freeze()
    origins = {key: merge.origins.get(key, "default") for key in flatten(cfg)}
    return Config(cfg, origins, task)


class _Merge:
    """The tree while settings are put into it, with each key's origin and the keys gone wrong."""

    def __init__(self, cfg: CfgNode, report: Report) -> None:
        self.cfg = cfg
        self.report = report
        self.origins: dict[str, str] = {}
        self.wrong: set[str] = set()

    def take(self, setting: Setting, keys: dict[str, Key]) -> None:
        """Put a setting of a declared key into the tree, or report what is wrong with it."""
        try:
            if setting.key not in keys:
                self._refuse(setting, keys)
                return
            key = keys[setting.key]
            node = _node(setting, key.default)
            if key.word and getattr(node, "value", None) == key.word:
                self._put(setting, key.word)
                return
            value = coerce(node, key.default, key.element)
            if key.path:
                value = expand(value)
            check_value(key, value)
            self._put(setting, value)
        except Mistake as mistake:
            self.wrong.add(setting.key)
            self.report(Problem(setting.where, setting.key, str(mistake), mistake.hint))

    def take_plain(self, setting: Setting) -> None:
        """Put a setting that nothing declares into the tree, with YAML's own type."""
        if isinstance(setting.node, yaml.MappingNode):
            return  # an empty section
        try:
            self._put(setting, plain(_node(setting, None)))
        except Mistake as mistake:
            self.report(Problem(setting.where, setting.key, str(mistake)))
        except (AttributeError, TypeError):  # one of the sections is a value
            self.report(Problem(setting.where, setting.key, _BELOW))

    def take_task(self, task: type, settings: list[Setting]) -> None:
        """Add the keys that a task declares, then the settings given to them."""
        try:
            declared = _declared(task)
            metrics = _metrics(task)
        except Mistake as mistake:
            self._blame("TASK.NAME", mistake)
            return
        self.cfg.TASK.update(declared)
        names = flatten(self.cfg.TASK)
        keys = {f"TASK.{name}": Key(f"TASK.{name}", value, "") for name, value in names.items()}
        for setting in settings:
            self.take(setting, keys)
        if metrics is not None:
            self._check_metric(metrics)

    def check_together(self) -> None:
        """Report keys that are right alone and wrong together."""
        for names, check in [*CHECKS, *OPTIM_CHECKS]:
            message = None if self.wrong.intersection(names) else check(self.cfg)
            if message:
                self._blame(names[0], Mistake(message))

    def _check_metric(self, metrics: list[str]) -> None:
        read = {"EVAL.EVERY", "EVAL.SPLITS", "CHECKPOINT.METRIC", "CHECKPOINT.KEEP_BEST"}
        if self.wrong & read or not evaluates(self.cfg) or self.cfg.CHECKPOINT.KEEP_BEST == 0:
            return
        splits = [recorded_as(split) for split in self.cfg.EVAL.SPLITS]
        splits += [f"{split}_raw" for split in splits if self.cfg.EVAL.RAW]
        names = [f"{split}/{name}" for split in splits for name in metrics]
        given = self.cfg.CHECKPOINT.METRIC
        if given not in names:
            message = f"{quote(given)} is not among what the task returns: {', '.join(names)}"
            self._blame("CHECKPOINT.METRIC", Mistake(message, nearest(given, names)))

    def _put(self, setting: Setting, value: object) -> None:
        put(self.cfg, setting.key, value)
        self.origins[setting.key] = setting.where

    def _blame(self, key: str, mistake: Mistake) -> None:
        where = self.origins.get(key, "default")
        self.report(Problem(where, key, str(mistake), mistake.hint))

    def _refuse(self, setting: Setting, keys: dict[str, Key]) -> None:
        """Raise Mistake for a name that is no key; an empty section is none, but no harm."""
        node: Any = self.cfg
        for part in setting.key.split("."):
            if not isinstance(node, CfgNode):
                raise Mistake(_BELOW)
            if part not in node:
                # What a task declares is its author's word.
                word = None if setting.key.startswith("TASK.") else foreign(setting.key)
                more, hint = word.told if word else ("", nearest_key(setting.key, keys))
                raise Mistake(f"unknown key{more}", hint)
            node = node[part]
        if not isinstance(setting.node, yaml.MappingNode):
            inside = next((name for name in keys if name.startswith(setting.key + ".")), "")
            like = f", such as {inside}" if inside else ""
            raise Mistake(f"is a section, not a value; set the keys in it{like}")


def _node(setting: Setting, default: object) -> yaml.Node:
    """A word of the command line is read as YAML only where the key does not say it is a scalar."""
    if setting.typed is not None and (default is None or isinstance(default, (list, tuple))):
        return parse_word(setting.typed)
    return setting.node


def _resolve(
    resolve_task: ResolveTask, name: str, config_file: str | None, merge: _Merge, builtin_only: bool
) -> type | None:
    search = [Path(config_file).parent] if config_file else []
    try:
        return resolve_task(name, [*search, Path.cwd()], builtin_only)
    except UsageError as error:
        merge._blame("TASK.NAME", Mistake(str(error)))
        return None


def _no_task(resolve_task: ResolveTask | None) -> str:
    message = "is empty; name the task to train"
    try:
        if resolve_task:
            resolve_task("", [], False)  # its message names the tasks there are
    except UsageError as error:
        message += f": {error}"
    return message


def _declared(task: type) -> CfgNode:
    """The keys a task declares. Raises Mistake where they are none that a config can hold."""
    told = f"{task.__name__}.defaults()"
    try:
        given = task.defaults() if hasattr(task, "defaults") else {}
        if not isinstance(given, dict):
            raise Mistake(f"{told} returns {type(given).__name__}, not a CfgNode")
        node = CfgNode(dict(given))
    except Mistake:
        raise
    except Exception as error:
        raise Mistake(f"{told} fails: {type(error).__name__}: {error}") from error
    if "NAME" in node:
        raise Mistake(f"{told} declares NAME, which is the task's own name; call it something else")
    _check_names(node, told)
    for name, value in flatten(node).items():
        try:
            written = yaml.compose(yaml.safe_dump([value]), Loader=yaml.SafeLoader)
            same = written is not None and coerce(written.value[0], value) == value
        except (yaml.YAMLError, Mistake, KeyError):
            same = False
        if not same:
            raise Mistake(f"{told}: {name} cannot be written as YAML and read back: {value!r}")
    return node


def _check_names(node: CfgNode, told: str) -> None:
    for name, value in node.items():
        if not isinstance(name, str) or not name or "." in name:
            raise Mistake(f"{told}: {name!r} is not a key; nest CfgNodes instead of dots")
        if isinstance(value, CfgNode):
            _check_names(value, told)


def _metrics(task: type) -> list[str] | None:
    told = f"{task.__name__}.metrics()"
    try:
        names = task.metrics() if hasattr(task, "metrics") else None
    except Exception as error:
        raise Mistake(f"{told} fails: {type(error).__name__}: {error}") from error
    if names is None:
        return None
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise Mistake(f"{told} returns {names!r}, not a list of names")
    return list(names)


def _from_here(name: str, config_file: str | None) -> str:
    """A file of a class found beside the config file, named from the working directory instead.

    So the run's own config.yaml, which lies elsewhere, names the same file.
    """
    path, colon, class_name = name.rpartition(":")
    if not config_file or not path.endswith(".py") or os.path.isabs(path):
        return name
    found = os.path.join(os.path.dirname(config_file), path)
    return f"{os.path.relpath(found)}{colon}{class_name}" if os.path.exists(found) else name
