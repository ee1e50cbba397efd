"""Muon for the matrices of a model and AdamW for the rest, as one optimiser."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer


class MuonWithAdamW(Optimizer):
    """Steps both. The groups of one come after those of the other, and the state of all weights is
    in one place, so that it is saved, loaded and given rates as any other optimiser.

    Two torch optimisers in a task's `build_optimizer` would be two phases, with a forward pass for
    each.
    """

    def __init__(self, parts: Iterable[Optimizer]) -> None:
        self.parts = list(parts)
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        for part in self.parts:
            self.state.update(part.state)
        self._share()

    def _share(self) -> None:
        """Give the parts what is theirs."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.state = self.state
            part.param_groups = [next(groups) for _ in part.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step(closure)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()


def takes(model: nn.Module) -> set[int]:
    """The ids of the weights that Muon is for: matrices, but for those of embeddings, of which a
    step sees a few rows."""
    embeddings = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
    }
    return {
        id(p)
        for p in model.parameters()
        if p.dim() == 2 and not p.is_complex() and id(p) not in embeddings
    }
