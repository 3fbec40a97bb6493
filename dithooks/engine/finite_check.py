"""Is a residual finite? Asked of the device when it is kept, and read when it is first to be reused."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..stats.timing import is_capturing, mark

_REDUCED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # dtypes with a norm of their own
_VAST = 1e30  # a dtype with such numbers is not left by a sum of a few residuals


class FiniteCheck:
    """The greatest magnitude in a residual, which is NaN or infinite where any of its numbers is.

    Taking it reads the residual once, on its device. Reading it waits for the device to have come that far, once: the
    host is a step ahead by then, so that little is left to wait for.

    Args:
        tensors: the residual, a tensor for each stream.
        dtypes: of the streams that it will be added to.

    Example:
        >>> FiniteCheck([torch.tensor([-3.0, 2.0])]).peak, FiniteCheck([torch.tensor([1.0, torch.nan])]).peak
        (3.0, nan)
    """

    def __init__(self, tensors: Sequence[Tensor], dtypes: Iterable[torch.dtype] = ()) -> None:
        # Where a graph of the device's work is captured, nothing can be read.
        tensors = [each for each in tensors if each.numel() and not each.is_meta and not is_capturing(each.device)]
        found = [_norm(tensor) for tensor in tensors]
        self.norms = torch.stack([norm.to(found[0].device) for norm in found]) if found else torch.zeros(1)
        self.event: Any = None  # to wait for before they are read; None: reading them waits, if need be
        self.limit = min([torch.finfo(dtype).max for dtype in dtypes], default=math.inf)
        self.is_narrow = self.limit < _VAST
        if self.norms.device.type != "cpu" and (sent := _home(self.norms)) is not None:
            self.norms, self.event = sent

    @property
    def peak(self) -> float:
        """The greatest magnitude; waits for the device."""
        if self.event is not None:
            self.event.synchronize()
        found: list[float] = self.norms.tolist()
        return next((norm for norm in found if not math.isfinite(norm)), max(found))


def _norm(tensor: Tensor) -> Tensor:
    local: Tensor = getattr(tensor, "to_local", lambda: tensor)()  # of a distributed tensor, this rank's part
    wide = local if local.dtype in _REDUCED else local.float()
    norm: Tensor = torch.linalg.vector_norm(wide, torch.inf)
    return norm.double() if wide.dtype is torch.float64 else norm.float()


def _home(norms: Tensor) -> tuple[Tensor, Any] | None:
    """Send numbers to the host's memory; return them and the event to wait for, ``None`` where there are no such."""
    try:
        home = torch.empty(norms.shape, dtype=norms.dtype, pin_memory=True).copy_(norms, non_blocking=True)
    except RuntimeError:  # a device whose host memory cannot be pinned
        return None
    event = mark(norms.device)
    return None if event is None else (home, event)
