"""Reuse as much as a wanted speed-up takes, at the steps that change least."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from ..validation import check_count, check_number, set_field
from .history import BranchHistory, Decision, Schedule
from .policy import Policy, Reduce, check_metric_fields, steps_are_needed
from .reason import Reason
from .uncached import Unplanned

WITHIN = 0.05  # of the target
RECENT = 3  # changes that count: those further back predict little of the steps to come


@dataclass(frozen=True)
class Budget(Policy):
    """Land on a wanted speed-up: a threshold that is steered through the run.

    The speed-up is counted in block executions: those of the run without the cache over those with it. With n of N
    blocks left out in a reused call, a run of C calls has to reuse R = C·(1 − 1/``target_speedup``)·N/n of them. When
    R' of them are still to come in C' calls, a branch has r = R'/B reuses in c = C'/B steps to come, B being the calls
    of a step; with the gap under way, in which s steps have been reused, that is c − r + 1 gaps, of
    g = (r + s)/(c − r + 1) reused steps on average. With v̄ the mean of the branch's last three changes measured, each
    divided by the steps it grew in, a step is reused while the change since the last computed step (as
    :class:`Threshold` measures it) is below v̄·(g + 1): at an even pace, that is g reused steps in a row, rounded up,
    so that no reuses pile up at the end. When as many calls are left as have to be reused, or none has to be any more,
    nothing is measured.

    Where the range and the warm-up do not allow the target, as much is reused as they do. A run without a step to
    reuse, or of an unknown number of steps, is computed. A warning at the run's first call names either.

    Args:
        target_speedup: > 1, such as 2.0.
        max_warmup_steps: the first so many steps of a run are computed; left out, a sixth of all that are, at least 1.
        separate_branches: whether each branch decides for itself; ``False``: the first at a step decides for all.
        reduce: over a batch, ``"mean"``, ``"max"`` or ``"each"``, as for :class:`Threshold`.

    Raises:
        TypeError, ValueError: a value is of the wrong type or out of range.

    Example:
        >>> from dithooks.policies.history import RunHistory
        >>> policy, schedule = Budget(2.0, max_warmup_steps=2), Schedule(steps=10)
        >>> branch = BranchHistory(run=RunHistory(calls=4, reused=1))
        >>> policy.to_come(4, branch, schedule)  # 5 of 10 are to be reused, 1 is, 6 calls remain
        (4, 6)
        >>> policy.before(6, BranchHistory(run=RunHistory(calls=6, reused=1)), schedule)
        Decision(reuse=True, reason='reuse', value=None)
    """

    metric: ClassVar[Literal["change", "rate"] | None] = "change"
    out_of_reach: ClassVar[str | None] = None  # set for a run: the warning at its start, not repeated at its end

    target_speedup: float
    max_warmup_steps: int | None = None
    separate_branches: bool = True
    reduce: Reduce = "mean"

    def __post_init__(self) -> None:
        target = check_number("target_speedup", self.target_speedup, 1, strictly=True)
        set_field(self, "target_speedup", target)
        if self.max_warmup_steps is not None:
            set_field(self, "max_warmup_steps", check_count("max_warmup_steps", self.max_warmup_steps, 1))
        check_metric_fields(self)

    def for_run(self, schedule: Schedule) -> Policy:
        name = f"Budget({self.target_speedup:g})"
        if schedule.steps is None:
            return Unplanned(steps_are_needed(name))
        if schedule.skipped < 1:
            return Unplanned(f"{name} computes every call, as the range leaves out no block. Choose a longer range")
        steps = schedule.steps - schedule.first
        if steps < 1:
            return Unplanned(
                f"{name} computes every call of a run that begins at step {schedule.first} of {schedule.steps}, at or "
                "beyond its end: is it another pipeline's? Then give its scheduler, handle.request(scheduler=...)"
            )
        warmup = self.max_warmup_steps
        if warmup is None:
            warmup = max(1, (steps - self._nearest(steps, schedule)) // 6)
        most = steps - warmup
        if most < 1:
            return Unplanned(
                f"{name} computes every call: the run's steps are {steps}, and max_warmup_steps is {warmup}, so that "
                "none is left to reuse. Take more steps, or fewer max_warmup_steps"
            )
        adapted = replace(self, max_warmup_steps=warmup)
        if self._wanted(steps, schedule) > most + 0.5:
            remark = (
                f"target_speedup={self.target_speedup:g} cannot be reached: with {schedule.skipped} of "
                f"{schedule.blocks} blocks left out in at most {most} of {steps} steps it is "
                f"{_speedup(most, steps, schedule):.3g}. Choose a longer range, fewer max_warmup_steps, or a lower "
                "target"
            )
            set_field(adapted, "out_of_reach", remark)
        return adapted

    def to_come(self, step: int, branch: BranchHistory, schedule: Schedule) -> tuple[int, int]:
        """Return how many calls of the run are still to be reused, and how many are to come, this one included."""
        assert schedule.steps is not None
        run = branch.run
        called = run.called if run.step == step else 0
        left = max((schedule.steps - step) * run.branches - called, 1)
        return self._nearest(run.calls + left, schedule) - run.reused, left

    def before(self, step: int, branch: BranchHistory, schedule: Schedule) -> Decision | None:
        if schedule.done(step) < (self.max_warmup_steps or 1):
            return Decision(False, Reason.WARM_UP)
        wanted, left = self.to_come(step, branch, schedule)
        if wanted <= 0:
            return Decision(False, Reason.BUDGET)
        return Decision(True, Reason.REUSE) if wanted >= left else None

    def judge(self, step: int, branch: BranchHistory, schedule: Schedule, value: float) -> Decision:
        if not math.isfinite(value):
            return Decision(False, Reason.NON_FINITE, value)
        wanted, left = self.to_come(step, branch, schedule)
        gap = max(step - branch.refreshed, 1) if branch.refreshed is not None else 1  # 0: the step is made once more
        rates = [*branch.rates, value / gap][-RECENT:]
        branches = branch.run.branches
        reuses = (wanted / branches + branch.streak) / (max(left - wanted, 0) / branches + 1)
        limit = sum(rates) / len(rates) * (reuses + 1)
        return Decision(True, Reason.REUSE, value) if value < limit else Decision(False, Reason.THRESHOLD, value)

    def warning_at_start(self, schedule: Schedule) -> str | None:
        return self.out_of_reach

    def warning_at_end(self, speedup: float) -> str | None:
        if self.out_of_reach or abs(speedup / self.target_speedup - 1) <= WITHIN + 1e-9:
            return None
        return (
            f"target_speedup={self.target_speedup:g} was not met: {speedup:.3g} times fewer blocks ran (few steps, or "
            "guidance on part of them, leave few choices)"
        )

    def _nearest(self, calls: int, schedule: Schedule) -> int:
        """R for so many calls: of the whole numbers beside it, the one whose speed-up is nearer to the target."""
        exact = min(max(self._wanted(calls, schedule), 0), calls)
        beside = {math.floor(exact), math.ceil(exact)}
        return min(beside, key=lambda r: abs(math.log(_speedup(r, calls, schedule) / self.target_speedup)))

    def _wanted(self, steps: int, schedule: Schedule) -> float:
        """R, not rounded."""
        return steps * (1 - 1 / self.target_speedup) * schedule.blocks / schedule.skipped


def _speedup(reused: int, steps: int, schedule: Schedule) -> float:
    """Blocks of the run without the cache over those with it."""
    return steps * schedule.blocks / max(steps * schedule.blocks - reused * schedule.skipped, 1)
