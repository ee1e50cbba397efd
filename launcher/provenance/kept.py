"""The versions of the code in a run directory, read back: code/step_<N>/. Imports no torch."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Version:
    """The code as it was from an attempt on: commit.txt, diff.patch, files/, and manifest.json."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def digests(self) -> dict[str, str]:
        """The SHA-256 of each file by its name, also of those that were too large to keep."""
        return {name: str(one["sha256"]) for name, one in self.manifest["files"].items()}

    @property
    def main(self) -> str:
        """The name of the task's own file; "" where that is not known."""
        modules = self.manifest.get("modules") or [""]
        name = str(modules[0]).replace(".", "/")
        return next((one for one in self.digests if one == f"{name}.py"), "")

    def imports(self, name: str) -> bool:
        """Whether import statements lead to a file from the task's; others were only loaded."""
        return bool(self.manifest["files"].get(name, {}).get("imported", True))

    def file(self, name: str) -> Path:
        return self.path / "files" / name

    def content(self, name: str) -> bytes | None:
        """A file as it was; None where it is not kept."""
        try:
            return self.file(name).read_bytes() if name in self.manifest["files"] else None
        except OSError:
            return None


def versions(run: Path) -> list[Version]:
    """The versions that a run directory holds, oldest first; those that can be read."""
    found = []
    for path in (run / "code").glob("step_*"):
        try:
            manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
            version = Version(path, manifest)
            found.append((int(manifest["number"]), version))
            _ = version.digests  # whether it has them
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return [version for _, version in sorted(found, key=lambda one: one[0])]


@dataclass(frozen=True)
class Change:
    """A file that differs: its name, and lines that came and went; None where a side is missing or
    was not kept."""

    name: str
    before: bytes | None
    after: bytes | None
    what: str  # "changed", "new" or "gone"

    @property
    def untold(self) -> bool:
        """Whether what has changed cannot be shown, since a side was not kept."""
        return self.what == "changed" and (self.before is None or self.after is None)

    def __str__(self) -> str:
        if self.untold:
            return f"{self.name} (changed; it was too large to keep)"
        lines = [line for hunk in self.hunks() for line in hunk[1:]]
        counts = [sum(line.startswith(sign) for line in lines) for sign in "+-"]
        told = f"{self.name} +{counts[0]} -{counts[1]}"
        return told if self.what == "changed" else f"{told} ({self.what})"

    def hunks(self) -> Iterator[list[str]]:
        """The parts of a unified diff, each a list of lines that begins with its @@ line."""
        if self.untold:
            return
        hunk: list[str] = []
        for line in list(
            difflib.unified_diff(_lines(self.before), _lines(self.after), lineterm="")
        )[2:]:
            if line.startswith("@@") and hunk:
                yield hunk
                hunk = []
            hunk.append(line)
        if hunk:
            yield hunk


def _lines(content: bytes | None) -> list[str]:
    """A file's lines; where the last one has no line feed, that shows."""
    text = (content or b"").decode(errors="replace")
    lines = [line.removesuffix("\n") for line in text.splitlines(keepends=True)]
    if text and not text.endswith("\n"):
        lines[-1] += "  (no line feed at the end)"
    return lines


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """What differs between files by name, each given by its content or, where that was not kept, by
    its SHA-256."""
    found = []
    for name in sorted({*before, *after}):
        sides = before.get(name), after.get(name)
        if name in before and name in after and digest(before[name]) == digest(after[name]):
            continue
        what = "new" if name not in before else "gone" if name not in after else "changed"
        old, new = (side if isinstance(side, bytes) else None for side in sides)
        found.append(Change(name, old, new, what))
    return found


def contents(version: Version) -> dict[str, bytes | str]:
    """A version's files, as `changes` takes them."""
    found: dict[str, bytes | str] = {}
    for name, sha256 in version.digests.items():
        content = version.content(name)
        found[name] = sha256 if content is None else content
    return found


def digest(content: bytes | str) -> str:
    """The SHA-256 of a content; one that is given by that already stays."""
    return content if isinstance(content, str) else hashlib.sha256(content).hexdigest()
