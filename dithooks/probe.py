"""Does a model hand a range's streams on as they were recognised? Asked of the model itself, with noise.

Where a model makes new tensors between two blocks, name and shape may say "something was added", though it was flipped
or rolled. On the call that a residual was taken from nothing of that shows, as it cancels out; on other inputs it
would. So the range is passed over twice, the second time with noise added at its first block: the difference at its
last block has to be that noise, joined, cut or turned as recognised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .blocks.bridge import Joined, build, lengths
from .blocks.wiring import Wiring

# Modules that stand between blocks and look at the stream (adapters for faces) answer to the noise, too, and bend it.
ALIKE = 0.5


class Probe:
    """One passage through a range, with or without noise.

    Args:
        wiring: of the range.
        noisy: whether noise is added.
    """

    def __init__(self, wiring: Wiring, noisy: bool) -> None:
        self.wiring, self.noisy = wiring, noisy
        self.noise: list[Tensor] = []  # of each stream that enters
        self.arrived: list[Tensor | None] = []  # at the last block, by position of its output

    def enter(self, given: Mapping[str, Any], passed: Sequence[Any]) -> list[Any]:
        """What the first block passes on: ``passed``, the noise added. ``given`` are the streams by name."""
        carried = self.wiring.ports[0].carries
        generator = torch.Generator().manual_seed(0)  # of its own: the user's numbers stay as they are
        noise: dict[str, Tensor] = {}
        for name, value in given.items():
            noise[name] = torch.zeros_like(value)
            if self.noisy and name in carried and value.is_floating_point():
                draw = torch.randn(value.shape, generator=generator).to(value.device)
                noise[name] = (draw * 0.1 * value.float().square().mean().sqrt()).to(value.dtype)
        self.noise = [noise[name] for name in self.wiring.entry]
        return [
            value if name not in noise or not isinstance(value, Tensor) else value + noise[name]
            for name, value in zip(carried, passed, strict=True)
        ]

    def leave(self, arrived: Sequence[Any]) -> None:
        """What reaches the last block."""
        self.arrived = [value.clone() if isinstance(value, Tensor) else None for value in arrived]


def likeness(quiet: Probe, noisy: Probe) -> list[float]:
    """For each output of the range, the cosine between the noise that arrived and that expected; 1 if none was.

    Of streams that are joined, the worst.
    """
    found = []
    for position, bridge in enumerate(noisy.wiring.leave):
        before, after = quiet.arrived[position], noisy.arrived[position]
        if bridge is None or before is None or after is None:
            found.append(1.0)
            continue
        expected = build(bridge, noisy.noise, after.shape)
        if expected is None or before.shape != after.shape:
            found.append(0.0)
            continue
        arrived, parts = after.float() - before.float(), [after.shape[0]]
        dim = 0
        if isinstance(bridge, Joined):
            dim, parts = bridge.dim, lengths(bridge, noisy.noise, after.shape) or parts
        pairs = zip(arrived.split(parts, dim), expected.float().split(parts, dim), strict=True)
        found.append(min(_cosine(a, b) for a, b in pairs))
    return found


def _cosine(arrived: Tensor, expected: Tensor) -> float:
    if not bool(expected.any()):
        return 1.0
    return float(torch.cosine_similarity(arrived.flatten(), expected.flatten(), dim=0))
