"""Several processes that search together: what the first one has measured holds for all."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def agree(value: T) -> T:
    """The first process's value, in every process. All of them have to call it, as often and in the same order.

    Times differ from process to process, and so would decisions that are made on them. The value is pickled, and
    travels on the device of the group's backend: of NCCL and HCCL, the process's current device.

    Args:
        value: what is to be the same everywhere; it counts in the first process only.

    Example:
        >>> agree(1.5)  # in one process, what it is
        1.5
    """
    if alone():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def leads() -> bool:
    """Whether this is the first process, or the only one: the one that writes and prints."""
    return alone() or dist.get_rank() == 0


def alone() -> bool:
    """Whether there is no other process."""
    return not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1
