"""The parts of a guided batch: the same latents several times, with another prompt each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..stats.timing import is_capturing


def is_repeated(latents: Tensor, count: int) -> bool:
    """Return whether a batch of latents is the same part so many times; this waits for the device.

    Where nothing can be read, on the meta device or while a graph of the device's work is captured, it is not.

    Example: guidance by one call on a batch of both.
        >>> latents = torch.tensor([[1.0], [2.0]])
        >>> is_repeated(torch.cat([latents, latents]), 2), is_repeated(latents, 2)
        (True, False)
    """
    local: Tensor = getattr(latents, "to_local", lambda: latents)()  # of a distributed tensor, this rank's part
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
    total = own.to(torch.promote_types(own.dtype, torch.float32), copy=True)
    columns = [each.chunk(len(weights)) for each in (total, *others)]
    for (first, *more), (part, *parts) in zip(weights, zip(*columns, strict=True), strict=True):
        part.mul_(first)
        for tensor, weight in zip(parts, more, strict=True):
            if weight != 0:
                part.add_(tensor, alpha=weight)
    return total.to(own.dtype)
