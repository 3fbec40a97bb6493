"""What a policy is given: the schedule of a run, and what the run and the branch have done so far."""

from __future__ import annotations

import math
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
    """What is known of a run when it begins.

    Args:
        steps: sampling steps of the whole schedule; ``None``: nothing tells.
        first: the step it begins at: not 0 where a picture is drawn on.
        sigmas: noise level of each step.
        blocks: of the transformer, and
        skipped: as many of them as a reused call leaves out.
    """

    steps: int | None = None
    first: int = 0
    sigmas: tuple[float, ...] | None = None
    blocks: int = 1
    skipped: int = 1

    def done(self, step: int) -> int:
        """How many steps of the run lie before this one. Where one is left out, the next begins a run of its own."""
        return step - self.first


@dataclass
class RunHistory:
    """All calls of a run so far, kept by the engine.

    Args:
        calls: settled, and
        reused: of these.
        branches: calls that a step makes, by the one before.
        step: of the last call, and
        called: calls settled at it.
    """

    calls: int = 0
    reused: int = 0
    branches: int = 1
    step: int = -1
    called: int = 0

    def note(self, step: int, reuse: bool) -> None:
        """A call was settled."""
        self.called = self.called + 1 if step == self.step else 1
        self.calls, self.reused, self.step = self.calls + 1, self.reused + reuse, step


@dataclass
class BranchHistory:
    """A branch's way through its run, kept by the engine.

    Args:
        number: of the branch.
        refreshed: step at which its residual was last computed.
        computed: calls computed so far, and
        reused: reused.
        streak: reused since the last computed one, and
        drift: the sum of the differences they were decided by.
        rates: every difference measured, divided by the steps it grew in.
        account: of the run, shared by its branches.
    """

    number: int = 0
    refreshed: int | None = None
    computed: int = 0
    reused: int = 0
    streak: int = 0
    drift: float = 0.0
    rates: list[float] = field(default_factory=list)
    account: RunHistory = field(default_factory=RunHistory)

    def note(self, step: int, decision: Decision) -> None:
        """A call was settled."""
        self.account.note(step, decision.reuse)
        value = decision.value
        if value is not None and self.refreshed is not None and step > self.refreshed and math.isfinite(value):
            self.rates.append(value / (step - self.refreshed))
        if decision.reuse:
            self.reused, self.streak, self.drift = self.reused + 1, self.streak + 1, self.drift + (value or 0.0)
        else:
            self.computed, self.streak, self.drift = self.computed + 1, 0, 0.0
