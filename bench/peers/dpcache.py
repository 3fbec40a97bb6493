"""Schedules by dynamic programming, as DPCache has them, written from its idea.

One run of the calibration cases, with everything computed, says what each gap would do: after the computed steps h and
i, all steps up to j are forecast with the line through h and i, and how far off that is, added up over the gap, is
cost[h, i, j]. Of all paths with so many computed steps the one with the least cost in total is taken.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.compare.subject import Subject
from bench.peers.left_out import PLACES, Place, leaving_out, line, marks, watched
from bench.peers.peer import Attached, Clock, Method, Spent

COMPUTED = (22, 19, 14, 11, 9, 7, 6)  # of 28 steps: 1.25 to 5 times fewer
Costs = NDArray[np.float64]


def gap_costs(runs: list[Tensor]) -> Costs:
    """Of all gaps: [h, i, j] with h < i < j, and [0, 0, j], where the first value is held.

    Args:
        runs: of each branch, the values at all steps (steps, …).
    """
    steps = len(runs[0])
    found = np.full((steps, steps, steps + 1), np.inf)
    for last in range(steps):
        for before in range(last) or (0,):
            known = [last] if before == last else [before, last]
            found[before, last, last + 1 :] = np.cumsum(
                [0.0, *(error(runs, known, step) for step in range(last + 1, steps))]
            )
    return found


def error(runs: list[Tensor], known: list[int], step: int) -> float:
    """Of the forecast of a step: Σ|a − b| / Σ|b|, the mean of the branches."""
    weights = line(known, step)
    apart = []
    for values in runs:
        forecast = sum(weight * values[each] for weight, each in zip(weights, known, strict=True))
        apart.append(float((forecast - values[step]).abs().sum() / values[step].abs().sum()))
    return float(np.mean(apart))


def cheapest(costs: Costs, count: int) -> tuple[int, ...]:
    """The steps of the cheapest path with ``count`` of them, the first step among them."""
    steps = len(costs)
    total = np.full((steps, steps), np.inf)  # by the last two computed steps
    total[0, 0] = 0.0
    came: list[NDArray[np.intp]] = []
    for _ in range(count - 1):
        ways = total[:, :, None] + costs[:, :, :steps]  # [h, i, j]
        came.append(ways.argmin(0))
        total = ways.min(0)
    before, last = np.unravel_index(int((total + costs[:, :, steps]).argmin()), total.shape)
    path = [int(last)]
    for each in reversed(came):
        before, last = each[before, last], before
        path.append(int(last))
    return tuple(reversed(path))


@lru_cache(maxsize=1)
def calibrated(subject: Subject, place: Place) -> tuple[Costs, float]:
    """The costs of all gaps, and the seconds that they took."""
    begun, values = time.perf_counter(), dict[int, list[Tensor]]()

    def taken(now: Clock, value: Tensor) -> None:
        values.setdefault(now.call, []).append(value)

    with watched(subject, place, lambda _: None, taken):
        subject.draw(subject.calibration)
    costs = gap_costs([torch.stack(each) for each in values.values()])
    return costs, time.perf_counter() - begun


@contextmanager
def attached(subject: Subject, count: int, *, place: Place) -> Iterator[Attached]:
    """So many steps computed, the others on the line through the last two."""
    costs, seconds = calibrated(subject, place)
    computed = cheapest(costs, count)
    with leaving_out(subject, place, computed, line, most=2):
        yield Attached(shown=marks(computed, subject.steps), spent=Spent(1.0, seconds, 1))


def methods() -> list[Method]:
    """Of the output, and of the hidden state."""
    return [
        Method("no library", f"DPCache ({place})", "computed steps", COMPUTED, partial(attached, place=place))
        for place in PLACES
    ]
