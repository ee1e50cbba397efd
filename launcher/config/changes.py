"""Whether a config may go on with what another one has begun."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from yacs.config import CfgNode

from launcher.config.keys import KEYS, flatten
from launcher.errors import UsageError
from launcher.log import get_logger

logger = get_logger(__name__)

# As it is allowed: the order of a data set of another length is another.
DATA = "DATASET_LENGTH"
# Keys that say with which weights a run begins.
BEGINNING = ("MODEL.WEIGHTS", "MODEL.INIT", "MODEL.REINIT")
# Keys that say where and how much to log, save and evaluate, or how to load: the steps of a run do
# not depend on them.
FREE = (
    *("OUTPUT_DIR", "LOG.", "CHECKPOINT.", "EVAL.", "TRAIN.MAX_TIME", "DIST.", *BEGINNING),
    # And PROFILE_STEPS. What is overfitted is another data set.
    *(
        f"DEBUG.{name}"
        for name in ("NONFINITE", "DETECT_ANOMALY", "BREAK_RANK", "PROFILE", "MEMORY")
    ),
    *(f"DATALOADER.{name}" for name in ("NUM_WORKERS", "PREFETCH_FACTOR", "PIN_MEMORY")),
)
# But for these, by which gradients are summed.
SUMS = ("DIST.GRADIENT_COMPRESSION", "DIST.BUCKET_MB", "DIST.STATIC_GRAPH")


def check_changes(
    saved: Mapping[str, Any], cfg: CfgNode, length: int, allow: frozenset[str]
) -> dict[str, str]:
    """Print how this config, and the `length` of the training data, differ from those of a saved
    state, and return that by key; refuse what would break exactness.

    Raises UsageError unless every such key is in `allow`.
    """
    # A key that is newer than the checkpoint had its default.
    old = {key.name: key.default for key in KEYS} | {DATA: saved["dataset_length"]}
    old |= flatten(CfgNode(yaml.safe_load(saved["config"])))
    new = flatten(cfg) | {DATA: length}
    changed = {}
    for key in sorted(old.keys() | new.keys()):
        before, now = (list(v) if isinstance(v, tuple) else v for v in (old.get(key), new.get(key)))
        if before != now:
            changed[key] = f"{key}: {before!r} -> {now!r}"
            logger.info("changed since the checkpoint: %s", changed[key])
    bound = [key for key in changed if key in SUMS or not key.startswith(FREE)]
    refused = [key for key in bound if key not in allow]
    if refused:
        told = "\n".join(f"  {changed[key]}" for key in refused)
        raise UsageError(
            f"This config differs from the checkpoint's, so the run cannot go on exactly:\n{told}\n"
            f"To go on all the same: --allow {','.join(refused)}"
        )
    return changed
