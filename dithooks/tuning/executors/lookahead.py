"""Guesses of the plans that a search will run next, made while it waits for one: it is continued with likely scores.

A search runs one plan after another, and chooses each by the scores of those before. Idle workers can run plans ahead:
the next score will be better than the best so far or not, and each case leads to one plan. A plan that was run ahead
and is not chosen costs time of a worker that had nothing else to do; the search itself stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from heapq import heappop, heappush
from typing import TypeVar

T = TypeVar("T")
TrialScore = float | None  # of one plan: the higher the better; None: it failed
MAX_CONTINUATIONS = 64  # sequences of scores that are continued for each plan that is run


def likely_next(
    next_after: Callable[[Sequence[TrialScore]], T | None],
    scores: Sequence[TrialScore],
    known: Callable[[T], tuple[TrialScore] | None],
) -> Iterator[T]:
    """Yield the plans that may be run next, the likeliest first; the first is run now, unless its score is known.

    Args:
        next_after: returns the plan that follows plans with these scores; ``None``: nothing.
        scores: scores so far.
        known: returns the score of what may be run, if there is one already.

    Example: a search that goes on by one when it got better, else by ten.
        >>> from itertools import islice, pairwise
        >>> def next_after(scores):
        ...     best = [max(scores[:n]) for n in range(1, len(scores) + 1)]
        ...     return 1 + sum(1 if b > a else 10 for a, b in pairwise(best))
        >>> list(islice(likely_next(next_after, [40.0, 41.0, 40.5], lambda plan: None), 4))
        [12, 22, 13, 32]
    """
    worse = chance_of_no_gain(scores)
    waiting: list[tuple[float, int, list[TrialScore]]] = [(-1.0, 0, list(scores))]  # minus how likely, a tiebreaker
    for number in range(1, MAX_CONTINUATIONS):
        if not waiting:
            return
        likely, _, assumed = heappop(waiting)
        plan = next_after(assumed)
        if plan is None:
            continue
        if (score := known(plan)) is not None:
            heappush(waiting, (likely, 2 * number, [*assumed, *score]))
            continue
        yield plan
        finite = [score for score in assumed if score is not None] or [0.0]
        heappush(waiting, (likely * worse, 2 * number, [*assumed, min(finite) - 1]))
        heappush(waiting, (likely * (1 - worse), 2 * number + 1, [*assumed, max(finite) + 1]))


def chance_of_no_gain(scores: Sequence[TrialScore]) -> float:
    """Estimate how likely the next score is no better than the best so far (Laplace's rule of succession).

    Example:
        >>> chance_of_no_gain([]), chance_of_no_gain([40.0, 41.0]), chance_of_no_gain([40.0, 39.0, None, 39.5])
        (0.5, 0.3333333333333333, 0.8)
    """
    best, worse = float("-inf"), 0
    for score in scores:
        worse += score is None or score <= best
        best = max(best, float("-inf") if score is None else score)
    followed = max(len(scores) - 1, 0)  # the first has nothing before it
    return (worse + 1) / (followed + 2)
