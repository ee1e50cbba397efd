"""Spells the digits: from an 8x8 image to "three", by an encoder, a decoder and attention."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from yacs.config import CfgNode

from launcher.errors import UsageError
from launcher.tasks.task import Task

if TYPE_CHECKING:
    import torch
    from torch import nn

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ALPHABET = "".join(sorted({*"".join(NAMES)}))  # letter i of the model is ALPHABET[i - 1]; 0 ends
LONGEST = max(map(len, NAMES)) + 1  # with its end


class DigitsCaption(Task):
    """Scikit-learn's digits, split as in the digits task, each with its English name.

    In training the decoder is told the letters before (teacher forcing), and so it is for `loss`
    and `letter_accuracy`, means over letters. For the other metrics it spells alone: `exact_match`
    is the share of names without a mistake, `class_match` that share's mean over the digits, and
    `edit_rate` the letters to change, put in or leave out, over all letters of the split.
    """

    @classmethod
    def defaults(cls) -> CfgNode:
        return CfgNode({"WIDTH": 64})  # of the encoder's features and of the decoder's state

    @classmethod
    def metrics(cls) -> list[str]:
        return ["loss", "letter_accuracy", "exact_match", "class_match", "edit_rate"]

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        if cfg.TASK.WIDTH < 16 or cfg.TASK.WIDTH % 16:
            raise UsageError(f"TASK.WIDTH must be a multiple of 16, not {cfg.TASK.WIDTH}")

    def build_model(self) -> nn.Module:
        from launcher.tasks.speller import Speller

        return Speller(len(ALPHABET) + 1, self.cfg.TASK.WIDTH)

    def build_dataset(self, split: str) -> Any:
        from torch.utils.data import TensorDataset

        from launcher.tasks.digits import normalised, read

        images, labels = read(split)
        return TensorDataset(normalised(images), labels)

    def collate(self, samples: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Images, and their names' letters padded to the longest: (B, L), 1 in `mask` where there
        is one, a name's end among them."""
        import torch

        images, labels = zip(*samples, strict=True)
        names = [[*letters_of(NAMES[int(label)]), 0] for label in labels]
        longest = max(map(len, names))
        return {
            "images": torch.stack(images),
            "labels": torch.stack(labels),
            "letters": torch.tensor([name + [0] * (longest - len(name)) for name in names]),
            "mask": torch.tensor([[i < len(name) for i in range(longest)] for name in names]),
        }

    def train_step(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        losses, right, mask = told(model, batch)
        count = mask.sum()
        # Weighted by letters: the mean is one over letters also where ranks have different ones.
        means = {"loss": losses.sum() / count, "letter_accuracy": right.sum() / count}
        return {**means, "weight": count}

    def eval_step(self, model: Any, batch: Any) -> dict[str, Any]:
        losses, right, mask = told(model, batch)
        count = mask.sum(1)
        spelled, _ = model.spell(batch["images"], LONGEST)
        return {
            "loss": losses.sum(1) / count,
            "letter_accuracy": right.sum(1) / count,
            "weight": count,
            "label": batch["labels"],
            "spelled": [word_of(letters) for letters in spelled.tolist()],
        }

    def summarize(self, outputs: dict[str, Any]) -> dict[str, float]:
        """The metrics of whole names, and how each digit is spelled."""
        spelled: dict[int, Counter[str]] = {}
        for label, word in zip(outputs["label"].tolist(), outputs["spelled"], strict=True):
            spelled.setdefault(label, Counter())[word] += 1
        lines = ["| name | spelled |", "| --- | --- |"]
        edits = letters = 0
        shares = list[float]()
        for label, words in sorted(spelled.items()):
            name, count = NAMES[label], words.total()
            edits += sum(distance(word, name) * times for word, times in words.items())
            letters += len(name) * count
            shares.append(words[name] / count)
            written = ", ".join(f"{word or '(nothing)'}: {n}" for word, n in words.most_common())
            lines.append(f"| {name} | {written} |")
        self.recorder.text("spelled", "\n".join(lines))
        exact = sum(words[NAMES[label]] for label, words in spelled.items())
        return {
            "exact_match": exact / len(outputs["spelled"]),
            "class_match": sum(shares) / len(shares),
            "edit_rate": edits / letters,
        }

    def show(self, model: Any) -> None:
        """Where the decoder looks, in red, for each letter of the ten digits' first images; a row
        a digit, first as it is."""
        import torch

        from launcher.tasks.digits import normalised, read
        from launcher.tasks.pictures import enlarge, grid

        images, labels = read("val")
        first = [int((labels == label).nonzero()[0]) for label in range(len(NAMES))]
        images = images[first]
        spelled, looked = model.spell(normalised(images).to(self.run.device), LONGEST)
        weights = looked.float().cpu().unflatten(2, (model.SIDE, model.SIDE))  # by rows
        weights = weights / weights.amax((2, 3), keepdim=True)
        weights = enlarge(weights, images.shape[-1] // model.SIDE)
        rest = images * (1 - weights)
        red = torch.maximum(images.expand_as(weights), weights)
        overlaid = torch.stack([red, rest, rest], 2)  # (10, LONGEST, 3, 8, 8)
        plain = images.unsqueeze(1).expand(-1, 1, 3, -1, -1)
        tiles = torch.cat([plain, overlaid], 1).flatten(0, 1)
        self.recorder.image("attention", grid(tiles, columns=1 + LONGEST))
        words = [word_of(letters) or "(nothing)" for letters in spelled.tolist()]
        self.recorder.text("attention_to", "By row: " + ", ".join(words))


def told(model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each letter's loss and whether it is guessed, told those before it, both 0 in the padding;
    and the mask. All of shape (B, L)."""
    from torch.nn.functional import cross_entropy

    letters, mask = batch["letters"], batch["mask"]
    logits = model(batch["images"], letters)
    losses = cross_entropy(logits.transpose(1, 2), letters, reduction="none")
    return losses * mask, (logits.argmax(2) == letters) & mask, mask


def letters_of(word: str) -> list[int]:
    return [ALPHABET.index(letter) + 1 for letter in word]


def word_of(letters: list[int]) -> str:
    """The word up to its end."""
    end = letters.index(0) if 0 in letters else len(letters)
    return "".join(ALPHABET[letter - 1] for letter in letters[:end])


def distance(a: str, b: str) -> int:
    """Letters to change, put in or leave out between two words (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b):
            row.append(min(above[j] + (x != y), above[j + 1] + 1, row[j] + 1))
    return row[-1]
