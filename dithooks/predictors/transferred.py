"""The weights of plans at other numbers of steps and noise levels than they were fitted for: polynomials through them.

A weight vector is written as what it would be without a fit, the line in σ for a forecast and (1, 0, 0) for a
correction, plus shares of a few directions in which fitted weights differ from that: of scale, of slope and of
curvature. Of each share, a polynomial in the place of the step is fitted to all steps of all plans:

    1, σ, σ², m, n, σ·m    with m, the fall of σ in each step since the last computed one, and n, the number of these
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from .polynomial import lagrange_weights
from .predictor import Moment

RIDGE = 1e-3  # relative to the mean square of a term: keeps shares that the plans leave open near none
LEAST_STEPS = 2  # that a polynomial is fitted to: one of two runs each, as of the first forecast of all
FINER, BEYOND = 1.5, 0.05  # how far from those fitted m may be, as a factor, and σ, as a share of the largest
Shares = NDArray[np.float64]


class Use(Enum):
    """What weights are for."""

    FORECAST = "of earlier residuals or outputs, in place of one that is not computed"
    OF_COMPUTED = "the correction of an output that was computed"
    OF_FORECAST = "the correction of an output that was made with a forecast residual"


class FittedRun(Protocol):
    """Weights of the steps of one run, as those of :class:`.fitted.Fitted`."""

    @property
    def coefficients(self) -> tuple[tuple[float, ...] | None, ...]:
        """Weights of each forecast."""

    @property
    def sigmas(self) -> tuple[float, ...] | None:
        """Time of each step."""

    @property
    def corrections(self) -> tuple[tuple[float, ...] | None, ...] | None:
        """Weights of each correction."""


class _StepPlace(NamedTuple):
    """Where in a run a step is: its noise level, the fall of that in each step since the last computed one, n."""

    level: float
    fall: float
    number: int

    @property
    def terms(self) -> Shares:
        level, fall = self.level, self.fall
        return np.array([1.0, level, level * level, fall, float(self.number), level * fall])


@dataclass(frozen=True)
class _Known:
    """Weights that were fitted: the step's place, its shares of each direction, and how much these count."""

    place: _StepPlace
    shares: Shares
    counts: Shares


@dataclass(frozen=True, eq=False)
class _Polynomials:
    """The shares of one kind of weights, as polynomials: (terms, directions); and the places that were fitted."""

    factors: Shares
    places: tuple[_StepPlace, ...]

    def shares(self, place: _StepPlace) -> Shares | None:
        """Return the share of each direction; ``None`` where the place is out of the fitted ones' reach."""
        levels, falls = [each.level for each in self.places], [each.fall for each in self.places]
        near = (
            min(levels) - BEYOND <= place.level <= max(levels) + BEYOND
            and min(falls) / FINER <= place.fall <= max(falls) * FINER
            and place.number <= max(each.number for each in self.places)
        )
        return place.terms @ self.factors if near else None


class Transferred:
    """The weights of some plans of one transformer, carried over to other steps.

    Example: plans whose weights are off the line by a share of the scale that is linear in σ; so they are in between.
        >>> from .fitted import Fitted
        >>> def made(steps):
        ...     sigmas = tuple(1 - step / steps for step in range(steps))
        ...     weights = tuple((1 + 0.1 * s,) if step % 2 else None for step, s in enumerate(sigmas))
        ...     return Fitted(weights, sigmas)
        >>> carried = Transferred([made(20), made(40)], "sigma")
        >>> [round(w, 2) for w in carried.weights(Use.FORECAST, [Moment(4, 0.62)], Moment(5, 0.6))]
        [1.06]
        >>> carried.weights(Use.FORECAST, [Moment(4, 0.9)], Moment(5, 0.6)) is None  # no plan has such steps
        True

    Args:
        plans: whose weights are carried over; all have ``sigmas``.
        axis: what their times are: ``"sigma"`` or ``"timestep"``; nothing is carried over from numbers of steps.
    """

    def __init__(self, plans: Sequence[FittedRun], axis: str) -> None:
        self._axis = axis
        self._largest = max((abs(time) for plan in plans for time in plan.sigmas or ()), default=0.0)
        self._polynomials: dict[tuple[Use, int], _Polynomials] = {}
        known: dict[tuple[Use, int], list[_Known]] = {}
        if axis != "step" and self._largest > 0:
            for plan in plans:
                for use, each in self._known(plan):
                    known.setdefault((use, len(each.shares)), []).append(each)
        for key, steps in known.items():
            if len(steps) >= LEAST_STEPS:
                self._polynomials[key] = _fitted(steps)

    def weights(self, use: Use, anchors: Sequence[Moment], now: Moment) -> tuple[float, ...] | None:
        """Return the weights at a step; ``None`` where nothing is known of such steps.

        Args:
            use: what they are for.
            anchors: the moments of the computed steps before, the newest first.
            now: the moment of the step.
        """
        if any(each.axis != self._axis for each in (now, *anchors)):
            return None
        for count in range(len(anchors), 0, -1):  # as many as some plan takes
            polynomials = self._polynomials.get((use, count if use is Use.FORECAST else count + 1))
            if polynomials is None:
                continue
            place, directions = self._place(anchors[0], now), _directions(use, anchors[:count], now)
            shares = None if place is None or directions is None else polynomials.shares(place)
            if shares is None or directions is None:
                return None
            return tuple(map(float, _start(use, anchors[:count], now) + shares @ directions))
        return None

    def reaches(self, times: Sequence[float]) -> bool:
        """Return whether all steps of a run that fall like these times are near those of the plans."""
        steps = [Moment(step, time, self._axis) for step, time in enumerate(times)]
        places = [self._place(before, now) for before, now in pairwise(steps[:-1])]
        known = [each for (use, _), each in self._polynomials.items() if use is Use.FORECAST]
        return all(place is not None and any(_is_as_fine(each, place) for each in known) for place in places)

    # -- inside --------------------------------------------------------------------------------------------------

    def _level(self, time: float) -> float:
        """Return a time as a noise level of 0 to 1."""
        if self._axis == "timestep":
            return time / self._largest
        return time if self._largest <= 1.0 else time / (1.0 + time)

    def _place(self, newest: Moment, now: Moment) -> _StepPlace | None:
        number = now.step - newest.step
        level, before = self._level(now.time), self._level(newest.time)
        return _StepPlace(level, abs(before - level) / number, number) if number > 0 and before != level else None

    def _known(self, plan: FittedRun) -> Iterator[tuple[Use, _Known]]:
        """Yield the weights of a plan's steps as shares."""
        times, computed = plan.sigmas or (), list[Moment]()
        for step, (forecast, correction) in enumerate(
            zip(plan.coefficients, plan.corrections or [None] * len(plan.coefficients), strict=True)
        ):
            now = Moment(step, times[step], self._axis)
            following = times[step + 1] if step + 1 < len(times) else 0.0
            fall = abs(self._level(now.time) - self._level(following))
            fitted = [(Use.FORECAST, forecast, len(forecast or ()))]
            fitted += [(correction_of(forecast is not None), correction, len(correction or ()) - 1)]
            for use, weights, count in fitted:
                anchors = computed[:count]
                if weights is None or not anchors or (place := self._place(anchors[0], now)) is None:
                    continue
                directions = _directions(use, anchors, now)
                if directions is None:
                    continue
                off = np.asarray(weights) - _start(use, anchors, now)
                shares = np.asarray(np.linalg.solve(directions.T, off), dtype=np.float64)
                yield use, _Known(place, shares, np.square(fall * np.linalg.norm(directions, axis=1)))
            if forecast is None:
                computed.insert(0, now)


def correction_of(is_forecast: bool) -> Use:
    """Return the use of a correction: of an output that was made with a forecast residual, or was computed."""
    return Use.OF_FORECAST if is_forecast else Use.OF_COMPUTED


def _start(use: Use, anchors: Sequence[Moment], now: Moment) -> Shares:
    """Return the weights without a fit: the line in σ, or the output as it is."""
    if use is Use.FORECAST:
        start = np.zeros(len(anchors))
        start[: len(anchors[:2])] = lagrange_weights(anchors[:2], now, "sigma")
        return start
    start = np.zeros(1 + len(anchors))
    start[0] = 1.0
    return start


def _directions(use: Use, anchors: Sequence[Moment], now: Moment) -> Shares | None:
    """Return (K, K): what K weights may be off by, scale first, then slope, then curvature; ``None``: times coincide.

    A forecast with a share of 1 of the curvature is that of the parabola, and one with −1 of the slope is the last
    residual; a correction adds a share of what the forecast of this step would have been off by.
    """
    times = [each.time for each in anchors]
    if len({*times, now.time}) <= len(times):
        return None
    size = len(anchors) + (use is not Use.FORECAST)
    rows = [np.eye(size)[0]]
    if use is Use.FORECAST:
        for degree in range(1, size):
            row = np.zeros(size)
            row[: degree + 1] = lagrange_weights(anchors[: degree + 1], now, "sigma")
            row[:degree] -= lagrange_weights(anchors[:degree], now, "sigma")
            rows.append(row)
    else:
        for degree in range(1, size):  # what was computed now, less the forecast of it
            row = np.zeros(size)
            row[0] = 1.0
            row[1 : degree + 1] = -np.asarray(lagrange_weights(anchors[:degree], now, "sigma"))
            rows.append(row)
    return np.stack(rows)


def _fitted(steps: Sequence[_Known]) -> _Polynomials:
    """Fit polynomials to the shares of some steps, by least squares; steps count by how far they move the latents."""
    terms = np.stack([each.place.terms for each in steps])
    sizes = np.maximum(np.sqrt(np.square(terms).mean(0)), 1e-12)
    scaled = terms / sizes
    columns = []
    for direction in range(len(steps[0].shares)):
        counts = np.array([each.counts[direction] for each in steps])
        aim = np.array([each.shares[direction] for each in steps])
        matrix = scaled.T @ (counts[:, None] * scaled) + RIDGE * counts.sum() * np.eye(len(sizes))
        factors = np.linalg.solve(matrix, scaled.T @ (counts * aim)) if counts.sum() > 0 else np.zeros(len(sizes))
        columns.append(factors / sizes)
    return _Polynomials(np.stack(columns, axis=1), tuple(each.place for each in steps))


def _is_as_fine(polynomials: _Polynomials, place: _StepPlace) -> bool:
    falls = [each.fall for each in polynomials.places]
    return min(falls) / FINER <= place.fall <= max(falls) * FINER
