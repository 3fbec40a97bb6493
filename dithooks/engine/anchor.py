"""A residual (or output) that is kept, in the form it is kept in; and that of a reused step, made of some of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..predictors.predictor import Moment
from .arguments import Signature
from .batch_parts import combined_by_part
from .finite_check import FiniteCheck


@dataclass(frozen=True, eq=False)
class Anchor:
    """The range's effect on each stream at a computed step: output of its last block − input of its first.

    Args:
        moment: of that step.
        signature: of the call.
        kept: a residual for each stream, in the dtype and on the device chosen for keeping it.
        forms: dtype and device of each stream.
        is_as_taken: whether the residuals are kept in just these.
        check: whether all its numbers are finite; ``None`` if that is not asked.
    """

    moment: Moment
    signature: Signature
    kept: tuple[Tensor, ...]
    forms: tuple[tuple[torch.dtype, torch.device], ...]
    is_as_taken: bool = True
    check: FiniteCheck | None = None

    @classmethod
    def keep(
        cls,
        moment: Moment,
        signature: Signature,
        deltas: Sequence[Tensor],
        dtype: torch.dtype | None,
        device: str | None,
        is_checked: bool = True,
    ) -> Anchor:
        """Take residuals over, as they are or converted and moved; nothing is waited for."""
        kept = [delta if dtype is None else delta.to(dtype) for delta in deltas]
        check = FiniteCheck(kept, [delta.dtype for delta in deltas]) if is_checked else None
        if device is not None:
            kept = [_moved(delta, device) for delta in kept]
        forms = tuple((delta.dtype, delta.device) for delta in deltas)
        as_taken = forms == tuple((tensor.dtype, tensor.device) for tensor in kept)
        return cls(moment, signature, tuple(kept), forms, as_taken, check)

    @property
    def shapes(self) -> list[torch.Size]:
        """Shape of each stream's residual."""
        return [delta.shape for delta in self.kept]

    @property
    def nbytes(self) -> int:
        """Memory of the kept residuals, wherever they lie."""
        return sum([delta.nbytes for delta in self.kept])


def weighted_sum(anchors: Sequence[Anchor], weights: Sequence[float]) -> tuple[Tensor, ...]:
    """Σ w_k Δ_k for each stream, in the stream's dtype and on its device; the one anchor itself where there is but one.

    Two anchors whose weights add up to 1 (any line through them) are read once each, and the result is written once.
    Three and more are added up in float32 at least: large weights of opposite signs would lose what half precision has.

    Args:
        anchors: of one signature.
        weights: as many; those with 0 are not read.
    """
    terms = [(anchor, weight) for anchor, weight in zip(anchors, weights, strict=True) if weight != 0]
    results = []
    for stream, (dtype, device) in enumerate(anchors[0].forms):
        tensors = [(anchor.kept[stream].to(device, non_blocking=True), weight) for anchor, weight in terms]
        results.append(_sum(tensors).to(dtype) if tensors else torch.zeros_like(anchors[0].kept[stream], dtype=dtype))
    return tuple(results)


def sum_by_part(anchors: Sequence[Anchor], weights: Sequence[Sequence[float]]) -> tuple[Tensor, ...]:
    """Return the same of a batch, each of its equal parts by weights of its own."""
    results = []
    for stream, (dtype, device) in enumerate(anchors[0].forms):
        tensors = [anchor.kept[stream].to(device, non_blocking=True) for anchor in anchors]
        results.append(combined_by_part(weights, tensors).to(dtype))
    return tuple(results)


def _sum(terms: Sequence[tuple[Tensor, float]]) -> Tensor:
    (newest, weight), *others = terms
    if not others:
        return newest if weight == 1 else newest * weight
    if len(others) == 1 and abs(weight + others[0][1] - 1) < 1e-6:
        return torch.lerp(others[0][0], newest, weight)
    wide = torch.promote_types(newest.dtype, torch.float32) if len(others) > 1 else newest.dtype
    total = newest.to(wide) * weight
    for tensor, factor in others:
        total.add_(tensor, alpha=factor)
    return total


def _moved(tensor: Tensor, device: str) -> Tensor:
    """A copy in the host's memory: pinned, so that neither this copy nor the one back waits.

    Both are queued on the stream that computes, so that each sees what it should.
    """
    if tensor.device.type in (device, "meta"):
        return tensor
    try:
        home = torch.empty(tensor.shape, dtype=tensor.dtype, device=device, pin_memory=True)
    except RuntimeError:  # a device whose host memory cannot be pinned
        return tensor.to(device)
    return home.copy_(tensor, non_blocking=True)
