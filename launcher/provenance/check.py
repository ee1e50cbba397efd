"""Whether a run may go on with the task's files as they are now. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from launcher.errors import UsageError
from launcher.provenance.code import Code
from launcher.provenance.kept import Version, versions

ALLOWED = "CODE"  # what --allow calls it
TOLD = 20  # files at most


def check_code(
    code: Code,
    run: Path,
    resume: bool,
    resume_from: Path | None,
    allow: Collection[str],
    restarted: bool,
) -> str:
    """What to warn of where the run goes on with other files of the task than it had: "" where it
    has the same, or an earlier version of the launcher kept none.

    Raises UsageError unless it is allowed. A `restarted` one may always go on: nobody is there to
    say so, and no run is to end at night because its author went on editing.
    """
    found = None
    if resume and any((run / "checkpoints").glob("step_*")):
        found = _newest(run) if _goes_on(run, allow) else None
    elif resume_from is not None:
        found = _of_checkpoint(resume_from.resolve())
    if found is None:
        return ""
    # A new file that nothing imports does not stop it: what is loaded may depend on the script that
    # starts the launcher.
    changes = [c for c in code.changes(found) if c.what != "new" or c.name in code.own.imported]
    if not changes:
        return ""
    told = "\n".join(f"  {change}" for change in changes[:TOLD])
    told += f"\n  and {len(changes) - TOLD} more" if len(changes) > TOLD else ""
    head = f"The task's files differ from those that this run had ({found.path}):\n{told}\n"
    if restarted or ALLOWED in allow:
        return f"{head}It goes on with them as they are now."
    one = next((c for c in changes if c.what == "changed" and c.before is not None), None)
    place = code.place(one.name) if one is not None else code.root
    shown = f"diff -u {found.file(one.name) if one else found.path / 'files'} {place}"
    raise UsageError(
        f"{head}Look at the difference (`{shown}`), and go on with these files with --allow "
        f"{ALLOWED}, or put the old ones back."
    )


def _goes_on(run: Path, allow: Collection[str]) -> bool:
    """A complete run does not go on, whatever its task's files are now, unless it is allowed to be
    longer."""
    try:
        status = json.loads((run / "status.json").read_text(encoding="utf-8"))
        return status["state"] != "completed" or "TRAIN.DURATION" in allow
    except (OSError, ValueError, KeyError, TypeError):
        return True


def _newest(run: Path) -> Version | None:
    return next(reversed(versions(run)), None)


def _of_checkpoint(checkpoint: Path) -> Version | None:
    """The version that made a checkpoint inside a run directory: the code may have changed since.
    The newest, where the history does not tell."""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    if folder.parent.name != "checkpoints":
        return None
    run = folder.parent.parent
    now, made = "", ""
    try:
        lines = (run / "history.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        try:
            record = json.loads(line)
            if record["event"] in ("start", "resume"):
                now = record.get("code", "")
            elif record["event"] == "checkpoint" and "failed" not in record:
                made = now if record.get("path") == folder.name else made
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return next((v for v in versions(run) if v.name == made), None) or _newest(run)
