"""What the cache did, in numbers."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np

QUANTILES = {"min": 0, "p25": 25, "p50": 50, "p75": 75, "p95": 95, "max": 100}


@dataclass(frozen=True)
class Quantiles:
    """Quantiles of the differences that decisions were made by, those that are finite; between two by the line.

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
        """Of some values; ``None`` where there are none.

        Example:
            >>> Quantiles.of([0.1, 0.3, float("nan")])
            Quantiles(min=0.1, p25=0.15, p50=0.2, p75=0.25, p95=0.29, max=0.3)
        """
        finite = [value for value in values if math.isfinite(value)]
        if not finite:
            return None
        found = np.percentile(np.asarray(finite, dtype=np.float64), list(QUANTILES.values())).tolist()
        return cls(**{name: float(f"{value:.6g}") for name, value in zip(QUANTILES, found, strict=True)})


@dataclass(frozen=True)
class BranchStats:
    """What one branch did in one run.

    Args:
        branch: its number: 0 is the first call of a step, conditional as a rule, 1 the next.
        steps: sampling steps at which it was called.
        computed: calls that ran the range.
        reused: calls that left it out.
        reasons: how often a call was settled so, by the word.
        differences: that decided, where a policy looks.
        blocks_run: block executions that took place, of
        blocks_total: as many without the cache.
        bytes_peak: the most that was kept for it: residuals, and what differences are told by.

    Example: two calls of four blocks, of which the second left out two.
        >>> first = CallRecord("model", 0, 0, 0, False, "warm-up", None)
        >>> second = CallRecord("model", 0, 1, 0, True, "reuse", 0.1)
        >>> found = branch_stats([first, second], blocks=4, skippable=2)
        >>> found.computed, found.reused, found.blocks_run, found.blocks_total, found.reasons
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
    """What a range did in one sampling run.

    Args:
        range: path of its transformer, or of a list that is a range of its own.
        run: which of the range's runs, from 0 on.
        branches: each for itself.
        seconds: from the beginning of the run's first call to the end of its last, by the host's clock.
        call_seconds: spent in its calls of the transformer, as far as that could be timed: by the host's clock on a
            CPU, by events in the stream on an accelerator. ``None``: not at all.
        estimated_speedup: of the calls, from block times: n·C / (n_c·C + n_r·(C − R)) of n calls, n_c computed and n_r
            reused; C is the median time of a computed call, R that of the range in it. ``None`` where no range was
            timed: in a model that is compiled as a whole, or where no residual was kept.
        measured_speedup: of the calls, from their own times: n·C over the time of all, the first left out, which
            learns and tests. ``None`` where nothing was reused or could be timed.

    Example:
        >>> branch = BranchStats(0, 4, 3, 1, {"warm-up": 3, "reuse": 1}, None, 9, 12)
        >>> run = RunStats("model", 0, (branch, branch), seconds=1.5)
        >>> run.computed, run.reused, run.blocks_run, run.blocks_total
        (6, 2, 18, 24)
    """

    range: str
    run: int
    branches: tuple[BranchStats, ...]
    seconds: float = field(compare=False)  # the same counts are the same statistics, however long it took
    call_seconds: float | None = field(default=None, compare=False)
    estimated_speedup: float | None = field(default=None, compare=False)
    measured_speedup: float | None = field(default=None, compare=False)

    @property
    def computed(self) -> int:
        """Calls that ran the range."""
        return sum(branch.computed for branch in self.branches)

    @property
    def reused(self) -> int:
        """Calls that left it out."""
        return sum(branch.reused for branch in self.branches)

    @property
    def blocks_run(self) -> int:
        """Block executions that took place."""
        return sum(branch.blocks_run for branch in self.branches)

    @property
    def blocks_total(self) -> int:
        """Block executions without the cache."""
        return sum(branch.blocks_total for branch in self.branches)

    @property
    def bytes_peak(self) -> int:
        """The most that was kept for each branch, added up."""
        return sum(branch.bytes_peak for branch in self.branches)


@dataclass(frozen=True)
class CacheStats:
    """Counts since attaching, or since the last reset; over all ranges of the handle.

    ``calls`` are calls of a transformer (guidance by two calls makes two per step), once for each of its ranges;
    ``blocks_run`` of ``blocks_total`` block executions took place; ``bytes_held`` is the memory of all that is kept
    right now, on whatever device, and ``bytes_peak`` the most that was; ``reasons`` says how often a call was computed
    or reused, and why. ``runs`` are the latest sampling runs, each range's for itself; printed, they are a table.

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

    def to_dict(self) -> dict[str, Any]:
        """The same as dicts, lists, numbers and names only."""
        made = asdict(self)
        made["runs"] = [{**run, "branches": list(run["branches"])} for run in made["runs"]]
        return made

    def to_json(self, indent: int | None = None) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)


class CachedRange(NamedTuple):
    """Blocks that are cached: those from ``first`` on, ``blocks`` of them, of ``total``, as they are called.

    ``range`` is the path of their transformer, or of a list that is a range of its own, as in :class:`CallRecord`.

    Example:
        >>> found = CachedRange("transformer", first=1, blocks=3, total=5)
        >>> f"blocks {found.first} … {found.first + found.blocks - 1} of {found.total}"
        'blocks 1 … 3 of 5'
    """

    range: str
    first: int
    blocks: int
    total: int


class CallRecord(NamedTuple):
    """How one call was settled.

    ``range`` is the path of its transformer, or of a list that is a range of its own; ``run`` counts the range's
    sampling runs; ``value`` is the difference that decided, where one did. ``reason`` is ``"reuse"``, or else why the
    call was computed: by the policy's own word (``"warm-up"``, ``"refresh"``, ``"mask"``, ``"threshold"``, ``"cap"``,
    …), or because the residual that is kept could not be used:

    - ``"no anchor"``: there is none; ``"shape"``, ``"switch"``: it was taken with other shapes, or with a flag set
      otherwise; ``"weights"``: with other weights; ``"unmeasured"``: there is nothing yet to measure a difference by;
      ``"non-finite"``: what was seen is not finite; ``"not reached"``: the call did not come to the range.
    - ``"gradients"``: they were enabled; ``"shared scheduler"``: one tells the steps of several threads.
    - ``"another rank"``: of the process group had nothing to reuse; ``"ranks differ"``: in what they have done before.

    Example:
        >>> each = CallRecord("transformer", 0, 7, 1, False, "threshold", 0.14)
        >>> f"step {each.step}: {'reused' if each.reuse else 'computed'} ({each.reason}, {each.value})"
        'step 7: computed (threshold, 0.14)'
    """

    range: str
    run: int
    step: int
    branch: int
    reuse: bool
    reason: str
    value: float | None


def branch_stats(settled: Sequence[CallRecord], blocks: int, skippable: int, bytes_peak: int = 0) -> BranchStats:
    """Of the calls of one branch in one run.

    Args:
        settled: these calls.
        blocks: of the transformer, and
        skippable: as many of them as a reused call leaves out.
        bytes_peak: the most that was kept.
    """
    reused = sum(each.reuse for each in settled)
    return BranchStats(
        branch=settled[0].branch,
        steps=len({each.step for each in settled}),
        computed=len(settled) - reused,
        reused=reused,
        reasons=dict(Counter(each.reason for each in settled)),
        differences=Quantiles.of([each.value for each in settled if each.value is not None]),
        blocks_run=len(settled) * blocks - reused * skippable,
        blocks_total=len(settled) * blocks,
        bytes_peak=bytes_peak,
    )


def total(parts: list[CacheStats]) -> CacheStats:
    """The sum over ranges; peaks at different times are added up all the same."""
    reasons: Counter[str] = Counter()
    for part in parts:
        reasons.update(part.reasons)
    numbers = [each.name for each in fields(CacheStats) if each.name not in ("reasons", "runs")]
    sums = {name: sum(getattr(part, name) for part in parts) for name in numbers}
    return CacheStats(**sums, reasons=dict(reasons), runs=tuple(run for part in parts for run in part.runs))
