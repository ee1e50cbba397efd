"""Settings that debugging adds to a config; imports no torch."""

from __future__ import annotations

import os
import re
import tempfile

from launcher.config import CfgNode
from launcher.config.checks import evaluates
from launcher.runtime.topology import Topology

# While somebody looks at one rank, the others wait for it.
NO_LIMITS = ["DIST.TRAIN_TIMEOUT", "1000h", "DIST.SAVE_TIMEOUT", "1000h"]
# `--debug`: one process after the other, the same each time, and short. What is given beside it
# wins. Records, an evaluation and a checkpoint come about within the first steps.
PRESET = [
    *("DATALOADER.NUM_WORKERS", "0", "DETERMINISTIC", "True", "LOG.PROGRESS_BAR", "False"),
    *("DEBUG.DETECT_ANOMALY", "True", "DEBUG.NONFINITE", "stop"),
    *("TRAIN.DURATION", "20step", "OPTIM.WARMUP", "", "OPTIM.SCHEDULE", "constant"),
    *("LOG.EVERY", "1step"),
    *("EVAL.EVERY", "10step", "EVAL.SAMPLES", "256", "CHECKPOINT.EVERY", "10step"),
    *NO_LIMITS,
]


# `--dry-run`, over what is given: each part of a run once.
DRY = [
    *("TRAIN.DURATION", "1step", "LOG.EVERY", "1step", "LOG.LEVEL", "WARNING"),
    *("CHECKPOINT.EVERY", "1step", "EVAL.AT_START", "False", "LOG.PROGRESS_BAR", "False"),
]


def added(cfg: CfgNode, folder: str, dry: bool) -> list[str]:
    """Settings that win over all others: those that follow from the keys of DEBUG, and those of a
    dry run, which goes into `folder`."""
    settings = implied(cfg)
    if dry:
        settings += [*DRY, "OUTPUT_DIR", f"{folder}/run"]
        settings += ["OPTIM.HORIZON", cfg.OPTIM.HORIZON or cfg.TRAIN.DURATION]
        if evaluates(cfg):
            settings += ["EVAL.EVERY", "1step", "EVAL.SAMPLES", str(cfg.EVAL.BATCH_SIZE)]
    return settings


def folder_of(topology: Topology, what: str) -> str:
    """A new folder for what is not to be kept, the same on all ranks; not made yet."""
    # Ranks without a job's id, as a launcher of one's own may start them, have an address together.
    alone = topology.world_size == 1
    shared = str(os.getpid()) if alone else f"{topology.master_addr}:{topology.master_port}"
    job = re.sub(r"\W+", "-", topology.job_id or shared)
    return f"{tempfile.gettempdir()}/launcher-{what}-{job}-{int(topology.retries)}"


def implied(cfg: CfgNode) -> list[str]:
    """Settings that follow from the keys of DEBUG, and win over all others."""
    settings: list[str] = []
    if cfg.DEBUG.BREAK_RANK >= 0:
        settings += [*NO_LIMITS, "LOG.PROGRESS_BAR", "False"]
    if cfg.DEBUG.OVERFIT_BATCHES:
        # The data set is the batches themselves (see data/splits.py), in their order.
        settings += ["TRAIN.SAMPLER", "sequential"]
        if evaluates(cfg):
            name = cfg.CHECKPOINT.METRIC.rpartition("/")[2]
            settings += ["EVAL.SPLITS", "[train]", "EVAL.SAMPLES", "0"]
            settings += ["CHECKPOINT.METRIC", f"train_eval/{name}"]
    return settings
