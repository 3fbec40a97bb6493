"""When: compute or reuse at this step."""

from __future__ import annotations

from typing import NamedTuple


class Decision(NamedTuple):
    """Whether a call reuses the residual, and why."""

    reuse: bool
    reason: str


class Interval:
    """Compute while ``step < start``; then compute when ``(step − start) mod interval = 0``, else reuse.

    Example:
        >>> policy = Interval(start=2, interval=3)
        >>> [policy.scheduled(step) for step in range(8)]  # computed?
        [True, True, True, False, False, True, False, False]
    """

    def __init__(self, start: int, interval: int) -> None:
        self.start, self.interval = start, interval

    def scheduled(self, step: int) -> bool:
        """Whether the schedule computes this step."""
        return step < self.start or (step - self.start) % self.interval == 0

    def wants_anchor(self, step: int) -> bool:
        """Whether what is computed at this step could ever be reused."""
        return step >= self.start

    def last_refresh(self, step: int) -> int:
        """The last step, this one included, that the schedule computes."""
        return step if step < self.start else step - (step - self.start) % self.interval

    def decide(self, step: int, anchor: int | None) -> Decision:
        """Settle one call, given the step at which its branch was last refreshed (``None``: never in this run)."""
        if step < self.start:
            return Decision(False, "warm-up")
        refresh = self.last_refresh(step)
        if refresh == step:
            return Decision(False, "refresh")
        if anchor is None:
            return Decision(False, "no anchor")
        if anchor < refresh:  # this branch was not called at the last refresh: its residual is too old
            return Decision(False, "missed refresh")
        return Decision(True, "reuse")

    def hopeless(self, steps: int) -> str | None:
        """Why a run of so many steps can never reuse anything, or ``None`` if it can."""
        if steps <= self.start + 1:
            return f"cache_step_start={self.start} leaves no step to reuse in a run of {steps}"
        return None
