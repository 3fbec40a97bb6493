"""From a recording to plans: which range and which steps cost least, at the speed-up that is wanted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..config.transformer_plan import TransformerPlan
from ..predictors.predictor import Moment
from ..progress_bars import ProgressCallback
from ..recording.recording import Recording, Trace
from .costs import Cost, Savings, worth
from .schedule_solver import Schedules
from .weight_fit import fit

Floats = NDArray[np.float64]  # on the host, as all of planning
Coefficients = tuple[tuple[float, ...] | None, ...]
STACK = 64  # ranges that are solved at once: as many as a processor's cache holds, …
ROOM = 2**27  # … and as have this many bytes to be solved in
MANY = 64  # steps, beyond which to solve with three anchors takes minutes: two are taken
FEW = 8  # … and for which it is worth while to solve with three anchors
SLACK = 1e-9
GUESS = 10.0  # times, that a late error counts more than an early one: as was found on one model


class Variant(NamedTuple):
    """How schedules are priced: residuals that a forecast is made of, and how many times more a late error counts.

    ``late_error_weight=None``: as the recording measured, to this ``power`` (1: as it is; 0: all steps alike), or else
    :data:`GUESS`.
    """

    anchors: int = 2
    late_error_weight: float | None = None
    power: float = 1.0


class Choice(NamedTuple):
    """A range of one transformer, with the steps it is computed at, of those at which the transformer is called."""

    trace: int
    first: int
    last: int
    computed: tuple[int, ...]


@dataclass(frozen=True)
class Candidate:
    """A plan as it was found, before anything is known of it but what the recording tells.

    Args:
        choices: of each transformer that is cached, one.
        variant: how it was priced.
        speedup: as predicted, and
        error: the price, of a run: √Σ over reused stretches of ‖error in the latents' direction‖² relative to ‖h‖.
        reaches: whether the speed-up is the one that was wanted.
    """

    choices: tuple[Choice, ...]
    variant: Variant
    speedup: float
    error: float
    reaches: bool = True


class Option(NamedTuple):
    """One way to save something, of one trace: ``refreshes`` of range number ``range``; by itself, to save nothing."""

    saved: float = 0.0
    cost: float = 0.0
    range: int = 0
    refreshes: int = 0
    computed: tuple[int, ...] = ()  # the schedule, where it need not be solved


@dataclass(eq=False)
class Planner:
    """Plans for one recording. What was solved is kept for the next target.

    Args:
        recording: of an uncached run.
        cost: what a block costs: ``"time"``, as measured, or ``"blocks"``, all the same.
        report: is told how many ranges are solved, of how many.
    """

    LATE_ERROR_WEIGHTS: ClassVar[tuple[float, ...]] = (GUESS, 3.0, 30.0)  # tried where the recording measured none

    POWERS: ClassVar[tuple[float, ...]] = (1.0, 0.5)  # of what was measured with small errors: large ones count less

    recording: Recording
    cost: Cost = "time"
    report: ProgressCallback = lambda stage, done, total: None
    _solved: dict[tuple[int, Variant, int], Floats] = field(default_factory=dict, repr=False)
    _chosen: dict[tuple[int, Variant, int, int], tuple[int, ...]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.savings = Savings.of(self.recording, self.cost)

    def candidate(self, target: float, variant: Variant | None = None, avoid: Sequence[Choice] = ()) -> Candidate:
        """The plan with the least price of those that reach a target, else that which comes nearest.

        Args:
            target: times as fast, > 1.
            variant: how schedules are priced.
            avoid: choices whose ranges, and those much like them, are left out.
        """
        variant, needed = self._feasible(variant or Variant()), self.savings.needed(target)
        options = [self._options(number, variant, needed, avoid) for number in range(len(self.recording.traces))]
        saved, cost, picked = _mixed(options, needed)
        choices = tuple(
            self._choice(number, option, variant) for number, option in enumerate(picked) if option.refreshes
        )
        reaches = bool(saved >= needed * (1 - SLACK))
        return Candidate(choices, variant, float(self.savings.speedup(saved)), float(np.sqrt(cost)), reaches)

    def frontier(self, variant: Variant | None = None) -> list[tuple[float, float]]:
        """(speed-up, predicted error) of every plan that none is both faster and better than, slowest first."""
        chosen = self._feasible(variant or Variant())
        options = [self._options(number, chosen, 0.0, ()) for number in range(len(self.recording.traces))]
        return [(float(self.savings.speedup(saved)), float(np.sqrt(cost))) for saved, cost, _ in _fronts(options)]

    def changed(self, candidate: Candidate) -> Iterator[Candidate]:
        """The same plan with one refresh a step earlier or later, those that cost least first."""
        found = []
        for place, choice in enumerate(candidate.choices):
            schedules = self._schedules(choice.trace, [self._range(choice)], candidate.variant)
            bits = choice.computed
            for step, onto in product(range(1, len(bits)), (-1, 1)):
                if bits[step] and 0 < step + onto < len(bits) and not bits[step + onto]:
                    moved = list(bits)
                    moved[step], moved[step + onto] = 0, 1
                    cost = float(schedules.cost(moved)[0]) - float(schedules.cost(bits)[0])
                    others = list(candidate.choices)
                    others[place] = choice._replace(computed=tuple(moved))
                    error = float(np.sqrt(max(candidate.error**2 + cost, 0.0)))
                    found.append(replace(candidate, choices=tuple(others), error=error))
        yield from sorted(found, key=lambda each: each.error)

    def others(self, target: float, best: Candidate, avoid: Sequence[Choice]) -> Iterator[Candidate]:
        """What to try beside the best: a plan of another range."""
        yield self.candidate(target, best.variant, [*best.choices, *avoid])

    def pieces(self, candidate: Candidate) -> tuple[TransformerPlan, ...]:
        """What a plan says of each transformer: the schedule in the run's own steps, with its coefficients."""
        return tuple(self._piece(choice, candidate.variant) for choice in candidate.choices)

    def _piece(self, choice: Choice, variant: Variant) -> TransformerPlan:
        recording, trace = self.recording, self.recording.traces[choice.trace]
        moments = [Moment(int(step), float(t), trace.axis) for step, t in zip(trace.steps, trace.times, strict=True)]
        weights_at = self._coefficients(choice, variant, moments)
        steps = [1] * recording.steps
        coefficients: list[tuple[float, ...] | None] = [None] * recording.steps
        known = trace.axis == "sigma" and recording.sigmas is not None and len(recording.sigmas) == recording.steps
        times = list(recording.sigmas or ()) if known else _filled(trace, recording.steps)
        for moment, bit, weights in zip(moments, choice.computed, weights_at, strict=True):
            steps[moment.step], coefficients[moment.step] = bit, weights
            times[moment.step] = moment.time
        called = int(trace.steps[0]), int(trace.steps[-1]) + 1
        return TransformerPlan(
            path=trace.path,
            first=choice.first,
            blocks=choice.last - choice.first + 1,
            total=len(trace.blocks),
            steps=tuple(steps),
            coefficients=tuple(coefficients),
            sigmas=tuple(times),
            axis=trace.axis,
            called=None if called == (0, recording.steps) else called,
        )

    def _coefficients(self, choice: Choice, variant: Variant, moments: Sequence[Moment]) -> Coefficients:
        """The weights of each reused step."""
        gram = self.recording.traces[choice.trace].gram(choice.first, choice.last)
        return fit(gram, moments, choice.computed, variant.anchors).coefficients

    def worth(self, trace: Trace, variant: Variant) -> Floats:
        """(R, T): what an error counts at each step."""
        measured = self.recording.sensitivity
        if variant.late_error_weight is not None or measured is None:
            return worth(trace, self.recording.steps, variant.late_error_weight or GUESS)
        return worth(trace, self.recording.steps, GUESS, [value**variant.power for value in measured])

    @property
    def guesses(self) -> list[Variant]:
        """How errors may count, the best guess first."""
        if self.recording.sensitivity is None:
            return [Variant(2, weight) for weight in self.LATE_ERROR_WEIGHTS]
        return [Variant(2, None, power) for power in self.POWERS]

    def _feasible(self, variant: Variant) -> Variant:
        if variant.late_error_weight is None and self.recording.sensitivity is None:
            variant = variant._replace(late_error_weight=GUESS)
        longest = max(len(trace.steps) for trace in self.recording.traces)
        return variant._replace(anchors=2) if variant.anchors > 2 and longest > MANY else variant

    def _options(self, number: int, variant: Variant, needed: float, avoid: Sequence[Choice]) -> list[Option]:
        """Ways to save something in one transformer, none of which another beats in both; nothing saved comes first."""
        trace, saving = self.recording.traces[number], self.savings.step[number]
        steps, alone = len(trace.steps), len(self.recording.traces) == 1
        allowed = self._allowed(number, avoid)
        if not allowed:
            return [Option()]
        most = dict.fromkeys(allowed, steps - 1)  # refreshes; a range that is computed at all steps saves nothing
        if alone and needed:
            lacking = {r: int(np.ceil(needed / saving[r] - SLACK)) for r in allowed}
            reaching = {r: steps - reused for r, reused in lacking.items() if reused < steps}
            most = reaching or dict.fromkeys(allowed, 1)
        enough = bool(alone and needed)  # of each range, the cheapest schedule that saves enough
        if variant.anchors > 2 and len(most) > FEW:
            most = self._promising(number, variant, most, enough)
        return best_ways([Option(), *self._ways(number, variant, most, enough)])

    def _allowed(self, number: int, avoid: Sequence[Choice]) -> list[int]:
        """Numbers of the ranges that save something, but for those to avoid; none where there is but one step."""
        trace, saving = self.recording.traces[number], self.savings.step[number]
        if len(trace.steps) < 2:
            return []
        return [r for r, pair in enumerate(trace.ranges) if saving[r] > 0 and not alike(pair, avoid, number, trace)]

    def _ways(self, number: int, variant: Variant, most: dict[int, int], enough: bool) -> list[Option]:
        """Every range with each number of refreshes up to its most; or with the one of them that costs least."""
        steps, saving = len(self.recording.traces[number].steps), self.savings.step[number]
        costs = self._costs(number, sorted(most), variant, max(most.values()))
        found = []
        for r, row in zip(sorted(most), costs, strict=True):
            each = (int(row[1 : most[r] + 1].argmin()) + 1,) if enough else range(1, most[r] + 1)
            found += [Option((steps - k) * saving[r], float(row[k]), r, k) for k in each]
        return found

    def _promising(self, number: int, variant: Variant, most: dict[int, int], enough: bool) -> dict[int, int]:
        """Ranges that are best with two anchors; where there is no one amount to save, from all along the way."""
        ways = self._ways(number, variant._replace(anchors=2), most, enough)
        if enough:
            ranges = [way.range for way in sorted(ways, key=lambda way: way.cost)]
        else:
            front = list(dict.fromkeys(way.range for way in reversed(best_ways(ways))))  # the one that saves most first
            ranges = [front[round(place)] for place in np.linspace(0, len(front) - 1, min(FEW, len(front)))]
        return {r: most[r] for r in ranges[:FEW]}

    def _costs(self, number: int, ranges: Sequence[int], variant: Variant, most: int) -> Floats:
        """(ranges, most + 1): the least price of each number of refreshes."""
        steps = len(self.recording.traces[number].steps)
        stack = max(1, min(STACK, ROOM // (8 * most * steps**2)))
        missing = [r for r in ranges if self._solved.get((number, variant, r), np.zeros(0)).size <= most]
        for start in range(0, len(missing), stack):
            some = missing[start : start + stack]
            rows = self._schedules(number, some, variant).costs(most)
            self._solved |= {(number, variant, r): row for r, row in zip(some, rows, strict=True)}
            self.report("plan", min(start + stack, len(missing)), len(missing))
        found: Floats = np.stack([self._solved[number, variant, r][: most + 1] for r in ranges])
        return found

    def _schedules(self, number: int, ranges: Sequence[int], variant: Variant) -> Schedules:
        trace = self.recording.traces[number]
        chosen = list(ranges)
        counts = self.worth(trace, variant)[chosen]
        return Schedules(trace.grams[chosen], trace.times, counts, variant.anchors, gamma=2.0)

    def _choice(self, number: int, option: Option, variant: Variant) -> Choice:
        first, last = (int(block) for block in self.recording.traces[number].ranges[option.range])
        if option.computed:
            return Choice(number, first, last, option.computed)
        key = number, variant, option.range, option.refreshes
        if key not in self._chosen:
            self._chosen[key] = self._schedules(number, [option.range], variant).best(option.refreshes)
        return Choice(number, first, last, self._chosen[key])

    def _range(self, choice: Choice) -> int:
        ranges = self.recording.traces[choice.trace].ranges
        return int(np.flatnonzero((ranges == (choice.first, choice.last)).all(axis=1))[0])


def _filled(trace: Trace, steps: int) -> list[float]:
    """A time for each step of the run; where the transformer is not called, that of its nearest call."""
    return [float(time) for time in np.interp(np.arange(steps), trace.steps, trace.times)]


def alike(pair: NDArray[np.int64], avoid: Sequence[Choice], number: int, trace: Trace) -> bool:
    """Whether a range is one to avoid, or nearly."""
    near = max(1, len(trace.blocks) // 10)
    return any(
        choice.trace == number and abs(choice.first - int(pair[0])) + abs(choice.last - int(pair[1])) < near
        for choice in avoid
    )


def best_ways(options: Sequence[Option]) -> list[Option]:
    """Those that no other beats in both, by what they save."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda each: (-each.saved, each.cost)):
        if not kept or option.cost < kept[-1].cost:
            kept.append(option)
    return kept[::-1]


def _fronts(options: Sequence[Sequence[Option]]) -> list[tuple[float, float, tuple[Option, ...]]]:
    """Ways to save in all transformers together, none of which another beats in both, by what they save."""
    mixed: list[tuple[float, float, tuple[Option, ...]]] = [(0.0, 0.0, ())]
    for each in options:
        joined = [(s + option.saved, c + option.cost, (*p, option)) for (s, c, p), option in product(mixed, each)]
        joined.sort(key=lambda way: (-way[0], way[1]))
        mixed = []
        for way in joined:
            if not mixed or way[1] < mixed[-1][1]:
                mixed.append(way)
        mixed.reverse()
    return mixed


def _mixed(options: Sequence[Sequence[Option]], needed: float) -> tuple[float, float, tuple[Option, ...]]:
    """The cheapest way to save what is needed, else that which saves most."""
    ways = _fronts(options)
    reaching = [way for way in ways if way[0] >= needed * (1 - SLACK)]
    return min(reaching, key=lambda way: way[1]) if reaching else ways[-1]
