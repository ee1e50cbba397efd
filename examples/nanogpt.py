"""A small GPT, after karpathy/nanoGPT: train.py, model.py and data/shakespeare_char/prepare.py.

Kept: the model (pre-norm blocks without biases, tied embeddings, scaled initial residuals), random
windows, AdamW with decay on matrices alone, warm-up and cosine to a tenth, clipping, accumulation,
estimates of the loss on both splits, a sample of text. Smaller: bytes of Python's own standard
library instead of Shakespeare's letters, 2 layers of 48 instead of 6 of 384; no dropout.
"""

from __future__ import annotations

import math
import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from launcher import CfgNode, Task
from launcher.datasets import TokenWindows


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = (nn.LayerNorm(width, bias=False) for _ in range(2))
        self.attend = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width, bias=False),
            nn.GELU(),
            nn.Linear(4 * width, width, bias=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.attend(self.norm_1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    def __init__(self, layers: int, heads: int, width: int, block_size: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, width)
        self.positions = nn.Embedding(block_size, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, 256, bias=False)
        self.head.weight = self.tokens.weight
        for name, weight in self.named_parameters():
            if weight.dim() >= 2:
                residual = name.endswith(("project.weight", "mlp.2.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * layers) if residual else 0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        at = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions(at))))


class NanoGPT(Task):
    @classmethod
    def defaults(cls) -> CfgNode:
        # WINDOWS: random windows of the text in an epoch.
        return CfgNode({"LAYERS": 2, "HEADS": 2, "WIDTH": 48, "BLOCK_SIZE": 32, "WINDOWS": 3200})

    @classmethod
    def metrics(cls) -> list[str]:
        return ["loss", "bits_per_byte"]

    def build_model(self) -> nn.Module:
        task = self.cfg.TASK
        return GPT(task.LAYERS, task.HEADS, task.WIDTH, task.BLOCK_SIZE)

    def build_dataset(self, split: str) -> TokenWindows:
        task = self.cfg.TASK
        return TokenWindows(tokens(split), task.BLOCK_SIZE, task.WINDOWS, self.cfg.SEED, "uint8")

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        optim = self.cfg.OPTIM
        groups = [
            {"params": [p for p in model.parameters() if p.dim() >= 2]},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            groups, optim.LR, tuple(optim.BETAS), weight_decay=optim.WEIGHT_DECAY, fused=True
        )

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        tokens, targets = batch
        return {"loss": F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())}

    def eval_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        tokens, targets = batch
        losses = F.cross_entropy(model(tokens).transpose(1, 2), targets, reduction="none").mean(1)
        return {"loss": losses, "bits_per_byte": losses / math.log(2)}

    def show(self, model: nn.Module) -> None:
        """200 bytes of text, of the 50 likeliest each."""
        text = torch.tensor([list(b"\ndef ")], device=self.run.device)
        for _ in range(200):
            logits = model(text[:, -self.cfg.TASK.BLOCK_SIZE :])[:, -1] / 0.8  # the temperature
            likeliest, those = logits.topk(50)
            drawn = torch.multinomial(likeliest.softmax(-1), 1)
            text = torch.cat([text, those.gather(1, drawn)], 1)
        shown = bytes(text[0].tolist()).decode(errors="replace")
        self.recorder.text("sample", f"```\n{shown}\n```")


def tokens(split: str) -> Path:
    """The file of the bytes of a split, made where there is none: the last tenth is for val."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nanogpt-stdlib"
    path = cache / f"{sys.version_info.major}.{sys.version_info.minor}.{split}.bin"
    if not path.exists():
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        text = b"".join(file.read_bytes() for file in files)
        cut = len(text) * 9 // 10
        cache.mkdir(parents=True, exist_ok=True)
        made = path.with_suffix(f".{os.getpid()}")
        made.write_bytes(text[:cut] if split == "train" else text[cut:])
        made.replace(path)  # at once: other ranks make the same
    return path
