"""Which plans a search may ask for next, while it waits for one: by playing on with answers that it may get.

A search asks for one plan after another, each in the light of how those before did. Several workers have something to
do all the same: a plan will either be better than the best so far or not, so what comes after it is known but for that,
and so on. What is run ahead of its time is run all the same, or in vain; the search is none the wiser.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from heapq import heappop, heappush
from typing import TypeVar

T = TypeVar("T")
TrialScore = float | None
FAR = 64  # answers that are played through at most, for each plan that is asked for


def likely_next(
    after: Callable[[Sequence[TrialScore]], T | None],
    answers: Sequence[TrialScore],
    known: Callable[[T], tuple[TrialScore] | None],
) -> Iterator[T]:
    """What may be asked for, the likeliest first; the first one is what is asked for now, unless it is known.

    Args:
        after: what is asked for when these answers have come; ``None``: nothing more.
        answers: that have come.
        known: of something that may be asked for: its answer, if there is one already.

    Example: a search that goes on by one when it got better, else by ten.
        >>> from itertools import islice, pairwise
        >>> def after(answers):
        ...     best = [max(answers[:n]) for n in range(1, len(answers) + 1)]
        ...     return 1 + sum(1 if b > a else 10 for a, b in pairwise(best))
        >>> list(islice(likely_next(after, [40.0, 41.0, 40.5], lambda plan: None), 4))
        [12, 22, 13, 32]
    """
    worse = chance_of_no_gain(answers)
    waiting: list[tuple[float, int, list[TrialScore]]] = [(-1.0, 0, list(answers))]
    for number in range(1, FAR):
        if not waiting:
            return
        likely, _, sofar = heappop(waiting)
        plan = after(sofar)
        if plan is None:
            continue
        if (found := known(plan)) is not None:
            heappush(waiting, (likely, 2 * number, [*sofar, *found]))
            continue
        yield plan
        scores = [answer for answer in sofar if answer is not None] or [0.0]
        heappush(waiting, (likely * worse, 2 * number, [*sofar, min(scores) - 1]))
        heappush(waiting, (likely * (1 - worse), 2 * number + 1, [*sofar, max(scores) + 1]))


def chance_of_no_gain(answers: Sequence[TrialScore]) -> float:
    """How likely the next is no better than the best so far, by how it went (Laplace's rule of succession).

    Example:
        >>> chance_of_no_gain([]), chance_of_no_gain([40.0, 41.0]), chance_of_no_gain([40.0, 39.0, None, 39.5])
        (0.5, 0.3333333333333333, 0.8)
    """
    best, worse = float("-inf"), 0
    for answer in answers:
        worse += answer is None or answer <= best
        best = max(best, float("-inf") if answer is None else answer)
    followed = max(len(answers) - 1, 0)  # the first has nothing before it
    return (worse + 1) / (followed + 2)
