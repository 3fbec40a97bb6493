"""The reasons for which a call is computed or reused."""

from __future__ import annotations

from enum import Enum


class Reason(str, Enum):
    """Why a call was computed or reused; equal to its word, and shown as it.

    Example:
        >>> Reason.WARM_UP == "warm-up", f"computed: {Reason.WARM_UP}", Reason.NO_ANCHOR.is_own
        (True, 'computed: warm-up', True)
    """

    # A policy's.
    REUSE = "reuse"
    WARM_UP = "warm-up"
    REFRESH = "refresh"
    MISSED_REFRESH = "missed refresh"  # the branch was not called at the step of the last refresh
    MASK = "mask"
    FORCED = "forced"
    THRESHOLD = "threshold"
    ACCUMULATED = "accumulated"
    CAP = "cap"
    BUDGET = "budget"
    END = "end"
    NON_FINITE = "non-finite"  # the change that was measured is NaN or infinite
    OFF = "off"  # the policy computes every call
    # The engine's: whatever the policy decides, there is nothing to reuse, or it must not be.
    NO_ANCHOR = "no anchor"
    UNMEASURED = "unmeasured"
    WEIGHTS = "weights"
    SHAPE = "shape"
    SWITCH = "switch"
    NOT_REACHED = "not reached"
    NOT_FINITE = "residual not finite"
    CONDITIONAL = "conditional only"  # one branch of guidance alone is computed, and another's output made of its own
    NO_CONDITIONAL = "no conditional output"  # for these latents: so another branch's cannot be made of it
    NO_DIFFERENCE = "no difference"  # of the two branches is kept, by which that would be made
    SHARED_SCHEDULER = "shared scheduler"
    ANOTHER_RANK = "another rank"
    RANKS_DIFFER = "ranks differ"
    GRADIENTS = "gradients"

    @property
    def is_own(self) -> bool:
        """Whether it holds for one branch or one rank only: another call of the step decides for itself."""
        return self in _OWN

    def __str__(self) -> str:
        return str(self.value)

    def __repr__(self) -> str:
        return repr(self.value)


_OWN = frozenset(
    {
        Reason.NO_ANCHOR,
        Reason.UNMEASURED,
        Reason.NON_FINITE,
        Reason.WEIGHTS,
        Reason.SHAPE,
        Reason.SWITCH,
        Reason.NOT_REACHED,
        Reason.NOT_FINITE,
        Reason.CONDITIONAL,
        Reason.NO_CONDITIONAL,
        Reason.NO_DIFFERENCE,
        Reason.SHARED_SCHEDULER,
        Reason.ANOTHER_RANK,
    }
)
