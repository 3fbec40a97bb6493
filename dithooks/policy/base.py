"""What every policy answers, and what it is told: the run's schedule, and the branch's way through it so far."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from numbers import Real
from typing import Any, ClassVar, Literal, NamedTuple

Reduce = Literal["mean", "max"]
LONG = 8  # steps: a branch not called for longer is not expected back


class Decision(NamedTuple):
    """Whether a call reuses the residual, why, and the difference it was decided by, if it was by one."""

    reuse: bool
    reason: str
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
class Account:
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
class Track:
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
    account: Account = field(default_factory=Account)

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


class Policy(ABC):
    """Decides, call by call. Subclasses are frozen dataclasses; what a run has seen so far is in its :class:`Track`.

    A call is settled by :meth:`before`, or, where that gives ``None``, looked at (``gauge`` says how) and settled by
    :meth:`judge`. Looking costs one wait for the device. Whether there is a residual to reuse is the engine's to check.
    """

    gauge: ClassVar[Literal["change", "rate"] | None] = None
    distinct: int = 1  # branches that it treats by their number
    needs_sigmas: ClassVar[bool] = False  # of the run's steps
    separate_branches: bool = True  # one decision a branch, or one a step that its branches share
    reduce: Reduce = "mean"  # over a batch, where it looks

    def for_run(self, schedule: Schedule) -> Policy:
        """The policy made out for one run.

        Raises:
            ValueError: the run does not tell what it needs.
        """
        return self

    @abstractmethod
    def before(self, step: int, track: Track, schedule: Schedule) -> Decision | None:
        """Settle a call without looking at it."""

    def judge(self, step: int, track: Track, schedule: Schedule, value: float) -> Decision:
        """Settle a call by the difference that was measured."""
        raise NotImplementedError(f"{type(self).__name__} decides without looking")

    def keeps(self, step: int, anchors: int) -> bool:
        """Whether what is computed at this step may be among the last ``anchors`` at one that is reused."""
        return True

    def outdated(self, step: int, track: Track, idle: int, anchors: int) -> bool:
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


def check_number(name: str, value: object, least: float, *, strictly: bool = False) -> float:
    """A finite number not below ``least``.

    Raises:
        TypeError: not a number.
        ValueError: out of range.
    """
    if isinstance(value, bool) or not isinstance(value, Real):  # NumPy's, too
        raise TypeError(f"{name} must be a number, not {value!r} ({type(value).__name__})")
    try:
        number = float(value)
    except OverflowError:  # a whole number that no float comes near
        raise ValueError(f"{name} is out of range: it has too many digits") from None
    if not math.isfinite(number):
        raise ValueError(f"{name}={number:g} is out of range: it must be finite")
    if number < least or (strictly and number == least):
        raise ValueError(f"{name}={number:g} is out of range: it must be {'above' if strictly else 'at least'} {least}")
    return number


def check_count(name: str, value: object, least: int) -> int:
    """A whole number not below ``least``; NumPy's, too.

    Raises:
        TypeError: not a whole number.
        ValueError: out of range.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, not {value!r} ({type(value).__name__})")
    count: int = value.__index__()
    if count < least:
        raise ValueError(f"{name}={count} is out of range: it must be at least {least}")
    return count


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    """One of a few words.

    Raises:
        ValueError: another one.
    """
    if value not in choices:
        raise ValueError(f"{name}={value!r}: there are {', '.join(map(repr, choices))}")
    return str(value)


def check_looking(policy: Policy) -> None:
    """What all policies that look are told: for whom they decide, and how they weigh a batch.

    Raises:
        TypeError, ValueError: one of them is of the wrong type, or another word.
    """
    check_choice("reduce", policy.reduce, ("mean", "max"))
    if not isinstance(policy.separate_branches, bool):
        raise TypeError(f"separate_branches must be True or False, not {policy.separate_branches!r}")


def no_end(last_steps: int, schedule: Schedule) -> str | None:
    """The remark that a run's last steps cannot be told, if they are asked for."""
    if not last_steps or schedule.steps is not None:
        return None
    return (
        f"last_steps_computed={last_steps} does nothing, as nothing tells the number of steps: give dit_cache the "
        "pipeline or scheduler=..., or write timestep_scope(step, steps=...)"
    )
