"""Which steps of the last run were reused, and by which differences it was decided, as figures and as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ...stats.types import CallRecord

COLUMNS = ("Cache Steps", "Diffs Min", "Diffs P25", "Diffs P50", "Diffs P75", "Diffs P95", "Diffs Max")
PERCENTILES = (0, 25, 50, 75, 95, 100)


@dataclass(frozen=True)
class Steps:
    """One branch of one range, in its last run.

    Args:
        range: the path of its transformer, or of a list that is a range of its own.
        branch: its number.
        called: steps at which it was called.
        reused: those at which it was reused.
        diffs: the difference that decided, by step, where one did.
    """

    range: str
    branch: int
    called: tuple[int, ...]
    reused: tuple[int, ...]
    diffs: dict[int, float]


def steps_of(decisions: Iterable[CallRecord]) -> list[Steps]:
    """The last run of each range, branch by branch, of what :attr:`CacheHandle.decisions` tells.

    Example:
        >>> settled = [CallRecord("blocks", 0, step, 0, step > 1, "reuse", step / 10) for step in range(4)]
        >>> steps_of(settled)
        [Steps(range='blocks', branch=0, called=(0, 1, 2, 3), reused=(2, 3), diffs={0: 0.0, 1: 0.1, 2: 0.2, 3: 0.3})]
    """
    latest: dict[str, int] = {}
    ordered = list(decisions)
    for each in ordered:
        latest[each.range] = max(each.run, latest.get(each.range, 0))
    found: dict[tuple[str, int], list[CallRecord]] = {}
    for each in ordered:
        if each.run == latest[each.range]:
            found.setdefault((each.range, each.branch), []).append(each)
    return [
        Steps(
            path,
            branch,
            tuple(each.step for each in settled),
            tuple(each.step for each in settled if each.reuse),
            {each.step: each.value for each in settled if each.value is not None},
        )
        for (path, branch), settled in found.items()
    ]


def steps_table(found: Sequence[Steps], details: bool = False) -> str:
    """Markdown: one row for all, or, with ``details``, one for each branch of each range.

    In the row for all, a step counts as reused where no call of it was computed.

    Example:
        >>> print(steps_table([Steps("blocks", 0, (0, 1), (1,), {1: 0.05})]))
        | Cache Steps | Diffs Min | Diffs P25 | Diffs P50 | Diffs P75 | Diffs P95 | Diffs Max |
        |-------------|-----------|-----------|-----------|-----------|-----------|-----------|
        | 1           | 0.050     | 0.050     | 0.050     | 0.050     | 0.050     | 0.050     |
    """
    if details:
        lead = ["Blocks", "Branch"]
        rows = [[each.range, str(each.branch), *_cells(len(each.reused), each.diffs.values())] for each in found]
    else:
        computed = {step for each in found for step in set(each.called) - set(each.reused)}
        reused = {step for each in found for step in each.reused} - computed
        lead, rows = [], [_cells(len(reused), [diff for each in found for diff in each.diffs.values()])]
    header = [*lead, *COLUMNS]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "|" + "|".join(f" {cell:<{width}} " for cell, width in zip(row, widths, strict=True)) + "|"
        for row in (header, *rows)
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _cells(reused: int, diffs: Iterable[float]) -> list[str]:
    values = [value for value in diffs if np.isfinite(value)]
    figures = [f"{value:.3f}" for value in np.percentile(values, PERCENTILES)] if values else ["–"] * len(PERCENTILES)
    return [str(reused), *figures]
