"""The residual of a range: take Δ = h_out − h_in on a computed step, return h_in + Δ̂ on a reused one."""

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
    """Store −h_in, copied, before the first block runs; return whether every stream was a tensor."""
    if wiring is not None:
        io = wiring.block_ios[0]
        streams = [io.read(name, args, kwargs) for name in wiring.entry]
        if not all(isinstance(stream, Tensor) for stream in streams):  # this call leaves a stream out
            return False
        capture.entry = [torch.neg(stream) for stream in streams]
    else:  # take all: which arguments are streams is known when the transformer returns
        tensors = {n: value for n, value in first.reader.arguments(args, kwargs).items() if isinstance(value, Tensor)}
        capture.entry = {name: torch.neg(value) for name, value in tensors.items() if value.is_floating_point()}
    return True


def capture_output(
    capture: Capture, wiring: Wiring | None, last: ObservedBlock, output: Any, with_output: bool = False
) -> None:
    """Take Δ after the last block has run; ``with_output``: also copy h_out of the measured streams."""
    capture.complete = True
    values = last.reader.take(output)[1] if wiring is None else wiring.block_ios[-1].take(output)
    if isinstance(capture.entry, list):
        assert wiring is not None
        if with_output:
            capture.output = measured_outputs(wiring, values)
        capture.deltas, capture.entry = take_residual(wiring, capture.entry, values), None
    else:
        copies = {id(value): value.clone() for value in values if isinstance(value, Tensor)}  # one of each
        capture.exit = tuple(copies.get(id(value)) for value in values)


def finish_capture(capture: Capture, wiring: Wiring, with_output: bool = False) -> None:
    """Take Δ of a call that was captured before the wiring was known."""
    named, capture.entry = capture.entry, None
    if not isinstance(named, dict) or not capture.exit or not set(wiring.entry) <= set(named):
        return
    io = wiring.block_ios[-1]
    kept, taken = io.kept or (None,) * len(capture.exit), io.output_builder.without_twins(capture.exit)
    values = [value if name is None else None for value, name in zip(taken, kept, strict=False)]
    if with_output:
        capture.output = measured_outputs(wiring, values)
    capture.deltas, capture.exit = take_residual(wiring, [named[name] for name in wiring.entry], values), ()


def metric_inputs(wiring: Wiring, read: Callable[[str], Any]) -> tuple[Tensor, ...] | None:
    """Return the first block's measured streams, if all are tensors; ``read`` returns a stream by its name."""
    streams = tuple(read(wiring.entry[number]) for number in wiring.measured)
    return streams if all(isinstance(stream, Tensor) for stream in streams) else None


def measured_deltas(capture: Capture, wiring: Wiring) -> tuple[Tensor, ...] | None:
    """Return Δ of the outputs that hold the measured streams, or ``None`` if none was taken."""
    positions = [position for position, bridge in enumerate(wiring.leave) if bridge is not None]
    if len(capture.deltas) != len(positions):
        return None
    return tuple(capture.deltas[positions.index(carrier)] for carrier in wiring.measured_outputs)


def clones(tensors: tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
    """Return a copy of each tensor."""
    return None if tensors is None else tuple(tensor.clone() for tensor in tensors)


def take_residual(wiring: Wiring, entry: Sequence[Tensor], values: Sequence[Any]) -> tuple[Tensor, ...]:
    """Return Δ of each output in that one's dtype, computed in the memory of −h_in where possible.

    Args:
        wiring: the wiring of the range.
        entry: copies of −h_in, one for each stream; overwritten.
        values: the outputs of the last block, by position.

    Returns:
        One residual for each output that is a tensor; an empty tuple if the range changed the form of a stream in this
        call, so that no residual could be added to it.
    """
    deltas: list[Tensor] = []
    if len(values) != len(wiring.leave) or not entry:
        return ()
    for bridge, value in zip(wiring.leave, values, strict=True):
        if bridge is None:
            if value is not None:  # an output that the wiring does not have
                return ()
            continue
        before = build(bridge, entry, value.shape) if isinstance(value, Tensor) else None
        if before is None or not _fits(value, before):
            return ()
        made_for_this = wiring.plain or isinstance(bridge, (Concat, Unrelated))
        if before.dtype is not value.dtype:  # a stream changes its dtype in the range, as under autocast
            before, made_for_this = before.to(value.dtype), True
        deltas.append(before.add_(value) if made_for_this else before + value)
    return tuple(deltas)


def apply_residual(wiring: Wiring, streams: Sequence[Any], deltas: Sequence[Tensor]) -> list[Tensor] | None:
    """Return h_in + Δ̂ for each output, in the dtype that it had; or ``None`` if a residual does not fit.

    Args:
        wiring: the wiring of the range.
        streams: h_in of each stream.
        deltas: Δ̂ of each output that is a tensor.
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
        if before.dtype is not delta.dtype:
            before = before.to(delta.dtype)
        results.append(before + delta)
    return results


def _fits(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.device == other.device


def measured_outputs(wiring: Wiring, values: Sequence[Any]) -> tuple[Tensor, ...] | None:
    """Return a copy of the outputs that hold the measured streams."""
    outputs = tuple(values[carrier] for carrier in wiring.measured_outputs if carrier < len(values))
    return tuple(output.clone() for output in outputs) if all(isinstance(o, Tensor) for o in outputs) else None
