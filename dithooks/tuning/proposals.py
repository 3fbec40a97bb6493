"""The plans that a search tries, one after another, each chosen by the scores of those before."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from itertools import pairwise

from ..config.transformer_plan import TransformerPlan
from ..planning.planner import Candidate, Choice, Planner, Variant

MIN_GAIN = 0.25  # dB, of a local move: of many plans that are nearly the same, the best on few pictures is mostly luck
WIDER = {3.0: 1.0, 30.0: 100.0}  # the late error weight beyond an extreme one
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

    How much more a late error counts than an early one depends on the model. So the measured sensitivity, or else a few
    late error weights, are tried with forecasts from two residuals; then the best of these with three residuals, with
    neighbouring weights, and on other ranges. Where outputs may be forecast, they are, too, with schedules priced in
    the hidden states and in the solver's space. Local moves follow: single refreshes of the best plan are moved by a
    step, those first that cost least, and as soon as one is better, the moves go on from there.

    Args:
        planner: the planner of the recording.
        target: times as fast as the uncached run.
        evals: largest number of plans before the local moves.
        local_moves: largest number of plans beyond, which are local moves.
    """
    tried = _Trials(planner, evals)
    for variant in planner.variants:
        yield from tried.propose(planner.candidate(target, variant, tried.failed))
    while tried.best is None and not tried.is_full and (other := planner.candidate(target, avoid=tried.failed)).choices:
        yield from tried.propose(other)
    if tried.best is None:
        return
    best = tried.best.variant
    nearby = _nearby(best, planner)
    yield from tried.propose(planner.candidate(target, best._replace(anchors=5 - best.anchors), tried.failed))
    for variant in () if tried.is_full else nearby:
        variant = variant._replace(anchors=tried.best.variant.anchors)
        yield from tried.propose(planner.candidate(target, variant, tried.failed))
    others = planner.alternatives(target, tried.best, tried.failed)
    while not tried.is_full and (another := next(others, None)) is not None:
        yield from tried.propose(another)
    tried.most, tried.gain = evals + local_moves, MIN_GAIN
    yield from _local_moves(planner, tried)


def fastest(planner: Planner, least: float, evals: int) -> Proposals:
    """Propose plans of several speed-ups to run, to find the fastest whose score is not below ``least``.

    The speed-ups are halved between one that is good enough and one that is not, with plans of the first variant; at
    the one that was just too fast, the others are tried.

    Args:
        planner: the planner of the recording.
        least: score that a plan has to reach.
        evals: largest number of plans.
    """
    variants, number = [each for each in planner.variants if planner.candidate(2.0, each).choices], 0
    low, high = 0, len(SPEEDUPS)
    while variants and low < high and number < evals:
        middle = (low + high) // 2
        score = yield planner.candidate(SPEEDUPS[middle], variants[0])
        number += 1
        low, high = (middle + 1, high) if score is not None and score >= least else (low, middle)
    for variant in variants[1:]:
        if number < evals and low < len(SPEEDUPS):
            score = yield planner.candidate(SPEEDUPS[low], variant)
            number, low = number + 1, low + (score is not None and score >= least)


def _nearby(best: Variant, planner: Planner) -> list[Variant]:
    """Return the variants to try beside the best one, if there were several."""
    weight = best.late_error_weight
    if len(planner.variants) < 2:
        return []
    if "output" in planner.payloads:
        others = [each for each in planner.LATE_ERROR_WEIGHTS if each != weight]
        return [best._replace(late_error_weight=each) for each in others]
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
