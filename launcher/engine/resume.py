"""Going on from a checkpoint: which one."""

from __future__ import annotations

from pathlib import Path

from launcher.checkpoint.store import CheckpointStore, DamagedCheckpoint, Found, load_file
from launcher.errors import RunError, UsageError
from launcher.log import get_logger
from launcher.runtime.process import Runtime

logger = get_logger(__name__)


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
    if found is not None and "optimizer_made" not in found.state:
        raise UsageError(
            "the checkpoint was written by an earlier version of the launcher, whose runs this one "
            "does not go on with. To start from its weights alone use MODEL.WEIGHTS."
        )
    return runtime.broadcast_state(found)  # collectives
