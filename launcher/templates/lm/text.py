"""A small language model: the next byte of a text, from the bytes before it.

The text is the source of Python's own standard library. For your own: let `read` return its bytes.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from launcher import CfgNode, Task


def read() -> bytes:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return b"".join(file.read_bytes() for file in files)


class Windows(Dataset):
    """Windows of `length` bytes, each with the bytes that follow. In training they begin at random
    places, which the launcher seeds by epoch and sample; else one follows the other.
    """

    def __init__(self, text: bytes, length: int, count: int, random: bool) -> None:
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.length, self.count, self.random = length, count, random

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        begin = index * self.length
        if self.random:
            begin = int(torch.randint(len(self.text) - self.length, ()))
        window = self.text[begin : begin + self.length + 1].long()
        return window[:-1], window[1:]


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, length: int) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, width)
        self.places = nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        norm = nn.LayerNorm(width)
        self.layers = nn.TransformerEncoder(layer, layers, norm, enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)

    def forward(self, window: torch.Tensor) -> torch.Tensor:
        length = window.shape[1]
        places = torch.arange(length, device=window.device)
        # No byte sees those that follow it.
        hidden = torch.ones(length, length, dtype=torch.bool, device=window.device).triu(1)
        x = self.bytes(window) + self.places(places)
        return self.head(self.layers(x, mask=hidden, is_causal=True))


class Text(Task):
    @classmethod
    def defaults(cls) -> CfgNode:
        # EPOCH: windows in an epoch of training; HELD_OUT: those of an evaluation.
        return CfgNode({"WIDTH": 64, "LAYERS": 2, "LENGTH": 64, "EPOCH": 3200, "HELD_OUT": 200})

    @classmethod
    def metrics(cls) -> list[str]:
        return ["loss", "perplexity"]

    def build_model(self) -> nn.Module:
        task = self.cfg.TASK
        return Transformer(task.WIDTH, task.LAYERS, task.LENGTH)

    def build_dataset(self, split: str) -> Dataset:
        task, text = self.cfg.TASK, read()
        cut = len(text) - (task.HELD_OUT * task.LENGTH + 1)
        if split == "train":
            return Windows(text[:cut], task.LENGTH, task.EPOCH, random=True)
        return Windows(text[cut:], task.LENGTH, task.HELD_OUT, random=False)

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        window, following = batch
        return {"loss": cross_entropy(model(window).flatten(0, 1), following.flatten())}

    def eval_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        window, following = batch
        losses = cross_entropy(model(window).transpose(1, 2), following, reduction="none")
        return {"loss": losses.mean(1)}  # of each window; they are all of one length

    def summarize(self, outputs: dict[str, torch.Tensor]) -> dict[str, float]:
        """What is no mean over samples, from those of all ranks in the data set's order."""
        return {"perplexity": float(outputs["loss"].double().mean().exp())}

    def show(self, model: nn.Module) -> None:
        """200 bytes that the model goes on with, in TensorBoard."""
        text = torch.tensor([list(b"\ndef ")], device=self.run.device)
        for _ in range(200):
            likely = model(text[:, -self.cfg.TASK.LENGTH :])[:, -1].softmax(-1)
            text = torch.cat([text, torch.multinomial(likely, 1)], 1)
        written = bytes(text[0].tolist()).decode(errors="replace")
        self.recorder.text("sample", f"```\n{written}\n```")
