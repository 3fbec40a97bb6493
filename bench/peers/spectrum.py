"""Spectrum (arXiv 2603.01623), written from its idea: Chebyshev polynomials of time, fitted by ridge regression.

To what each branch has computed so far in a run, a sum of T₀ … T_m over the run's time, scaled to −1 … 1, is fitted,
and read where a step is left out. A few steps at the start are all computed; then one of N, and N grows by α with each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
from numpy.polynomial.chebyshev import chebvander

from bench.compare.subject import Subject
from bench.peers.left_out import PLACES, Place, leaving_out, line, marks
from bench.peers.peer import Attached, Method

DEGREE, RIDGE = 4, 0.1
WARMUP = 4  # steps of 28
WINDOWS = ("1.25, 0", "1.5, 0", "2, 0", "2, 0.25", "3, 0", "2, 0.75", "4, 0", "5, 1")


def schedule(steps: int, window: float, flex: float, warmup: int = WARMUP) -> frozenset[int]:
    """The steps that are computed: ``warmup`` at the start, then one of each ``window``, which grows by ``flex``."""
    computed, due = set(range(warmup)), warmup - 1 + window
    while (step := int(due)) < steps:
        computed.add(step)
        window += flex
        due += window
    return frozenset(computed)


def weights(
    steps: Sequence[int], step: int, *, total: int, degree: int = DEGREE, ridge: float = RIDGE, share: float = 1.0
) -> list[float]:
    """Of the values at ``steps``, for one at ``step`` of ``total``.

    Args:
        degree: of the highest polynomial, m.
        ridge: λ, on all coefficients.
        share: of the fit; the rest is that of a line through the last two values.
    """
    times = 2 * np.array([*steps, step]) / (total - 1) - 1
    *known, wanted = chebvander(times, degree)
    design = np.stack(known)
    fitted = design @ np.linalg.solve(design.T @ design + ridge * np.eye(degree + 1), wanted)
    straight = np.array(line(steps, step))
    mixed: list[float] = (share * fitted + (1 - share) * straight).tolist()
    return mixed


@contextmanager
def attached(
    subject: Subject, value: str, *, place: Place, degree: int = DEGREE, ridge: float = RIDGE, share: float = 1.0
) -> Iterator[Attached]:
    """With a window and by how much it grows, such as ``"2, 0.75"``."""
    window, flex = map(float, value.split(", "))
    computed = schedule(subject.steps, window, flex)
    fit = partial(weights, total=subject.steps, degree=degree, ridge=ridge, share=share)
    with leaving_out(subject, place, computed, fit):
        yield Attached(shown=marks(computed, subject.steps))


def methods() -> list[Method]:
    """With its own settings, and half and half with a line; of the output, and of the hidden state."""
    found = []
    for place in PLACES:
        for name, share in ((f"Spectrum ({place})", 1.0), (f"Spectrum ({place}), half a line", 0.5)):
            found.append(Method("no library", name, "N, α", WINDOWS, partial(attached, place=place, share=share)))
    return found
