"""The parts of a guided batch: the same latents several times, with another prompt each."""

from __future__ import annotations

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
