"""What a policy decides by, and how: the schedule of a run, the history of its branches, the decision."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from .reason import Reason


class Decision(NamedTuple):
    """Whether a call reuses the residual, why, and the difference that was compared, where one was.

    A policy of one's own may give a reason in a word of its own.

    Example:
        >>> Decision(False, Reason.THRESHOLD, 0.14)
        Decision(reuse=False, reason='threshold', value=0.14)
    """

    reuse: bool
    reason: Reason | str
    value: float | None = None


@dataclass(frozen=True)
class Schedule:
    """A sampling run as known at its first call.

    Args:
        steps: number of sampling steps of the whole schedule; ``None`` where it is not known.
        first: the step at which the run begins. It is above 0 in image-to-image, and for a second expert.
        sigmas: the noise level of each step; ``None`` where they are not known.
        blocks: number of blocks of the transformer.
        skipped: number of blocks that a reused call leaves out.

    Example:
        >>> Schedule(steps=20, first=8).done(10)
        2
    """

    steps: int | None = None
    first: int = 0
    sigmas: tuple[float, ...] | None = None
    blocks: int = 1
    skipped: int = 1

    def done(self, step: int) -> int:
        """The number of the run's steps before this one. A run that leaves out a step is two runs."""
        return step - self.first


@dataclass
class RunHistory:
    """The calls of a run so far, over all its branches. Folded from the log of decisions.

    Args:
        calls: number of calls that were decided.
        reused: number of calls among them that reused a residual.
        branches: number of calls that one step makes, taken from the step before.
        step: the step of the last call.
        called: number of calls that were decided at that step.
    """

    calls: int = 0
    reused: int = 0
    branches: int = 1
    step: int = -1
    called: int = 0


@dataclass
class BranchHistory:
    """The calls of one branch (conditional, unconditional, …) in a run so far. Folded from the log of decisions.

    Args:
        number: number of the branch, in the order of the calls of a step.
        refreshed: step of the newest anchor, the residual that would be reused; ``None`` where there is none.
        computed: number of calls that were computed.
        reused: number of calls that were reused.
        streak: number of calls that were reused since the last computed one.
        drift: sum of the changes that were measured in the calls of the streak.
        rates: each change that was measured, divided by the steps since the refresh.
        run: the history of the run, which its branches share.
    """

    number: int = 0
    refreshed: int | None = None
    computed: int = 0
    reused: int = 0
    streak: int = 0
    drift: float = 0.0
    rates: list[float] = field(default_factory=list)
    run: RunHistory = field(default_factory=RunHistory)
