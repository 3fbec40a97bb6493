"""The Pareto front of options, by what they save and what they cost: of one transformer, and of several together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from .candidate import Option

SLACK = 1e-9  # relative, for comparisons of sums


def pareto_front(options: Sequence[Option]) -> list[Option]:
    """Return the options that no other beats in saving and cost, ascending by what they save."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda each: (-each.saved, each.cost)):
        if not kept or option.cost < kept[-1].cost:
            kept.append(option)
    return kept[::-1]


def joint_front(options: Sequence[Sequence[Option]]) -> list[tuple[float, float, tuple[Option, ...]]]:
    """Return the Pareto front (saved, cost, an option of each transformer), ascending by the savings."""
    front: list[tuple[float, float, tuple[Option, ...]]] = [(0.0, 0.0, ())]
    for own in options:
        joined = [(s + option.saved, c + option.cost, (*mix, option)) for (s, c, mix), option in product(front, own)]
        joined.sort(key=lambda mix: (-mix[0], mix[1]))
        front = []
        for mix in joined:
            if not front or mix[1] < front[-1][1]:
                front.append(mix)
        front.reverse()
    return front


def cheapest_mix(options: Sequence[Sequence[Option]], needed: float) -> tuple[float, float, tuple[Option, ...]]:
    """Return the cheapest mix (saved, cost, options) that saves enough, or else the one that saves most."""
    front = joint_front(options)
    least = min(needed, front[-1][0]) * (1 - SLACK)  # sums in another order save as much, but for rounding
    return min((mix for mix in front if mix[0] >= least), key=lambda mix: mix[1])
