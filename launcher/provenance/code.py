"""The code that a run is made of, kept in its directory: a folder for each version. No torch.

    code/step_<N>/commit.txt     the commit of the repository that holds the task's file, or nothing
    code/step_<N>/diff.patch     how its tracked files differed from that
    code/step_<N>/files/...      the task's own files (launcher/tasks/sources.py)
    code/step_<N>/manifest.json  where they lay, and their SHA-256

N is the step at which the version began. History's `start` and `resume` records name the version
that ran from there on; nothing is written where nothing has changed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.log import get_logger
from launcher.provenance import git
from launcher.provenance.kept import Change, Version, changes, contents, digest, versions
from launcher.provenance.packages import imported, versions_of
from launcher.tasks.sources import own_files

logger = get_logger(__name__)
MOST_FILES = 8 << 20  # bytes of all files; a data file of Python's is not what this is for
MOST_DIFF = 1 << 20
MOST_WEIGHTS = 64 << 20  # a file up to this size is read to know its content


class Code:
    """The own files of some modules, each read when it was first seen to be loaded: whoever goes on
    editing while a job waits for its ranks changes nothing of what runs. Made on rank 0 alone."""

    def __init__(self, modules: Sequence[str]) -> None:
        self.modules = list(modules)
        self.own = own_files(self.modules)
        self.root = self.own.root
        self._read: dict[Path, bytes] = {}
        self.files()
        self.commit = git.commit(self.root)
        self.diff = git.difference(self.root, MOST_DIFF) if self.commit else ""

    def files(self, version: Version | None = None) -> dict[str, bytes | str]:
        """The own files by name, as they were when they were loaded; with those of a `version` that
        are not loaded, or not yet: some modules are imported where they are used."""
        self.own = own_files(self.modules)
        found: dict[str, bytes | str] = {}
        kept = version.manifest["files"] if version is not None else {}
        moved = version is not None and version.manifest.get("root") != str(self.root)
        places: dict[str, list[Path]] = {}
        for name, one in kept.items():
            place = [Path(one.get("path", name)), self.root / name]
            # Where the files lay elsewhere then, they are sought below the root of now first.
            places[name] = place[::-1] if moved else place[:1]
        places |= {name: [path] for name, path in self.own.files.items()}
        for name, paths in places.items():
            for one in paths:
                if one not in self._read:
                    with contextlib.suppress(OSError):
                        self._read[one] = one.read_bytes()
                if one in self._read:
                    found[name] = self._read[one]
                    break
        return dict(sorted(found.items()))

    def place(self, name: str) -> Path:
        """Where a file lies."""
        return self.own.files.get(name, self.root / name)

    def changes(self, version: Version) -> list[Change]:
        """How these files differ from those of a version."""
        return changes(contents(version), self.files(version))

    def packages(self, known: dict[str, str]) -> dict[str, str]:
        """Versions of what the files import, but for those `known` already."""
        return versions_of(
            imported(v for v in self.files().values() if isinstance(v, bytes)), known
        )

    def keep(self, run: Path, step: int, weights: str) -> dict[str, Any]:
        """Write a version that begins at this step, unless it is the newest already; what history's
        record says: its name, and where there was one before, what has `changed`; at the start
        also which file of `weights` the run begins from. Where it cannot be written (a full disk,
        say), that is told, and the run goes on."""
        told = {"weights": describe_weights(Path(weights))} if weights and step == 0 else {}
        try:
            return {**self._keep(run, step), **told}
        except OSError as error:
            logger.warning("%s could not be written: %s", run / "code", error)
            return told

    def _keep(self, run: Path, step: int) -> dict[str, Any]:
        known = versions(run)
        newest = known[-1] if known else None
        files = self.files(newest)
        changed: list[Change] = []
        if newest is not None:
            changed = changes(contents(newest), files)
            around = newest.manifest.get("commit"), newest.manifest.get("diff")
            if not changed and around == (self.commit, digest(self.diff.encode())):
                return {"code": newest.name}
        folder = run / "code"
        folder.mkdir(exist_ok=True)
        for left in folder.glob(".tmp_*"):  # by a rank that was killed: the directory is ours
            shutil.rmtree(left, ignore_errors=True)
        begun = folder / f".tmp_{os.getpid()}"
        left_out = self._write(begun, files, step, (newest.manifest["number"] if newest else 0) + 1)
        name, count = f"step_{step}", 1
        while (folder / name).exists():
            count += 1
            name = f"step_{step}-{count}"
        begun.rename(folder / name)
        told: dict[str, Any] = {"code": name}
        if changed:
            told["code_changed"] = [str(change) for change in changed]
        if left_out:
            told["code_left_out"] = left_out
        return told

    def _write(
        self, folder: Path, files: dict[str, bytes | str], step: int, number: int
    ) -> list[str]:
        """Write a version; the names of files that are too large to be kept with the others."""
        listed, left_out, total = dict[str, Any](), list[str](), 0
        (folder / "files").mkdir(parents=True)
        for name, content in files.items():
            assert isinstance(content, bytes)  # read, not given by their SHA-256
            kept = total + len(content) <= MOST_FILES
            if kept:
                total += len(content)
                path = folder / "files" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            else:
                left_out.append(name)
            listed[name] = {
                "path": str(self.place(name)),
                "sha256": digest(content),
                "bytes": len(content),
                "kept": kept,
                "imported": name in self.own.imported,
            }
        (folder / "commit.txt").write_text(self.commit + "\n" * bool(self.commit), encoding="utf-8")
        (folder / "diff.patch").write_text(self.diff, encoding="utf-8")
        manifest = {
            "number": number,
            "step": step,
            "time": time.time(),
            "root": str(self.root),
            "modules": self.modules,
            "commit": self.commit,
            "diff": digest(self.diff.encode()),
            "files": listed,
        }
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        return left_out


def describe_weights(path: Path) -> dict[str, Any]:
    """Which file MODEL.WEIGHTS is: path, size, time of change, and SHA-256 where it is small."""
    file = path / "state.pt" if path.is_dir() else path
    found: dict[str, Any] = {"path": str(path.resolve())}
    with contextlib.suppress(OSError):
        stat = file.stat()
        found |= {"bytes": stat.st_size, "changed": stat.st_mtime}
        if stat.st_size <= MOST_WEIGHTS:
            found["sha256"] = digest(file.read_bytes())
    return found
