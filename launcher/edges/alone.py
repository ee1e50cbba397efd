"""What a task does on one rank alone, while the others wait for its result."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from launcher.errors import RunError


class Alone(TorchDispatchMode):
    """A context in which a collective is an error before it begins: no other rank would come.

    All of torch.distributed's pass through torch's dispatcher, whoever calls them (torch's own
    `CommDebugMode` counts them in the same way).
    """

    def __init__(self, method: str) -> None:
        super().__init__()
        self.method = method

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            raise RunError(
                f"{self.method} began a collective ({func.name()}), but runs on rank 0 alone: it "
                "would wait for the others for ever. It is given what all ranks' eval_step "
                "returned, so nothing need be exchanged; metrics of torchmetrics take "
                "sync_on_compute=False."
            )
        return func(*args, **(kwargs or {}))
