"""Plans that four numbers can say: one range, refreshed every so many steps from a start on, and reused as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ..config.cache_config import DitCacheConfig
from ..config.transformer_plan import TransformerPlan
from ..errors import InvalidSetting
from ..policies.interval import Interval
from ..predictors.predictor import Moment
from .planner import GUESS, SLACK, STACK, Candidate, Choice, Coefficients, Option, Planner, Variant, alike, best_ways

Floats = NDArray[np.float64]  # on the host, as all of planning
AS_IT_IS = (1.0,)  # the last residual's weight


def scheduled(start: int, interval: int, steps: Sequence[int]) -> tuple[int, ...]:
    """1 for each step that :class:`Interval` computes, of those at which a transformer is called; its first is one.

    Example:
        >>> scheduled(2, 3, range(8)), scheduled(0, 3, range(2, 8))
        ((1, 1, 1, 0, 0, 1, 0, 0), (1, 1, 0, 0, 1, 0))
    """
    policy = Interval(start, interval)
    before = [-1, *steps[:-1]]  # a refresh that falls between two calls is made at the second
    return tuple(int(policy.last_refresh(step) > former) for step, former in zip(steps, before, strict=True))


def numbers_of(piece: TransformerPlan, interval: int = 2) -> DitCacheConfig:
    """What a plan says of a transformer, as four numbers: those of the configuration that does the same.

    Args:
        piece: of a plan that was searched with an interval.
        interval: what was asked for. Where only one step is refreshed from the start on, several do the same: the
            least that is not below this one is given.

    Raises:
        ValueError: four numbers cannot say it, or not with such an interval.

    Example:
        >>> piece = TransformerPlan("", 1, 2, 4, (1, 1, 0, 0, 1), (None, None, (1.0,), (1.0,), None), None)
        >>> print(numbers_of(piece))
        DitCacheConfig(cache_step_start=1, cache_step_interval=3, cache_block_start=1, cache_num_blocks=2)
    """
    first, end = piece.called or (0, len(piece.steps))
    bits, called = piece.steps[first:end], range(first, end)
    if {weights for weights in piece.coefficients if weights is not None} == {AS_IT_IS}:
        start = _start(bits, called)
        for each in range(interval, max(interval, len(bits)) + 1):
            if scheduled(start, each, called) == bits:
                return DitCacheConfig(start, each, piece.first, piece.blocks)
    raise InvalidSetting(
        f"{piece}: no four numbers say this, with an interval of {interval} or more; search it with interval=..."
    )


def stretches(grams: Floats, worth: Floats) -> Floats:
    """(R, T, T + 1): what it costs to reuse the residual of step b as it is until step c, ‖Σ u_τ (Δ_b − Δ_τ)‖².

    The sum is over b < τ < c; where c ≤ b, what stands there means nothing.

    Args:
        grams: (R, T, T), ⟨Δ_s, Δ_t⟩ of each range.
        worth: (R, T), u: what an error counts at each step.

    Example: residuals 1, 2, 4 of one number, all steps of the same worth.
        >>> stretches(np.outer([1.0, 2.0, 4.0], [1.0, 2.0, 4.0])[None], np.ones((1, 3)))[0, 0, 1:]
        array([ 0.,  1., 16.])
    """
    ranges, steps = worth.shape
    # Sums over τ < c, from which those over a stretch are differences.
    total, cross = np.zeros((ranges, steps + 1)), np.zeros((ranges, steps, steps + 1))
    whole = np.zeros((ranges, steps + 1, steps + 1))
    np.cumsum(worth, axis=1, out=total[:, 1:])
    np.cumsum(grams * worth[:, None], axis=2, out=cross[:, :, 1:])  # ⟨Δ_b, Σ u Δ⟩
    np.cumsum(cross * worth[:, :, None], axis=1, out=whole[:, 1:])  # ⟨Σ u Δ, Σ u Δ⟩
    at = np.arange(steps)
    last, following = grams[:, at, at, None], whole[:, at + 1, at + 1, None]
    lead = total[:, None] - total[:, 1:, None]
    along = cross - cross[:, at, at + 1, None]
    own = np.diagonal(whole, axis1=1, axis2=2)[:, None] - 2 * whole[:, 1:] + following
    prices: Floats = np.maximum(lead * (lead * last - 2 * along) + own, 0.0)
    return prices


@dataclass(frozen=True, eq=False)
class Every:
    """All ranges of a transformer with all starts.

    Args:
        ranges: their numbers.
        schedules: one for each start.
        saved: (ranges, schedules), and
        costs: (ranges, schedules).
    """

    ranges: Sequence[int]
    schedules: Sequence[tuple[int, ...]]
    saved: Floats
    costs: Floats

    def option(self, place: int) -> Option:
        """One of them, by its place in a flattened array."""
        r, s = divmod(int(place), len(self.schedules))
        computed = self.schedules[s]
        return Option(float(self.saved[r, s]), float(self.costs[r, s]), self.ranges[r], sum(computed), computed)


@dataclass(eq=False)
class IntervalPlanner(Planner):
    """Plans that four numbers can say, of which every range and start is priced.

    The interval is the one that was asked for, where a range and start reach the target with it, else the next larger
    one with which some do; :meth:`frontier` is of the former. Several transformers have it in common, with a range and
    start each. Of a variant only ``late_error_weight`` counts.

    Args:
        recording: as for :class:`Planner`.
        cost: as for :class:`Planner`.
        report: as for :class:`Planner`.
        interval: ≥ 2.
        within: whether a range, first and last of so many blocks, is considered.
    """

    # The only guesses: what is reused as it is depends little on it.
    LATE_ERROR_WEIGHTS: ClassVar[tuple[float, ...]] = (GUESS,)
    POWERS: ClassVar[tuple[float, ...]] = (1.0,)

    interval: int = field(default=2, kw_only=True)
    within: Callable[[int, int, int], bool] = field(default=lambda first, last, blocks: True, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._steps = [tuple(trace.steps.tolist()) for trace in self.recording.traces]
        longest = max(steps[-1] - steps[0] + 1 for steps in self._steps)
        self._intervals = range(min(self.interval, longest), longest + 1)  # beyond, nothing more is reused

    def changed(self, candidate: Candidate) -> Iterator[Candidate]:
        """The same plan with one start a step earlier or later, if it is as fast, those that cost least first."""
        interval = self._interval_of(candidate.choices)
        found = []
        for place, choice in enumerate(candidate.choices):
            steps = self._steps[choice.trace]
            at = steps.index(_start(choice.computed, steps))
            near = [scheduled(steps[each], interval, steps) for each in (at - 1, at + 1) if 0 <= each < len(steps)]
            costs = self._priced(choice.trace, [self._range(choice)], candidate.variant, [choice.computed, *near])
            for computed, cost in zip(near, costs[0, 1:] - costs[0, 0], strict=True):
                found.append(self._with(candidate, place, choice._replace(computed=computed), cost))
        as_fast = [each for each in found if each.speedup >= candidate.speedup * (1 - SLACK)]
        yield from sorted(as_fast, key=lambda each: each.error)

    def others(self, target: float, best: Candidate, avoid: Sequence[Choice]) -> Iterator[Candidate]:
        """Whatever else reaches the target with the interval of the best.

        What an error of an inner range becomes in the blocks behind it is not in the price. So first the best of the
        ranges of all blocks, and of those up to the last one; then ranges that are not alike, and then all others and
        all starts, one transformer at a time, by their price.
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
            every = self._every(number, self._allowed(number, ()), best.variant, interval)
            now = self._priced(number, [self._range(choice)], best.variant, [choice.computed])[0, 0]
            order = every.costs.argsort(axis=None)
            for option in map(every.option, order[every.saved.ravel()[order] >= lacking]):
                if not alike(pair := trace.ranges[option.range], avoid, number, trace):
                    another = Choice(number, int(pair[0]), int(pair[1]), option.computed)
                    yield self._with(best, place, another, option.cost - now)

    def _options(self, number: int, variant: Variant, needed: float, avoid: Sequence[Choice]) -> list[Option]:
        every = self._every(number, self._allowed(number, avoid), variant, self._interval(needed, avoid))
        if not every.costs.size:
            return [Option()]
        # Of tens of thousands few are beaten by none: those whose cost is below that of all that save as much or more.
        order = np.lexsort((every.costs.ravel(), -every.saved.ravel()))
        falling = every.costs.ravel()[order]
        kept = order[np.append(True, falling[1:] < np.minimum.accumulate(falling)[:-1])]
        return best_ways([Option(), *map(every.option, kept)])

    def _allowed(self, number: int, avoid: Sequence[Choice]) -> list[int]:
        trace = self.recording.traces[number]
        ends, blocks = trace.ranges.tolist(), len(trace.blocks)
        return [r for r in super()._allowed(number, avoid) if self.within(ends[r][0], ends[r][1], blocks)]

    def _every(self, number: int, allowed: Sequence[int], variant: Variant, interval: int) -> Every:
        steps, saving = self._steps[number], self.savings.step[number]
        schedules = [each for start in steps if 0 in (each := scheduled(start, interval, steps))]
        saved = np.outer(saving[list(allowed)], [computed.count(0) for computed in schedules])
        return Every(allowed, schedules, saved, self._priced(number, allowed, variant, schedules))

    def _coefficients(self, choice: Choice, variant: Variant, moments: Sequence[Moment]) -> Coefficients:
        return tuple(None if bit else AS_IT_IS for bit in choice.computed)

    def _interval(self, needed: float, avoid: Sequence[Choice]) -> int:
        """The least with which so much can be saved, else the largest: with none is more saved."""
        each = range(len(self._steps))
        most = [max(self.savings.step[n][self._allowed(n, avoid)], default=0.0) for n in each]
        for interval in self._intervals:
            reused = [scheduled(steps[0], interval, steps).count(0) for steps in self._steps]
            if float(np.dot(most, reused)) >= needed * (1 - SLACK):
                return interval
        return self._intervals[-1]

    def _interval_of(self, choices: Sequence[Choice]) -> int:
        """The least that gives the schedules of all."""

        def gives(interval: int, choice: Choice) -> bool:
            steps = self._steps[choice.trace]
            return scheduled(_start(choice.computed, steps), interval, steps) == choice.computed

        return next(each for each in self._intervals if all(gives(each, choice) for choice in choices))

    def _with(self, candidate: Candidate, place: int, choice: Choice, dearer: float) -> Candidate:
        """A candidate with another choice for one transformer, which costs so much more."""
        choices = (*candidate.choices[:place], choice, *candidate.choices[place + 1 :])
        error = float(np.sqrt(max(candidate.error**2 + dearer, 0.0)))
        return replace(candidate, choices=choices, speedup=self.savings.speedup(self._saved(choices)), error=error)

    def _saved(self, choices: Sequence[Choice]) -> float:
        return sum(float(self.savings.step[c.trace][self._range(c)]) * c.computed.count(0) for c in choices)

    def _priced(
        self, number: int, ranges: Sequence[int], variant: Variant, schedules: Sequence[tuple[int, ...]]
    ) -> Floats:
        """(ranges, schedules): what each costs."""
        trace = self.recording.traces[number]
        counts = self.worth(trace, variant)
        refreshes = [np.flatnonzero(computed) for computed in schedules]
        costs = np.empty((len(ranges), len(schedules)))
        for begin in range(0, len(ranges), STACK):
            some = list(ranges[begin : begin + STACK])
            prices = stretches(trace.grams[some], counts[some])
            for place, at in enumerate(refreshes):
                costs[begin : begin + STACK, place] = prices[:, at, np.append(at[1:], len(trace.steps))].sum(1)
        return costs


def _start(computed: Sequence[int], steps: Sequence[int]) -> int:
    """The step from which on a schedule reuses: the one before the first that it does."""
    return steps[list(computed).index(0) - 1]
