"""A language model over bytes, on the source of the running Python's own standard library: real
text that needs no download."""

from __future__ import annotations

import math
import os
import sysconfig
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yacs.config import CfgNode

from launcher.errors import UsageError
from launcher.tasks.task import Task

if TYPE_CHECKING:
    import torch
    from torch import nn

BYTES = 256  # the vocabulary


class BytesLM(Task):
    """A GPT that tells the next byte. An epoch is as many random windows as the text has disjoint
    ones; the evaluation goes through disjoint windows, in a shuffled order that is always the same,
    so that EVAL.SAMPLES takes them from all over the text.

    `bits_per_byte` is the loss in bits: 8 for one who knows nothing.
    """

    @classmethod
    def defaults(cls) -> CfgNode:
        return CfgNode(
            {
                "LAYERS": 5,
                "HEADS": 4,  # of attention; they share WIDTH
                "WIDTH": 128,
                "CONTEXT": 256,  # bytes in a sample: as many as the model sees
                "DROPOUT": 0.0,
                "SHOW_BYTES": 200,  # written by the model after each evaluation; 0: none
            }
        )

    @classmethod
    def metrics(cls) -> list[str]:
        return ["loss", "bits_per_byte"]

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        task = cfg.TASK
        for name in ("LAYERS", "HEADS", "WIDTH", "CONTEXT"):
            if task[name] < 1:
                raise UsageError(f"TASK.{name} must be at least 1, not {task[name]}")
        if task.WIDTH % task.HEADS:
            raise UsageError(f"TASK.WIDTH {task.WIDTH} is no multiple of TASK.HEADS {task.HEADS}")
        if not 0 <= task.DROPOUT < 1 or task.SHOW_BYTES < 0:
            raise UsageError("TASK.DROPOUT is from 0 to below 1, and TASK.SHOW_BYTES at least 0")

    def build_model(self) -> nn.Module:
        from launcher.tasks.gpt import GPT

        task = self.cfg.TASK
        return GPT(BYTES, task.CONTEXT, task.LAYERS, task.HEADS, task.WIDTH, task.DROPOUT)

    def flops(self) -> float:
        from launcher.tasks.gpt import flops

        task = self.cfg.TASK
        return flops(BYTES, task.CONTEXT, task.LAYERS, task.WIDTH)

    def build_dataset(self, split: str) -> Any:
        """Pairs of CONTEXT bytes and the same one further on, both int64."""
        import numpy as np

        from launcher.datasets import TokenFile, TokenWindows
        from launcher.datasets.part import shuffled_part

        if split not in ("train", "val"):
            raise UsageError(f"bytes-lm has the splits train and val, not {split!r}")
        text = b"".join(path.read_bytes() for path in source_files(split).values())
        tokens, context = np.frombuffer(text, np.uint8), self.cfg.TASK.CONTEXT
        disjoint = TokenFile(tokens, context)
        if split == "train":
            return TokenWindows(tokens, context, len(disjoint), self.cfg.SEED)
        return shuffled_part(disjoint, len(disjoint), seed=0)

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        loss = losses(model, batch).mean()
        return {"loss": loss, "bits_per_byte": loss / math.log(2)}

    def eval_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        loss = losses(model, batch).mean(1)
        return {"loss": loss, "bits_per_byte": loss / math.log(2)}

    def show(self, model: nn.Module) -> None:
        """A text that the model goes on with, byte by byte."""
        import torch

        if not self.cfg.TASK.SHOW_BYTES:
            return
        text = torch.tensor([list(b"\ndef ")], device=self.run.device)
        for _ in range(self.cfg.TASK.SHOW_BYTES):
            logits = model(text[:, -self.cfg.TASK.CONTEXT :])[:, -1]
            likely = (logits.float() / 0.8).softmax(-1)  # a little surer than it is: fewer slips
            text = torch.cat([text, torch.multinomial(likely, 1)], 1)
        shown = bytes(text[0].tolist()).decode(errors="replace")
        self.recorder.text("sample", f"```\n{shown}\n```")


def losses(model: nn.Module, batch: Any) -> torch.Tensor:
    """The cross-entropy of every byte, shape (B, T)."""
    from torch.nn.functional import cross_entropy

    tokens, following = batch
    return cross_entropy(model(tokens).transpose(1, 2), following, reduction="none")


def source_files(split: str) -> dict[str, Path]:
    """The .py files of the standard library that belong to a split, by their names below it, in
    order. About every tenth is for val, by its name alone: so it is in any version of Python."""
    folder = Path(sysconfig.get_path("stdlib"))
    found: dict[str, Path] = {}

    def unreadable(error: OSError) -> None:
        raise UsageError(f"the standard library, {error.filename}: {error.strerror}") from error

    for place, folders, names in os.walk(folder, onerror=unreadable):
        # What was installed beside it is another text on every machine.
        folders[:] = [name for name in folders if name not in ("site-packages", "dist-packages")]
        paths = [Path(place, name) for name in names if name.endswith(".py")]
        found |= {path.relative_to(folder).as_posix(): path for path in paths}
    held_out = {name for name in found if zlib.crc32(name.encode()) % 10 == 0}
    chosen = held_out if split == "val" else found.keys() - held_out
    if not chosen:
        raise UsageError(
            f"bytes-lm trains on the source of the standard library, and {folder} has none for "
            f"{split}: use a Python that has its .py files"
        )
    return {name: found[name] for name in sorted(chosen)}
