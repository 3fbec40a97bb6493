"""Weights that were fitted ahead of time, step by step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

from ..errors import InvalidSetting, WrongType
from ..policies.history import Schedule
from ..validation import check_number, set_field, shown
from .predictor import Moment, Predictor

# Two times are the same within this share of the larger |σ|. The same schedule in another precision or from another
# version of a scheduler differs by less (bfloat16 rounds by 2⁻⁸ at most); the last steps of schedules that fall by a
# factor, such as Karras's and EDM's from 80 to 0.002, differ by more. What counts as 0 is a share of the largest σ.
SAME_TIME, NEXT_TO_NOTHING = 4e-3, 1e-6


@dataclass(frozen=True)
class Fitted(Predictor):
    """Δ̂_t = α_t·Δ_b + β_t·Δ_a with numbers found beforehand, for the steps at which these were found.

    Args:
        coefficients: for each step of the run, the weights of the last residuals, the newest first; ``None`` where the
            step is computed. They fit the residuals of the last ``None`` steps. For others, and beyond the last step,
            the line in σ takes their place, as in :class:`Linear`, with one warning.
        sigmas: σ of each step that the coefficients were found for, or the time in its place (``Moment.time``). They
            fit only where the step and the residuals' steps are at these times, to within 0.4 %, the rounding of
            bfloat16. ``None``: they fit at any σ.

    Raises:
        TypeError, ValueError: not such a list, the first step is not computed, or ``sigmas`` has not one for each step.

    Example:
        >>> plan = Fitted((None, None, (1.4, -0.4), None, (1.5, -0.5)))
        >>> plan.weights([Moment(3, 0.4), Moment(1, 0.8)], Moment(4, 0.2))
        (1.5, -0.5)
        >>> plan.weights([Moment(2, 0.6), Moment(1, 0.8)], Moment(4, 0.2)) is None  # another schedule
        True
        >>> plan = Fitted((None, (0.9,)), sigmas=(1.0, 0.5))
        >>> plan.weights([Moment(0, 1.0)], Moment(1, 0.5)), plan.weights([Moment(0, 1.0)], Moment(1, 0.6))
        ((0.9,), None)
    """

    coefficients: tuple[tuple[float, ...] | None, ...]
    sigmas: tuple[float, ...] | None = field(default=None, metadata={"written": "where given"})

    def __post_init__(self) -> None:
        coefficients = _listed(self.coefficients)
        given = list(coefficients) if isinstance(coefficients, Iterable) else None
        if given is None or not all(each is None or isinstance(each, Iterable) for each in given):
            raise WrongType(
                f"coefficients must be None or a list of weights for each step, not {shown(self.coefficients)}"
            )
        if not given or given[0] is not None:
            raise InvalidSetting("coefficients must begin with None: the first step is computed")
        checked = tuple(
            None if each is None else tuple(check_number("a coefficient", c, -float("1e30")) for c in each)
            for each in given
        )
        set_field(self, "coefficients", checked)
        before = 0
        for step, each in enumerate(checked):
            if each is not None and not 1 <= len(each) <= before:
                raise InvalidSetting(f"step {step} has {len(each)} coefficients, but {before} computed steps before it")
            before += each is None
        if self.sigmas is None:
            return
        sigmas = _listed(self.sigmas)
        if not isinstance(sigmas, Iterable) or isinstance(sigmas, str):
            raise WrongType(f"sigmas must be a number for each step, or None, not {shown(self.sigmas)}")
        set_field(self, "sigmas", tuple(check_number("a sigma", s, -float("1e30")) for s in sigmas))
        if len(self.sigmas) != len(checked):
            raise InvalidSetting(f"sigmas has {len(self.sigmas)} entries, but coefficients has {len(checked)}")

    @cached_property
    def anchors(self) -> int:
        return max((len(each) for each in self.coefficients if each is not None), default=1)

    @property
    def needs_sigmas(self) -> bool:
        return self.sigmas is not None or self.anchors > 1

    def weights(self, anchors: Sequence[Moment], now: Moment) -> tuple[float, ...] | None:
        step, time, _ = now
        chosen = self.coefficients[step] if step < len(self.coefficients) else None
        if chosen is None or len(anchors) < len(chosen) or not self._is_at(step, time):
            return None
        for planned, (step, time, _) in zip(self._planned_anchors[now.step], anchors, strict=False):
            if step != planned or not self._is_at(step, time):
                return None
        return chosen

    def warning_at_start(self, schedule: Schedule) -> str | None:
        instead = "the last residual" if self.anchors == 1 else "the line through the last two residuals, in σ,"
        fitted, steps = len(self.coefficients), schedule.steps
        if steps is not None and steps != fitted:
            where = "" if self.sigmas is not None else "where they follow other computed steps, "
            return (
                f"coefficients were fitted for {fitted} step{'s' * (fitted != 1)}, and this run has {steps}: "
                f"{where}{instead} is taken in their place"
            )
        here = schedule.sigmas or ()
        other = next((step for step, sigma in enumerate(here) if not self._is_at(step, sigma)), None)
        if other is None or self.sigmas is None:
            return None
        return (
            f"coefficients were fitted at other noise levels (step {other} at {self.sigmas[other]:.4g}, and in this "
            f"run at {here[other]:.4g}): {instead} is taken in their place"
        )

    def _is_at(self, step: int, time: float) -> bool:
        """Whether a step is at the time that the coefficients were found for, as far as that is known."""
        if self.sigmas is None:
            return True
        sigma = self.sigmas[step]
        return abs(time - sigma) <= SAME_TIME * max(abs(time), abs(sigma)) + self._nothing

    @cached_property
    def _nothing(self) -> float:
        """The largest time that counts as 0 beside the largest σ."""
        return NEXT_TO_NOTHING * max(map(abs, self.sigmas or (0.0,)))

    @cached_property
    def _planned_anchors(self) -> tuple[tuple[int, ...], ...]:
        """For each step, the computed steps whose residuals it takes, the latest first."""
        weights = (each or () for each in self.coefficients)
        return tuple(tuple(islice(self._planned(step), len(each))) for step, each in enumerate(weights))

    def _planned(self, step: int) -> Iterator[int]:
        """The computed steps before this one, the latest first."""
        return (earlier for earlier in range(step - 1, -1, -1) if self.coefficients[earlier] is None)


def _listed(values: Any) -> Any:
    return values.tolist() if hasattr(values, "tolist") else values  # an array or a tensor
