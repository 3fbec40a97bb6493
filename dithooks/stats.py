"""What the cache did, in numbers."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class CacheStats:
    """Counts since attaching, or since the last reset; over all transformers of the handle.

    ``calls`` are calls of a transformer (guidance by two calls makes two per step); ``blocks_run`` of ``blocks_total``
    block executions took place; ``bytes_held`` is the memory of the residuals kept right now; ``reasons`` says how
    often a call was computed or reused, and why.
    """

    calls: int
    computed_calls: int
    reused_calls: int
    blocks_run: int
    blocks_total: int
    bytes_held: int
    reasons: dict[str, int]


class Ledger:
    """Counts the calls of one transformer; threads may share it."""

    def __init__(self, blocks: int, skippable: int) -> None:
        self.blocks, self.skippable = blocks, skippable
        self._reasons: Counter[tuple[bool, str]] = Counter()
        self._lock = threading.Lock()

    def count(self, reuse: bool, reason: str) -> None:
        """One more call."""
        with self._lock:
            self._reasons[reuse, reason] += 1

    def recount(self, before: tuple[bool, str], after: tuple[bool, str]) -> None:
        """A call counted as ``before`` turned out to be ``after``."""
        with self._lock:
            self._reasons[before] -= 1
            self._reasons[after] += 1

    def clear(self) -> None:
        with self._lock:
            self._reasons.clear()

    def stats(self, bytes_held: int) -> CacheStats:
        with self._lock:
            counts = {key: number for key, number in self._reasons.items() if number}
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
            reasons=dict(reasons),
        )


def total(parts: list[CacheStats]) -> CacheStats:
    """The sum over transformers."""
    reasons: Counter[str] = Counter()
    for part in parts:
        reasons.update(part.reasons)
    sums = {
        name: sum(getattr(part, name) for part in parts)
        for name in CacheStats.__dataclass_fields__
        if name != "reasons"
    }
    return CacheStats(**sums, reasons=dict(reasons))
