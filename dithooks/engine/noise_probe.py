"""Does a model hand a range's streams on as they were recognised? Asked of the model itself, with noise.

Where a model makes new tensors between two blocks, name and shape may say "something was added", though it was flipped
or rolled. On the call that a residual was taken from nothing of that shows, as it cancels out; on other inputs it
would. So the range is passed over twice, the second time with noise added at its first block: the difference at its
last block has to be that noise, joined, cut or turned as recognised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan
from typing import Any

import torch
from torch import Tensor

from ..blocks.stream_transforms import StreamTransform, build, streams_of
from ..blocks.wiring import Wiring
from .additions import added

# Modules that stand between blocks and look at the stream (adapters for faces) answer to the noise, too, and bend it;
# and models overwrite parts (HiDream's text tokens, half of Bria FIBO's channels) that they set for every block.
ALIKE = 0.6


class NoiseProbe:
    """One passage through a range, with or without noise.

    Args:
        wiring: of the range.
        seed: of the noise; ``None``: without.
        size: of the noise, relative to that of each stream.
    """

    def __init__(self, wiring: Wiring, seed: int | None, size: float = 0.1) -> None:
        self.wiring, self.seed, self.size = wiring, seed, size
        self.entered: list[Tensor] = []  # what enters of each stream, noise included
        self.is_whole = False  # all streams are there
        self.is_touched = False  # what arrived is not what was passed on, but written into or replaced
        self._passed: list[tuple[Tensor, int | None]] = []  # on from the first block, and the versions of it
        self.noise: list[Tensor] = []  # of each stream that enters
        self.sizes: list[float] = []  # mean squares, of streams thought to end on the way, too
        self.arrived: list[Tensor | None] = []  # at the last block, by position of its output

    def enter(self, given: Mapping[str, Any], passed: Sequence[Any]) -> list[Any]:
        """What the first block passes on: ``passed``, the noise added. ``given`` are the streams by name."""
        self.is_whole = all(isinstance(given[name], Tensor) for name in self.wiring.entry)
        if not self.is_whole:
            return list(passed)
        carried = self.wiring.block_ios[0].carries
        generator = torch.Generator().manual_seed(self.seed or 0)  # of its own: the user's numbers stay as they are
        noisy = []
        for value in passed:
            noise = torch.zeros_like(value) if isinstance(value, Tensor) else None
            if self.seed is not None and noise is not None and noise.is_floating_point():
                draw = torch.randn(noise.shape, generator=generator).to(noise.device)
                size = value.float().square().mean().sqrt()
                noise = (draw * self.size * torch.where(size > 0, size, 1.0)).to(noise.dtype)
                self.sizes.append(float(noise.float().square().mean()))
            noisy.append(noise)
        streams = dict(zip(carried, noisy, strict=True))
        found = [streams.get(name) for name in self.wiring.entry]
        self.noise = [
            torch.zeros_like(given[name]) if noise is None else noise
            for name, noise in zip(self.wiring.entry, found, strict=True)
        ]
        self.entered = [given[name] + noise for name, noise in zip(self.wiring.entry, self.noise, strict=True)]
        passed = [value if noise is None else value + noise for value, noise in zip(passed, noisy, strict=True)]
        self._passed = [(value, _version(value)) for value in passed if isinstance(value, Tensor)]
        return passed

    def leave(self, arrived: Sequence[Any]) -> None:
        """What reaches the last block."""
        self.arrived = [value.clone() if isinstance(value, Tensor) else None for value in arrived]
        if self.wiring.certain and self.wiring.hands_on:  # else another object shows nothing
            at_last = set(map(id, arrived))
            self.is_touched = any(id(v) not in at_last or _version(v) != version for v, version in self._passed)
        self._passed = []

    def added(self) -> list[Tensor | None]:
        """Return what was added on the way, for each output of the range that is a tensor."""
        pairs = zip(self.wiring.leave, self.arrived, strict=True)
        return added(self.wiring, [value for bridge, value in pairs if bridge is not None], self.entered)


def few(probe: NoiseProbe) -> bool:
    """Whether a stream has so few numbers that noise could look alike by chance."""
    return any(0 < each.numel() < 1000 for each in probe.noise)


def are_independent(quiet: NoiseProbe, noisy: NoiseProbe) -> list[bool]:
    """Return of each output that is a tensor whether what is added on the way is the same with noise in the streams.

    Rounding may differ by a share of what arrived: the noise is to be of the size of the streams.
    """
    arrived = [value for bridge, value in zip(noisy.wiring.leave, noisy.arrived, strict=True) if bridge is not None]
    found = []
    for one, other, whole in zip(quiet.added(), noisy.added(), arrived, strict=True):
        if one is None or other is None or whole is None or one.shape != other.shape or one.is_meta:
            found.append(False)
        else:
            allowed = max(1e-3, 8 * torch.finfo(whole.dtype).eps) * float(whole.float().norm())
            found.append(float((other.float() - one.float()).norm()) <= allowed)
    return found


def likeness(quiet: NoiseProbe, noisy: NoiseProbe) -> list[float]:
    """For each output of the range, how much the noise that arrived is like that expected, from 0 to 1; 1 if none was.

    That is the least of: their cosine; twice the share that arrived of the noise of one stream; and what lacks of 1
    where some arrived at tokens where none was expected. NaN where the dtype has no numbers as great or as small.
    """
    found = []
    size = min(noisy.sizes, default=1.0)
    for position, bridge in enumerate(noisy.wiring.leave):
        before, after = quiet.arrived[position], noisy.arrived[position]
        if bridge is None or before is None or after is None:
            found.append(1.0)
        elif before.shape != after.shape:
            found.append(0.0)
        elif not size:
            found.append(nan)
        else:
            arrived = after.float() - before.float()
            whole = _expected(bridge, noisy.noise, None, arrived)
            shares = [
                2 * float((arrived * part).sum() / part.square().sum())
                for number in set(streams_of(bridge))
                if bool((part := _expected(bridge, noisy.noise, number, arrived)).any())
            ]
            cosine = float(torch.cosine_similarity(arrived.flatten(), whole.flatten(), dim=0)) if shares else 1.0
            found.append(min([cosine, *shares, 1 - _astray(arrived, whole) / size]))
    return found


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _astray(arrived: Tensor, expected: Tensor) -> float:
    """Mean square of what arrived at tokens where nothing was expected."""
    silent = ~expected.any(-1)
    return float(arrived[silent].square().mean()) if bool(silent.any()) else 0.0


def _expected(bridge: StreamTransform, noise: Sequence[Tensor], only: int | None, like: Tensor) -> Tensor:
    """What becomes of the noise, or of that of one stream; infinite where it cannot have the form that arrived."""
    chosen = [each if only in (None, number) else torch.zeros_like(each) for number, each in enumerate(noise)]
    made = build(bridge, chosen, like.shape)
    return torch.full_like(like, torch.inf) if made is None else made.float()
