"""The effect of a range: take Δ = h_out − h_in where it is computed, apply h_in + Δ̂ where it is reused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..blocks.observation import ObservedBlock
from ..blocks.stream_transforms import Concat, Stream, Unrelated, build
from ..blocks.wiring import Wiring
from .call import Capture


def capture_input(
    capture: Capture, wiring: Wiring | None, first: ObservedBlock, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Keep −h_in, by value, as the first block is about to run; return whether that could be done."""
    if wiring is not None:
        io = wiring.block_ios[0]
        streams = [io.read(name, args, kwargs) for name in wiring.entry]
        if not all(isinstance(stream, Tensor) for stream in streams):  # one that this call does without
            return False
        capture.entry = [torch.neg(stream) for stream in streams]
    else:  # which of them are streams shows when the transformer returns
        tensors = {n: value for n, value in first.reader.arguments(args, kwargs).items() if isinstance(value, Tensor)}
        capture.entry = {name: torch.neg(value) for name, value in tensors.items() if value.is_floating_point()}
    return True


def capture_output(
    capture: Capture, wiring: Wiring | None, last: ObservedBlock, output: Any, with_output: bool = False
) -> None:
    """Take Δ as the last block has run; ``with_output``: keep h_out of the streams that are measured, too."""
    capture.complete = True
    values = last.reader.take(output)[1]
    if isinstance(capture.entry, list):
        assert wiring is not None
        if with_output:
            capture.output = _measured(wiring, values)
        capture.deltas, capture.entry = take_residual(wiring, capture.entry, values), None
    else:
        capture.exit = tuple(value.clone() if isinstance(value, Tensor) else None for value in values)


def finish_capture(capture: Capture, wiring: Wiring, with_output: bool = False) -> None:
    """Take Δ of what was captured before the wiring was known."""
    named, capture.entry = capture.entry, None
    if not isinstance(named, dict) or not capture.exit or not set(wiring.entry) <= set(named):
        return
    if with_output:
        capture.output = _measured(wiring, capture.exit)
    capture.deltas, capture.exit = take_residual(wiring, [named[name] for name in wiring.entry], capture.exit), ()


def metric_inputs(wiring: Wiring, read: Callable[[str], Any]) -> tuple[Tensor, ...] | None:
    """Return what a change metric looks at of what enters the first block; ``read`` gives a stream by its name."""
    streams = tuple(read(wiring.entry[number]) for number in wiring.measured)
    return streams if all(isinstance(each, Tensor) for each in streams) else None


def measured_deltas(capture: Capture, wiring: Wiring) -> tuple[Tensor, ...] | None:
    """Return Δ of the outputs that hold the streams that are measured."""
    positions = [position for position, bridge in enumerate(wiring.leave) if bridge is not None]
    if len(capture.deltas) != len(positions):
        return None
    return tuple(capture.deltas[positions.index(carrier)] for carrier in wiring.measured_outputs)


def clones(tensors: tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
    """Return the same in memory of its own."""
    return None if tensors is None else tuple(each.clone() for each in tensors)


def take_residual(wiring: Wiring, entry: Sequence[Tensor], values: Sequence[Any]) -> tuple[Tensor, ...]:
    """Return Δ of each output of a range, made in the place of the streams that entered, where that is possible.

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
    """Return h_in + Δ̂ for each output of a range; ``None`` if the residuals do not fit what enters it.

    Args:
        wiring: of the range.
        streams: what enters it.
        deltas: a residual for each output that is a tensor.
    """
    if len(streams) != len(wiring.entry) or len(wiring.outputs) != len(deltas):
        return None
    results = []
    for bridge, delta in zip(wiring.outputs, deltas, strict=True):
        if type(bridge) is Stream:
            before = streams[bridge.number]
        else:
            before = build(bridge, streams, delta.shape) if all(isinstance(s, Tensor) for s in streams) else None
        if not isinstance(before, Tensor) or not _fits(before, delta):
            return None
        results.append(before + delta)
    return results


def _fits(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and one.device == other.device


def _measured(wiring: Wiring, values: Sequence[Any]) -> tuple[Tensor, ...] | None:
    """Return a copy of the outputs that hold the streams that are measured."""
    found = tuple(values[carrier] for carrier in wiring.measured_outputs if carrier < len(values))
    return tuple(value.clone() for value in found) if all(isinstance(value, Tensor) for value in found) else None
