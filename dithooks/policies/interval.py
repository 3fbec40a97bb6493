"""Refresh at a fixed interval."""

from __future__ import annotations

from dataclasses import dataclass

from ..validation import check_count, set_field
from .history import BranchHistory, Decision, Schedule
from .policy import Policy
from .reason import Reason


@dataclass(frozen=True)
class Interval(Policy):
    """Compute while ``step < start``; then compute when ``(step − start) mod interval = 0``, else reuse.

    Args:
        start: first step at which the schedule holds, ≥ 0; itself computed.
        interval: steps from one refresh to the next, ≥ 1. 1 reuses nothing.

    Raises:
        TypeError, ValueError: not a whole number, or out of range.

    Example:
        >>> policy = Interval(start=2, interval=3)
        >>> [policy.last_refresh(step) == step for step in range(8)]  # computed?
        [True, True, True, False, False, True, False, False]
    """

    start: int
    interval: int

    def __post_init__(self) -> None:
        for name, least in (("start", 0), ("interval", 1)):
            set_field(self, name, check_count(name, getattr(self, name), least))

    @property
    def never_reuses(self) -> bool:
        return self.interval == 1

    def last_refresh(self, step: int) -> int:
        """The last step, this one included, that the schedule computes."""
        return step if step < self.start else step - (step - self.start) % self.interval

    def before(self, step: int, branch: BranchHistory, schedule: Schedule) -> Decision:
        if step < self.start:
            return Decision(False, Reason.WARM_UP)
        refresh = self.last_refresh(step)
        if refresh == step:
            return Decision(False, Reason.REFRESH)
        if branch.refreshed is not None and branch.refreshed < refresh:  # this branch was not called then
            return Decision(False, Reason.MISSED_REFRESH)
        return Decision(True, Reason.REUSE)

    def outdated(self, step: int, branch: BranchHistory, idle: int, anchors: int) -> bool:
        if anchors > 1:
            return super().outdated(step, branch, idle, anchors)
        return idle > 1 and branch.refreshed is not None and branch.refreshed < self.last_refresh(step)

    def keeps(self, step: int, anchors: int) -> bool:
        return not self.never_reuses and step > self.start - anchors
