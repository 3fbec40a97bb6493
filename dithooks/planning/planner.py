"""The planner: of a recording, the range and the schedule that cost least at a target speed-up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ..config.transformer_plan import Payload, TransformerPlan
from ..predictors.predictor import Moment
from ..progress_bars import ProgressCallback
from ..recording.noise_levels import falling_times, noise_levels
from ..recording.recording import Floats, Recording, Trace
from .candidate import Candidate, Choice, Option, StepMode, Variant
from .costs import Cost, Savings, error_weights
from .pareto_front import SLACK, cheapest_mix, joint_front, pareto_front
from .schedule_solver import Schedules
from .weight_fit import fit

Coefficients = tuple[tuple[float, ...] | None, ...]
RANGES_AT_ONCE = 64  # solved in one stack: as many as fit into a processor's cache
SOLVER_BYTES = 2**27  # memory of one stack
LONG_RUN = 64  # steps, beyond which three anchors take minutes to solve: two are taken instead
FEW_RANGES = 8  # solved with three anchors: the most promising with two
DEFAULT_LATE_ERROR_WEIGHT = 10.0  # the best on one model that it was measured on


@dataclass(eq=False)
class Planner:
    """Finds the best plans of one recording; what it has solved for one target serves for the next.

    Args:
        recording: the recording of an uncached run.
        cost: what a block costs: ``"time"``, as measured, or ``"blocks"``, all the same.
        report: called with the number of ranges that are solved, and of all.
        payloads: what may be forecast: the ``"output"``, too, where it was recorded and the call can be left out.
        fits: whether weights are fitted while plans are run.
        shared: choices whose ranges and payloads all plans have, with schedules of their own; none: any may be had.
        modes: of steps, that are tried beside ``"whole"``.
    """

    # The variants to try: without a measured sensitivity, weights of late errors; with one, powers of it, as it was
    # measured with small errors, and large ones count less.
    LATE_ERROR_WEIGHTS: ClassVar[tuple[float, ...]] = (DEFAULT_LATE_ERROR_WEIGHT, 3.0, 30.0)
    POWERS: ClassVar[tuple[float, ...]] = (1.0, 0.5)

    recording: Recording
    cost: Cost = "time"
    report: ProgressCallback = lambda stage, done, total: None
    payloads: tuple[Payload, ...] = ("residual",)
    fits: bool = False
    shared: tuple[Choice, ...] = ()
    modes: tuple[StepMode, ...] = ()
    _solved: dict[tuple[int, Variant, int], Floats] = field(default_factory=dict, repr=False)
    _chosen: dict[tuple[int, Variant, int, int], tuple[int, ...]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.savings = Savings.of(self.recording, self.cost)

    def like(self, pieces: Sequence[TransformerPlan]) -> Planner:
        """Return a planner of the same recording whose plans leave out the same blocks, with the same payload.

        Args:
            pieces: of a plan of this recording; a transformer that has none stays uncached.
        """
        numbers = {trace.path: number for number, trace in enumerate(self.recording.traces)}
        shared = tuple(
            Choice(numbers[piece.path], piece.first, piece.first + piece.blocks - 1, (), piece.payload)
            for piece in pieces
        )
        return replace(self, shared=shared, payloads=tuple({choice.payload for choice in shared}))

    def candidate(self, target: float, variant: Variant | None = None, avoid: Sequence[Choice] = ()) -> Candidate:
        """Return the candidate with the least error of those that reach a target, or else the fastest.

        Args:
            target: times as fast as the recorded run, > 1.
            variant: how schedules are priced.
            avoid: choices whose ranges are left out, with ranges that are nearly the same.
        """
        variant, needed = self._feasible(variant or Variant()), self.savings.needed(target)
        options = [self._options(number, variant, needed, avoid) for number in range(len(self.recording.traces))]
        saved, cost, picked = cheapest_mix(options, needed)
        choices = tuple(
            self._choice(number, option, variant) for number, option in enumerate(picked) if option.refreshes
        )
        if len(choices) < len(self.shared):  # this variant has other ranges
            saved, cost, choices = 0.0, 0.0, ()
        reaches = bool(saved >= needed * (1 - SLACK))
        return Candidate(choices, variant, float(self.savings.speedup(saved)), float(np.sqrt(cost)), reaches, target)

    def frontier(self, variant: Variant | None = None) -> list[tuple[float, float]]:
        """Return the Pareto front of all plans as (speed-up, predicted error), slowest first."""
        chosen = self._feasible(variant or Variant())
        options = [self._options(number, chosen, 0.0, ()) for number in range(len(self.recording.traces))]
        return [(float(self.savings.speedup(saved)), float(np.sqrt(cost))) for saved, cost, _ in joint_front(options)]

    def neighbours(self, candidate: Candidate) -> Iterator[Candidate]:
        """Yield the same plan with one refresh a step earlier or later, those that cost least first.

        Before them comes the same schedule with the other payload, if it saves as much.
        """
        if (other := self._with_other_payload(candidate)) is not None:
            yield other
        moves = []
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
                    moves.append(replace(candidate, choices=tuple(others), error=error))
        yield from sorted(moves, key=lambda move: move.error)

    def _with_other_payload(self, candidate: Candidate) -> Candidate | None:
        """Return the same schedules with the other payload; ``None`` where that is not possible, or saves less."""
        if (
            self.shared
            or "output" not in self.payloads
            or any(
                (each.first, each.last) != (0, len(self.recording.traces[each.trace].blocks) - 1)
                for each in candidate.choices
            )
        ):
            return None
        payload: Payload = "output" if candidate.variant.payload == "residual" else "residual"
        variant = candidate.variant._replace(payload=payload)
        choices = tuple(each._replace(payload=payload) for each in candidate.choices)
        if any(self._whole(each.trace, variant) is None for each in choices):
            return None
        steps = (each.computed.count(0) * float(self.savings.step[each.trace][self._range(each)]) for each in choices)
        speedup = float(self.savings.speedup(sum(steps)))
        if speedup < candidate.target * (1 - SLACK):
            return None
        return replace(candidate, choices=choices, variant=variant, speedup=speedup)

    def alternatives(self, target: float, best: Candidate, avoid: Sequence[Choice]) -> Iterator[Candidate]:
        """Yield other plans to try beside the best: the best one of another range."""
        yield self.candidate(target, best.variant, [*best.choices, *avoid])

    def pieces(self, candidate: Candidate) -> tuple[TransformerPlan, ...]:
        """Return each transformer's part of the plan: its schedule over all steps of the run, with the weights."""
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
            payload=choice.payload,
        )

    def _coefficients(self, choice: Choice, variant: Variant, moments: Sequence[Moment]) -> Coefficients:
        """Return the fitted weights of each reused step."""
        trace, solver = self.recording.traces[choice.trace], self.recording.solver
        if choice.payload == "output":
            assert solver is not None
            gram = solver.gram[np.ix_(trace.steps, trace.steps)]
        else:
            gram = trace.gram(choice.first, choice.last)
        return fit(gram, moments, choice.computed, variant.anchors).coefficients

    def error_weights(self, trace: Trace, variant: Variant) -> Floats:
        """Return (R, T): the weight of an error at each step."""
        steps, measured = self.recording.steps, self.recording.sensitivity
        if variant.late_error_weight is not None or measured is None:
            return error_weights(trace, steps, variant.late_error_weight or DEFAULT_LATE_ERROR_WEIGHT)
        return error_weights(trace, steps, DEFAULT_LATE_ERROR_WEIGHT, [gain**variant.power for gain in measured])

    def _late_weights(self, trace: Trace, variant: Variant) -> Floats:
        """Return (T,): how many times more an error of each step counts than one at the beginning."""
        weight = variant.late_error_weight or DEFAULT_LATE_ERROR_WEIGHT
        levels = noise_levels(falling_times(trace, self.recording.steps), trace.axis, self.recording.steps)
        late: Floats = weight**-levels
        return late

    @property
    def variants(self) -> list[Variant]:
        """The variants to try, the likeliest to be best first."""
        if self.recording.sensitivity is None:
            return [Variant(2, weight) for weight in self.LATE_ERROR_WEIGHTS]
        return [Variant(2, None, power) for power in self.POWERS]

    def _feasible(self, variant: Variant) -> Variant:
        if variant.late_error_weight is None and self.recording.sensitivity is None:
            variant = variant._replace(late_error_weight=DEFAULT_LATE_ERROR_WEIGHT)
        longest = max(len(trace.steps) for trace in self.recording.traces)
        return variant._replace(anchors=2) if variant.anchors > 2 and longest > LONG_RUN else variant

    def _options(self, number: int, variant: Variant, needed: float, avoid: Sequence[Choice]) -> list[Option]:
        """Return the Pareto front of one transformer's options; the first one caches nothing, if that is one."""
        trace, saving = self.recording.traces[number], self.savings.step[number]
        steps, alone = len(trace.steps), len(self.recording.traces) == 1
        allowed = self._allowed(number, avoid, variant)
        if not allowed:
            return [Option()]
        most = dict.fromkeys(allowed, steps - 1)  # refreshes; a range that is computed at all steps saves nothing
        if alone and needed:
            to_reuse = {r: int(np.ceil(needed / saving[r] - SLACK)) for r in allowed}
            reaching = {r: steps - reused for r, reused in to_reuse.items() if reused < steps}
            most = reaching or dict.fromkeys(allowed, 1)
        enough = bool(alone and needed)  # of each range, the cheapest schedule that saves enough
        if variant.anchors > 2 and len(most) > FEW_RANGES:
            most = self._promising(number, variant, most, enough)
        return pareto_front([*self._uncached, *self._all_options(number, variant, most, enough)])

    @property
    def _uncached(self) -> list[Option]:
        """The option to cache nothing of a transformer, if it need not be cached."""
        return [] if self.shared else [Option()]

    def _allowed(self, number: int, avoid: Sequence[Choice], variant: Variant) -> list[int]:
        """Return the numbers of the ranges that save something, without those to avoid; none for a single step."""
        possible = self._possible(number, avoid, variant)
        if not self.shared:
            return possible
        own = [self._range(choice) for choice in self.shared if choice.trace == number]
        return [each for each in possible if each in own]

    def _possible(self, number: int, avoid: Sequence[Choice], variant: Variant) -> list[int]:
        trace, saving = self.recording.traces[number], self.savings.step[number]
        if len(trace.steps) < 2:
            return []
        if "output" in (variant.space, variant.payload):
            whole = self._whole(number, variant)
            is_avoided = any(each.trace == number and each.payload == variant.payload for each in avoid)
            return [] if whole is None or is_avoided else [whole]
        return [r for r, pair in enumerate(trace.ranges) if saving[r] > 0 and not is_near(pair, avoid, number, trace)]

    def _all_options(self, number: int, variant: Variant, most: dict[int, int], enough: bool) -> list[Option]:
        """Return an option for each range and number of refreshes up to ``most``; ``enough``: each range's cheapest."""
        steps, saving = len(self.recording.traces[number].steps), self.savings.step[number]
        costs = self._costs(number, sorted(most), variant, max(most.values()))
        options = []
        for r, row in zip(sorted(most), costs, strict=True):
            counts = (int(row[1 : most[r] + 1].argmin()) + 1,) if enough else range(1, most[r] + 1)
            options += [Option((steps - k) * saving[r], float(row[k]), r, k) for k in counts]
        return options

    def _promising(self, number: int, variant: Variant, most: dict[int, int], enough: bool) -> dict[int, int]:
        """Return the ranges that are best with two anchors; without a target, some from all along the Pareto front."""
        options = self._all_options(number, variant._replace(anchors=2), most, enough)
        if enough:
            ranges = [option.range for option in sorted(options, key=lambda option: option.cost)]
        else:  # the range that saves most comes first
            front = list(dict.fromkeys(option.range for option in reversed(pareto_front(options))))
            ranges = [front[round(place)] for place in np.linspace(0, len(front) - 1, min(FEW_RANGES, len(front)))]
        return {r: most[r] for r in ranges[:FEW_RANGES]}

    def _costs(self, number: int, ranges: Sequence[int], variant: Variant, most: int) -> Floats:
        """Return (ranges, most + 1): the least cost for each number of refreshes."""
        steps = len(self.recording.traces[number].steps)
        stack = max(1, min(RANGES_AT_ONCE, SOLVER_BYTES // (8 * most * steps**2)))
        missing = [r for r in ranges if self._solved.get((number, variant, r), np.zeros(0)).size <= most]
        for start in range(0, len(missing), stack):
            some = missing[start : start + stack]
            rows = self._schedules(number, some, variant).costs(most)
            self._solved |= {(number, variant, r): row for r, row in zip(some, rows, strict=True)}
            self.report("plan", min(start + stack, len(missing)), len(missing))
        costs: Floats = np.stack([self._solved[number, variant, r][: most + 1] for r in ranges])
        return costs

    def _schedules(self, number: int, ranges: Sequence[int], variant: Variant) -> Schedules:
        trace, solver = self.recording.traces[number], self.recording.solver
        every = self._all_blocks(trace)
        if solver is not None and (variant.space == "output" or (variant.payload == "output" and every is None)):
            gram = solver.gram[np.ix_(trace.steps, trace.steps)]
            moved = self._late_weights(trace, variant) * np.abs(solver.gains[trace.steps])
            return Schedules(gram[None], trace.times, moved[None], variant.anchors, gamma=2.0)
        chosen = [every if each == len(trace.ranges) and every is not None else each for each in ranges]
        weights = self.error_weights(trace, variant)[chosen]
        return Schedules(trace.grams[chosen], trace.times, weights, variant.anchors, gamma=2.0)

    def _choice(self, number: int, option: Option, variant: Variant) -> Choice:
        trace = self.recording.traces[number]
        is_output = option.range == len(trace.ranges)
        first, last = (0, len(trace.blocks) - 1) if is_output else (int(block) for block in trace.ranges[option.range])
        payload: Payload = "output" if is_output else "residual"
        if option.computed:
            return Choice(number, first, last, option.computed, payload)
        key = number, variant, option.range, option.refreshes
        if key not in self._chosen:
            self._chosen[key] = self._schedules(number, [option.range], variant).best(option.refreshes)
        return Choice(number, first, last, self._chosen[key], payload)

    def _whole(self, number: int, variant: Variant) -> int | None:
        """Return the number of the range of all blocks, or one more than those of ranges for the output's payload."""
        trace = self.recording.traces[number]
        every = self._all_blocks(trace)
        if self.recording.solver is None:
            return None
        return len(trace.ranges) if variant.payload == "output" else every

    def _all_blocks(self, trace: Trace) -> int | None:
        """Return the number of the range of all blocks; ``None``: the wiring does not allow it."""
        found = np.flatnonzero((trace.ranges == (0, len(trace.blocks) - 1)).all(axis=1))
        return int(found[0]) if len(found) else None

    def _range(self, choice: Choice) -> int:
        ranges = self.recording.traces[choice.trace].ranges
        if choice.payload == "output":
            return len(ranges)
        return int(np.flatnonzero((ranges == (choice.first, choice.last)).all(axis=1))[0])


def _filled(trace: Trace, steps: int) -> list[float]:
    """Return a time for each step of the run, interpolated where the transformer is not called."""
    return [float(time) for time in np.interp(np.arange(steps), trace.steps, trace.times)]


def is_near(pair: NDArray[np.int64], avoid: Sequence[Choice], number: int, trace: Trace) -> bool:
    """Whether a range is one to avoid, or nearly the same as one."""
    near = max(1, len(trace.blocks) // 10)
    return any(
        choice.trace == number
        and choice.payload == "residual"
        and abs(choice.first - int(pair[0])) + abs(choice.last - int(pair[1])) < near
        for choice in avoid
    )
