"""The passes of a loop that calls blocks without their transformer, each observed by itself."""

from __future__ import annotations

from collections.abc import Sequence

from ..blocks.held_outputs import HeldOutputs
from ..blocks.observation import Observation, ObservedBlock

MOST_LOOKED_AT = 3  # passes: to look for lists that hold outputs goes through all objects


class LoopPasses:
    """Splits the calls of blocks into passes: a new one begins where a block is called again.

    Args:
        observed: all blocks.
        ordered: whether the blocks are one list, so that a call of an earlier block also begins a pass.
    """

    def __init__(self, observed: Sequence[ObservedBlock], ordered: bool) -> None:
        self._observed, self._ordered = observed, ordered
        self._now: Observation | None = None
        self._most: Observation | None = None
        self._passes = 0
        self.held: HeldOutputs | None = None  # of the current pass, if these are looked at in it
        self.most_held: HeldOutputs | None = None  # of the longest pass

    def entered(self, index: int) -> Observation:
        """Return the pass of a block's call that is about to run."""
        seen = [] if self._now is None else [call.index for call in self._now.calls]
        if index in seen or (self._ordered and index < max(seen, default=0)):
            self.cut()
        if self._now is None:
            self._now, self._passes = Observation(self._observed), self._passes + 1
            self.held = HeldOutputs(self._observed) if self._passes <= MOST_LOOKED_AT else None
        return self._now

    @property
    def now(self) -> Observation | None:
        """The current pass."""
        return self._now

    def cut(self) -> Observation | None:
        """End the pass; return the longest one so far, since blocks may also be called by themselves."""
        if self._now is not None:
            self._now.close()
            if self._most is None or len(self._now.calls) > len(self._most.calls):
                self._most, self.most_held = self._now, self.held
        self._now, self.held = None, None
        return self._most
