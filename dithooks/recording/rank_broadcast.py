"""Several processes that search together: what rank 0 has measured holds for all."""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def broadcast_from_rank_0(value: T) -> T:
    """Return rank 0's value on every rank. All ranks have to call this equally often, in the same order.

    Measured times differ from rank to rank, and so would decisions that are made on them. The value is pickled, and
    travels on the device of the group's backend: with NCCL and HCCL, the process's current device.

    Args:
        value: counts on rank 0 only.

    Example:
        >>> broadcast_from_rank_0(1.5)  # unchanged in a single process
        1.5
    """
    if is_single_process():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_all_ranks(value: bool) -> bool:
    """Return whether a value is true on every rank. All ranks have to call this.

    Example:
        >>> on_all_ranks(True), on_all_ranks(False)
        (True, False)
    """
    if is_single_process():
        return value
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return all(values)


def is_rank_0() -> bool:
    """Whether this process is rank 0, or the only one: it writes files and progress."""
    return is_single_process() or dist.get_rank() == 0


def is_single_process() -> bool:
    """Whether ``torch.distributed`` has no other process."""
    return not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1
