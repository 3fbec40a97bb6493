"""The statistics that users read: records of single calls, and counts by branch, run and handle."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np

from ..policies.reason import Reason
from .byte_count import size

QUANTILES = {"min": 0, "p25": 25, "p50": 50, "p75": 75, "p95": 95, "max": 100}


@dataclass(frozen=True)
class Quantiles:
    """Quantiles of the finite differences that calls were decided by, interpolated linearly between two of them.

    Example:
        >>> Quantiles.of([0.1, 0.2, 0.4]).p50
        0.2
    """

    min: float
    p25: float
    p50: float
    p75: float
    p95: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quantiles | None:
        """Compute the quantiles of those values that are finite; ``None`` where none is.

        Example:
            >>> Quantiles.of([0.1, 0.3, float("nan")])
            Quantiles(min=0.1, p25=0.15, p50=0.2, p75=0.25, p95=0.29, max=0.3)
        """
        finite = [value for value in values if math.isfinite(value)]
        if not finite:
            return None
        quantiles = np.percentile(np.asarray(finite, dtype=np.float64), list(QUANTILES.values())).tolist()
        return cls(**{name: float(f"{value:.6g}") for name, value in zip(QUANTILES, quantiles, strict=True)})


@dataclass(frozen=True)
class BranchStats:
    """The counts of one branch in one run.

    Args:
        branch: number of the branch; 0 is the first call of a step, usually the conditional one, 1 the next.
        steps: number of sampling steps at which the branch was called.
        computed: number of calls that ran the range.
        reused: number of calls that left the range out.
        reasons: number of calls by the reason of their decision.
        differences: quantiles of the differences that calls were decided by; ``None`` if the policy measures none.
        blocks_run: number of block executions that took place; two for half the batch count as one.
        blocks_total: number of block executions that there would have been without the cache.
        bytes_peak: the most memory that was kept for the branch: residuals, outputs, and tensors that differences
            are measured against.

    Example: two calls of four blocks; the second call left out two of them.
        >>> first = CallRecord("model", 0, 0, 0, False, "warm-up", None)
        >>> second = CallRecord("model", 0, 1, 0, True, "reuse", 0.1)
        >>> branch = branch_stats([first, second], blocks=4, skippable=2)
        >>> branch.computed, branch.reused, branch.blocks_run, branch.blocks_total, branch.reasons
        (1, 1, 6, 8, {'warm-up': 1, 'reuse': 1})
    """

    branch: int
    steps: int
    computed: int
    reused: int
    reasons: dict[str, int]
    differences: Quantiles | None
    blocks_run: int
    blocks_total: int
    bytes_peak: int = 0


@dataclass(frozen=True)
class RunStats:
    """The counts and times of one range in one sampling run.

    Args:
        range: path of the transformer, or of the block list that is a range of its own.
        run: number of the run among those of the range, from 0 on.
        branches: counts of each branch.
        seconds: time from the beginning of the run's first call to the end of its last, by the host's clock.
        call_seconds: time spent in calls of the transformer, as far as it could be measured: by the host's clock on a
            CPU, by events in the stream on an accelerator. ``None`` if it could not be.
        estimated_speedup: speedup of the calls, estimated from block times: n·C / (n_c·C + n_r·(C − R)) for n calls,
            n_c computed and n_r reused; C is the median time of a computed call, R the median time of the range in
            it. ``None`` where no range was timed: in a model that is compiled as a whole, or where no residual was
            kept; and where the transformer has other ranges, as a call that computes this one may leave them out.
        measured_speedup: speedup of the calls, from their own times: n·C over the time of all calls. The first call
            is left out, since it observes and verifies. ``None`` where nothing was reused or could be timed, and where
            the transformer has other ranges.

    Example:
        >>> branch = BranchStats(0, 4, 3, 1, {"warm-up": 3, "reuse": 1}, None, 9, 12)
        >>> run = RunStats("model", 0, (branch, branch), seconds=1.5)
        >>> run.computed, run.reused, run.blocks_run, run.blocks_total
        (6, 2, 18, 24)
    """

    range: str
    run: int
    branches: tuple[BranchStats, ...]
    seconds: float = field(compare=False)  # equal counts are equal statistics, however long the run took
    call_seconds: float | None = field(default=None, compare=False)
    estimated_speedup: float | None = field(default=None, compare=False)
    measured_speedup: float | None = field(default=None, compare=False)

    @property
    def computed(self) -> int:
        """Number of calls that ran the range."""
        return sum(branch.computed for branch in self.branches)

    @property
    def reused(self) -> int:
        """Number of calls that left the range out."""
        return sum(branch.reused for branch in self.branches)

    @property
    def blocks_run(self) -> int:
        """Number of block executions that took place."""
        return sum(branch.blocks_run for branch in self.branches)

    @property
    def blocks_total(self) -> int:
        """Number of block executions that there would have been without the cache."""
        return sum(branch.blocks_total for branch in self.branches)

    @property
    def bytes_peak(self) -> int:
        """The most memory that was kept for each branch, added up."""
        return sum(branch.bytes_peak for branch in self.branches)


@dataclass(frozen=True, repr=False)
class CacheStats:
    """The counts since attaching, or since the last reset, over all ranges of a handle.

    Args:
        calls: number of calls of the transformers, once for each of their ranges. Guidance by two calls makes two a
            step.
        computed_calls: number of calls that ran their range.
        reused_calls: number of calls that left their range out.
        blocks_run: number of block executions that took place.
        blocks_total: number of block executions that there would have been without the cache.
        bytes_held: memory that is held now, on all devices.
        bytes_peak: the most memory that was held.
        reasons: number of calls by the reason of their decision.
        runs: statistics of the latest 16 sampling runs of each range. ``print(stats)`` is a line without them, and
            ``print(handle)`` shows them as a table.

    Example:
        >>> stats = CacheStats(4, 3, 1, 9, 12, 0, 16, {"warm-up": 2, "reuse": 1, "refresh": 1})
        >>> stats.to_dict()["reasons"], stats.to_json()[:12]
        ({'warm-up': 2, 'reuse': 1, 'refresh': 1}, '{"calls": 4,')
    """

    calls: int
    computed_calls: int
    reused_calls: int
    blocks_run: int
    blocks_total: int
    bytes_held: int
    bytes_peak: int
    reasons: dict[str, int]
    runs: tuple[RunStats, ...] = ()

    def __str__(self) -> str:
        fewer = f" ({self.blocks_total / self.blocks_run:.2f}x fewer)" if self.blocks_run else ""
        held = f"{size(self.bytes_held)} held, {size(self.bytes_peak)} at most"
        blocks = f"{self.blocks_run} of {self.blocks_total} blocks run{fewer}"
        return f"{self.reused_calls} of {self.calls} calls reused; {blocks}; {held}"

    def __repr__(self) -> str:
        return f"<CacheStats {self}>"

    def to_dict(self) -> dict[str, Any]:
        """Convert to dicts, lists, numbers and strings."""
        stats = asdict(self)
        stats["runs"] = [{**run, "branches": list(run["branches"])} for run in stats["runs"]]
        return stats

    def to_json(self, indent: int | None = None) -> str:
        """Convert to JSON, by :meth:`to_dict`."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)


class CachedRange(NamedTuple):
    """The blocks that are cached, counted in the order in which the transformer calls them.

    Attributes:
        range: path of the transformer, or of the block list that is a range of its own; as in :class:`CallRecord`.
        first: number of the first cached block, from 0 on.
        blocks: number of cached blocks.
        total: number of blocks of the transformer.

    Example:
        >>> cached = CachedRange("transformer", first=1, blocks=3, total=5)
        >>> f"blocks {cached.first} … {cached.first + cached.blocks - 1} of {cached.total}"
        'blocks 1 … 3 of 5'
    """

    range: str
    first: int
    blocks: int
    total: int


class CallRecord(NamedTuple):
    """One call of a transformer, and how it was decided.

    Attributes:
        range: path of the transformer, or of the block list that is a range of its own.
        run: number of the sampling run among those of the range.
        step: sampling step of the call.
        branch: number of the branch, as in :class:`BranchStats`.
        reuse: whether the range was left out.
        reason: ``"reuse"``, or why the call was computed: one of the policy's own reasons (``"warm-up"``,
            ``"refresh"``, ``"mask"``, ``"threshold"``, ``"cap"``, …), or one of those below.
        value: the difference that the call was decided by; ``None`` if none was measured.

    The kept residual could not be used:

    - ``"no anchor"``: there was none.
    - ``"shape"``, ``"switch"``, ``"weights"``: it was computed with other shapes, another flag, or other weights.
    - ``"unmeasured"``: there was nothing yet to measure the difference against.
    - ``"non-finite"``: a tensor that the difference is measured by was not finite.
    - ``"residual not finite"``: it held NaN or infinity, or a forecast of several might.
    - ``"not reached"``: the call did not reach the range.
    - ``"shared scheduler"``: one scheduler gives the steps of several threads or tasks.
    - ``"another rank"``: another rank of the process group had nothing to reuse.
    - ``"ranks differ"``: the ranks of the process group computed or reused different calls before.

    Where one branch of guidance alone is computed (:class:`TransformerPlan`, ``conditional``):

    - ``"conditional only"``: the call was left out, and its output made of the other branch's; or, where it was
      computed, half the batch was, and the output of the other half made of that.
    - ``"no conditional output"``: the branch that is computed alone had not been called before it with these latents,
      or its half of the batch cannot be computed alone.
    - ``"no difference"``: no difference of the two branches was kept, as where one of them was not called before.

    Calls with gradients enabled have no record; they are counted under ``"gradients"``.

    Example:
        >>> record = CallRecord("transformer", 0, 7, 1, False, "threshold", 0.14)
        >>> f"step {record.step}: {'reused' if record.reuse else 'computed'} ({record.reason}, {record.value})"
        'step 7: computed (threshold, 0.14)'
    """

    range: str
    run: int
    step: int
    branch: int
    reuse: bool
    reason: str
    value: float | None


def branch_stats(records: Sequence[CallRecord], blocks: int, skippable: int, bytes_peak: int = 0) -> BranchStats:
    """Count the calls of one branch in one run.

    Args:
        records: the calls; at least one.
        blocks: number of blocks of the transformer.
        skippable: number of blocks that a reused call leaves out.
        bytes_peak: the most memory that was kept for the branch.
    """
    reused = sum(record.reuse for record in records)
    halves = sum(not record.reuse and record.reason == Reason.CONDITIONAL for record in records)
    return BranchStats(
        branch=records[0].branch,
        steps=len({record.step for record in records}),
        computed=len(records) - reused,
        reused=reused,
        reasons=dict(Counter(record.reason for record in records)),
        differences=Quantiles.of([record.value for record in records if record.value is not None]),
        blocks_run=len(records) * blocks - blocks_left_out(reused, halves, skippable),
        blocks_total=len(records) * blocks,
        bytes_peak=bytes_peak,
    )


def blocks_left_out(reused: int, halves: int, skippable: int) -> int:
    """Return how many block executions were left out.

    Args:
        reused: number of calls that left the range out.
        halves: number of calls that ran the transformer for half the batch.
        skippable: number of blocks that a reused call leaves out.
    """
    return (2 * reused + halves) * skippable // 2


def total(parts: list[CacheStats]) -> CacheStats:
    """Add up the statistics of several ranges; peaks are added up even if they were not at the same time."""
    reasons: Counter[str] = Counter()
    for part in parts:
        reasons.update(part.reasons)
    names = [each.name for each in fields(CacheStats) if each.name not in ("reasons", "runs")]
    sums = {name: sum(getattr(part, name) for part in parts) for name in names}
    return CacheStats(**sums, reasons=dict(reasons), runs=tuple(run for part in parts for run in part.runs))
