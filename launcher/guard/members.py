"""The ranks of a run make themselves known to each other, and find out before the first step where
they disagree: later it would be a hang, or a run that nobody can repeat."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from launcher.config import CfgNode, flatten
from launcher.errors import UsageError
from launcher.provenance.environment import source, versions
from launcher.runtime.member import Member
from launcher.runtime.process import Runtime
from launcher.tasks.sources import file_of


def introduce(cfg: CfgNode, task_class: type, runtime: Runtime) -> list[Member]:
    """The process of every rank. A collective. Raises UsageError where ranks have another config,
    other versions or other code."""
    found = {k: list(v) if isinstance(v, tuple) else v for k, v in flatten(cfg).items()}
    found |= {f"version of {name}": version for name, version in versions().items()}
    file = file_of(task_class.__module__)
    code = hashlib.sha256(file.read_bytes() if file is not None else b"").hexdigest()[:12]
    found |= {f"code of {task_class.__module__}": code, "code of launcher": source()[:12]}
    # A collective, the run's first: nothing is built yet.
    return compare(found, runtime)


def compare(found: Mapping[str, Any], runtime: Runtime) -> list[Member]:
    """The process of every rank; raises UsageError where ranks have found different things. A
    collective."""
    everywhere = runtime.broadcast(runtime.gather((Member.here(), dict(found))))
    ours, lines = everywhere[0][1], []
    for rank, (member, theirs) in enumerate(everywhere):
        keys = [k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k)]
        if keys:
            told = (f"{k} is {theirs.get(k)!r}, on rank 0 {ours.get(k)!r}" for k in keys[:8])
            lines.append(f"  rank {rank} on {member.host}: {'; '.join(told)}")
    if lines:
        raise UsageError(
            "The ranks disagree, so nothing was started. Do all nodes have the same files, "
            "packages and command line?\n" + "\n".join(lines)
        )
    return [member for member, _ in everywhere]
