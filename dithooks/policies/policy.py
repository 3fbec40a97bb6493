"""What every policy answers, and what it is told: the run's schedule, and the branch's way through it so far."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, ClassVar, Literal

from ..validation import check_bool, check_choice
from .history import BranchHistory, Decision, Schedule

Reduce = Literal["mean", "max"]
LONG = 8  # steps: a branch not called for longer is not expected back


class Policy(ABC):
    """Decides, call by call. Subclasses are frozen dataclasses; what happened so far is in the :class:`BranchHistory`.

    A call is settled by :meth:`before`, or, where that gives ``None``, looked at (``metric`` says how) and settled by
    :meth:`judge`. Looking costs one wait for the device. Whether there is a residual to reuse is the engine's to check.
    """

    metric: ClassVar[Literal["change", "rate"] | None] = None
    distinct: int = 1  # branches that it treats by their number
    needs_sigmas: ClassVar[bool] = False  # of the run's steps
    separate_branches: bool = True  # one decision a branch, or one a step that its branches share
    reduce: Reduce = "mean"  # over a batch, where it looks

    @property
    def never_reuses(self) -> bool:
        """Whether every call is computed, in any run: there is nothing to attach then."""
        return False

    def for_run(self, schedule: Schedule) -> Policy:
        """The policy made out for one run.

        Raises:
            ValueError: the run does not tell what it needs.
        """
        return self

    @abstractmethod
    def before(self, step: int, track: BranchHistory, schedule: Schedule) -> Decision | None:
        """Settle a call without looking at it."""

    def judge(self, step: int, track: BranchHistory, schedule: Schedule, value: float) -> Decision:
        """Settle a call by the difference that was measured."""
        raise NotImplementedError(f"{type(self).__name__} decides without looking")

    def keeps(self, step: int, anchors: int) -> bool:
        """Whether what is computed at this step may be among the last ``anchors`` at one that is reused."""
        return True

    def outdated(self, step: int, track: BranchHistory, idle: int, anchors: int) -> bool:
        """Whether a branch that was last called ``idle`` steps ago can do without what is kept for it.

        ``anchors`` is how many residuals the predictor takes: with several, an older one is of use.
        """
        return idle > LONG

    def remark(self, schedule: Schedule) -> str | None:
        """What is to be said at the start of a run."""
        return None

    def review(self, speedup: float) -> str | None:
        """What is to be said of a run that ran so many times fewer blocks than without the cache."""
        return None

    def verdict(self, values: list[float], reasons: Mapping[str, int]) -> str | None:
        """Why a run with these differences, computed for these reasons, reused nothing, in numbers."""
        return None

    def __str__(self) -> str:
        """The policy with what is not as it is by default."""
        shown = []
        for each in fields(self):  # type: ignore[arg-type]
            value = getattr(self, each.name)
            if each.default is MISSING or value != each.default:
                shown.append(f"{each.name}={value if isinstance(value, Policy) else _short(value)}")
        return f"{type(self).__name__}({', '.join(shown)})"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:36]} …)"


def check_looking(policy: Policy) -> None:
    """What all policies that look are told: for whom they decide, and how they weigh a batch.

    Raises:
        TypeError, ValueError: one of them is of the wrong type, or another word.
    """
    check_choice("reduce", policy.reduce, ("mean", "max"))
    check_bool("separate_branches", policy.separate_branches)


def no_end(last_steps: int, schedule: Schedule) -> str | None:
    """The remark that a run's last steps cannot be told, if they are asked for."""
    if not last_steps or schedule.steps is not None:
        return None
    return (
        f"last_steps_computed={last_steps} does nothing, as nothing tells the number of steps: give dit_cache the "
        "pipeline or scheduler=..., or write timestep_scope(step, steps=...)"
    )
