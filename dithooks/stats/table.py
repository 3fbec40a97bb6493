"""The statistics of a handle as a table of at most 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from .byte_count import size
from .types import QUANTILES, BranchStats, CacheStats, RunStats

HEAD = ("run", "branch", "steps", "computed", "reused", "blocks run", *QUANTILES)
WIDTH = 100


def summary(stats: CacheStats, ranges: Sequence[str] = ()) -> str:
    """Format statistics: totals, and a table of the latest runs of each range, with their speedups.

    Args:
        stats: statistics of a handle.
        ranges: descriptions of the cached ranges, printed above.
    """
    lines = [*ranges, str(stats)]
    for name in dict.fromkeys(run.range for run in stats.runs):
        lines += ["", *_table(name, [run for run in stats.runs if run.range == name])]
    if not stats.runs and stats.reasons:
        lines.append(f"reasons: {_reasons(stats.reasons)}")
    return "\n".join(line for whole in lines for line in _wrapped(whole))


def _table(name: str, runs: Sequence[RunStats]) -> list[str]:
    rows = [HEAD, *(_row(run.run, branch) for run in runs for branch in run.branches)]
    if not any(branch.differences for run in runs for branch in run.branches):  # no policy that measures
        rows = [row[: -len(QUANTILES)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return [name, *table, *(line for run in runs for line in _footer(run))]


def _row(run: int, branch: BranchStats) -> tuple[str, ...]:
    differences = branch.differences
    quantiles = ["–" if differences is None else f"{getattr(differences, name):.3g}" for name in QUANTILES]
    counts = (run, branch.branch, branch.steps, branch.computed, branch.reused)
    return (*map(str, counts), f"{branch.blocks_run}/{branch.blocks_total}", *quantiles)


def _footer(run: RunStats) -> list[str]:
    """Format what holds for a run as a whole: speedups, times and reasons."""
    reasons: dict[str, int] = {}
    for branch in run.branches:
        for reason, number in branch.reasons.items():
            reasons[reason] = reasons.get(reason, 0) + number
    speedups = [f"{run.blocks_total / run.blocks_run:.2f}x fewer blocks"] if run.blocks_run else []
    if run.estimated_speedup is not None:
        speedups.append(f"{run.estimated_speedup:.2f}x as fast by block times")
    if run.measured_speedup is not None:
        speedups.append(f"{run.measured_speedup:.2f}x measured")
    kept = f"; {size(run.bytes_peak)} kept" if run.bytes_peak else ""
    calls = "" if run.call_seconds is None else f", calls {run.call_seconds:.2f} s"
    return [f"run {run.run}: {'; '.join([*speedups, f'{run.seconds:.2f} s{calls}'])}", f"  {_reasons(reasons)}{kept}"]


def _reasons(reasons: dict[str, int]) -> str:
    return ", ".join(f"{reason} {number}" for reason, number in sorted(reasons.items(), key=lambda item: -item[1]))


def _wrapped(line: str) -> list[str]:
    """Break a line into lines of the table's width."""
    return textwrap.wrap(line, WIDTH, subsequent_indent="  ") if len(line) > WIDTH else [line]
