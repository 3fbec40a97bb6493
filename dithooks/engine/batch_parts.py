"""The parts of a guided batch: the same latents several times, with another prompt each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks.block_io import parameter_names
from ..stats.timing import is_capturing
from .arguments import TIME


def is_repeated(latents: Tensor, count: int) -> bool:
    """Return whether a batch of latents is the same part so many times; this waits for the device.

    Where nothing can be read, on the meta device or while a graph of the device's work is captured, it is not.

    Example: guidance by one call on a batch of both.
        >>> latents = torch.tensor([[1.0], [2.0]])
        >>> is_repeated(torch.cat([latents, latents]), 2), is_repeated(latents, 2)
        (True, False)
    """
    local: Tensor = getattr(latents, "to_local", lambda: latents)()  # of a distributed tensor, this rank's part
    if _is_split(latents):  # over the ranks: the rows here are no parts of the batch
        return False
    if not local.dim() or not len(local) or len(local) % count or local.is_meta or is_capturing(local.device):
        return False
    first, *others = local.chunk(count)
    return all(torch.equal(first, other) for other in others)


def combined_by_part(weights: Sequence[Sequence[float]], tensors: Sequence[Tensor]) -> Tensor:
    """Return Σ w_k x_k of each equal part of a batch, by weights of its own, added up in float32 at least.

    Example:
        >>> combined_by_part([(1.0,), (0.5,)], [torch.tensor([2.0, 3.0, 4.0, 6.0])])
        tensor([2., 3., 2., 3.])
    """
    own, *others = tensors
    if _is_split(own):  # its chunks are copies: sums written into them would be lost
        split: list[Any] = list(tensors)
        whole: Any = combined_by_part(weights, [each.redistribute(placements=_gathered(each)) for each in split])
        summed: Tensor = whole.redistribute(placements=split[0].placements)
        return summed
    total = own.to(torch.promote_types(own.dtype, torch.float32), copy=True)
    columns = [each.chunk(len(weights)) for each in (total, *others)]
    for (first, *more), (part, *parts) in zip(weights, zip(*columns, strict=True), strict=True):
        part.mul_(first)
        for tensor, weight in zip(parts, more, strict=True):
            if weight != 0:
                part.add_(tensor, alpha=weight)
    return total.to(own.dtype)


def repeated_argument(model: nn.Module) -> tuple[int, str]:
    """Return position and name of the argument whose parts are compared: a model's first one that is no time."""
    return next(((place, name) for place, name in enumerate(parameter_names(model)) if name not in TIME), (0, ""))


def _is_split(tensor: Any) -> bool:
    """Return whether the rows of a distributed tensor lie on several ranks."""
    return any(each.is_shard(0) for each in getattr(tensor, "placements", ()))


def _gathered(tensor: Any) -> list[Any]:
    from torch.distributed.tensor import Replicate

    return [Replicate() if each.is_shard(0) else each for each in tensor.placements]
