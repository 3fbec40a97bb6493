"""Compute every call, because it is asked for, or because a run cannot be planned."""

from __future__ import annotations

from dataclasses import dataclass

from .history import BranchHistory, Decision, Schedule
from .policy import Policy
from .reason import Reason


@dataclass(frozen=True)
class Uncached(Policy):
    """Compute every call: nothing is attached to a transformer or list with this policy.

    Example: two experts, of which only the first is cached.
        >>> from dithooks import DitCacheConfig, Threshold, Uncached
        >>> config = DitCacheConfig(policy=Threshold(0.1), overrides={"transformer_2": {"policy": Uncached()}})
        >>> config.overridden("transformer_2").when.never_reuses
        True
    """

    @property
    def never_reuses(self) -> bool:
        return True

    def before(self, step: int, branch: BranchHistory, schedule: Schedule) -> Decision:
        return Decision(False, Reason.OFF)

    def keeps(self, step: int, anchors: int) -> bool:
        return False


@dataclass(frozen=True)
class Unplanned(Uncached):
    """What stands in for a policy in a run that it cannot plan: every call is computed, and a warning gives the reason.

    Args:
        why: the warning for the user, with the remedy.

    Example:
        >>> from dithooks import Mask
        >>> Mask("medium").for_run(Schedule()).before(1, BranchHistory(), Schedule()).reuse
        False
    """

    why: str

    def warning_at_start(self, schedule: Schedule) -> str | None:
        return self.why
