"""What: the residual of a reused step, as weights of those stored. Plain numbers; tensors are combined elsewhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, Literal, NamedTuple

from .policy.base import Schedule, check_choice, check_count, check_number

# Of the larger |σ| of two. One schedule, computed anew in another precision or by another version of a scheduler,
# differs by less, down to bfloat16, which rounds by 2⁻⁸ at most; and where steps fall by a factor, as Karras's and
# EDM's do, from 80 to 0.002, the last are told apart, too. A rest that stands for 0 is small beside the largest.
SAME_TIME, NEXT_TO_NOTHING = 4e-3, 1e-6


class Moment(NamedTuple):
    """Where in the run a call stands: its step, and σ, or what stands for it.

    ``axis`` says what ``time`` is: ``"sigma"``, ``"timestep"`` (where no σ is known; for flow matching that is σ but
    for a factor) or ``"step"``.
    """

    step: int
    time: float
    axis: str = "sigma"


class Predictor(ABC):
    """Says how much of each stored residual makes that of a reused step. Subclasses are frozen dataclasses."""

    @property
    @abstractmethod
    def anchors(self) -> int:
        """How many residuals it takes, at most."""

    @abstractmethod
    def weights(self, anchors: Sequence[Moment], now: Moment) -> tuple[float, ...] | None:
        """A weight for each of the first so many anchors, of which ``anchors`` has at least one, the newest first.

        ``None``: these are not the anchors it was made for; the line through the last two is taken then.
        """

    @property
    def needs_sigmas(self) -> bool:
        """Whether it asks for the noise level of a step."""
        return self.anchors > 1

    def remark(self, schedule: Schedule) -> str | None:
        """What is to be said at the start of a run."""
        return None


@dataclass(frozen=True)
class Reuse(Predictor):
    """Δ̂_t = Δ_b, the last stored residual, unchanged.

    Example:
        >>> Reuse().weights([Moment(4, 0.6)], Moment(5, 0.5))
        (1.0,)
    """

    @property
    def anchors(self) -> int:
        return 1

    def weights(self, anchors: Sequence[Moment], now: Moment) -> tuple[float, ...]:
        return (1.0,)


@dataclass(frozen=True)
class Taylor(Predictor):
    """Δ̂_t = Σ_{k ≤ order} Δ⁽ᵏ⁾(σ_b)·(σ_t − σ_b)ᵏ/k!, the derivatives from finite differences of the stored residuals.

    On whatever spacing, that is the polynomial of degree ``order`` through the last order + 1 of them, exact for
    residuals that are one; with fewer stored, of the degree that they allow. After TaylorSeer (Liu et al.,
    arXiv:2503.06923), which takes steps at equal distances, and all derivatives from backward differences.

    Args:
        order: ≥ 0; 0 is :class:`Reuse`, 1 a line. Memory is order + 1 residuals a branch.
        axis: ``"sigma"``: the residual is a function of the noise level; ``"step"``: of the step's number.

    Raises:
        TypeError, ValueError: a value is of the wrong type or out of range.

    Example:
        >>> Taylor(2).weights([Moment(4, 3.0), Moment(3, 4.0), Moment(2, 5.0)], Moment(5, 2.0))
        (3.0, -3.0, 1.0)
    """

    order: int = 2
    axis: Literal["sigma", "step"] = "sigma"

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", check_count("order", self.order, 0))
        check_choice("axis", self.axis, ("sigma", "step"))

    @property
    def anchors(self) -> int:
        return self.order + 1

    def weights(self, anchors: Sequence[Moment], now: Moment) -> tuple[float, ...]:
        return through(anchors[: self.order + 1], now, self.axis)


@dataclass(frozen=True)
class Linear(Predictor):
    """Δ̂_t = (1 + r)·Δ_b − r·Δ_a with r = (σ_t − σ_b)/(σ_b − σ_a): the line through the last two residuals, in σ.

    Example:
        >>> Linear().weights([Moment(4, 0.5), Moment(3, 0.75)], Moment(5, 0.375))
        (1.5, -0.5)
    """

    @property
    def anchors(self) -> int:
        return 2

    def weights(self, anchors: Sequence[Moment], now: Moment) -> tuple[float, ...]:
        return through(anchors[:2], now, "sigma")


@dataclass(frozen=True)
class Fitted(Predictor):
    """Δ̂_t = α_t·Δ_b + β_t·Δ_a with numbers found beforehand, for the steps at which these were found.

    Args:
        coefficients: for each step of the run, the weights of the last residuals, the newest first; ``None`` where the
            step is computed. Residuals other than those of the last ``None`` steps do not fit: then, and beyond the
            last step, the line in σ is taken, as :class:`Linear` does, and that is said once.
        sigmas: σ of each step they were found for, or what stands for it (``Moment.time``). Given, they fit only where
            the step and the residuals' own steps are at these, each to within 0.4 %, a bfloat16's rounding. Left out,
            whatever σ is.

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
            raise TypeError(f"coefficients must be None or a list of weights for each step, not {self.coefficients!r}")
        if not given or given[0] is not None:
            raise ValueError("coefficients must begin with None: the first step is computed")
        checked = tuple(
            None if each is None else tuple(check_number("a coefficient", c, -float("1e30")) for c in each)
            for each in given
        )
        object.__setattr__(self, "coefficients", checked)
        for step, each in enumerate(checked):
            before = len(list(self._planned(step)))
            if each is not None and not 1 <= len(each) <= before:
                raise ValueError(f"step {step} has {len(each)} coefficients, but {before} computed steps before it")
        if self.sigmas is None:
            return
        sigmas = _listed(self.sigmas)
        if not isinstance(sigmas, Iterable) or isinstance(sigmas, str):
            raise TypeError(f"sigmas must be a number for each step, or None, not {self.sigmas!r}")
        object.__setattr__(self, "sigmas", tuple(check_number("a sigma", s, -float("1e30")) for s in sigmas))
        if len(self.sigmas) != len(checked):
            raise ValueError(f"sigmas has {len(self.sigmas)} entries, but coefficients has {len(checked)}")

    @cached_property
    def anchors(self) -> int:
        return max((len(each) for each in self.coefficients if each is not None), default=1)

    @property
    def needs_sigmas(self) -> bool:
        return self.sigmas is not None or self.anchors > 1

    def weights(self, anchors: Sequence[Moment], now: Moment) -> tuple[float, ...] | None:
        chosen = self.coefficients[now.step] if now.step < len(self.coefficients) else None
        if chosen is None:
            return None
        used = anchors[: len(chosen)]
        if [anchor.step for anchor in used] != list(islice(self._planned(now.step), len(chosen))):
            return None
        return chosen if all(self._is_at(moment.step, moment.time) for moment in (now, *used)) else None

    def remark(self, schedule: Schedule) -> str | None:
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
        """What is as good as 0 beside the largest σ."""
        return NEXT_TO_NOTHING * max(map(abs, self.sigmas or (0.0,)))

    def _planned(self, step: int) -> Iterator[int]:
        """The computed steps before this one, the latest first."""
        return (earlier for earlier in range(step - 1, -1, -1) if self.coefficients[earlier] is None)


def _listed(values: Any) -> Any:
    return values.tolist() if hasattr(values, "tolist") else values  # an array or a tensor


def through(anchors: Sequence[Moment], now: Moment, axis: str) -> tuple[float, ...]:
    """Weights of the polynomial through the anchors, at ``now`` (Lagrange's form); they add up to 1.

    Anchors told by another axis than ``now``, and those at the time of a newer one, get 0.
    """
    steps = axis == "step"
    here = float(now.step) if steps else now.time
    times = [float(anchor.step) if steps else anchor.time for anchor in anchors]
    used: list[int] = []
    for k, anchor in enumerate(anchors):
        if (steps or anchor.axis == now.axis) and all(times[k] != times[newer] for newer in used):
            used.append(k)
    used = used or [0]
    weights = [0.0] * len(anchors)
    for k in used:
        weight = 1.0
        for other in used:
            if other != k:
                weight *= (here - times[other]) / (times[k] - times[other])
        weights[k] = weight
    return tuple(weights)
