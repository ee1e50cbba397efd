"""An encoder and a decoder with additive attention: from a small image to a word."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class AdditiveAttention(nn.Module):
    """Bahdanau et al., 2015: a place's score is v . tanh(W query + U place)."""

    def __init__(self, query: int, places: int, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(query, width)
        self.places = nn.Linear(places, width, bias=False)
        self.score = nn.Linear(width, 1, bias=False)

    def forward(
        self, query: torch.Tensor, places: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of queries (B, Q) and places (B, P, F): the places' weighted mean, the weights (B, P)."""
        scores = self.score(torch.tanh(self.query(query).unsqueeze(1) + self.places(places)))
        weights = scores.squeeze(2).softmax(1)
        return (weights.unsqueeze(1) @ places).squeeze(1), weights


class Speller(nn.Module):
    """Spells what is on images of shape (B, 1, 8, 8), letter by letter, looking at its 16 places.

    Letter 0 stands for a word's end, and for what comes before its first letter.
    """

    SIDE = 4  # places in a row, and rows

    def __init__(self, letters: int, width: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, width // 2, 3, padding=1, bias=False),
            nn.GroupNorm(8, width // 2),
            nn.ReLU(),
            nn.Conv2d(width // 2, width, 3, padding=1, bias=False),
            nn.GroupNorm(8, width),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.positions = nn.Parameter(torch.randn(self.SIDE**2, width) * 0.1)
        self.begin = nn.Linear(width, width)
        self.letters = nn.Embedding(letters, width)
        self.attention = AdditiveAttention(width, width, width)
        self.cell = nn.GRUCell(2 * width, width)
        self.out = nn.Linear(2 * width, letters)

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The places (B, P, width), and the decoder's first state (B, width)."""
        places = self.encoder(images).flatten(2).transpose(1, 2) + self.positions
        return places, torch.tanh(self.begin(places.mean(1)))

    def step(
        self, letter: torch.Tensor, state: torch.Tensor, places: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """After the last letter (B,): logits of the next, the state, where it looked (B, P)."""
        seen, weights = self.attention(state, places)
        state = self.cell(torch.cat([self.letters(letter), seen], 1), state)
        return self.out(torch.cat([state, seen], 1)), state, weights

    def forward(self, images: torch.Tensor, letters: torch.Tensor) -> torch.Tensor:
        """Logits (B, L, letters) of each of `letters`, (B, L), told all that come before it."""
        places, state = self.encode(images)
        told, logits = F.pad(letters, (1, 0))[:, :-1], list[torch.Tensor]()
        for letter in told.unbind(1):
            guess, state, _ = self.step(letter, state, places)
            logits.append(guess)
        return torch.stack(logits, 1)

    def spell(self, images: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The likeliest letter after the likeliest, (B, length), and where it looked for each,
        (B, length, P). What comes after a word's end means nothing."""
        places, state = self.encode(images)
        letter = torch.zeros(len(images), dtype=torch.long, device=images.device)
        spelled, looked = list[torch.Tensor](), list[torch.Tensor]()
        for _ in range(length):
            logits, state, weights = self.step(letter, state, places)
            letter = logits.argmax(1)
            spelled.append(letter)
            looked.append(weights)
        return torch.stack(spelled, 1), torch.stack(looked, 1)
