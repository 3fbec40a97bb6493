"""Which plans to try, one after another, in the light of how those before did."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from itertools import pairwise

from .planner import Candidate, Choice, Planner, Variant

LATE = (10.0, 3.0, 30.0)  # how many times more a late error may count: the like of models and samplers at hand
FURTHER = {3.0: 1.0, 30.0: 100.0}
Proposals = Generator[Candidate, "float | None", None]


@dataclass(eq=False)
class _Tried:
    """What was tried, and how it did; ``None``: it could not be run. No more than ``most`` are tried."""

    most: int
    scores: dict[tuple[tuple[Choice, ...], int], float | None] = field(default_factory=dict)
    best: Candidate | None = None
    score: float = float("-inf")

    @property
    def over(self) -> bool:
        return len(self.scores) >= self.most

    def try_out(self, candidate: Candidate) -> Proposals:
        """Have it run, unless it was before, and take note."""
        key = (candidate.choices, min(candidate.variant.anchors, max(map(_reach, candidate.choices), default=0)))
        if key in self.scores or self.over or not candidate.choices:
            return
        self.scores[key] = score = yield candidate
        if score is not None and (self.best is None or score > self.score):
            self.best, self.score = candidate, score


def _reach(choice: Choice) -> int:
    """Residuals that are there at the last reused step: to be told from more makes it no other plan."""
    return sum(choice.computed[: len(choice.computed) - choice.computed[::-1].index(0)])


def proposals(planner: Planner, target: float, evals: int, climb: int = 0) -> Proposals:
    """Plans to be run, best guesses first; each is answered by its score (higher is better), ``None`` where it failed.

    How much more a late error counts than an early one depends on the model: a few guesses are tried with forecasts
    from two residuals; the best of them with three; with what lies next to it; and on another range. Then single
    refreshes of the best are moved, those first that cost least, and as soon as one is better, on from there.

    Args:
        planner: of the recording.
        target: times as fast.
        evals: plans at most, and
        climb: further ones of the second kind.
    """
    tried = _Tried(evals)
    for late in LATE:
        yield from tried.try_out(planner.candidate(target, Variant(2, late)))
    if tried.best is None:  # none could be run: another range, then
        yield from tried.try_out(planner.candidate(target, avoid=planner.candidate(target).choices))
    if tried.best is None:
        return
    late = tried.best.variant.late
    near = [FURTHER[late]] if late in FURTHER else []
    near += [(a * b) ** 0.5 for a, b in pairwise(sorted((*LATE, *FURTHER.values()))) if late in (a, b)]
    yield from tried.try_out(planner.candidate(target, Variant(3, late)))
    for guess in () if tried.over else near:
        yield from tried.try_out(planner.candidate(target, Variant(tried.best.variant.anchors, guess)))
    if not tried.over:
        yield from tried.try_out(planner.candidate(target, tried.best.variant, tried.best.choices))
    tried.most = evals + climb
    yield from _climbed(planner, tried)


def _climbed(planner: Planner, tried: _Tried) -> Proposals:
    """Move single refreshes of the best."""
    start = None
    while start is not tried.best and not tried.over:
        start = tried.best
        assert start is not None
        for candidate in planner.changed(start):
            yield from tried.try_out(candidate)
            if tried.best is not start or tried.over:
                break
