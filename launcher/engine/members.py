"""The ranks of a run make themselves known to each other, and find out before the first step where
they disagree: later it would be a hang, or a run that nobody can repeat."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

import launcher
from launcher.config import CfgNode, flatten
from launcher.errors import UsageError
from launcher.runtime import hang
from launcher.runtime.process import Runtime
from launcher.telemetry.environment import versions


def introduce(cfg: CfgNode, task_class: type, runtime: Runtime) -> list[dict[str, Any]]:
    """Host, pid and start time of every rank's process. A collective.

    Raises UsageError where ranks have another config, other versions or other code.
    """
    found = {key: _plain(value) for key, value in flatten(cfg).items()}
    found |= {f"version of {name}": version for name, version in versions().items()}
    found[f"code of {task_class.__module__}"] = _code([inspect.getsourcefile(task_class)])
    found["code of launcher"] = _code(sorted(Path(launcher.__file__).parent.rglob("*.py")))
    # A collective, the run's first: nothing is built yet.
    members = runtime.all_gather({**hang.myself(), "found": found})
    _compare([(member["host"], member.pop("found")) for member in members])
    return members


def compare(found: Mapping[str, Any], runtime: Runtime) -> None:
    """Raise UsageError where ranks have found different things. A collective."""
    _compare(runtime.all_gather((hang.myself()["host"], dict(found))))


def model_layout(model: nn.Module) -> str:
    """A digest of the names, shapes and types of a model's parameters and buffers."""
    tensors = model.state_dict()
    text = "\n".join(f"{name} {tuple(t.shape)} {t.dtype}" for name, t in tensors.items())
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _compare(everywhere: list[tuple[str, dict[str, Any]]]) -> None:
    _, ours = everywhere[0]
    lines = []
    for rank, (host, theirs) in enumerate(everywhere):
        keys = [k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k)]
        if keys:
            told = (f"{k} is {theirs.get(k)!r}, on rank 0 {ours.get(k)!r}" for k in keys[:8])
            lines.append(f"  rank {rank} on {host}: {'; '.join(told)}")
    if lines:
        raise UsageError(
            "The ranks disagree, so nothing was started. Do all nodes have the same files, "
            "packages and command line?\n" + "\n".join(lines)
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _code(files: list[Any]) -> str:
    digest = hashlib.sha256()
    for file in files:
        if file is not None:
            digest.update(Path(file).read_bytes())
    return digest.hexdigest()[:12]
