"""Models that several ranks run together: sharded weights, divided tokens."""

from __future__ import annotations

import sys

from torch import nn


def shared_by_ranks(model: nn.Module) -> str | None:
    """Describe how several ranks run a model together and so have to skip the same blocks; ``None`` if they do not."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    if getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None) is not None:
        return "its tokens are split over ranks (context parallel)"
    fsdp, tensor = (sys.modules.get(f"torch.distributed.{name}") for name in ("fsdp", "tensor"))
    sharded = tuple(
        each for name in ("FSDPModule", "FullyShardedDataParallel") if (each := getattr(fsdp, name, None)) is not None
    )
    if sharded and any(isinstance(module, sharded) for module in model.modules()):
        return "its weights are sharded over ranks (FSDP)"
    dtensor = getattr(tensor, "DTensor", None)
    if dtensor is not None and any(isinstance(parameter, dtensor) for parameter in model.parameters()):
        return "its weights are sharded over ranks (DTensor)"
    return None
