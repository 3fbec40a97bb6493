"""A static cache as closures over each block's ``forward``: the least that a cache of whole blocks can do.

It does what msmodelslim's ``DitCacheAdaptor`` does, as far as its documentation describes it: one counter of blocks, a
step that the user sets, an interval; the first block of the range keeps what enters it, the last one keeps its effect
or adds it. It checks nothing, tells no branches apart and cannot be taken off, so it is a lower bound, not a rival.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

Streams = tuple[Tensor, ...]


def flux_streams(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Streams:
    """Text and image, as FLUX's blocks are given them by keyword."""
    return kwargs["encoder_hidden_states"], kwargs["hidden_states"]


def first_stream(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Streams:
    """The first positional argument, of blocks with one stream."""
    return (args[0],)


class Closures:
    """Every second step reused, over all blocks given, e.g. ``Closures(list(model.blocks), first_stream)``.

    Args:
        blocks: in the order in which the model calls them.
        streams: reads a block's streams from its arguments, in the order of its outputs.
        interval: one of so many steps is computed.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        streams: Callable[[tuple[Any, ...], dict[str, Any]], Streams],
        interval: int = 2,
    ) -> None:
        self.step = self.block = 0
        self.last, self.streams, self.interval = len(blocks) - 1, streams, interval
        self.entry: Streams = ()
        self.effect: Streams = ()
        for block in blocks:
            block.forward = self.wrapped(block.forward)

    def set_step(self, step: int) -> None:
        """Name the sampling step of the calls that follow."""
        self.step = step

    def wrapped(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return a ``forward`` that runs the block, or passes its streams on."""

        def cached(*args: Any, **kwargs: Any) -> Any:
            block = self.block
            self.block = 0 if block == self.last else block + 1
            if self.step % self.interval:
                given = self.streams(args, kwargs)
                if block == self.last:
                    given = tuple([stream + effect for stream, effect in zip(given, self.effect, strict=True)])
                return given if len(given) > 1 else given[0]
            if block == 0:
                self.entry = self.streams(args, kwargs)
            output = forward(*args, **kwargs)
            if block == self.last:
                outputs = output if isinstance(output, tuple) else (output,)
                self.effect = tuple([after - before for after, before in zip(outputs, self.entry, strict=True)])
            return output

        return cached
