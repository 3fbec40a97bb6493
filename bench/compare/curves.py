"""Curves instead of points: what each method would reach at the very compute that another took."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bench.compare.quality import interval
from bench.compare.sweep import Row

Axis = Literal["fraction", "time"]
ROUNDING = 1.005  # what counts as no more compute


@dataclass(frozen=True)
class Reached:
    """PSNR by case, on a curve, and LPIPS if it was measured; ``how`` says from which points."""

    title: str
    how: str
    psnr: NDArray[np.float64]
    lpips: NDArray[np.float64] | None = None

    @property
    def mean(self) -> float:
        return float(self.psnr.mean())


@dataclass(frozen=True)
class Duel:
    """One found plan and the best that any other library does for as much compute.

    Args:
        target: times fewer blocks, that the plan was asked for.
        own: the plan's row.
        best: of every other library's best, the best.
        others: each library's best.
    """

    target: float
    own: Row
    best: Reached
    others: tuple[Reached, ...]

    @property
    def ahead(self) -> tuple[float, float, float]:
        """By so many dB, case by case, with a 95 % interval."""
        return interval(psnr_of(self.own) - self.best.psnr)

    @property
    def lpips(self) -> tuple[float, float] | None:
        """Mean LPIPS of the plan and of the best other; ``None`` unless both were measured."""
        own, best = lpips_of(self.own), self.best.lpips
        return None if own is None or best is None else (float(own.mean()), float(best.mean()))

    @property
    def apart(self) -> bool:
        """Whether the two means' intervals do not overlap."""
        return interval(psnr_of(self.own))[1] > interval(self.best.psnr)[2]


def psnr_of(row: Row) -> NDArray[np.float64]:
    """By case; only of rows that have figures."""
    assert row.quality is not None
    return np.asarray(row.quality.psnr)


def lpips_of(row: Row) -> NDArray[np.float64] | None:
    """By case; ``None`` where it was not measured."""
    assert row.quality is not None
    return None if row.quality.lpips is None else np.asarray(row.quality.lpips)


def measured(rows: Iterable[Row]) -> list[Row]:
    """Those with figures."""
    return [row for row in rows if row.quality is not None]


def useful(rows: Iterable[Row]) -> list[Row]:
    """Those that left something out; where nothing is, there is nothing to draw a line to."""
    return [row for row in measured(rows) if cost(row, "fraction") < 1 / ROUNDING]


def reach(rows: Sequence[Row], compute: float, axis: Axis = "fraction") -> Reached | None:
    """The best that one method's settings do with no more than this compute, ``None``: they all take more.

    The best of its settings that take no more, or the line between two neighbours around it where that is higher:
    as if the knob had been turned to the very point.
    """
    line = sorted(useful(rows), key=lambda row: cost(row, axis))
    found = [
        Reached(row.title, f"{row.knob} {row.value}", psnr_of(row), lpips_of(row))
        for row in line
        if cost(row, axis) <= compute * ROUNDING
    ]
    for below, above in pairwise(line):
        low, high = cost(below, axis), cost(above, axis)
        if low < compute < high:
            share = (compute - low) / (high - low)
            between = psnr_of(below) * (1 - share) + psnr_of(above) * share
            looks = lpips_of(below), lpips_of(above)
            distance = None if looks[0] is None or looks[1] is None else looks[0] * (1 - share) + looks[1] * share
            how = f"{below.knob} between {below.value} and {above.value}"
            found.append(Reached(below.title, how, between, distance))
    return max(found, key=lambda each: each.mean, default=None)


def cost(row: Row, axis: Axis) -> float:
    """Compute of a row that has figures, as a share of the uncached run's."""
    value = row.fraction if axis == "fraction" else row.time
    assert value is not None
    return value


def libraries(rows: Iterable[Row]) -> dict[str, dict[str, list[Row]]]:
    """Rows by library, without its version, and by method."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        name = row.library.rsplit(" ", 1)[0] if row.library[-1].isdigit() else row.library
        found.setdefault(name, {}).setdefault(row.method, []).append(row)
    return found


def best_of(methods: Iterable[Sequence[Row]], compute: float, axis: Axis = "fraction") -> Reached | None:
    """Of several methods."""
    reached = [each for rows in methods if (each := reach(rows, compute, axis)) is not None]
    return max(reached, key=lambda each: each.mean, default=None)


def duels(rows: Sequence[Row], own: str, method: str, axis: Axis = "fraction") -> list[Duel]:
    """Every found plan, against all other libraries."""
    by_library = libraries(measured(rows))
    found = []
    for row in by_library.get(own, {}).get(method, []):
        compute = cost(row, axis)
        others = [best_of(methods.values(), compute, axis) for name, methods in by_library.items() if name != own]
        reached = sorted((each for each in others if each is not None), key=lambda each: -each.mean)
        if reached:
            found.append(Duel(float(row.value), row, reached[0], tuple(reached)))
    return found


def kendall(a: Sequence[float], b: Sequence[float]) -> float:
    """Kendall's τ-b of two lists: 1 where they have the same order, −1 where they have opposite ones."""
    apart = [np.sign(np.subtract.outer(each, each)) for each in (a, b)]
    pairs = [float(np.square(each).sum()) for each in apart]
    return float((apart[0] * apart[1]).sum()) / (pairs[0] * pairs[1]) ** 0.5 if all(pairs) else float("nan")


def envelope(methods: Iterable[Sequence[Row]], axis: Axis) -> list[Row]:
    """The settings that none of the same library beats with less compute, from the dearest to the cheapest."""
    rows = sorted(
        (row for each in methods for row in useful(each)), key=lambda row: (cost(row, axis), -psnr_of(row).mean())
    )
    found: list[Row] = []
    for row in rows:
        if not found or psnr_of(row).mean() > psnr_of(found[-1]).mean():
            found.append(row)
    return found[::-1]
