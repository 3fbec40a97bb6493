"""Capture what some blocks did to the streams in one call: from what enters the first and what leaves the last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..blocks.observation import ObservedBlock
from ..blocks.wiring import Wiring
from .call import Capture
from .residual import take_residual


def capture_input(
    capture: Capture, wiring: Wiring | None, spot: ObservedBlock, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """The first block is about to run: keep −h_in, by value. Returns whether that could be done."""
    if wiring is not None:
        ports = wiring.ports[0]
        streams = [ports.read(name, args, kwargs) for name in wiring.entry]
        if not all(isinstance(stream, Tensor) for stream in streams):  # one that this call does without
            return False
        capture.entry = [torch.neg(stream) for stream in streams]
    else:  # which of them are streams shows when the transformer returns
        tensors = {n: value for n, value in spot.face.arguments(args, kwargs).items() if isinstance(value, Tensor)}
        capture.entry = {name: torch.neg(value) for name, value in tensors.items() if value.is_floating_point()}
    return True


def capture_output(
    capture: Capture, wiring: Wiring | None, spot: ObservedBlock, output: Any, wholly: bool = False
) -> None:
    """The last block has run: Δ = h_out − h_in; ``wholly``: keep h_out of what is looked at, too."""
    capture.left = True
    values = spot.face.take(output)[1]
    if isinstance(capture.entry, list):
        assert wiring is not None
        if wholly:
            capture.output = _looked(wiring, values)
        capture.deltas, capture.entry = take_residual(wiring, capture.entry, values), None
    else:
        capture.exit = tuple(value.clone() if isinstance(value, Tensor) else None for value in values)


def finish_capture(capture: Capture, wiring: Wiring, wholly: bool = False) -> None:
    """What was captured before the wiring was known is made out now."""
    named, capture.entry = capture.entry, None
    if not isinstance(named, dict) or not capture.exit or not set(wiring.entry) <= set(named):
        return
    if wholly:
        capture.output = _looked(wiring, capture.exit)
    capture.deltas, capture.exit = take_residual(wiring, [named[name] for name in wiring.entry], capture.exit), ()


def metric_inputs(wiring: Wiring, read: Callable[[str], Any]) -> tuple[Tensor, ...] | None:
    """What is looked at of what enters the first block; ``read`` gives a stream by its name."""
    found = tuple(read(wiring.entry[number]) for number in wiring.looked)
    return found if all(isinstance(each, Tensor) for each in found) else None


def effect(capture: Capture, wiring: Wiring) -> tuple[Tensor, ...] | None:
    """Δ of the outputs that hold what is looked at."""
    positions = [position for position, bridge in enumerate(wiring.leave) if bridge is not None]
    if len(capture.deltas) != len(positions):
        return None
    return tuple(capture.deltas[positions.index(carrier)] for carrier in wiring.carriers)


def copied(tensors: tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
    """The same in memory of their own."""
    return None if tensors is None else tuple(each.clone() for each in tensors)


def _looked(wiring: Wiring, values: Sequence[Any]) -> tuple[Tensor, ...] | None:
    found = tuple(values[carrier] for carrier in wiring.carriers if carrier < len(values))
    return tuple(value.clone() for value in found) if all(isinstance(value, Tensor) for value in found) else None
