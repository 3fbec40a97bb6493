"""The exact best of all schedules with so many refreshes, by dynamic programming.

A schedule's *segments* are its reused stretches: the steps between two refreshes b < c, forecast from the last
refreshes b > a > …. A segment costs ‖Σ u_τ (Δ̂_τ − Δ_τ)‖^γ, the signed sum of its errors, u_τ being the weight of an
error at step τ (:mod:`.costs`); a schedule costs the sum of its segments. Since the cost of a segment depends on its
own refreshes only, the cheapest path to the refreshes (a, b) in k refreshes is part of the best schedule through them.

All ranges are solved at once, stacked: arrays are (ranges, refreshes so far, earlier refreshes, next refresh).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidSetting
from ..recording.recording import Floats
from ..validation import shown
from .weight_fit import RIDGE

GAMMA = 2.0  # errors of different segments add up as if unrelated; 4 gave almost the same schedules
Earlier = tuple[int, ...]  # refreshes before the last, the newest first


@dataclass(frozen=True, eq=False)
class Schedules:
    """All schedules of some ranges, with their costs.

    Args:
        grams: (R, T, T), G[s, t] = ⟨Δ_s, Δ_t⟩ of each range.
        times: (T,), σ of each step, or what stands for it: the axis of the line through two residuals.
        error_weights: (R, T), the weight of an error of the residual at each step.
        anchors: residuals that a forecast is made of, 1 to 3.
        ridge: how strongly forecasts are pulled to the line, as for :func:`dithooks.planning.weight_fit.fit`.
        gamma: γ: the larger it is, the more the worst segment decides.

    Raises:
        ValueError: the sizes do not match, or ``anchors`` is out of range.
    """

    grams: Floats
    times: Floats
    error_weights: Floats
    anchors: int = 2
    ridge: float = RIDGE
    gamma: float = GAMMA

    def __post_init__(self) -> None:
        ranges, steps = self.error_weights.shape
        if self.grams.shape != (ranges, steps, steps) or self.times.shape != (steps,):
            raise InvalidSetting(
                f"{ranges} ranges of {steps} steps need Gram matrices ({ranges}, {steps}, {steps}) and {steps} times: "
                f"got {self.grams.shape} and {self.times.shape}"
            )
        if not 1 <= self.anchors <= 3:
            raise InvalidSetting(f"anchors={self.anchors}: forecasts are made of 1, 2 or 3 residuals")

    @property
    def steps(self) -> int:
        """Number of steps, T."""
        return len(self.times)

    def costs(self, most: int | None = None) -> Floats:
        """Return (R, most + 1): in column k the least cost of a schedule with k refreshes; column 0 is infinite.

        Args:
            most: largest number of refreshes; left out, T.
        """
        most = self.steps if most is None else min(most, self.steps)
        ends, _ = self._solve(max(most, 1))
        return ends[:, : most + 1]

    def best(self, refreshes: int) -> tuple[int, ...]:
        """Return the cheapest schedule with so many refreshes: a 1 for each step that is computed.

        Raises:
            ValueError: there are several ranges, or fewer steps than refreshes.
        """
        if len(self.grams) != 1 or not 1 <= refreshes <= self.steps:
            raise InvalidSetting(f"best({refreshes}): one range, and 1 to {self.steps} refreshes")
        _, arrivals = self._solve(refreshes)
        chosen = self._trace(arrivals, refreshes)
        return tuple(int(step in chosen) for step in range(self.steps))

    def cost(self, computed: Sequence[int]) -> Floats:
        """Return (R,): the cost of one schedule.

        Raises:
            ValueError: ``computed`` is not a 0 or 1 for each step, the first of them 1.
        """
        refreshes = [step for step, bit in enumerate(computed) if bit]
        if len(computed) != self.steps or refreshes[:1] != [0]:
            raise InvalidSetting(
                f"{shown(computed)} is not a 0 or 1 for each of {self.steps} steps, the first of them 1"
            )
        total = np.zeros(len(self.grams))
        for place, (last, following) in enumerate(zip(refreshes, [*refreshes[1:], self.steps], strict=True)):
            earlier = tuple(reversed(refreshes[max(place - self.anchors + 1, 0) : place]))
            total += self.prices(last, [earlier])[:, 0, following - last - 1]
        return total

    def _solve(self, most: int) -> tuple[Floats, list[Floats]]:
        """Return the least cost of each number of refreshes, and of each path to a last refresh."""
        size, arrivals = len(self.grams), list[Floats]()
        for last in range(self.steps):
            arrivals.append(np.full((size, most + 1, len(self.earlier[last])), np.inf))
        arrivals[0][:, 1, 0] = 0.0
        ends = np.full((size, most + 1), np.inf)
        for last in range(self.steps):
            ways = self.earlier[last]
            prices = self.prices(last, ways)  # (R, ways, T − last): the next refresh is last + 1 … T
            merged: dict[Earlier, list[int]] = {}
            for number, way in enumerate(ways):
                merged.setdefault(self.onward(last, way), []).append(number)
            for onward, numbers in merged.items():
                first, final = numbers[0], numbers[-1] + 1  # they are neighbours in the sorted list
                arrived = arrivals[last][:, :, first:final, None] + prices[:, None, first:final]
                cheapest = arrived.min(axis=2)  # (R, most + 1, T − last)
                ends = np.minimum(ends, cheapest[:, :, -1])
                for following in range(last + 1, self.steps):
                    place = self.place[following][onward]
                    there = arrivals[following][:, 1:, place]
                    np.minimum(there, cheapest[:, :-1, following - last - 1], out=there)
        return ends, arrivals

    def _trace(self, arrivals: list[Floats], refreshes: int) -> set[int]:
        """Return the refreshes of the cheapest schedule, traced back from its last one."""
        best, state = np.inf, (0, 0)
        for last in range(self.steps):
            prices = self.prices(last, self.earlier[last])[0, :, -1]
            totals = arrivals[last][0, refreshes] + prices
            if totals.min() < best:
                best, state = float(totals.min()), (last, int(totals.argmin()))
        chosen, (last, place) = {state[0]}, state
        for number in range(refreshes, 1, -1):
            way = self.earlier[last][place]
            cheapest = (np.inf, 0, 0)
            for before in way[:1] or range(last):
                for other, earlier in enumerate(self.earlier[before]):
                    if self.onward(before, earlier) == way:
                        price = self.prices(before, [earlier])[0, 0, last - before - 1]
                        total = float(arrivals[before][0, number - 1, other] + price)
                        cheapest = min(cheapest, (total, before, other))
            _, last, place = cheapest
            chosen.add(last)
        return chosen

    @cached_property
    def earlier(self) -> list[list[Earlier]]:
        """For each last refresh, the sorted tuples of refreshes before it that a forecast may use."""
        reach, earlier = self.anchors - 1, []
        for last in range(self.steps):
            ways: list[Earlier] = [()] if last == 0 or reach == 0 else []
            for length in range(1, reach + 1):
                tuples = combinations(range(last - 1, -1, -1), length)
                ways += [way for way in tuples if length == reach or way[-1] == 0]
            earlier.append(sorted(ways))
        return earlier

    @cached_property
    def place(self) -> list[dict[Earlier, int]]:
        return [{way: place for place, way in enumerate(ways)} for ways in self.earlier]

    def onward(self, last: int, way: Earlier) -> Earlier:
        """Return the refreshes before the one that follows ``last``, as far as forecasts use them."""
        return (last, *way)[: self.anchors - 1]

    def prices(self, last: int, ways: Sequence[Earlier]) -> Floats:
        """Return (R, ways, T − last): the cost of the segment from ``last`` to each next refresh last + 1 … T."""
        groups: dict[int, list[int]] = {}
        for number, way in enumerate(ways):
            groups.setdefault(len(way), []).append(number)
        prices = np.zeros((len(self.grams), len(ways), self.steps - last))
        if last == self.steps - 1:
            return prices
        for numbers in groups.values():
            known = np.array([(last, *ways[number]) for number in numbers])
            prices[:, numbers, 1:] = self._segments(last, known)
        return prices

    def _segments(self, last: int, known: NDArray[np.int_]) -> Floats:
        """Return (R, ways, T − 1 − last): costs of the segments to each end; ``known``: (ways, anchors)."""
        reused = slice(last + 1, self.steps)
        weights = forecast_weights(self.grams, self.times, known, last + 1, self.ridge)  # (R, ways, anchors, reused)
        errors = self.error_weights[:, reused]
        leads = np.cumsum(weights * errors[:, None, None, :], axis=3)  # of each anchor, summed over the segment
        inner = self.grams[:, known[:, :, None], known[:, None, :]]  # (R, ways, anchors, anchors)
        effects = np.cumsum(self.grams[:, :, reused] * errors[:, None, :], axis=2)  # (R, T, reused): ⟨Δ_s, Σ u Δ⟩
        cross = effects[:, known]  # (R, ways, anchors, reused)
        own = np.cumsum(np.cumsum(self.grams[:, reused, reused] * errors[:, :, None] * errors[:, None, :], 1), 2)
        whole = np.diagonal(own, axis1=1, axis2=2)  # (R, reused): ‖Σ u Δ‖²
        squares = (np.matmul(inner, leads) * leads).sum(2) - 2 * (cross * leads).sum(2) + whole[:, None]
        prices: Floats = np.maximum(squares, 0.0) ** (self.gamma / 2)
        return prices


def forecast_weights(grams: Floats, times: Floats, known: NDArray[np.int_], first: int, ridge: float) -> Floats:
    """Return (R, ways, anchors, T − first): the weights with which residuals best forecast those of later steps.

    The weights minimise ‖Δ_t − Σ w_k Δ_k‖² + ridge·mean(G_kk)·‖w − w₀‖², as in :func:`.weight_fit.fit`; w₀ is the line
    through the two newest residuals.

    Args:
        grams: (R, T, T), ⟨Δ_s, Δ_t⟩ of each range.
        times: (T,), the axis of the line.
        known: (ways, anchors): for each way the refreshes that forecasts use, the newest first.
        first: first step that is forecast.
        ridge: strength of the pull to the line, ≥ 0.
    """
    count = known.shape[1]
    line = np.zeros((*known.shape, len(times) - first))
    line[:, 0] = 1.0
    if count > 1:
        newest, before = times[known[:, 0]], times[known[:, 1]]
        gap = newest - before
        distance = times[None, first:] - newest[:, None]
        slope = np.divide(distance, gap[:, None], out=np.zeros_like(distance), where=gap[:, None] != 0)
        line[:, 0], line[:, 1] = 1.0 + slope, -slope
    inner = grams[:, known[:, :, None], known[:, None, :]]
    pull = ridge * np.trace(inner, axis1=2, axis2=3) / count  # (R, ways)
    matrix = inner + pull[:, :, None, None] * np.eye(count)
    aim = grams[:, known, first:] + pull[:, :, None, None] * line
    return _solved(matrix, aim, line)


def _solved(matrix: Floats, aim: Floats, line: Floats) -> Floats:
    """Return matrix⁻¹·aim for small symmetric matrices: the smallest solution, or the line where the matrix is 0."""
    count = matrix.shape[-1]
    mean = np.trace(matrix, axis1=-2, axis2=-1) / count
    singular = _determinant(matrix) <= 1e-12 * mean**count  # 0 where residuals are parallel
    regular = np.where(singular[..., None, None], np.eye(count), matrix)
    weights = np.asarray(np.linalg.solve(regular, aim), dtype=np.float64)
    if singular.any():
        inverse = np.linalg.pinv(matrix[singular], rcond=count * float(np.finfo(np.float64).eps), hermitian=True)
        nothing = ~matrix[singular].any(axis=(-2, -1))
        of_lines = np.broadcast_to(line, aim.shape)[singular]
        weights[singular] = np.where(nothing[:, None, None], of_lines, inverse @ aim[singular])
    return weights


def _determinant(matrix: Floats) -> Floats:
    """Return the determinants of symmetric matrices of size 1, 2 or 3; NumPy's takes as long as solving does."""
    if matrix.shape[-1] == 1:
        return matrix[..., 0, 0]
    (a, b), d = (matrix[..., 0, k] for k in (0, 1)), matrix[..., 1, 1]
    if matrix.shape[-1] == 2:
        return a * d - b * b
    c, e, f = matrix[..., 0, 2], matrix[..., 1, 2], matrix[..., 2, 2]
    determinant: Floats = a * (d * f - e * e) - b * (b * f - c * e) + c * (b * e - c * d)
    return determinant
