"""The exact best of all schedules with steps at which one branch of guidance alone is computed, for each cost.

A refresh is *whole*, or *conditional*: then one branch alone is computed, at a share of the price, and the other's
output is made of it and the difference of the two at the last whole refresh. Stretches of reused steps cost what they
do in :class:`.Schedules`, between refreshes of either kind, since forecasts use the outputs of both. A conditional
refresh at step t costs (U·‖a_t − a_s‖)^γ besides, with s the last whole one, and a what guidance adds to the output
(``SolverTrace.apart``). All are errors of the solver's latents. U is the weight of an error at t and at reused steps
up to the next refresh, summed: what is held is in their forecasts, too, whose weights add up to 1 or nearly so.

The cheapest path to a state is part of the best schedule through it, if the state has all that later costs depend on:
the last refreshes, as many as a forecast uses; the last whole one; and what was spent so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import comb
from typing import NamedTuple

import numpy as np

from ..errors import InvalidSetting
from ..recording.recording import Floats
from ..validation import check_number, shown
from .schedule_solver import GAMMA, Earlier, Schedules
from .weight_fit import RIDGE

MOST_STATES = 2**26  # half a gigabyte of costs: 47 steps with three anchors, 100 with two, where a share is ½
FINEST = 8  # parts of a computed step, that a conditional one's share is counted in


class ConditionalSchedule(NamedTuple):
    """A schedule.

    Args:
        computed: 1 for each step that is computed, in whole or in part, and 0 for those that are reused.
        conditional: 1 for each step at which one branch alone is computed.
        cost: in computed steps.
        error: its price.
    """

    computed: tuple[int, ...]
    conditional: tuple[int, ...]
    cost: float
    error: float


class _Solution(NamedTuple):
    """The least errors of all ways to all states.

    Args:
        ends: (units,), of whole schedules that cost so many units.
        arrivals: for each last refresh (ways, last whole one, units), of its paths.
        prices: for each last refresh (ways, T − last), of the stretch from it to each next one.
    """

    ends: Floats
    arrivals: list[Floats]
    prices: list[Floats]


@dataclass(frozen=True, eq=False)
class ConditionalSchedules:
    """All schedules of a transformer whose outputs are forecast, with steps of one branch alone.

    Args:
        gram: (T, T), ⟨g_s, g_t⟩ of the outputs that the solver was given, at the transformer's steps.
        times: (T,), σ of each step, or what stands for it.
        error_weights: (T,), the weight of an error of the output at each step.
        apart: (T, T), ‖a_s − a_t‖², as in ``SolverTrace.apart_squares``.
        anchors: outputs that a forecast is made of, 1 to 3.
        share: cost of a conditional step, in computed ones, below 1: a multiple of ½, ⅓, …, or ⅛.
        ridge: as for :class:`.Schedules`.
        gamma: γ, as for :class:`.Schedules`.
        carries: whether U has the weights of the reused steps; else it is u_t alone. Which one finds the better
            schedules depends on the model.

    Raises:
        ValueError: the sizes do not match, the share is none of these, or there are so many steps that the best
            schedule would take gigabytes: more than 47 with three anchors, or 100 with two, at a share of ½.

    Example: guidance that does not change is held without any error.
        >>> outputs = np.cumsum([[1.0, 0.5], [0.0, 1.0], [0.7, 0.1], [1.2, 0.3]], axis=0)
        >>> every = ConditionalSchedules(outputs @ outputs.T, np.arange(4.0, 0, -1), np.ones(4), np.zeros((4, 4)))
        >>> every.best(2.5)
        ConditionalSchedule(computed=(1, 1, 1, 1), conditional=(0, 1, 1, 1), cost=2.5, error=0.0)
    """

    gram: Floats
    times: Floats
    error_weights: Floats
    apart: Floats
    anchors: int = 2
    share: float = 0.5
    ridge: float = RIDGE
    gamma: float = GAMMA
    carries: bool = True

    def __post_init__(self) -> None:
        if self.apart.shape != self.gram.shape:
            raise InvalidSetting(
                f"apart is of shape {self.apart.shape}, and gram of {self.gram.shape}: give one of both"
            )
        given = check_number("share", self.share, 0, strictly=True)
        if given >= 1 or abs(float(self._parts) - given) > 1e-9:
            raise InvalidSetting(f"share={shown(self.share)} should be below 1, and a multiple of 1/2, 1/3, … or 1/8")
        states = _states(self.steps, self.anchors, self._parts.denominator)
        if states > MOST_STATES:
            raise InvalidSetting(
                f"{self.steps} steps with anchors={self.anchors} and share={self._parts} have {states:,} states, and "
                f"{MOST_STATES:,} are solved at most: take fewer anchors, or a share of 1/2"
            )

    @property
    def steps(self) -> int:
        """Number of steps, T."""
        return len(self.times)

    @cached_property
    def schedules(self) -> Schedules:
        """The schedules without such steps."""
        return Schedules(
            self.gram[None], self.times, self.error_weights[None], self.anchors, ridge=self.ridge, gamma=self.gamma
        )

    def errors(self) -> dict[float, float]:
        """Return the least error for each cost that a schedule may have."""
        found = enumerate(self._solution.ends)
        return {unit / self._parts.denominator: float(error) for unit, error in found if np.isfinite(error)}

    def best(self, cost: float) -> ConditionalSchedule:
        """Return the schedule of least error among those that cost at most so many computed steps.

        Raises:
            ValueError: no schedule costs as little: the first step is computed.
        """
        if not cost >= 1:
            raise InvalidSetting(f"best({shown(cost)}): the first step is computed, so that the least cost is 1")
        units = min(int(cost * self._parts.denominator + 1e-9), self._most)
        return self._traced(int(self._solution.ends[: units + 1].argmin()))

    def error(self, computed: Sequence[int], conditional: Sequence[int]) -> float:
        """Return the error of one schedule.

        Raises:
            ValueError: it is none.
        """
        bits, halves = list(computed), list(conditional)
        fits = len(halves) == self.steps and all(bit >= half >= 0 for bit, half in zip(bits, halves, strict=False))
        if not fits or halves[0]:
            raise InvalidSetting(
                f"conditional={shown(conditional)} is not a 0 or 1 for each of {self.steps} steps, 1 at computed ones "
                "only, and not at the first"
            )
        total, whole = float(self.schedules.cost(bits)[0]), 0
        refreshes = [step for step, bit in enumerate(bits) if bit]
        for step, following in zip(refreshes, [*refreshes[1:], self.steps], strict=True):
            whole = whole if halves[step] else step
            total += float(self._held(step)[whole, following - step - 1])
        return total

    @cached_property
    def _parts(self) -> Fraction:
        return Fraction(self.share).limit_denominator(FINEST)

    @property
    def _most(self) -> int:
        """The cost of all steps, in units."""
        return self._parts.denominator * self.steps

    def _held(self, last: int) -> Floats:
        """Return (last + 1, T − last): the error of what is held at a refresh, by the last whole one and the next one.

        It is 0 where the refresh is whole itself.
        """
        weights = self.error_weights[last:]
        reach = np.cumsum(weights) if self.carries else np.full(len(weights), weights[0])
        held: Floats = (self.apart[: last + 1, last, None] * reach**2) ** (self.gamma / 2)
        held[last] = 0.0
        return held

    @cached_property
    def _solution(self) -> _Solution:
        """The least errors, by dynamic programming from the first step on."""
        steps, every = self.steps, self.schedules
        whole, part = self._parts.denominator, self._parts.numerator
        arrivals = [np.full((len(ways), last + 1, self._most + 1), np.inf) for last, ways in enumerate(every.earlier)]
        arrivals[0][0, 0, whole] = 0.0
        ends, prices = np.full(self._most + 1, np.inf), list[Floats]()
        for last in range(steps):
            prices.append(every.prices(last, every.earlier[last])[0])
            held = self._held(last)
            cheapest: dict[Earlier, Floats] = {}  # (last whole one, units, T − last), of all ways that go on alike
            for way, arrived, price in zip(every.earlier[last], arrivals[last], prices[last], strict=True):
                onward, found = every.onward(last, way), arrived[:, :, None] + (price + held)[:, None]
                known = cheapest.setdefault(onward, found)
                if known is not found:
                    np.minimum(known, found, out=known)
            for onward, found in cheapest.items():
                ends = np.minimum(ends, found[:, :, -1].min(axis=0))
                for following in range(last + 1, steps):
                    there = arrivals[following][every.place[following][onward]]
                    costs = found[:, :, following - last - 1]
                    np.minimum(there[-1, whole:], costs[:, :-whole].min(axis=0), out=there[-1, whole:])
                    np.minimum(there[: last + 1, part:], costs[:, :-part], out=there[: last + 1, part:])
        return _Solution(ends, arrivals, prices)

    def _traced(self, units: int) -> ConditionalSchedule:
        """Return the best schedule of a cost, traced back from its last refresh."""
        solution, every = self._solution, self.schedules
        cost, error, chosen = units / self._parts.denominator, float(solution.ends[units]), dict[int, int]()
        last, way, whole = self._last(units)
        while last:
            is_part = whole != last
            chosen[last] = int(is_part)
            units -= self._parts.numerator if is_part else self._parts.denominator
            best = (np.inf, 0, 0, 0)
            onward = every.earlier[last][way]
            for before in onward[:1] or range(last):
                ways, held = enumerate(every.earlier[before]), self._held(before)[:, last - before - 1]
                for number in (each for each, earlier in ways if every.onward(before, earlier) == onward):
                    price = solution.prices[before][number, last - before - 1]
                    arrived = solution.arrivals[before][number, :, units] + price + held
                    if is_part:  # the last whole one is the same
                        arrived = np.where(np.arange(before + 1) == whole, arrived, np.inf)
                    best = min(best, (float(arrived.min()), before, number, int(arrived.argmin())))
            _, last, way, whole = best
        chosen[0] = 0
        computed = tuple(int(step in chosen) for step in range(self.steps))
        conditional = tuple(chosen.get(step, 0) for step in range(self.steps))
        return ConditionalSchedule(computed, conditional, cost, error)

    def _last(self, units: int) -> tuple[int, int, int]:
        """Return the last refresh of the best schedule of a cost, the number of its way, and the last whole one."""
        best = (np.inf, 0, 0, 0)
        for last, (arrived, prices) in enumerate(zip(self._solution.arrivals, self._solution.prices, strict=True)):
            totals = arrived[:, :, units] + prices[:, -1:] + self._held(last)[:, -1]
            way, whole = np.unravel_index(int(totals.argmin()), totals.shape)
            best = min(best, (float(totals.min()), last, int(way), int(whole)))
        return best[1:]


def most_anchors(steps: int, anchors: int) -> int:
    """Return the number of anchors, up to a wanted one, with which a run of so many steps is solved, at a share of ½.

    Example:
        >>> most_anchors(28, 3), most_anchors(64, 3), most_anchors(200, 3)
        (3, 2, 1)
    """
    return next((each for each in range(anchors, 0, -1) if _states(steps, each, 2) <= MOST_STATES), 0)


def _states(steps: int, anchors: int, parts: int) -> int:
    """Return the number of states, of a share counted in so many parts of a computed step."""
    ways = sum((last + 1) * max(1, comb(last, anchors - 1)) for last in range(steps))
    return (parts * steps + 1) * ways
