"""The data of a map of steps and blocks, from the decisions of a handle or from a plan."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ..config.cache_plan import CachePlan
from ..config.transformer_plan import TransformerPlan
from ..errors import InvalidSetting, WrongType
from ..handle import CacheHandle
from ..stats.types import CallRecord
from ..validation import check_count, shown


class Bar(NamedTuple):
    """The blocks ``first`` to ``last`` at a step, with the difference that decided about them, None if none did."""

    step: int
    first: int
    last: int
    value: float | None


class Extent(NamedTuple):
    """The blocks of a range: ``number`` of the ``total`` blocks, from block ``first`` on."""

    first: int = 0
    number: int = 1
    total: int = 1


@dataclass(frozen=True)
class StepMap:
    """One branch of one range in one run, or one transformer's part of a plan.

    Args:
        name: the path of the transformer or list; "" for the target itself.
        branch: the number of the branch; None if there is only one.
        extent: the blocks of the range.
        reused: whether the range was reused, by step; steps without a call are left out.
        values: the difference that decided, by step; steps without a finite difference are left out.
    """

    name: str
    branch: int | None
    extent: Extent
    reused: Mapping[int, bool]
    values: Mapping[int, float]

    def bars(self, reused: bool, joined: bool) -> list[Bar]:
        """The bars of all blocks that were reused, or of all that were computed.

        Args:
            reused: whether to return the reused blocks, or the computed ones.
            joined: whether blocks of a step that are alike are one bar.

        Example:
            >>> drawn = StepMap("", None, Extent(1, 2, 3), {0: False, 1: True}, {1: 0.5})
            >>> drawn.bars(reused=True, joined=True)
            [Bar(step=1, first=1, last=2, value=0.5)]
            >>> len(drawn.bars(reused=False, joined=False))
            4
        """
        begin, end = self.extent.first, self.extent.first + self.extent.number
        found: list[Bar] = []
        for step, left_out in self.reused.items():
            for first, stop in ((0, begin), (begin, end), (end, self.extent.total)):
                inside = first == begin and stop == end
                if first == stop or (left_out and inside) is not reused:
                    continue
                value = self.values.get(step) if inside else None
                if joined:
                    found.append(Bar(step, first, stop - 1, value))
                else:
                    found += [Bar(step, block, block, value) for block in range(first, stop)]
        return found

    def title(self, length: int) -> str:
        """The title of the map; a path that is too long for ``length`` letters loses its first parts.

        Example:
            >>> StepMap("transformer.blocks", 1, Extent(), {0: False, 1: True}, {}).title(40)
            'blocks, branch 1: 1 of 2 steps reused'
        """
        branch = "" if self.branch is None else f", branch {self.branch}"
        counts = f"{branch}: {sum(self.reused.values())} of {len(self.reused)} steps reused"
        name = self.name or "blocks"
        while len(name) + len(counts) > length and "." in name:
            name = name.partition(".")[2]
        return name + counts


def maps_of(source: CacheHandle | CachePlan, run: int | None) -> list[StepMap]:
    """The maps of a handle's run, or of a plan.

    Args:
        source: a handle or a plan.
        run: the number of the run; None for the last run of each range.

    Raises:
        WrongType: ``source`` is neither.
        InvalidSetting: there is nothing to show, or no such run.
    """
    if isinstance(source, CachePlan):
        if run is not None:
            raise InvalidSetting(f"run={run}: a plan has no runs; leave it out")
        return [_of_piece(each) for piece in source.pieces for each in piece.ranges]
    if not isinstance(source, CacheHandle):
        raise WrongType(f"steps takes the handle that dit_cache returns, or a CachePlan, not {shown(source)}")
    decisions = source.decisions
    if not decisions:
        raise InvalidSetting(
            "no call has been decided yet, so there is no step to show: draw something while the cache is attached "
            "(update() and reset() forget what was before)"
        )
    chosen = _of_run(decisions, run)
    extents = {each.range: Extent(each.first, each.blocks, each.total) for each in source.ranges}
    branches = {(each.range, each.branch): dict[int, CallRecord]() for each in chosen}
    for each in chosen:
        branches[each.range, each.branch][each.step] = each
    several = len({branch for _, branch in branches}) > 1
    return [
        StepMap(
            path,
            branch if several else None,
            extents[path],
            {step: each.reuse for step, each in records.items()},
            {s: each.value for s, each in records.items() if each.value is not None and math.isfinite(each.value)},
        )
        for (path, branch), records in branches.items()
    ]


def _of_piece(piece: TransformerPlan) -> StepMap:
    first, end = piece.called or (0, len(piece.steps))
    reused = {step: not piece.steps[step] for step in range(first, end)}
    return StepMap(piece.path, None, Extent(piece.first, piece.blocks, piece.total), reused, {})


def _of_run(decisions: Iterable[CallRecord], run: int | None) -> list[CallRecord]:
    """The decisions of one run, or those of the last run of each range."""
    found: dict[str, dict[int, list[CallRecord]]] = {}
    for each in decisions:
        found.setdefault(each.range, {}).setdefault(each.run, []).append(each)
    if run is None:
        return [each for runs in found.values() for each in runs[max(runs)]]
    check_count("run", run, 0)
    if not any(run in runs for runs in found.values()):
        there = sorted({number for runs in found.values() for number in runs})
        raise InvalidSetting(f"run={run}: there is none of that number; decisions are kept of {_spelled(there)}")
    return [each for runs in found.values() for each in runs.get(run, [])]


def _spelled(runs: list[int]) -> str:
    return f"run {runs[0]}" if len(runs) == 1 else f"runs {runs[0]} to {runs[-1]}"
