"""The effect of a range: Δ = h_out − h_in where it is computed, h_in + Δ̂ where it is reused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..blocks.stream_transforms import Concat, Unrelated, build
from ..blocks.wiring import Wiring


def take_residual(wiring: Wiring, entry: Sequence[Tensor], values: Sequence[Any]) -> tuple[Tensor, ...]:
    """Δ of each output of a range, in the place of the streams that entered, where that is possible.

    Args:
        wiring: of the range.
        entry: −h_in of each stream, kept by value; used up.
        values: what its last block returned, by position.

    Returns:
        One residual for each output that is a tensor; none at all where the range changed a stream's form in this
        call, so that nothing could be added back.
    """
    deltas: list[Tensor] = []
    if len(values) != len(wiring.leave) or not entry:
        return ()
    for bridge, value in zip(wiring.leave, values, strict=True):
        if bridge is None:
            if value is not None:  # not returned when the wiring was seen
                return ()
            continue
        before = build(bridge, entry, value.shape) if isinstance(value, Tensor) else None
        if before is None or not _fits(value, before):
            return ()
        made_for_this = wiring.plain or isinstance(bridge, (Concat, Unrelated))
        deltas.append(before.add_(value) if made_for_this else before + value)
    return tuple(deltas)


def apply_residual(wiring: Wiring, streams: Sequence[Any], deltas: Sequence[Tensor]) -> list[Tensor] | None:
    """h_in + Δ̂ for each output of a range; ``None`` if the residuals do not fit what enters it.

    Args:
        wiring: of the range.
        streams: what enters it.
        deltas: a residual for each output that is a tensor.
    """
    bridges = [bridge for bridge in wiring.leave if bridge is not None]
    if len(streams) != len(wiring.entry) or len(bridges) != len(deltas):
        return None
    if not all(isinstance(stream, Tensor) for stream in streams):
        return None
    results = []
    for bridge, delta in zip(bridges, deltas, strict=True):
        before = build(bridge, streams, delta.shape)
        if before is None or not _fits(before, delta):
            return None
        results.append(before + delta)
    return results


def _fits(value: Any, delta: Tensor) -> bool:
    return (
        isinstance(value, Tensor)
        and value.shape == delta.shape
        and value.dtype == delta.dtype
        and value.device == delta.device
    )
