"""Which weights train when: MODEL.FREEZE and MODEL.THAW."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from launcher.config import CfgNode, Duration, parse_duration
from launcher.edges.model import fits, fitting, plain_name
from launcher.errors import UsageError
from launcher.log import get_logger
from launcher.runtime.progress import Progress

logger = get_logger(__name__)


class Freezing:
    """Weights by the patterns of their names; a pattern also names all that is below a module.

    What is frozen has no gradient and is left out of the exchange between ranks. A norm whose
    weights are all frozen by MODEL.FREEZE rests in eval mode: its statistics are frozen with them.
    From a MODEL.THAW's moment on its weights train as all others; the optimiser has had them from
    the start, so that its state is kept.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module) -> None:
        """Readies the model for whoever makes the optimiser: all weights that will ever train
        are switched on. Raises UsageError for a pattern that fits nothing."""
        weights = {plain_name(name): p for name, p in model.named_parameters()}
        self.frozen = {
            id(p) for pattern in cfg.MODEL.FREEZE for p in fitting(weights, pattern, "MODEL.FREEZE")
        }
        # For norms without weights the patterns of what is frozen, and of what was thawed.
        self.patterns, self.thawed = list(cfg.MODEL.FREEZE), list[str]()
        norms = {
            plain_name(name): module
            for name, module in model.named_modules()
            if isinstance(module, nn.modules.batchnorm._NormBase)
        }
        self.norms = {name: norm for name, norm in norms.items() if self._rests(name, norm)}
        self.frozen |= {id(p) for p in weights.values() if not p.requires_grad}
        # The moment from which on each weight trains that does not from the start.
        self.left: list[tuple[Duration, str, list[nn.Parameter]]] = []
        for entry in cfg.MODEL.THAW:
            pattern, _, when = entry.rpartition("@")
            duration = parse_duration(when)
            assert duration is not None  # the config check demands one
            found = [p for p in fitting(weights, pattern, "MODEL.THAW") if id(p) in self.frozen]
            if not found:
                raise UsageError(
                    f"MODEL.THAW {entry}: nothing of that is frozen. Name it in MODEL.FREEZE too."
                )
            self.left.append((duration, pattern, found))
        thawed = {id(p) for _, _, found in self.left for p in found}
        for p in weights.values():
            if p.requires_grad != (trains := id(p) not in self.frozen or id(p) in thawed):
                p.requires_grad_(trains)

    def _rests(self, name: str, norm: nn.Module) -> bool:
        weights = list(norm.parameters(recurse=False))
        if not weights:
            frozen, thawed = (any(fits(name, p) for p in ps) for ps in (self.patterns, self.thawed))
            return frozen and not thawed
        return all(id(p) in self.frozen for p in weights)

    def begin(self, optimizers: Iterable[Any]) -> None:
        """Freeze what does not train from the start, once the optimisers are made. Raises
        UsageError for one that takes no weights later."""
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        if self.left and any(g.get("fused") and g.get("momentum") for g in groups):
            raise UsageError(
                "MODEL.THAW: torch's fused SGD with momentum takes no weights later. Make "
                "it with fused=False in build_optimizer."
            )
        for _, _, found in self.left:
            for p in found:
                p.requires_grad_(False)
        self._rest()

    def thaw(self, progress: Progress) -> bool:
        """Switch on what trains from here on; whether that was anything."""
        due = [thaw for thaw in self.left if progress.reached(thaw[0])]
        for thaw in due:
            self.left.remove(thaw)
            for p in thaw[2]:
                p.requires_grad_(True)
                self.frozen.discard(id(p))
            self.thawed.append(thaw[1])
            logger.info("thawed at step %d: %s", progress.step, thaw[1])
        self._rest()
        return bool(due)

    def _rest(self) -> None:
        for name, norm in list(self.norms.items()):
            norm.train(not self._rests(name, norm))
            if norm.training:
                del self.norms[name]
