"""Polynomials through the last residuals, of degree 0, 1 or higher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..validation import check_choice, check_count, set_field
from .predictor import Moment, Predictor


@dataclass(frozen=True)
class Reuse(Predictor):
    """Δ̂_t = Δ_b, the last stored residual, unchanged.

    Example:
        >>> Reuse().weights([Moment(4, 0.6)], Moment(5, 0.5))
        (1.0,)
    """

    takes_the_last: ClassVar[bool] = True

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
        set_field(self, "order", check_count("order", self.order, 0))
        check_choice("axis", self.axis, ("sigma", "step"))

    @property
    def anchors(self) -> int:
        return self.order + 1

    def weights(self, anchors: Sequence[Moment], now: Moment) -> tuple[float, ...]:
        return lagrange_weights(anchors[: self.order + 1], now, self.axis)


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
        return lagrange_weights(anchors[:2], now, "sigma")


def lagrange_weights(anchors: Sequence[Moment], now: Moment, axis: str) -> tuple[float, ...]:
    """Return the weights of the polynomial through the anchors, at ``now`` (Lagrange's form); they add up to 1.

    An anchor on another axis than ``now``, or at the time of a newer anchor, gets 0.
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
