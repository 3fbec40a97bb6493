"""StepWeights that were fitted ahead of time, step by step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
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


StepWeights = tuple["tuple[float, ...] | None", ...]  # of each step; None: it has none


@dataclass(frozen=True)
class BranchWeights:
    """The weights of one branch of guidance, where each branch has its own.

    Args:
        coefficients: as those of :class:`Fitted`, at the same steps and as many at each.
        corrections: likewise; ``None`` where there are none.
    """

    coefficients: StepWeights
    corrections: StepWeights | None = field(default=None, metadata={"written": "where given"})


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
        corrections: for each step at which the transformer's output is corrected, the weights of the sum that takes its
            place: of this output first, then of the outputs of the computed steps before, as the transformer returned
            them, the newest first; ``None`` where the output is used as it is. Where they do not fit, as for
            coefficients, the output is used as it is.
        branches: the weights of each branch of guidance, in the order of the calls of a step, where they have weights
            of their own. A run with another number of branches takes ``coefficients`` and ``corrections`` for all.

    Raises:
        TypeError, ValueError: not such a list, the first step is not computed, ``sigmas`` has not one for each step, or
            a branch has weights at other steps, or another number of them.

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
    corrections: tuple[tuple[float, ...] | None, ...] | None = field(default=None, metadata={"written": "where given"})
    branches: tuple[BranchWeights, ...] = field(default=(), metadata={"written": "where given"})

    def __post_init__(self) -> None:
        checked = _weights("coefficients", self.coefficients)
        if not checked or checked[0] is not None:
            raise InvalidSetting("coefficients must begin with None: the first step is computed")
        set_field(self, "coefficients", checked)
        before = 0
        for step, each in enumerate(checked):
            if each is not None and not 1 <= len(each) <= before:
                raise InvalidSetting(f"step {step} has {len(each)} coefficients, but {before} computed steps before it")
            before += each is None
        self._check_corrections()
        set_field(self, "branches", self._checked_branches())
        if self.sigmas is None:
            return
        sigmas = _listed(self.sigmas)
        if not isinstance(sigmas, Iterable) or isinstance(sigmas, str):
            raise WrongType(f"sigmas must be a number for each step, or None, not {shown(self.sigmas)}")
        set_field(self, "sigmas", tuple(check_number("a sigma", s, -float("1e30")) for s in sigmas))
        if len(self.sigmas) != len(checked):
            raise InvalidSetting(f"sigmas has {len(self.sigmas)} entries, but coefficients has {len(checked)}")

    def _check_corrections(self) -> None:
        if self.corrections is None:
            return
        set_field(self, "corrections", corrections := _weights("corrections", self.corrections))
        if len(corrections) != len(self.coefficients):
            raise InvalidSetting(
                f"corrections has {len(corrections)} entries, but coefficients has {len(self.coefficients)}"
            )
        before = 0
        for step, (each, forecast) in enumerate(zip(corrections, self.coefficients, strict=True)):
            if each is not None and not 1 <= len(each) <= 1 + before:
                raise InvalidSetting(
                    f"step {step} is corrected by {len(each)} outputs: by its own and those of the {before} computed "
                    "steps before it, it can be"
                )
            before += forecast is None

    def _checked_branches(self) -> tuple[BranchWeights, ...]:
        """Return the branches' weights as plain numbers, each at the same steps as those of all."""
        given: Any = self.branches
        if not isinstance(given, (tuple, list)) or not all(isinstance(each, BranchWeights) for each in given):
            raise WrongType(f"branches must be BranchWeights, one for each branch, not {shown(given)}")
        if len(given) == 1:
            raise InvalidSetting("branches has weights of one branch: leave it out, as one has those of all")
        found = []
        for number, each in enumerate(given):
            own = _weights("coefficients", each.coefficients), _weights("corrections", each.corrections or ())
            for name, weights, wanted in zip(
                ("coefficients", "corrections"), own, (self.coefficients, self.corrections or ()), strict=True
            ):
                here, there = ([None if some is None else len(some) for some in each] for each in (weights, wanted))
                if here != there:
                    raise InvalidSetting(
                        f"branches[{number}].{name} has to have as many weights at each step as {name}: it has "
                        f"{shown(here)}, and {name} {shown(there)}"
                    )
            found.append(BranchWeights(own[0], own[1] or None))
        return tuple(found)

    @cached_property
    def anchors(self) -> int:
        return max((len(each) for each in self.coefficients if each is not None), default=1)

    @cached_property
    def outputs(self) -> int:
        return max((len(each) - 1 for each in self.corrections or () if each is not None), default=0)

    @cached_property
    def corrected_steps(self) -> Mapping[int, bool]:
        steps = enumerate(self.corrections or ())
        return {step: self.coefficients[step] is not None for step, weights in steps if weights is not None}

    @property
    def by_branch(self) -> bool:
        return bool(self.branches)

    def of_branch(self, number: int, count: int) -> Fitted:
        return self._own[number] if count == len(self._own) and number < count else self

    @cached_property
    def _own(self) -> tuple[Fitted, ...]:
        """The weights of each branch."""
        return tuple(Fitted(each.coefficients, self.sigmas, each.corrections) for each in self.branches)

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

    def output_weights(self, outputs: Sequence[Moment], now: Moment) -> tuple[float, ...] | None:
        step, time, _ = now
        chosen = None if self.corrections is None or step >= len(self.corrections) else self.corrections[step]
        if chosen is None or len(outputs) < len(chosen) - 1 or not self._is_at(step, time):
            return None
        for planned, (earlier, at, _) in zip(self._planned(step), outputs[: len(chosen) - 1], strict=False):
            if earlier != planned or not self._is_at(earlier, at):
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


def _weights(name: str, given: Any) -> tuple[tuple[float, ...] | None, ...]:
    """StepWeights of each step, as plain numbers; ``None`` where a step has none."""
    values = _listed(given)
    listed = list(values) if isinstance(values, Iterable) else None
    if listed is None or not all(each is None or isinstance(each, Iterable) for each in listed):
        raise WrongType(f"{name} must be None or a list of weights for each step, not {shown(given)}")
    one = f"a number in {name}" if name == "corrections" else "a coefficient"
    return tuple(
        None if each is None else tuple(check_number(one, weight, -float("1e30")) for weight in each) for each in listed
    )


def _listed(values: Any) -> Any:
    return values.tolist() if hasattr(values, "tolist") else values  # an array or a tensor
