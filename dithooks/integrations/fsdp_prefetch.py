"""Weights that FSDP has prefetched for blocks that are then skipped.

With ``set_modules_to_forward_prefetch`` a block requests the weights of others before these run. Weights that arrive
for a skipped block are kept until it next runs, although newer ones may have been loaded by then: they are dropped.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import nn


def sharded(blocks: Iterable[nn.Module]) -> bool:
    """Return whether FSDP shards one of some blocks."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return kind is not None and any(issubclass(cls, kind) for cls in set(map(type, blocks)))


def drop_prefetched(blocks: Iterable[nn.Module]) -> None:
    """Drop what has come, or is on its way, for blocks in which nothing ran. No rank is asked for anything.

    Args:
        blocks: of the range.
    """
    from torch.distributed.fsdp import FSDPModule

    for block in blocks:
        if isinstance(block, FSDPModule) and _waiting(block._get_fsdp_state()):
            block.unshard()  # takes what has come
            block.reshard()


def _waiting(state: Any) -> bool:
    groups = getattr(state, "_fsdp_param_groups", None)  # PyTorch's own affair: one group, in older releases
    groups = [getattr(state, "_fsdp_param_group", None)] if groups is None else groups
    return any(getattr(group, "_all_gather_result", None) is not None for group in groups)
