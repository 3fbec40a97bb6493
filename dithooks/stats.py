"""What the cache did, in numbers."""

from __future__ import annotations

import threading
from collections import Counter, deque
from dataclasses import dataclass
from typing import NamedTuple

from .policy.base import Decision

REMEMBERED = 10_000  # decisions of a range


@dataclass(frozen=True)
class CacheStats:
    """Counts since attaching, or since the last reset; over all ranges of the handle.

    ``calls`` are calls of a transformer (guidance by two calls makes two per step), once for each of its ranges;
    ``blocks_run`` of ``blocks_total`` block executions took place; ``bytes_held`` is the memory of all that is kept
    right now, on whatever device, and ``bytes_peak`` the most that was; ``reasons`` says how often a call was computed
    or reused, and why.
    """

    calls: int
    computed_calls: int
    reused_calls: int
    blocks_run: int
    blocks_total: int
    bytes_held: int
    bytes_peak: int
    reasons: dict[str, int]


class Settled(NamedTuple):
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
    """

    range: str
    run: int
    step: int
    branch: int
    reuse: bool
    reason: str
    value: float | None


class Ledger:
    """Counts the calls of one range; threads may share it."""

    def __init__(self, name: str, blocks: int, skippable: int) -> None:
        self.name, self.blocks, self.skippable = name, blocks, skippable
        self._reasons: Counter[tuple[bool, str]] = Counter()
        self._settled: deque[Settled] = deque(maxlen=REMEMBERED)
        self._runs = self._peak = 0
        self._lock = threading.Lock()

    def begin(self) -> int:
        """Another run: its number."""
        with self._lock:
            self._runs += 1
            return self._runs - 1

    def count(self, decision: Decision, run: int | None = None, step: int = 0, branch: int = 0) -> None:
        """One more call; of no run where it was not even asked whether."""
        with self._lock:
            self._reasons[decision.reuse, decision.reason] += 1
            if run is not None:
                self._settled.append(Settled(self.name, run, step, branch, *decision))

    def recount(self, run: int, step: int, branch: int, decision: Decision) -> None:
        """A call that was counted as reused turned out otherwise."""
        with self._lock:
            self._reasons[True, "reuse"] -= 1
            self._reasons[decision.reuse, decision.reason] += 1
            for index in range(len(self._settled) - 1, -1, -1):
                if self._settled[index][1:4] == (run, step, branch):
                    self._settled[index] = Settled(self.name, run, step, branch, *decision)
                    break

    def held(self, now: int) -> None:
        """So many bytes are kept now."""
        with self._lock:
            self._peak = max(self._peak, now)

    def clear(self) -> None:
        with self._lock:
            self._reasons.clear()
            self._settled.clear()
            self._runs = self._peak = 0

    def settled(self) -> list[Settled]:
        """The calls, in order; of very many the latest."""
        with self._lock:
            return list(self._settled)

    def stats(self, bytes_held: int) -> CacheStats:
        with self._lock:
            counts = {key: number for key, number in self._reasons.items() if number}
            peak = self._peak
        reused = sum(number for (reuse, _), number in counts.items() if reuse)
        calls = sum(counts.values())
        reasons: Counter[str] = Counter()
        for (_, reason), number in counts.items():
            reasons[reason] += number
        return CacheStats(
            calls=calls,
            computed_calls=calls - reused,
            reused_calls=reused,
            blocks_run=calls * self.blocks - reused * self.skippable,
            blocks_total=calls * self.blocks,
            bytes_held=bytes_held,
            bytes_peak=max(peak, bytes_held),
            reasons=dict(reasons),
        )


def total(parts: list[CacheStats]) -> CacheStats:
    """The sum over ranges; peaks at different times are added up all the same."""
    reasons: Counter[str] = Counter()
    for part in parts:
        reasons.update(part.reasons)
    sums = {
        name: sum(getattr(part, name) for part in parts)
        for name in CacheStats.__dataclass_fields__
        if name != "reasons"
    }
    return CacheStats(**sums, reasons=dict(reasons))
