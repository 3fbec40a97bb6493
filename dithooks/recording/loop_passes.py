"""Blocks that a loop calls without calling their transformer: each pass through them, observed by itself."""

from __future__ import annotations

from collections.abc import Sequence

from ..blocks.observation import Observation, ObservedBlock


class LoopPasses:
    """Where one pass ends and the next begins, told by the blocks alone.

    Args:
        spots: all blocks.
        ordered: whether they are one list, which is gone through from its front.
    """

    def __init__(self, spots: Sequence[ObservedBlock], ordered: bool) -> None:
        self._spots, self._ordered = spots, ordered
        self._now: Observation | None = None
        self._most: Observation | None = None

    def entered(self, index: int) -> Observation:
        """The pass to which the call of a block belongs that is about to run."""
        seen = [] if self._now is None else [call.index for call in self._now.calls]
        if index in seen or (self._ordered and index < max(seen, default=0)):
            self.cut()
        if self._now is None:
            self._now = Observation(self._spots)
        return self._now

    @property
    def now(self) -> Observation | None:
        """The pass under way."""
        return self._now

    def cut(self) -> Observation | None:
        """The pass is over; of all so far, that through most blocks: some may be called by themselves."""
        if self._now is not None:
            self._now.close()
            if self._most is None or len(self._now.calls) > len(self._most.calls):
                self._most = self._now
        self._now = None
        return self._most
