"""Is a residual finite? Asked of the device when it is kept, and read when it is first to be reused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..stats.timing import is_capturing, mark

_REDUCED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # dtypes with a norm of their own
_HOST = "cpu"
_VAST = 1e30  # a dtype with such numbers is not left by a sum of a few residuals


class FiniteCheck:
    """The greatest magnitude in a residual, which is NaN or infinite where any of its numbers is.

    Taking it reads the residual once, on its device. Reading it waits for the device to have come that far, once: the
    host is a step ahead by then, so that little is left to wait for.

    Args:
        tensors: the residual, a tensor for each stream.
        dtypes: of the streams that these will be added to.

    Example:
        >>> FiniteCheck([torch.tensor([-3.0, 2.0])]).peak, FiniteCheck([torch.tensor([1.0, torch.nan])]).peak
        (3.0, nan)
    """

    def __init__(self, tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype] = ()) -> None:
        found = [_norm(tensor) for tensor in tensors]
        self.norms = torch.stack([norm.to(found[0].device) for norm in found]) if found else torch.zeros(1)
        self.event: Any = None  # to wait for before they are read; None: they are on the host
        self.limits = [torch.finfo(dtype).max for dtype in dtypes]
        self.is_narrow = min(self.limits, default=math.inf) < _VAST
        if self.norms.device.type != _HOST:
            self._taken = self.norms
            self.norms, self.event = _home(self.norms)

    @property
    def peaks(self) -> list[float]:
        """The greatest magnitude of each stream; waits for the device."""
        if self.event is not None:
            try:
                self.event.synchronize()
            except (RuntimeError, NotImplementedError):  # a device that waits for all or nothing: for all, then
                self.norms, self.event = self._taken.cpu(), None
        found: list[float] = self.norms.tolist()
        return found

    @property
    def peak(self) -> float:
        """The greatest magnitude of all; waits for the device."""
        found = self.peaks
        return next((norm for norm in found if not math.isfinite(norm)), max(found))

    @property
    def is_out_of_reach(self) -> bool:
        """Whether to wait for the device would break off a graph of its work, which is being captured."""
        return self.event is not None and is_capturing(self._taken.device)


def is_beyond(checks: Sequence[FiniteCheck], weights: Sequence[float]) -> bool:
    """Return whether Σ w_k Δ_k may have numbers that the dtype of a stream has not.

    Example:
        >>> delta, dtypes = torch.tensor([4e4]), (torch.float16, torch.float32)
        >>> [is_beyond([FiniteCheck([delta], [dtype])] * 2, (2.0, -1.0)) for dtype in dtypes]
        [True, False]
    """
    sizes = [0.0] * len(checks[0].limits)
    for check, weight in zip(checks, weights, strict=True):
        sizes = [size + abs(weight) * peak for size, peak in zip(sizes, check.peaks, strict=True)]
    return any(size > limit for size, limit in zip(sizes, checks[0].limits, strict=True))


def _norm(tensor: Tensor) -> Tensor:
    local: Tensor = getattr(tensor, "to_local", lambda: tensor)()  # of a distributed tensor, this rank's part
    if local.is_meta or is_capturing(local.device):  # where a graph of the device's work is captured, nothing is read
        return torch.zeros(())
    if not local.numel():
        return torch.zeros((), device=local.device)
    wide = local if local.dtype in _REDUCED or local.is_complex() else local.float()
    norm: Tensor = torch.linalg.vector_norm(wide, torch.inf)
    return norm if norm.dtype is torch.float64 else norm.float()


class _NoEvent:
    """In an event's place, where none can be had."""

    def synchronize(self) -> None:
        raise NotImplementedError


def _home(norms: Tensor) -> tuple[Tensor, Any]:
    """Send numbers to the host's memory; return them there, or where they are, and what to wait for."""
    try:
        home = torch.empty(norms.shape, dtype=norms.dtype, pin_memory=True).copy_(norms, non_blocking=True)
    except RuntimeError:  # a device whose host memory cannot be pinned
        return norms, _NoEvent()
    event = mark(norms.device)
    return (norms, _NoEvent()) if event is None else (home, event)
