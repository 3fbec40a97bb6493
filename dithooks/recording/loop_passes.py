"""The passes of a loop that calls blocks without their transformer, each observed by itself."""

from __future__ import annotations

from collections.abc import Sequence

from ..blocks.observation import Observation, ObservedBlock


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

    def entered(self, index: int) -> Observation:
        """Return the pass of a block's call that is about to run."""
        seen = [] if self._now is None else [call.index for call in self._now.calls]
        if index in seen or (self._ordered and index < max(seen, default=0)):
            self.cut()
        if self._now is None:
            self._now = Observation(self._observed)
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
                self._most = self._now
        self._now = None
        return self._most
