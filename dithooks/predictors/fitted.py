"""StepWeights that were fitted ahead of time, step by step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

from ..errors import InvalidSetting, WrongType
from ..policies.history import Schedule
from ..validation import check_bool, check_number, set_field, shown
from .predictor import Moment, Predictor
from .transferred import Transferred, Use, correction_of

# Two times are the same within this share of the larger |σ|. The same schedule in another precision or from another
# version of a scheduler differs by less (bfloat16 rounds by 2⁻⁸ at most); the last steps of schedules that fall by a
# factor, such as Karras's and EDM's from 80 to 0.002, differ by more. What counts as 0 is a share of the largest σ.
SAME_TIME, NEXT_TO_NOTHING = 4e-3, 1e-6
MOST_OTHERS = 16  # runs of other numbers of steps: far more than anybody fits


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
        others: what was fitted for other numbers of steps, each with ``sigmas``. It counts where a run is theirs; and
            in runs that are nobody's, but near, the weights are polynomials through all (:mod:`.transferred`), in place
            of the line.
        in_batch: whether the branches are not calls of a step, but the equal parts of its only call's batch, in their
            order. A batch whose latents are not so many times the same takes ``coefficients`` and ``corrections``.

    Raises:
        TypeError, ValueError: not such a list, the first step is not computed, ``sigmas`` has not one for each step, a
            branch has weights at other steps, or another number of them, ``others`` have no ``sigmas``, or others of
            their own, or ``in_batch`` is no bool, or is set without ``branches``.

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
    others: tuple[Fitted, ...] = field(default=(), repr=False, metadata={"written": "where given"})
    in_batch: bool = field(default=False, metadata={"written": "where given"})

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
        if check_bool("in_batch", self.in_batch) and not self.branches:
            raise InvalidSetting("in_batch says that branches are parts of a batch, and there are none: leave it out")
        self._check_others()
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

    def _check_others(self) -> None:
        others: Any = self.others
        if not isinstance(others, (tuple, list)) or not all(isinstance(each, Fitted) for each in others):
            raise WrongType(f"others must be a tuple of Fitted, not {shown(self.others)}")
        set_field(self, "others", tuple(others))
        if len(others) > MOST_OTHERS:
            raise InvalidSetting(f"others has {len(others)} entries: at most {MOST_OTHERS}")
        if others and any(each.sigmas is None for each in (self, *others)):
            raise InvalidSetting("sigmas is missing: with others, each needs its own, which tell them apart")
        if any(each.others for each in others):
            raise InvalidSetting("one of others has others of its own: list all of them in one")

    @cached_property
    def anchors(self) -> int:
        weights = (each for run in self._runs for each in run.coefficients)
        return max((len(each) for each in weights if each is not None), default=1)

    @cached_property
    def outputs(self) -> int:
        weights = (each for run in self._runs for each in run.corrections or ())
        return max((len(each) - 1 for each in weights if each is not None), default=0)

    @cached_property
    def corrects(self) -> frozenset[bool]:
        steps = ((*pair,) for run in self._runs for pair in zip(run.corrections or (), run.coefficients, strict=False))
        return frozenset(forecast is not None for correction, forecast in steps if correction is not None)

    @property
    def by_branch(self) -> bool:
        return bool(self.branches)

    @property
    def parts(self) -> int:
        return len(self.branches) if self.in_batch else 1

    def of_branch(self, number: int, count: int) -> Fitted:
        return self._own[number] if count == len(self._own) and number < count else self

    @cached_property
    def _own(self) -> tuple[Fitted, ...]:
        """The weights of each branch."""
        count = len(self.branches)
        return tuple(
            Fitted(
                each.coefficients,
                self.sigmas,
                each.corrections,
                others=tuple(other.of_branch(number, count) for other in self.others),
            )
            for number, each in enumerate(self.branches)
        )

    @property
    def needs_sigmas(self) -> bool:
        return self.sigmas is not None or self.anchors > 1

    def weights(self, anchors: Sequence[Moment], now: Moment) -> tuple[float, ...] | None:
        step, time, _ = now
        chosen = self.coefficients[step] if step < len(self.coefficients) else None
        if chosen is None or len(anchors) < len(chosen) or not self._is_at(step, time):
            return self._weights_elsewhere(anchors, now)
        for planned, (step, time, _) in zip(self._planned_anchors[now.step], anchors, strict=False):
            if step != planned or not self._is_at(step, time):
                return self._weights_elsewhere(anchors, now)
        return chosen

    def _weights_elsewhere(self, anchors: Sequence[Moment], now: Moment) -> tuple[float, ...] | None:
        """Return the weights of a step that is not one of this run's."""
        found = (run.weights(anchors, now) for run in self.others)
        exact = next((weights for weights in found if weights is not None), None)
        if exact is not None or not self.others:
            return exact
        return self._transferred(now.axis).weights(Use.FORECAST, anchors, now)

    def output_weights(
        self, outputs: Sequence[Moment], now: Moment, is_forecast: bool = False
    ) -> tuple[float, ...] | None:
        for run in self._runs_at(now):
            chosen = None if run.corrections is None else run.corrections[now.step]
            if chosen is None:
                if not self.others or run._follow(outputs, now.step, 1):
                    return None
            elif (run.coefficients[now.step] is not None) is is_forecast and run._follow(
                outputs, now.step, len(chosen) - 1
            ):
                return chosen
        return self._correction_elsewhere(outputs, now, is_forecast)

    def _correction_elsewhere(
        self, outputs: Sequence[Moment], now: Moment, is_forecast: bool
    ) -> tuple[float, ...] | None:
        """Return the correction of a step that no run has: empty if one was planned for the step, but does not fit."""
        if not self.others:
            planned = now.step < len(self.corrections or ()) and (self.corrections or ())[now.step] is not None
            return () if planned else None
        follows_reused = bool(outputs) and outputs[0].step < now.step - 1
        if is_forecast not in self.corrects or not (is_forecast or follows_reused):
            return None
        return self._transferred(now.axis).weights(correction_of(is_forecast), outputs, now) or ()

    def warning_at_start(self, schedule: Schedule) -> str | None:
        if self.others and schedule.sigmas is not None and self._transferred("sigma").reaches(schedule.sigmas):
            return None
        instead = "the last residual" if self.anchors == 1 else "the line through the last two residuals, in σ,"
        *more, fitted = sorted({len(run.coefficients) for run in self._runs})
        steps = schedule.steps
        if steps is not None and steps not in (fitted, *more):
            where = "" if self.sigmas is not None else "where they follow other computed steps, "
            where = "where its noise levels fall faster or slower than theirs, " if self.others else where
            counts = f"{', '.join(map(str, more))} and {fitted}" if more else str(fitted)
            return (
                f"coefficients were fitted for {counts} step{'s' * (fitted != 1)}, and this run has {steps}: "
                f"{where}{instead} is taken in their place"
            )
        here, run = schedule.sigmas or (), next((run for run in self._runs if len(run.coefficients) == steps), self)
        other = next((step for step, sigma in enumerate(here) if not run._is_at(step, sigma)), None)
        if other is None or run.sigmas is None:
            return None
        return (
            f"coefficients were fitted at other noise levels (step {other} at {run.sigmas[other]:.4g}, and in this "
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
    def _runs(self) -> tuple[Fitted, ...]:
        return (self, *self.others)

    def _runs_at(self, now: Moment) -> Sequence[Fitted]:
        """The runs that have a step at this time, the nearest first."""
        step, time, _ = now
        if not self.others:
            return self._runs if step < len(self.coefficients) and self._is_at(step, time) else ()
        found = [run for run in self._runs if step < len(run.coefficients) and run._is_at(step, time)]
        return sorted(found, key=lambda run: abs((run.sigmas or (time,) * (step + 1))[step] - time))

    def _follow(self, moments: Sequence[Moment], step: int, count: int) -> bool:
        """Whether the last computed steps before a step, so many, are the planned ones, at their times."""
        if len(moments) < count:
            return False
        planned = islice(self._planned(step), count)
        return all(at == each.step and self._is_at(at, each.time) for at, each in zip(planned, moments, strict=False))

    def _transferred(self, axis: str) -> Transferred:
        """The weights at other steps than those of all runs."""
        known = self._transfers.get(axis)
        if known is None:
            known = self._transfers[axis] = Transferred(self._runs, axis)
        return known

    @cached_property
    def _transfers(self) -> dict[str, Transferred]:
        return {}

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
