"""The data of a map of steps and blocks, from the decisions of a handle or from a plan."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..config.cache_plan import CachePlan
from ..config.transformer_plan import TransformerPlan, span_name
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
    """One branch of a range in one run, with the further ranges of the same blocks; or a transformer's part of a plan.

    Args:
        name: the path of the transformer or list; "" for the target itself.
        branch: the number of the branch; None if there is only one.
        extent: the blocks of the range.
        reused: whether the range was reused, by step; steps without a call are left out.
        values: the difference that decided, by step; steps without a finite difference are left out.
        further: the other ranges of the same blocks, each a map of its own; what is in none of them was computed.
    """

    name: str
    branch: int | None
    extent: Extent
    reused: Mapping[int, bool]
    values: Mapping[int, float]
    further: tuple[StepMap, ...] = ()

    @property
    def parts(self) -> list[StepMap]:
        """The map of each range, the first block's first."""
        return sorted((self, *self.further), key=lambda part: part.extent.first)

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
        spans, end = list[tuple[int, int, StepMap | None]](), 0
        for own in self.parts:
            begin, stop = own.extent.first, own.extent.first + own.extent.number
            spans += [(end, begin, None), (begin, stop, own)]
            end = stop
        spans.append((end, self.extent.total, None))
        found: list[Bar] = []
        for step in self.reused:
            for first, stop, part in spans:
                if first == stop or (part is not None and part.reused.get(step, False)) is not reused:
                    continue
                value = None if part is None else part.values.get(step)
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
        reused = " and ".join(str(sum(part.reused.values())) for part in self.parts)
        counts = f"{branch}: {reused} of {len(self.reused)} steps reused"
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
        return _joined((piece.path, [_of_piece(each) for each in piece.ranges]) for piece in source.pieces)
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
    found: dict[tuple[str, int, int], list[StepMap]] = {}
    for (path, branch), records in branches.items():
        extent = extents[path]
        reused = {step: each.reuse for step, each in records.items()}
        values = {s: each.value for s, each in records.items() if each.value is not None and math.isfinite(each.value)}
        own = StepMap(path, branch if several else None, extent, reused, values)
        whole = path.removesuffix(
            span_name(extent.first, extent.number)
        )  # one of several ranges is named by its blocks
        found.setdefault((whole, extent.total, branch), []).append(own)
    return _joined((maps[0].name if len(maps) == 1 else whole, maps) for (whole, _, _), maps in found.items())


def _joined(ranges: Iterable[tuple[str, list[StepMap]]]) -> list[StepMap]:
    """Join the maps of the ranges of the same blocks, each of which has a name."""
    return [replace(first, name=name, further=tuple(rest)) for name, (first, *rest) in ranges]


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
