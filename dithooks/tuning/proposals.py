"""The plans that a search tries, one after another, each chosen by the scores of those before."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from itertools import pairwise

from ..config.transformer_plan import Payload, TransformerPlan
from ..planning.candidate import Candidate, Choice, Variant
from ..planning.planner import Planner

FITTED_GAIN = (
    0.4  # dB, of any plan over one that was tried before it, where its weights are fitted on the same pictures
)
MIN_GAIN = 0.25  # dB, of a local move: of many plans that are nearly the same, the best on few pictures is mostly luck
WIDER = {3.0: 1.0, 30.0: 100.0}  # the late error weight beyond an extreme one
FITTED_WEIGHTS = (0.5, 5.0)  # late error weights that are tried where weights are fitted: one for each kind of model
FURTHER = {0.5: 0.2, 5.0: 15.0}  # tried beyond the better one
SPEEDUPS = (1.2, 1.4, 1.6, 1.8, 2.0, 2.25, 2.5, 2.75, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0, 7.0)  # that are tried for a PSNR
Proposals = Generator[Candidate, "float | None", None]


@dataclass(eq=False)
class _Trials:
    """The trials of a search: scores by plan (``None``: it failed), and the best. At most ``most`` plans are tried."""

    planner: Planner
    most: int
    scores: dict[tuple[TransformerPlan, ...], float | None] = field(default_factory=dict)
    best: Candidate | None = None
    score: float = float("-inf")
    gain: float = 0.0  # by which the next has to be better
    failed: list[Choice] = field(default_factory=list)  # to avoid: other schedules of their ranges mostly fail, too

    @property
    def is_full(self) -> bool:
        return len(self.scores) >= self.most

    def propose(self, candidate: Candidate) -> Proposals:
        """Propose a candidate, unless it was tried before or is slower than needed, and note its score."""
        best = self.best
        if best is not None and not candidate.reaches and (best.reaches or candidate.speedup < best.speedup):
            return
        if self.is_full or not candidate.choices or (key := self.planner.pieces(candidate)) in self.scores:
            return
        self.scores[key] = score = yield candidate
        if score is None:
            self.failed += candidate.choices
        elif best is None or candidate.reaches > best.reaches or score > self.score + self.gain:
            self.best, self.score = candidate, score


def proposals(planner: Planner, target: float, evals: int, local_moves: int = 0) -> Proposals:
    """Propose plans to run, the most promising first; send each one's score, higher is better, ``None`` if it failed.

    How much more a late error counts than an early one depends on the model. Where weights are fitted while plans are
    run, two late error weights are tried, then with the better one a schedule priced in the solver's space, residuals,
    a weight further out, and two anchors. Else a few late error weights, or powers of the measured sensitivity, are
    tried with forecasts from two residuals; then the best of these with three, with neighbouring weights, and on other
    ranges. Local moves follow: single refreshes of the best plan are moved by a step, those first that cost least, and
    as soon as one is better, the moves go on from there.

    Args:
        planner: the planner of the recording.
        target: times as fast as the uncached run.
        evals: largest number of plans before the local moves.
        local_moves: largest number of plans beyond, which are local moves.
    """
    tried = _Trials(planner, evals)
    tried.gain = FITTED_GAIN if planner.fits else 0.0
    yield from (_fitted if planner.fits else _as_planned)(planner, target, tried)
    while (
        tried.best is None and not tried.is_full and (next_one := planner.candidate(target, avoid=tried.failed)).choices
    ):
        yield from tried.propose(next_one)
    if tried.best is None:
        return
    others = planner.alternatives(target, tried.best, tried.failed)
    while not tried.is_full and (another := next(others, None)) is not None:
        yield from tried.propose(another)
    tried.most, tried.gain = evals + local_moves, max(MIN_GAIN, tried.gain)
    yield from _local_moves(planner, tried)


def _as_planned(planner: Planner, target: float, tried: _Trials) -> Proposals:
    """Propose plans with the weights that the recording gives."""
    for variant in planner.variants:
        yield from tried.propose(planner.candidate(target, variant, tried.failed))
    if tried.best is None:
        return
    yield from _with_modes(planner, target, tried)
    nearby = _nearby(tried.best.variant, planner)
    yield from tried.propose(planner.candidate(target, tried.best.variant._replace(anchors=3), tried.failed))
    for variant in () if tried.is_full else nearby:
        variant = variant._replace(anchors=tried.best.variant.anchors)
        yield from tried.propose(planner.candidate(target, variant, tried.failed))


def _fitted(planner: Planner, target: float, tried: _Trials) -> Proposals:
    """Propose plans whose weights are fitted while they are run."""
    outputs: Payload = "output" if "output" in planner.payloads else "residual"
    for weight in FITTED_WEIGHTS:
        yield from tried.propose(planner.candidate(target, Variant(3, weight, payload=outputs), tried.failed))
    if tried.best is None:
        return
    yield from _with_modes(planner, target, tried)
    further: list[Callable[[Variant], Variant]] = [
        lambda best: best._replace(late_error_weight=FURTHER[best.late_error_weight or FITTED_WEIGHTS[0]]),
        lambda best: best._replace(payload="residual", space="hidden"),
        lambda best: best._replace(space="output"),
        lambda best: best._replace(anchors=2),
    ]
    # Where late errors count more, the solver's space has shown better schedules; where early ones do, worse.
    counts_late = tried.best.variant.late_error_weight == FITTED_WEIGHTS[-1]
    changes = [further[2], further[1], further[0], further[3]] if counts_late else further
    for change in changes:
        if tried.best is not None:
            yield from tried.propose(planner.candidate(target, change(tried.best.variant), tried.failed))


def _with_modes(planner: Planner, target: float, tried: _Trials) -> Proposals:
    """Propose plans with steps that compute a part, as far as that is asked for, priced as the best plan is."""
    assert tried.best is not None
    variant = tried.best.variant
    for mode in planner.modes:
        if mode == "conditional" and "output" not in planner.payloads:
            continue
        part = variant._replace(mode=mode, payload="residual", space="hidden")
        if mode == "conditional":  # by the first price there mostly is no such step: what it holds counts for much
            part = part._replace(payload="output", space="output", carries=False)
            yield from tried.propose(planner.candidate(target, part._replace(carries=True), tried.failed))
        yield from tried.propose(planner.candidate(target, part, tried.failed))


def fastest(planner: Planner, least: float, evals: int) -> Proposals:
    """Propose plans of several speed-ups to run, to find the fastest whose score is not below ``least``.

    The speed-ups that there are plans for are halved between one that is good enough and one that is not, with plans of
    the first variant; at the one that was just too fast, the others are tried.

    Args:
        planner: the planner of the recording.
        least: score that a plan has to reach.
        evals: largest number of plans.
    """
    first, number = planner.variants[0], 0
    if planner.fits:
        first = Variant(3, FITTED_WEIGHTS[0], payload=planner.payloads[-1])
    variants = [first, first._replace(late_error_weight=FITTED_WEIGHTS[1]), first._replace(payload="residual")]
    variants = [each for each in variants if planner.candidate(2.0, each).choices]
    plans = _of_each_speedup(planner, variants[0]) if variants else []
    low, high = 0, len(plans)
    while low < high and number < evals:
        middle = (low + high) // 2
        score = yield plans[middle]
        number += 1
        low, high = (middle + 1, high) if score is not None and score >= least else (low, middle)
    for variant in variants[1:]:
        if number < evals and low < len(plans):
            score = yield planner.candidate(plans[low].target, variant)
            number, low = number + 1, low + (score is not None and score >= least)


def _of_each_speedup(planner: Planner, variant: Variant) -> list[Candidate]:
    """Return the plans for :data:`SPEEDUPS`, the slowest first: of few steps, several of these have the same one."""
    plans = [planner.candidate(speedup, variant) for speedup in SPEEDUPS]
    found = {round(plan.speedup, 9): plan for plan in plans if plan.choices and plan.reaches}
    return [found[speedup] for speedup in sorted(found)]


def _nearby(best: Variant, planner: Planner) -> list[Variant]:
    """Return the variants to try beside the best one, if there were several."""
    weight = best.late_error_weight
    if len(planner.variants) < 2:
        return []
    if weight is None:
        return [best._replace(power=sum(planner.POWERS) / len(planner.POWERS))]
    further = [WIDER[weight]] if weight in WIDER else []
    weights = sorted((*planner.LATE_ERROR_WEIGHTS, *WIDER.values()))
    further += [(a * b) ** 0.5 for a, b in pairwise(weights) if weight in (a, b)]
    return [best._replace(late_error_weight=each) for each in further]


def _local_moves(planner: Planner, tried: _Trials) -> Proposals:
    """Propose neighbours of the best plan, until none is better."""
    start = None
    while start is not tried.best and not tried.is_full:
        start = tried.best
        assert start is not None
        for candidate in planner.neighbours(start):
            yield from tried.propose(candidate)
            if tried.best is not start or tried.is_full:
                break
