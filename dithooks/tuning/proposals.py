"""Which plans to try, one after another, in the light of how those before did."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from itertools import pairwise

from ..config.transformer_plan import TransformerPlan
from ..planning.planner import Candidate, Choice, Planner, Variant

GAIN = 0.25  # dB: of many that are much the same, the best on a few pictures is mostly the luckiest
FURTHER = {3.0: 1.0, 30.0: 100.0}
Proposals = Generator[Candidate, "float | None", None]


@dataclass(eq=False)
class _Tried:
    """What was tried, and how it did; ``None``: it could not be run. No more than ``most`` are tried."""

    planner: Planner
    most: int
    scores: dict[tuple[TransformerPlan, ...], float | None] = field(default_factory=dict)
    best: Candidate | None = None
    score: float = float("-inf")
    gain: float = 0.0  # by which the next has to be better
    failed: list[Choice] = field(default_factory=list)  # with their ranges: as a rule no other schedule mends these

    @property
    def over(self) -> bool:
        return len(self.scores) >= self.most

    def try_out(self, candidate: Candidate) -> Proposals:
        """Have it run, unless it was before, and take note."""
        best = self.best  # one that falls short is of no use beside one that does not, or that falls less short
        if best is not None and not candidate.reaches and (best.reaches or candidate.speedup < best.speedup):
            return
        if self.over or not candidate.choices or (key := self.planner.pieces(candidate)) in self.scores:
            return
        self.scores[key] = score = yield candidate
        if score is None:
            self.failed += candidate.choices
        elif best is None or candidate.reaches > best.reaches or score > self.score + self.gain:
            self.best, self.score = candidate, score


def proposals(planner: Planner, target: float, evals: int, local_moves: int = 0) -> Proposals:
    """Plans to be run, best guesses first; each is answered by its score (higher is better), ``None`` where it failed.

    How much more a late error counts than an early one depends on the model: what was measured, or else a few guesses,
    are tried with forecasts from two residuals; the best of them with three; with what lies next to it, or a guess; and
    on another range, or whatever others the planner has. Then single refreshes of the best are moved, those first that
    cost least, and as soon as one is better, on from there.

    Args:
        planner: of the recording.
        target: times as fast.
        evals: plans at most, and
        local_moves: further ones of the second kind.
    """
    tried = _Tried(planner, evals)
    for guess in planner.variants:
        yield from tried.try_out(planner.candidate(target, guess, tried.failed))
    while tried.best is None and not tried.over and (other := planner.candidate(target, avoid=tried.failed)).choices:
        yield from tried.try_out(other)
    if tried.best is None:
        return
    near = _near(tried.best.variant, planner)
    yield from tried.try_out(planner.candidate(target, tried.best.variant._replace(anchors=3), tried.failed))
    for guess in () if tried.over else near:
        variant = guess._replace(anchors=tried.best.variant.anchors)
        yield from tried.try_out(planner.candidate(target, variant, tried.failed))
    others = planner.alternatives(target, tried.best, tried.failed)
    while not tried.over and (another := next(others, None)) is not None:
        yield from tried.try_out(another)
    tried.most, tried.gain = evals + local_moves, GAIN
    yield from _local_moves(planner, tried)


def _near(best: Variant, planner: Planner) -> list[Variant]:
    """What to try beside the best of the guesses, if there were several."""
    weight = best.late_error_weight
    if len(planner.variants) < 2:
        return []
    if weight is None:
        return [best._replace(power=sum(planner.POWERS) / len(planner.POWERS))]
    further = [FURTHER[weight]] if weight in FURTHER else []
    weights = sorted((*planner.LATE_ERROR_WEIGHTS, *FURTHER.values()))
    further += [(a * b) ** 0.5 for a, b in pairwise(weights) if weight in (a, b)]
    return [best._replace(late_error_weight=each) for each in further]


def _local_moves(planner: Planner, tried: _Tried) -> Proposals:
    """Move single refreshes of the best."""
    start = None
    while start is not tried.best and not tried.over:
        start = tried.best
        assert start is not None
        for candidate in planner.neighbours(start):
            yield from tried.try_out(candidate)
            if tried.best is not start or tried.over:
                break
