"""The reused steps of the last run and the differences that decided, as figures and as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ...stats.types import CallRecord

COLUMNS = ("Cache Steps", "Diffs Min", "Diffs P25", "Diffs P50", "Diffs P75", "Diffs P95", "Diffs Max")
PERCENTILES = (0, 25, 50, 75, 95, 100)


@dataclass(frozen=True)
class Steps:
    """One branch of one range in the range's last run.

    Args:
        range: path of the transformer, or of a list that is a range of its own.
        branch: number of the branch.
        called: steps at which the branch was called.
        reused: steps at which it was reused.
        diffs: the difference that decided, by step; steps without one are left out.
    """

    range: str
    branch: int
    called: tuple[int, ...]
    reused: tuple[int, ...]
    diffs: dict[int, float]


def steps_of(decisions: Iterable[CallRecord]) -> list[Steps]:
    """Extract the last run of each range, branch by branch, from :attr:`CacheHandle.decisions`.

    Example:
        >>> records = [CallRecord("blocks", 0, step, 0, step > 1, "reuse", step / 10) for step in range(4)]
        >>> steps_of(records)
        [Steps(range='blocks', branch=0, called=(0, 1, 2, 3), reused=(2, 3), diffs={0: 0.0, 1: 0.1, 2: 0.2, 3: 0.3})]
    """
    latest: dict[str, int] = {}
    records = list(decisions)
    for record in records:
        latest[record.range] = max(record.run, latest.get(record.range, 0))
    branches: dict[tuple[str, int], list[CallRecord]] = {}
    for record in records:
        if record.run == latest[record.range]:
            branches.setdefault((record.range, record.branch), []).append(record)
    return [
        Steps(
            path,
            branch,
            tuple(call.step for call in calls),
            tuple(call.step for call in calls if call.reuse),
            {call.step: call.value for call in calls if call.value is not None},
        )
        for (path, branch), calls in branches.items()
    ]


def steps_table(found: Sequence[Steps], details: bool = False) -> str:
    """Format a table in Markdown: one row for all, or, with ``details``, one for each branch of each range.

    In the row for all, a step counts as reused if no call of it was computed.

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
