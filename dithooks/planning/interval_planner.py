"""The planner of intervals: one range, refreshed every so many steps from a start on, and reused as it is.

Such plans have the form of a :class:`DitCacheConfig` of four numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from ..config.cache_config import DitCacheConfig
from ..config.transformer_plan import TransformerPlan
from ..errors import InvalidSetting
from ..policies.interval import Interval
from ..predictors.predictor import Moment
from ..recording.recording import Floats
from .candidate import Candidate, Choice, Option, Variant
from .pareto_front import SLACK, pareto_front
from .planner import DEFAULT_LATE_ERROR_WEIGHT, RANGES_AT_ONCE, Coefficients, Planner, is_near

LAST_RESIDUAL = (1.0,)  # the weights of plain reuse


def interval_schedule(start: int, interval: int, steps: Sequence[int]) -> tuple[int, ...]:
    """Return the schedule of :class:`Interval`: a 1 for each of a transformer's steps that it computes, the first too.

    Example:
        >>> interval_schedule(2, 3, range(8)), interval_schedule(0, 3, range(2, 8))
        ((1, 1, 1, 0, 0, 1, 0, 0), (1, 1, 0, 0, 1, 0))
    """
    policy = Interval(start, interval)
    previous = [-1, *steps[:-1]]  # a refresh that falls between two calls is made at the second
    return tuple(int(policy.last_refresh(step) > before) for step, before in zip(steps, previous, strict=True))


def interval_config(piece: TransformerPlan, interval: int = 2) -> DitCacheConfig:
    """Return the configuration that does the same as a transformer's part of a plan.

    Args:
        piece: the transformer's part of a plan that was searched with an interval.
        interval: the interval of that search. Where only one step is refreshed from the start on, several intervals do
            the same: the least that is not below this one is returned.

    Raises:
        ValueError: no configuration of four numbers with such an interval does the same.

    Example:
        >>> piece = TransformerPlan("", 1, 2, 4, (1, 1, 0, 0, 1), (None, None, (1.0,), (1.0,), None), None)
        >>> print(interval_config(piece))
        DitCacheConfig(cache_step_start=1, cache_step_interval=3, cache_block_start=1, cache_num_blocks=2)
    """
    first, end = piece.called or (0, len(piece.steps))
    bits, called = piece.steps[first:end], range(first, end)
    if {weights for weights in piece.coefficients if weights is not None} == {LAST_RESIDUAL}:
        start = _start(bits, called)
        for wider in range(interval, max(interval, len(bits)) + 1):
            if interval_schedule(start, wider, called) == bits:
                return DitCacheConfig(start, wider, piece.first, piece.blocks)
    raise InvalidSetting(
        f"{piece}: no four numbers say this, with an interval of {interval} or more; search it with interval=..."
    )


def stretch_costs(grams: Floats, weights: Floats) -> Floats:
    """Return (R, T, T + 1): the cost ‖Σ u_τ (Δ_b − Δ_τ)‖² of reusing the residual of step b as it is until step c.

    The sum is over b < τ < c. Entries with c ≤ b have no meaning.

    Args:
        grams: (R, T, T), ⟨Δ_s, Δ_t⟩ of each range.
        weights: (R, T), u: the weight of an error at each step.

    Example: residuals 1, 2, 4 of one number, all steps of the same weight.
        >>> stretch_costs(np.outer([1.0, 2.0, 4.0], [1.0, 2.0, 4.0])[None], np.ones((1, 3)))[0, 0, 1:]
        array([ 0.,  1., 16.])
    """
    ranges, steps = weights.shape
    # Sums over τ < c, from which those over a stretch are differences.
    total, cross = np.zeros((ranges, steps + 1)), np.zeros((ranges, steps, steps + 1))
    whole = np.zeros((ranges, steps + 1, steps + 1))
    np.cumsum(weights, axis=1, out=total[:, 1:])
    np.cumsum(grams * weights[:, None], axis=2, out=cross[:, :, 1:])  # ⟨Δ_b, Σ u Δ⟩
    np.cumsum(cross * weights[:, :, None], axis=1, out=whole[:, 1:])  # ⟨Σ u Δ, Σ u Δ⟩
    at = np.arange(steps)
    last, following = grams[:, at, at, None], whole[:, at + 1, at + 1, None]
    lead = total[:, None] - total[:, 1:, None]
    along = cross - cross[:, at, at + 1, None]
    own = np.diagonal(whole, axis1=1, axis2=2)[:, None] - 2 * whole[:, 1:] + following
    prices: Floats = np.maximum(lead * (lead * last - 2 * along) + own, 0.0)
    return prices


@dataclass(frozen=True, eq=False)
class IntervalOptions:
    """All ranges of a transformer with all starts, for one interval.

    Args:
        ranges: numbers of the ranges.
        schedules: one for each start.
        saved: (ranges, schedules), what each saves.
        costs: (ranges, schedules), what each costs.
    """

    ranges: Sequence[int]
    schedules: Sequence[tuple[int, ...]]
    saved: Floats
    costs: Floats

    def option(self, place: int) -> Option:
        """Return an option by its place in the flattened arrays."""
        r, s = divmod(int(place), len(self.schedules))
        computed = self.schedules[s]
        return Option(float(self.saved[r, s]), float(self.costs[r, s]), self.ranges[r], sum(computed), computed)


@dataclass(eq=False)
class IntervalPlanner(Planner):
    """Plans with an interval: every range with every start is priced.

    The interval is the one given, where a range and start reach the target with it, or else the next larger one with
    which some do; :meth:`frontier` is of the one given. Several transformers share the interval, and have a range and
    start each. Of a variant, ``anchors`` has no effect.

    Args:
        recording: as for :class:`Planner`.
        cost: as for :class:`Planner`.
        report: as for :class:`Planner`.
        interval: ≥ 2.
        within: called with the first and last block of a range and the number of blocks: whether it is considered.
    """

    # One variant each: the best interval depends little on the weights of errors.
    LATE_ERROR_WEIGHTS: ClassVar[tuple[float, ...]] = (DEFAULT_LATE_ERROR_WEIGHT,)
    POWERS: ClassVar[tuple[float, ...]] = (1.0,)

    interval: int = field(default=2, kw_only=True)
    within: Callable[[int, int, int], bool] = field(default=lambda first, last, blocks: True, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._steps = [tuple(trace.steps.tolist()) for trace in self.recording.traces]
        longest = max(steps[-1] - steps[0] + 1 for steps in self._steps)
        self._intervals = range(min(self.interval, longest), longest + 1)  # beyond, nothing more is reused

    def neighbours(self, candidate: Candidate) -> Iterator[Candidate]:
        """Yield the same plan with one start a step earlier or later, if it is as fast, those that cost least first."""
        interval = self._interval_of(candidate.choices)
        moves = []
        for place, choice in enumerate(candidate.choices):
            steps = self._steps[choice.trace]
            at = steps.index(_start(choice.computed, steps))
            near = [
                interval_schedule(steps[each], interval, steps) for each in (at - 1, at + 1) if 0 <= each < len(steps)
            ]
            costs = self._priced(choice.trace, [self._range(choice)], candidate.variant, [choice.computed, *near])
            for computed, cost in zip(near, costs[0, 1:] - costs[0, 0], strict=True):
                moves.append(self._with(candidate, place, choice._replace(computed=computed), cost))
        as_fast = [move for move in moves if move.speedup >= candidate.speedup * (1 - SLACK)]
        yield from sorted(as_fast, key=lambda move: move.error)

    def alternatives(self, target: float, best: Candidate, avoid: Sequence[Choice]) -> Iterator[Candidate]:
        """Yield all other plans that reach the target with the interval of the best.

        The price leaves out what the blocks behind a range make of its error. So the best range of all blocks comes
        first, then the best that ends with the last block, then ranges that are not near each other, and then all
        others with all starts, one transformer at a time, by their price.
        """
        interval, avoided = self._interval_of(best.choices), [*best.choices, *avoid]
        for within in (lambda a, b, n: a == 0 and b == n - 1, lambda a, b, n: b == n - 1):
            found = replace(self, within=within).candidate(target, best.variant, avoid)
            if found.reaches and self._interval_of(found.choices) == interval:
                yield found
                avoided += found.choices
        while (found := self.candidate(target, best.variant, avoided)).reaches:
            if self._interval_of(found.choices) > interval:
                break
            yield found
            avoided += found.choices
        needed = self.savings.needed(target) * (1 - SLACK)
        for place, choice in enumerate(best.choices):
            number, trace = choice.trace, self.recording.traces[choice.trace]
            lacking = needed - self._saved([each for each in best.choices if each is not choice])
            every = self._every(number, self._allowed(number, (), best.variant), best.variant, interval)
            now = self._priced(number, [self._range(choice)], best.variant, [choice.computed])[0, 0]
            order = every.costs.argsort(axis=None)
            for option in map(every.option, order[every.saved.ravel()[order] >= lacking]):
                if not is_near(pair := trace.ranges[option.range], avoid, number, trace):
                    another = Choice(number, int(pair[0]), int(pair[1]), option.computed)
                    yield self._with(best, place, another, option.cost - now)

    def _options(self, number: int, variant: Variant, needed: float, avoid: Sequence[Choice]) -> list[Option]:
        every = self._every(number, self._allowed(number, avoid, variant), variant, self._interval(needed, avoid))
        if not every.costs.size:
            return [Option()]
        # Of tens of thousands of options keep those whose cost is below that of all that save as much or more.
        order = np.lexsort((every.costs.ravel(), -every.saved.ravel()))
        costs = every.costs.ravel()[order]
        kept = order[np.append(True, costs[1:] < np.minimum.accumulate(costs)[:-1])]
        return pareto_front([*self._uncached, *map(every.option, kept)])

    def _allowed(self, number: int, avoid: Sequence[Choice], variant: Variant) -> list[int]:
        trace = self.recording.traces[number]
        ends, blocks = trace.ranges.tolist(), len(trace.blocks)
        return [r for r in super()._allowed(number, avoid, variant) if self.within(ends[r][0], ends[r][1], blocks)]

    def _every(self, number: int, allowed: Sequence[int], variant: Variant, interval: int) -> IntervalOptions:
        steps, saving = self._steps[number], self.savings.step[number]
        schedules = [each for start in steps if 0 in (each := interval_schedule(start, interval, steps))]
        saved = np.outer(saving[list(allowed)], [computed.count(0) for computed in schedules])
        return IntervalOptions(allowed, schedules, saved, self._priced(number, allowed, variant, schedules))

    def _coefficients(self, choice: Choice, variant: Variant, moments: Sequence[Moment]) -> Coefficients:
        return tuple(None if bit else LAST_RESIDUAL for bit in choice.computed)

    def _interval(self, needed: float, avoid: Sequence[Choice]) -> int:
        """Return the least interval with which so much can be saved, or else the largest, which saves most."""
        saving = enumerate(self.savings.step)
        most = [max(saved[self._allowed(number, avoid, Variant())], default=0.0) for number, saved in saving]
        for interval in self._intervals:
            reused = [interval_schedule(steps[0], interval, steps).count(0) for steps in self._steps]
            if float(np.dot(most, reused)) >= needed * (1 - SLACK):
                return interval
        return self._intervals[-1]

    def _interval_of(self, choices: Sequence[Choice]) -> int:
        """Return the least interval that gives all these schedules."""

        def gives(interval: int, choice: Choice) -> bool:
            steps = self._steps[choice.trace]
            return interval_schedule(_start(choice.computed, steps), interval, steps) == choice.computed

        return next(each for each in self._intervals if all(gives(each, choice) for choice in choices))

    def _with(self, candidate: Candidate, place: int, choice: Choice, dearer: float) -> Candidate:
        """Return a candidate with another choice for one transformer, which costs so much more."""
        choices = (*candidate.choices[:place], choice, *candidate.choices[place + 1 :])
        error = float(np.sqrt(max(candidate.error**2 + dearer, 0.0)))
        return replace(candidate, choices=choices, speedup=self.savings.speedup(self._saved(choices)), error=error)

    def _saved(self, choices: Sequence[Choice]) -> float:
        return sum(float(self.savings.step[c.trace][self._range(c)]) * c.computed.count(0) for c in choices)

    def _priced(
        self, number: int, ranges: Sequence[int], variant: Variant, schedules: Sequence[tuple[int, ...]]
    ) -> Floats:
        """Return (ranges, schedules): the cost of each."""
        trace = self.recording.traces[number]
        weights = self.error_weights(trace, variant)
        refreshes = [np.flatnonzero(computed) for computed in schedules]
        costs = np.empty((len(ranges), len(schedules)))
        for begin in range(0, len(ranges), RANGES_AT_ONCE):
            some = list(ranges[begin : begin + RANGES_AT_ONCE])
            prices = stretch_costs(trace.grams[some], weights[some])
            for place, at in enumerate(refreshes):
                costs[begin : begin + RANGES_AT_ONCE, place] = prices[:, at, np.append(at[1:], len(trace.steps))].sum(1)
        return costs


def _start(computed: Sequence[int], steps: Sequence[int]) -> int:
    """Return the step before the first that a schedule reuses."""
    return steps[list(computed).index(0) - 1]
