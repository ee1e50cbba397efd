"""Gradients of all ranks together: torch's DistributedDataParallel, by the keys of DIST."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel as DDP

from launcher.config import CfgNode


def exchanging(
    module: nn.Module, cfg: CfgNode, ignored: Iterable[str], carrier: torch.Tensor
) -> DDP:
    """The module with its gradients averaged over the ranks. Buffers of `ignored` names are each
    rank's own; the gradient of `carrier` holds whole numbers, which are not rounded. A collective.
    """
    # Else DDP would give them rank 0's values before each forward pass.
    module._ddp_params_and_buffers_to_ignore = list(ignored)  # type: ignore[assignment]
    ddp = DDP(
        module,
        gradient_as_bucket_view=True,
        find_unused_parameters=cfg.DIST.FIND_UNUSED_PARAMETERS,
        static_graph=cfg.DIST.STATIC_GRAPH,
        bucket_cap_mb=cfg.DIST.BUCKET_MB or None,
    )
    if cfg.DIST.GRADIENT_COMPRESSION:
        # Without annotations, which are text here, and DDP compares them with its own.
        def hook(group, bucket):  # type: ignore[no-untyped-def]
            if any(p is carrier for p in bucket.parameters()):
                return default_hooks.allreduce_hook(group, bucket)
            return default_hooks.bf16_compress_hook(group, bucket)

        ddp.register_comm_hook(None, hook)
    return ddp
