"""The checkpoints of a run directory: committed whole, verified, kept and found.

checkpoints/step_<N>/state.pt         the training state
checkpoints/step_<N>/manifest.json    what it is, and the size and SHA-256 of its files
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from launcher.config import CfgNode, parse_duration
from launcher.edges.pickled import strangers
from launcher.errors import RunError
from launcher.log import get_logger

logger = get_logger(__name__)
REPLACED = ".tmp_replaced_"
STATE, MANIFEST = "state.pt", "manifest.json"


class DamagedCheckpoint(Exception):
    """A checkpoint that is not what its manifest says; the message tells why."""


@dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept: the newest, the best by a metric, and one a period."""

    last: int = 1
    best: int = 0
    every: str = ""
    metric: str = ""
    mode: str = "min"

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Retention:
        c = cfg.CHECKPOINT
        return cls(c.KEEP_LAST, c.KEEP_BEST, c.KEEP_EVERY, c.METRIC, c.MODE)

    def score(self, manifest: dict[str, Any]) -> float | None:
        """The metric, larger is better; None where there is none or it is not a finite number."""
        value = manifest.get("metrics", {}).get(self.metric)
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            return None
        return value if self.mode == "max" else -value

    def ranked(self, manifests: Iterable[dict[str, Any]]) -> list[int]:
        """Steps from best to worst; of equals the earlier one is better."""
        scored = [(s, m["step"]) for m in manifests if (s := self.score(m)) is not None]
        return [step for _, step in sorted(scored, key=lambda pair: (-pair[0], pair[1]))]

    def keep(self, manifests: list[dict[str, Any]]) -> set[int]:
        """Steps of the checkpoints to keep."""
        ordered = sorted(manifests, key=lambda m: m["step"])
        kept = {m["step"] for m in ordered[-self.last :]}
        kept |= set(self.ranked(ordered)[: self.best])
        every = parse_duration(self.every)
        if every is not None:
            # The first checkpoint at or after each multiple of the period.
            unit = "epoch" if every.unit == "ep" else "step"
            first = {m[unit] // every.amount: m["step"] for m in reversed(ordered)}
            kept |= {step for period, step in first.items() if period > 0}
        return kept


class Found(NamedTuple):
    """A valid checkpoint's state, its step (None for one of another run), and the damaged ones
    passed over, with what is wrong."""

    step: int | None
    state: dict[str, Any]
    damaged: dict[int, str]


def load_file(path: Path) -> dict[str, Any]:
    """The state in a checkpoint directory (verified by its manifest) or in a file, on the CPU.

    Nothing in it is executed. Raises DamagedCheckpoint where it is not what it should be.
    """
    if path.is_dir():
        match = re.fullmatch(r"step_(\d+)", path.resolve().name)
        if match is None:
            raise DamagedCheckpoint(f"{path} is no checkpoint: its name is not step_<N>")
        store = CheckpointStore(path.resolve().parent)
        return store.load(int(match[1]))
    import torch

    from launcher.edges.state import foreign, why

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DamagedCheckpoint(f"{path}: {foreign(path) or why(error)}") from error


class CheckpointStore:
    """Reads and writes the checkpoints of one run. Rank 0 alone has one."""

    def __init__(self, directory: Path, retention: Retention | None = None) -> None:
        self.directory, self.retention = directory, retention or Retention()

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, oldest first, valid or not."""
        if not self.directory.is_dir():
            return []
        names = (re.fullmatch(r"step_(\d+)", p.name) for p in self.directory.iterdir())
        return sorted(int(match[1]) for match in names if match)

    def path(self, step: int) -> Path:
        return self.directory / f"step_{step}"

    def manifest(self, step: int) -> dict[str, Any]:
        """A checkpoint's manifest. Raises DamagedCheckpoint where it cannot be read."""
        try:
            manifest = json.loads((self.path(step) / MANIFEST).read_text(encoding="utf-8"))
            if manifest.pop("digest") != _digest(manifest):
                raise ValueError("it is not as it was written")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedCheckpoint(f"no readable {MANIFEST}: {error!r}") from error
        if manifest["step"] != step or STATE not in manifest["files"]:
            raise DamagedCheckpoint(f"{MANIFEST} describes another checkpoint")
        return manifest

    def commit(self, state: dict[str, Any], manifest: dict[str, Any]) -> Path:
        """Write a checkpoint that exists completely or not at all, then drop those not kept.

        Everything is written and synced in a temporary directory beside its place; one rename
        makes it a checkpoint.
        """
        import torch  # here, so that reading manifests needs none

        target = self.path(manifest["step"])
        temporary = self.directory / f".tmp_{target.name}_{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            files = {STATE: _write(temporary / STATE, lambda file: torch.save(state, file))}
            covers = state.get("files", {}).get("metrics.jsonl", 0)  # bytes
            whole = {**manifest, "records": covers, "files": files}
            text = json.dumps({**whole, "digest": _digest(whole)}, indent=2)
            _write(temporary / MANIFEST, lambda file: file.write(text.encode()))
            _sync(temporary)
            # Before anything older may go: a disk or mount that lost some of it is found out here,
            # as far as the system's cache does not hide it.
            self._compare(temporary, files)
            self._put(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._link("last", target.name)
        self._retain()
        return target

    def _put(self, temporary: Path, target: Path) -> None:
        """Rename, where the step was saved before in place of the old one, which goes last;
        `newest` puts it back where this is cut short."""
        replaced = self.directory / f"{REPLACED}{target.name}"
        if target.exists():
            target.rename(replaced)
        temporary.rename(target)
        _sync(self.directory)
        shutil.rmtree(replaced, ignore_errors=True)

    def newest(self) -> Found | None:
        """The newest checkpoint that is valid; None where there are none at all. For the run's live
        owner only.

        Raises RunError when there are checkpoints but none is valid: starting afresh over their
        remains would lose the run.
        """
        for path in self.directory.glob(f"{REPLACED}*"):
            if not (target := path.with_name(path.name.removeprefix(REPLACED))).exists():
                path.rename(target)  # a crash came between the two renames
        steps, damaged = self.steps(), dict[int, str]()
        for step in reversed(steps):
            try:
                return Found(step, self.load(step), damaged)
            except DamagedCheckpoint as error:
                damaged[step] = str(error)
                logger.warning("checkpoint step_%s is damaged, passed over: %s", step, error)
        if steps:
            raise RunError(
                f"None of the {len(steps)} checkpoints in {self.directory} is valid. Nothing was "
                "changed. Move them away to start over with --resume, or use --overwrite."
            )
        return None

    def clean(self, damaged: Iterable[int] = ()) -> None:
        """Remove what a crash left half written, and move damaged checkpoints out of the way as
        `damaged_step_<N>`, so that they count for nothing; for the run's live owner only, and after
        `newest`, which puts back what a crash left between two names."""
        if not self.directory.is_dir():
            return
        for path in self.directory.glob(".tmp_*"):
            shutil.rmtree(path, ignore_errors=True)
        for step in damaged:
            target = self.directory / f"damaged_step_{step}"
            shutil.rmtree(target, ignore_errors=True)
            self.path(step).rename(target)

    def verify(self, step: int) -> dict[str, Any]:
        """The manifest of a checkpoint whose files are all as it says, and hold nothing that is not
        loaded, else DamagedCheckpoint."""
        manifest = self.manifest(step)
        self._compare(self.path(step), manifest["files"])
        if names := strangers(self.path(step) / STATE):
            raise DamagedCheckpoint(f"{STATE}: it holds {', '.join(names)}, which is not loaded")
        return manifest

    @staticmethod
    def _compare(directory: Path, files: dict[str, Any]) -> None:
        for name, expected in files.items():
            path = directory / name
            try:
                found = _fingerprint(path)
            except OSError as error:
                raise DamagedCheckpoint(f"{name}: {error.strerror}") from error
            if found != expected:
                what = "size" if found["size"] != expected.get("size") else "sha256"
                raise DamagedCheckpoint(
                    f"{name}: its {what} is {found[what]}, the manifest says {expected.get(what)}"
                )

    def load(self, step: int) -> dict[str, Any]:
        """The verified state of a checkpoint, on the CPU. Nothing in the file is executed."""
        self.verify(step)
        return load_file(self.path(step) / STATE)

    def is_best(self, metrics: dict[str, float], pending: dict[str, Any] | None = None) -> bool:
        """Whether these metrics beat those of every checkpoint kept, and of one being written."""
        score = self.retention.score({"metrics": metrics})
        if score is None or self.retention.best == 0:
            return False
        others = [*self.manifests(), *([pending] if pending else [])]
        return all((s := self.retention.score(m)) is None or score > s for m in others)

    def manifests(self) -> list[dict[str, Any]]:
        """Readable manifests, oldest first."""
        manifests = []
        for step in self.steps():
            # A damaged one is neither kept nor dropped by the rules: a person should look at it.
            with contextlib.suppress(DamagedCheckpoint):
                manifests.append(self.manifest(step))
        return manifests

    def _retain(self) -> None:
        manifests = self.manifests()
        ranked = self.retention.ranked(manifests)
        if ranked and self.retention.best:
            self._link("best", self.path(ranked[0]).name)
        kept = self.retention.keep(manifests)
        for manifest in manifests:
            if manifest["step"] not in kept:
                # Renamed first: one that a kill leaves half deleted counts for none.
                dropped = self.directory / f".tmp_dropped_{manifest['step']}"
                self.path(manifest["step"]).rename(dropped)
                shutil.rmtree(dropped, ignore_errors=True)

    def _link(self, name: str, target: str) -> None:
        """Point a relative link for people at a checkpoint, atomically; the code never reads it."""
        temporary = self.directory / f".{name}_{os.getpid()}"
        temporary.unlink(missing_ok=True)
        try:
            temporary.symlink_to(target, target_is_directory=True)
            temporary.replace(self.directory / name)
        except OSError as error:  # a file system without links is no reason to stop
            logger.debug("no link %s: %s", name, error)


def _digest(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest's content, so that a flipped bit in a metric shows as well."""
    canonical = json.dumps(manifest, sort_keys=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


class _Hashing:
    """Takes bytes, and passes them on to a file where there is one; their size and SHA-256."""

    def __init__(self, file: BinaryIO | None = None) -> None:
        self.file, self.digest, self.size = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.size += len(data)
        try:
            return self.file.write(data) if self.file is not None else len(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """torch.save asks for it; closing the file does it."""

    def fingerprint(self) -> dict[str, Any]:
        return {"size": self.size, "sha256": self.digest.hexdigest()}


def _write(path: Path, fill: Callable[[Any], Any]) -> dict[str, Any]:
    """Have a file filled, and sync it; the fingerprint of what it was given."""
    with path.open("wb") as file:
        hashing = _Hashing(file)
        try:
            fill(hashing)
        except RuntimeError as error:
            # torch tells of its own writer's surprise, not of the full disk behind it.
            raise hashing.error or error from error
    _sync(path)
    return hashing.fingerprint()


def _fingerprint(path: Path) -> dict[str, Any]:
    hashing = _Hashing()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            hashing.write(block)
    return hashing.fingerprint()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
