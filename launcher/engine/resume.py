"""Going on from a checkpoint: which one, and whether this config may."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from launcher.checkpoint.store import CheckpointStore, DamagedCheckpoint, Found, load_file
from launcher.config import CfgNode, flatten
from launcher.errors import RunError, UsageError
from launcher.log import get_logger
from launcher.runtime.process import Runtime

logger = get_logger(__name__)

# As it is allowed: the order of a data set of another length is another.
DATA = "DATASET_LENGTH"
# Keys that say where and how much to log, save and evaluate, or how to load: the steps of a run do
# not depend on them.
FREE = (
    *("OUTPUT_DIR", "LOG.", "CHECKPOINT.", "EVAL.", "TRAIN.MAX_TIME", "DIST.", "MODEL.WEIGHTS"),
    *(f"DATALOADER.{name}" for name in ("NUM_WORKERS", "PREFETCH_FACTOR", "PIN_MEMORY")),
)


def find(
    store: CheckpointStore, resume: bool, resume_from: Path | None, runtime: Runtime
) -> Found | None:
    """The checkpoint to go on from, on every rank: of this run, else the one named; None to start
    afresh. A collective.

    Rank 0 alone need see the checkpoints: it loads and sends, so all ranks have the same one.
    """
    found = store.newest() if runtime.is_main and resume else None
    if runtime.is_main and found is None and resume_from is not None:
        try:
            found = Found(None, load_file(resume_from), {})
        except DamagedCheckpoint as error:
            raise RunError(f"--resume-from {resume_from}: {error}") from error
        if "progress" not in found.state:
            raise UsageError(
                f"--resume-from {resume_from} holds no training state. To start from weights "
                "alone use MODEL.WEIGHTS."
            )
    return runtime.broadcast_state(found)  # collectives


def choose_checkpoint(store: CheckpointStore, which: str) -> Path:
    """The path of the newest valid checkpoint ("last"), the valid one with the best metric
    ("best"), or the path given. Raises UsageError where there is none."""
    if which not in ("last", "best"):
        return Path(which)
    manifests = store.manifests()
    steps = [manifest["step"] for manifest in reversed(manifests)]
    if which == "best":
        steps = store.retention.ranked(manifests)
    for step in steps:
        try:
            store.verify(step)
            return store.path(step)
        except DamagedCheckpoint as error:
            logger.warning("checkpoint step_%s is damaged, passed over: %s", step, error)
    told = f" with a {store.retention.metric}" if which == "best" else ""
    raise UsageError(f"there is no valid checkpoint{told} in {store.directory}")


def check_changes(
    saved: Mapping[str, Any], cfg: CfgNode, length: int, allow: frozenset[str]
) -> dict[str, str]:
    """Print how this config, and the `length` of the training data, differ from those of a saved
    state, and return that by key; refuse what would break exactness.

    Raises UsageError unless every such key is in `allow`.
    """
    old = flatten(CfgNode(yaml.safe_load(saved["config"]))) | {DATA: saved["dataset_length"]}
    new = flatten(cfg) | {DATA: length}
    changed = {}
    for key in sorted(old.keys() | new.keys()):
        before, now = (list(v) if isinstance(v, tuple) else v for v in (old.get(key), new.get(key)))
        if before != now:
            changed[key] = f"{key}: {before!r} -> {now!r}"
            logger.info("changed since the checkpoint: %s", changed[key])
    refused = [key for key in changed if not key.startswith(FREE) and key not in allow]
    if refused:
        told = "\n".join(f"  {changed[key]}" for key in refused)
        raise UsageError(
            f"This config differs from the checkpoint's, so the run cannot go on exactly:\n{told}\n"
            f"To go on all the same: --allow {','.join(refused)}"
        )
    return changed
