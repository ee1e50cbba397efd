"""A BERT that classifies sentences, after huggingface/transformers:
examples/pytorch/text-classification/run_glue_no_trainer.py.

Kept: the model and its loss, batches padded to their longest sentence, AdamW without decay of
biases and LayerNorm, a linear schedule with warm-up, accuracy and F1. Sentences of similar length
are together, as run_glue.py does on demand. Smaller: lines of Python's own standard library and the
packages that they are from, instead of GLUE; words for tokens, and a BERT of 2 layers of 64 from
scratch, instead of downloads.
"""

from __future__ import annotations

import re
import sysconfig
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from launcher import CfgNode, Task

PACKAGES = ("asyncio", "email", "multiprocessing", "unittest")
PADDING, UNKNOWN, BEGIN = range(3)  # tokens; words have the numbers after these
Sentence = tuple[torch.Tensor, int]  # its tokens and its label


class Sentences(Dataset):
    deterministic = True

    def __init__(self, sentences: list[Sentence]) -> None:
        self.sentences = sentences
        self.lengths = [len(tokens) for tokens, _ in sentences]  # for TRAIN.SAMPLER grouped

    def __len__(self) -> int:
        return len(self.sentences)

    def __getitem__(self, index: int) -> Sentence:
        return self.sentences[index]


class TextClassification(Task):
    @classmethod
    def defaults(cls) -> CfgNode:
        # LINES: of each package.
        model = {"WIDTH": 64, "LAYERS": 2, "HEADS": 4, "VOCABULARY": 2000}
        return CfgNode({**model, "MAX_LENGTH": 32, "LINES": 1200})

    @classmethod
    def metrics(cls) -> list[str]:
        return ["loss", "accuracy", "f1"]

    def build_model(self) -> nn.Module:
        from transformers import BertConfig, BertForSequenceClassification

        task = self.cfg.TASK
        config = BertConfig(
            vocab_size=task.VOCABULARY,
            hidden_size=task.WIDTH,
            num_hidden_layers=task.LAYERS,
            num_attention_heads=task.HEADS,
            intermediate_size=4 * task.WIDTH,
            max_position_embeddings=task.MAX_LENGTH,
            initializer_range=0.05,  # not 0.02, for so narrow a model
            pad_token_id=PADDING,
            id2label=dict(enumerate(PACKAGES)),
        )
        return BertForSequenceClassification(config)

    def build_dataset(self, split: str) -> Sentences:
        task = self.cfg.TASK
        return Sentences(corpus(task.LINES, task.VOCABULARY, task.MAX_LENGTH)[split])

    def collate(self, samples: list[Sentence]) -> dict[str, torch.Tensor]:
        sentences, labels = zip(*samples, strict=True)
        tokens = pad_sequence(list(sentences), batch_first=True, padding_value=PADDING)
        mask = (tokens != PADDING).long()
        return {"input_ids": tokens, "attention_mask": mask, "labels": torch.tensor(labels)}

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        optim, groups = self.cfg.OPTIM, dict[bool, list[nn.Parameter]]({True: [], False: []})
        for name, weight in model.named_parameters():
            groups[not name.endswith(("bias", "LayerNorm.weight"))].append(weight)
        return torch.optim.AdamW(
            [
                {"params": groups[True], "weight_decay": optim.WEIGHT_DECAY},
                {"params": groups[False], "weight_decay": 0.0},
            ],
            lr=optim.LR,
        )

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        return {"loss": model(**batch).loss}

    def eval_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        logits, labels = model(**batch).logits, batch["labels"]
        guesses = logits.argmax(1)
        loss = F.cross_entropy(logits, labels, reduction="none")
        return {"loss": loss, "accuracy": guesses == labels, "guess": guesses, "label": labels}

    def summarize(self, outputs: dict[str, torch.Tensor]) -> dict[str, float]:
        from sklearn.metrics import f1_score

        return {"f1": f1_score(outputs["label"], outputs["guess"], average="macro")}


@cache
def corpus(lines: int, vocabulary: int, most: int) -> dict[str, list[Sentence]]:
    """Lines of each package, every fifth for val, as at most so many tokens each."""
    parts: dict[str, list[tuple[list[str], int]]] = {"train": [], "val": []}
    for label, package in enumerate(PACKAGES):
        files = sorted((Path(sysconfig.get_path("stdlib")) / package).glob("*.py"))
        text = "\n".join(path.read_text(encoding="utf-8") for path in files)
        found = (re.findall(r"\w+|[^\w\s]", line) for line in dict.fromkeys(text.splitlines()))
        long_enough = [words[: most - 1] for words in found if len(words) >= 4][:lines]
        for i, words in enumerate(long_enough):
            parts["val" if i % 5 == 4 else "train"].append((words, label))
    counts = Counter(word for words, _ in parts["train"] for word in words)
    number = {word: i for i, (word, _) in enumerate(counts.most_common(vocabulary - 3), BEGIN + 1)}
    return {
        split: [
            (torch.tensor([BEGIN, *(number.get(word, UNKNOWN) for word in words)]), label)
            for words, label in part
        ]
        for split, part in parts.items()
    }
