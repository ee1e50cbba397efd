"""A GPT: pre-norm transformer blocks over tokens, as GPT-2 (Radford et al., 2019)."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """Causal self-attention, then two layers, each added to what comes in."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.norm_attention(x)).view(batch, length, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        chance = self.dropout.p if self.training else 0.0
        found = F.scaled_dot_product_attention(query, key, value, dropout_p=chance, is_causal=True)
        found = found.transpose(1, 2).reshape(batch, length, width)
        x = x + self.dropout(self.attention_out(found))
        inner = F.gelu(self.mlp_in(self.norm_mlp(x)), approximate="tanh")
        return x + self.dropout(self.mlp_out(inner))


class GPT(nn.Module):
    """From tokens of shape (B, T), T at most `context`, to logits of the next, (B, T, vocabulary).

    The embedding of a token is also what the output is compared with (tied), and weights begin as
    GPT-2's: normal with a deviation of 0.02 (of positions 0.01), scaled by 1/sqrt(2 layers) where a
    layer adds to the residual stream; biases 0.
    """

    def __init__(
        self, vocabulary: int, context: int, layers: int, heads: int, width: int, dropout: float
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                adds = name.endswith("_out")  # to the residual stream
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * layers if adds else 1))
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.01)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.tokens(tokens) + self.positions(places))
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)


def flops(vocabulary: int, length: int, layers: int, width: int) -> float:
    """Of one sample of `length` tokens, forward and backward: those of all matrix products, with
    attention to all places, as papers count it."""
    block = 12 * width**2 + 2 * length * width  # multiplications a token
    return 3 * 2 * length * (layers * block + vocabulary * width)
