"""An LSTM over words, after pytorch/examples: word_language_model/main.py, model.py and data.py.

Kept: two layers with dropout, truncated backpropagation (the text in columns, one a row of the
batch, whose hidden state goes on from step to step, and from batch to batch in an evaluation),
clipping at 0.25, SGD at 20, a quarter of that whenever the validation loss has not got better.
Smaller: the words of Python's own standard library instead of Wikitext-2, 64 units instead of 200.
"""

from __future__ import annotations

import re
import sysconfig
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from launcher import CfgNode, Task

Hidden = tuple[torch.Tensor, torch.Tensor]  # of an LSTM: (layers, rows, width) each


class Segments(Dataset):
    """A text cut into segments of `length` words, and these into `columns` of equal size."""

    deterministic = True

    def __init__(self, words: torch.Tensor, length: int, columns: int) -> None:
        self.words, self.length, self.columns = words, length, columns
        self.size = (len(words) - 1) // length // columns

    def __len__(self) -> int:
        return self.columns * self.size

    def __getitem__(self, index: int) -> tuple[int, bool, torch.Tensor, torch.Tensor]:
        """The column, whether it begins here, the words, and each one's next."""
        start, stop = index * self.length, (index + 1) * self.length
        words, following = self.words[start:stop], self.words[start + 1 : stop + 1]
        return index // self.size, index % self.size == 0, words, following

    def order(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """The columns side by side: a batch holds one segment of each, the next batch the next."""
        return positions % self.columns * self.size + positions // self.columns


class LSTM(nn.Module):
    def __init__(self, vocabulary: int, width: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.encoder = nn.Embedding(vocabulary, width)
        self.rnn = nn.LSTM(width, width, layers, batch_first=True, dropout=dropout)
        self.decoder = nn.Linear(width, vocabulary)
        for part in (self.encoder, self.decoder):
            nn.init.uniform_(part.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, words: torch.Tensor, hidden: Hidden | None) -> tuple[torch.Tensor, Hidden]:
        out, hidden = self.rnn(self.dropout(self.encoder(words)), hidden)
        return self.decoder(self.dropout(out)), hidden


class WordLanguageModel(Task):
    eval_shares = 10  # the columns of an evaluation

    @classmethod
    def defaults(cls) -> CfgNode:
        # WORDS: of the text, in all; VOCABULARY: its most frequent ones, the others are unknown.
        model = {"WIDTH": 64, "LAYERS": 2, "DROPOUT": 0.2, "LENGTH": 35}
        return CfgNode({**model, "WORDS": 40000, "VOCABULARY": 1000})

    @classmethod
    def metrics(cls) -> list[str]:
        return ["loss", "perplexity"]

    def build_model(self) -> nn.Module:
        task, columns = self.cfg.TASK, self.cfg.TRAIN.BATCH_SIZE
        shape = task.LAYERS, columns, task.WIDTH
        self.hidden = [torch.zeros(shape, device=self.run.device) for _ in range(2)]
        return LSTM(task.VOCABULARY, task.WIDTH, task.LAYERS, task.DROPOUT)

    def build_dataset(self, split: str) -> Segments:
        task, columns = self.cfg.TASK, self.cfg.TRAIN.BATCH_SIZE
        words = corpus(task.WORDS, task.VOCABULARY)[split]
        return Segments(words, task.LENGTH, columns if split == "train" else 1)

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        columns, begins, words, following = batch
        # Of the columns that this rank has.
        goes_on = ~begins[:, None]
        hidden = tuple(part[:, columns] * goes_on for part in self.hidden)
        logits, hidden = model(words, hidden)
        for part, new in zip(self.hidden, hidden, strict=True):
            part[:, columns] = new.detach()
        return {"loss": F.cross_entropy(logits.flatten(0, 1), following.flatten())}

    def eval_step(self, model: nn.Module, batch: Any, carried: Any) -> dict[str, Any]:
        _, _, words, following = batch
        # One segment continues the other: a single row.
        logits, hidden = model(words.view(1, -1), carried)
        losses = F.cross_entropy(logits[0], following.flatten(), reduction="none")
        return {"loss": losses.view(words.shape).mean(1), "carried": hidden}

    def summarize(self, outputs: dict[str, torch.Tensor]) -> dict[str, float]:
        return {"perplexity": outputs["loss"].double().mean().exp()}

    def state_dict(self) -> dict[str, Any]:
        return {"hidden": self.hidden}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.hidden = [part.to(self.run.device) for part in state["hidden"]]


@cache
def corpus(size: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """The first words of the standard library as numbers: a tenth each for val and test."""
    text = "".join(
        path.read_text(encoding="utf-8", errors="replace")
        for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    )
    words = [found[0] for found in re.finditer(r"\w+|[^\w\s]|\n", text)][:size]
    cuts = [size * 8 // 10, size * 9 // 10]
    # Number 0 is for all others.
    frequent = Counter(words[: cuts[0]]).most_common(vocabulary - 1)
    number = {word: i for i, (word, _) in enumerate(frequent, 1)}
    numbers = torch.tensor([number.get(word, 0) for word in words])
    return dict(zip(("train", "val", "test"), numbers.tensor_split(cuts), strict=True))
