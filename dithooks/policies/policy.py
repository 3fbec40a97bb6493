"""The base class of policies: the decision to compute or to reuse, call by call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, ClassVar, Literal

from ..validation import check_bool, check_choice
from .conditional import Conditional
from .history import BranchHistory, Decision, Schedule

Reduce = Literal["mean", "max", "each"]
LONG = 8  # steps after which a branch that was not called is not expected back


class Policy(ABC):
    """When to reuse: the decision of each call of a range, to compute it or to reuse a residual.

    Subclasses are frozen dataclasses and keep nothing from call to call: the engine keeps the :class:`BranchHistory`.
    :meth:`before` decides a call, or returns ``None`` to have a change measured by ``metric``, by which :meth:`judge`
    then decides. To measure waits for the device once. The engine sees to it that there is a residual to reuse.

    Example: every second step of a run reuses the residual of the step before.
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Pairs(Policy):
        ...     def before(self, step, branch, schedule):
        ...         return Decision(True, "reuse") if schedule.done(step) % 2 else Decision(False, "refresh")
        >>> [Pairs().before(step, BranchHistory(), Schedule()).reuse for step in range(4)]
        [False, True, False, True]
    """

    metric: ClassVar[Literal["change", "rate"] | None] = None  # the measure where `before` returns None
    distinct: int = 1  # number of branches that are treated differently, by their number
    needs_sigmas: ClassVar[bool] = False  # whether Schedule.sigmas is to be filled in
    separate_branches: bool = True  # False: the first call of a step decides for all branches
    reduce: Reduce = "mean"  # over a batch, where a change is measured
    conditional: Conditional | None = None  # steps at which one branch of guidance alone is computed

    @property
    def has_conditional(self) -> bool:
        """Whether there are such steps, in any run."""
        return self.conditional is not None

    @property
    def never_reuses(self) -> bool:
        """Whether every call is computed, in any run; nothing is attached then."""
        return False

    def for_run(self, schedule: Schedule) -> Policy:
        """Return the policy for one run, with what depends on its number of steps or noise levels worked out.

        It is called within a call of the model, so it does not raise: where the schedule lacks what the policy needs,
        it returns one that computes, such as :class:`~.uncached.Unplanned`, and :meth:`warning_at_start` says why.
        """
        return self

    @abstractmethod
    def before(self, step: int, branch: BranchHistory, schedule: Schedule) -> Decision | None:
        """Decide a call before anything is measured; ``None``: :meth:`judge` decides, by a measured change."""

    def judge(self, step: int, branch: BranchHistory, schedule: Schedule, value: float) -> Decision:
        """Decide a call by the change that was measured."""
        raise NotImplementedError(f"{type(self).__name__} decides without looking")

    def keeps(self, step: int, anchors: int) -> bool:
        """Whether a residual computed at this step may still be among the last ``anchors`` at a step that is reused."""
        return True

    def outdated(self, step: int, branch: BranchHistory, idle: int, anchors: int) -> bool:
        """Whether the residuals of a branch that was last called ``idle`` steps ago can be freed.

        Args:
            step: the step of the run.
            branch: the branch that was not called.
            idle: number of steps since its last call.
            anchors: number of residuals that the predictor takes; with several, older ones are of use, too.
        """
        return idle > LONG

    def warning_at_start(self, schedule: Schedule) -> str | None:
        """Return the warning for the user at the start of a run with this schedule, if any."""
        return None

    def warning_at_end(self, speedup: float) -> str | None:
        """Return the warning for the user after a run in which so many times fewer blocks ran, if any."""
        return None

    def why_nothing_reused(self, values: list[float], reasons: Mapping[str, int]) -> str | None:
        """Explain in numbers why a run reused nothing.

        Args:
            values: the changes that were measured in it, all finite; at least one.
            reasons: how many calls were computed for which reason.
        """
        return None

    def __str__(self) -> str:
        """Name the policy and the fields that differ from their defaults."""
        shown = []
        for each in fields(self):  # type: ignore[arg-type]
            value = getattr(self, each.name)
            if each.default is MISSING or value != each.default:
                shown.append(f"{each.name}={value if isinstance(value, Policy) else _short(value)}")
        return f"{type(self).__name__}({', '.join(shown)})"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:36]} …)"


def check_metric_fields(policy: Policy) -> None:
    """Check the fields that all policies with a metric share: ``reduce`` and ``separate_branches``.

    Raises:
        TypeError: ``separate_branches`` is not ``True`` or ``False``.
        ValueError: ``reduce`` is another word.
    """
    check_choice("reduce", policy.reduce, ("mean", "max", "each"))
    check_bool("separate_branches", policy.separate_branches)


def steps_are_needed(policy: str) -> str:
    """The warning that a policy cannot do anything in a run whose number of steps is not known."""
    return (
        f"{policy} needs the number of steps, which is not known, so every call is computed: give dit_cache the "
        "pipeline or scheduler=..., or write timestep_scope(step, steps=...)"
    )


def unknown_end_warning(last_steps: int, schedule: Schedule) -> str | None:
    """The warning that ``last_steps_computed`` does nothing in a run whose number of steps is not known."""
    if not last_steps or schedule.steps is not None:
        return None
    return (
        f"last_steps_computed={last_steps} does nothing, as the number of steps is not known: give dit_cache the "
        "pipeline or scheduler=..., or write timestep_scope(step, steps=...)"
    )
