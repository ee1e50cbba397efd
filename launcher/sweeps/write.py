"""A sweep's directory, made once: a config a point, and the scripts that run them all."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from launcher.api.attempt import check_task
from launcher.config import Config, ConfigError, flatten, load_config
from launcher.config.checks import evaluates
from launcher.config.keys import put
from launcher.config.problem import Problem
from launcher.errors import UsageError
from launcher.runs.sweep import CONFIGS, FILE, RUNS, read_sweep
from launcher.sweeps.points import names
from launcher.sweeps.scripts import ARRAY, LOOP, filled
from launcher.tasks import resolve_task

OWN = "OUTPUT_DIR"  # each point has one, of the sweep's giving


def load_points(base: Path, settings: Sequence[dict[str, str]]) -> dict[str, Config]:
    """Each point's config by its name. Raises UsageError with every mistake, and for two points
    that are the same."""
    found: dict[str, Config] = {}
    problems: list[Problem] = []
    for name, point in zip(names(len(settings)), settings, strict=True):
        if OWN in point:
            raise UsageError(
                f"{OWN} is no key to sweep over: each point has a directory of its own"
            )
        try:
            words = [f"{key}={value}" for key, value in point.items()]
            found[name] = load_config(str(base), words, resolve_task, typed="the sweep")
            check_task(found[name], evaluates(found[name].cfg))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    seen: dict[str, str] = {}
    for name, config in found.items():
        whole = json.dumps({**flatten(config.cfg), OWN: ""}, sort_keys=True)
        if whole in seen:
            told = ", ".join(f"{k}={v}" for k, v in settings[int(name)].items())
            raise UsageError(
                f"points {seen[whole]} and {name} are the same ({told}): leave one out, or draw "
                "fewer, or from a wider range"
            )
        seen[whole] = name
    return found


def write_sweep(
    path: Path, base: Path, asked: dict[str, Any], points: dict[str, Config], keys: Sequence[str]
) -> int:
    """How many files had to be written: none where the same sweep is there already, which may have
    been changed by hand since, but for the points.

    Raises UsageError where the directory holds another sweep, or anything else.
    """
    path = Path(os.path.abspath(path))
    values = {name: flatten(config.cfg) for name, config in points.items()}
    sweep = {
        "base": os.path.abspath(base),
        **asked,
        "points": {name: {key: of[key] for key in keys} for name, of in values.items()},
    }
    files = {FILE: json.dumps(sweep, indent=2) + "\n"}
    for name, config in points.items():
        files[f"{CONFIGS}/{name}.yaml"] = _config(path, base, name, config, keys)
    for name, text in (("sweep.sbatch", ARRAY), ("sweep.sh", LOOP)):
        files[name] = filled(text, path, len(points))
    try:
        _refuse_another(path, json.loads(files[FILE]))
        missing = [name for name in files if not (path / name).exists()]
        (path / CONFIGS).mkdir(parents=True, exist_ok=True)
        for name in missing:
            (path / name).write_text(files[name], encoding="utf-8")
            if name.startswith("sweep.s"):
                (path / name).chmod(0o755)
    except OSError as error:
        raise UsageError(f"-o {path} cannot be written: {error.strerror}") from error
    return len(missing)


def _refuse_another(path: Path, sweep: dict[str, Any]) -> None:
    if not path.exists() or not any(path.iterdir()):
        return
    if read_sweep(path) is None:
        raise UsageError(f"-o {path} holds something else; choose a new directory")
    there = json.loads((path / FILE).read_text(encoding="utf-8"))
    differing = [name for name in sweep if there.get(name) != sweep[name]]
    if differing:
        raise UsageError(
            f"-o {path} holds another sweep, which differs in: {', '.join(differing)}. Choose "
            "another directory for this one."
        )


def _config(path: Path, base: Path, name: str, config: Config, keys: Sequence[str]) -> str:
    """A point's config, which stands elsewhere than the base: files that are sought beside that are
    named in full."""
    cfg, tree = config.cfg, CfgNode()
    values = flatten(cfg)
    for key in keys:
        put(tree, key, values[key])
    for key in ("TASK.NAME", "OPTIM.NAME"):
        place, _, of = values[key].rpartition(":")
        if place.endswith(".py"):
            put(tree, key, f"{os.path.abspath(place)}:{of}")
    callbacks = [_in_full(entry, base.parent) for entry in cfg.CALLBACKS]
    if callbacks != list(cfg.CALLBACKS):
        put(tree, "CALLBACKS", callbacks)
    put(tree, OWN, str(path / RUNS / name))
    head = {"_BASE_": os.path.abspath(base)}
    text = "".join(
        yaml.safe_dump(part, sort_keys=False, allow_unicode=True, width=1000)
        for part in (head, _plain(tree))
    )
    return f"# Point {name} of the sweep in {path}\n{text}"


def _in_full(entry: str, folder: Path) -> str:
    place = shlex.split(entry)[0].rpartition(":")[0]
    if place.endswith(".py") and (folder / place).is_file():
        return entry.replace(place, shlex.quote(os.path.abspath(folder / place)), 1)
    return entry


def _plain(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: _plain(value) for name, value in tree.items()}
    return list(tree) if isinstance(tree, tuple) else tree
