"""Counts the calls of one range, tells of them, and keeps the latest runs."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

from ..policies.history import Decision
from ..policies.reason import Reason
from .timing import Mark, between, is_ready
from .types import CacheStats, CallRecord, RunStats, branch_stats

REMEMBERED = 10_000  # decisions of a range
RUNS = 16  # of which more is told than counts


@dataclass
class _Book:
    """One run: its calls, and how long they took, in seconds."""

    run: int
    began: float
    ended: float
    settled: list[CallRecord] = field(default_factory=list)
    computed: list[float] = field(default_factory=list)
    reused: list[float] = field(default_factory=list)
    ranges: list[float] = field(default_factory=list)
    kept: dict[int, int] = field(default_factory=dict)  # bytes at most, by branch
    marks: deque[tuple[bool, list[Mark]]] = field(default_factory=deque)  # of calls that the device is not done with

    def read(self) -> None:
        """Take in the times of calls that the device is done with by now."""
        while self.marks and is_ready(self.marks[0][1][-1]):
            reuse, marks = self.marks.popleft()
            taken = between(marks[0], marks[-1])
            within = between(marks[1], marks[2]) if len(marks) == 4 else None
            if taken is not None:
                (self.reused if reuse else self.computed).append(taken)
            if within is not None:
                self.ranges.append(within)

    def stats(self, range: str, blocks: int, skippable: int) -> RunStats:
        self.read()
        numbers = sorted({each.branch for each in self.settled})
        calls = [[each for each in self.settled if each.branch == number] for number in numbers]
        branches = tuple(
            branch_stats(each, blocks, skippable, self.kept.get(number, 0))
            for number, each in zip(numbers, calls, strict=True)
        )
        times = [*self.computed, *self.reused]
        return RunStats(
            range,
            self.run,
            branches,
            self.ended - self.began,
            sum(times) if times else None,
            *self._speedups(sum(branch.computed for branch in branches), sum(branch.reused for branch in branches)),
        )

    def _speedups(self, computed: int, reused: int) -> tuple[float | None, float | None]:
        """Estimated from block times, and measured; the first call, which learns and tests, counts for neither."""
        plain = median(self.computed[1:] or self.computed) if self.computed else 0.0
        if not plain or not reused:
            return None, None
        estimated = None
        if self.ranges:
            left = max(plain - median(self.ranges[1:] or self.ranges), 0.0)
            estimated = (computed + reused) * plain / (computed * plain + reused * left)
        spent = [*self.computed[1:], *self.reused]
        return estimated, len(spent) * plain / sum(spent) if self.reused else None


class Ledger:
    """Counts the calls of one range; threads may share it.

    Args:
        name: path of the range's transformer, or of the list that is a range of its own.
        blocks: of the transformer, and
        skippable: as many of them as a reused call leaves out.
        on_decision: is told of each call that is settled.
    """

    def __init__(
        self, name: str, blocks: int, skippable: int, on_decision: Callable[[CallRecord], object] | None = None
    ) -> None:
        self.name, self.blocks, self.skippable, self.on_decision = name, blocks, skippable, on_decision
        self._reasons: Counter[tuple[bool, str]] = Counter()
        self._settled: deque[CallRecord] = deque(maxlen=REMEMBERED)
        self._books: dict[int, _Book] = {}
        self._runs = self._peak = 0
        self._lock = threading.Lock()
        self._log = logging.getLogger("dithooks")

    def begin(self) -> int:
        """Another run: its number."""
        with self._lock:
            number, now = self._runs, time.perf_counter()
            self._runs += 1
            self._books[number] = _Book(number, now, now)
            while len(self._books) > RUNS:
                del self._books[next(iter(self._books))]
            return number

    def count(self, decision: Decision, run: int | None = None, step: int = 0, branch: int = 0) -> None:
        """One more call; of no run where it was not even asked whether."""
        settled = (
            None
            if run is None
            else CallRecord(self.name, run, step, branch, decision.reuse, str(decision.reason), decision.value)
        )
        with self._lock:
            self._reasons[decision.reuse, decision.reason] += 1
            if settled is not None:
                self._settled.append(settled)
                if (book := self._books.get(settled.run)) is not None:
                    book.settled.append(settled)
        if settled is not None:
            self._tell(settled)

    def recount(self, run: int, step: int, branch: int, decision: Decision) -> None:
        """A call that was counted as reused turned out otherwise."""
        settled = CallRecord(self.name, run, step, branch, decision.reuse, str(decision.reason), decision.value)
        book = self._books.get(run)
        with self._lock:
            self._reasons[True, Reason.REUSE] -= 1
            self._reasons[decision.reuse, decision.reason] += 1
            for told in (self._settled, [] if book is None else book.settled):
                for index in range(len(told) - 1, -1, -1):
                    if told[index][1:4] == (run, step, branch):
                        told[index] = settled
                        break
        self._tell(settled)

    def timed(self, run: int, reuse: bool, marks: list[Mark]) -> None:
        """A call of a run is over.

        Args:
            run: which.
            reuse: whether the range was left out.
            marks: its beginning and end; between them, where it could be timed, the beginning and end of the range.
        """
        with self._lock:
            if (book := self._books.get(run)) is not None:
                book.ended = time.perf_counter()
                book.marks.append((reuse, marks))
                book.read()

    def held(self, now: int, run: int, branch: int, own: int) -> None:
        """So many bytes are kept now, and so many of them for one branch of a run."""
        with self._lock:
            self._peak = max(self._peak, now)
            if (book := self._books.get(run)) is not None:
                book.kept[branch] = max(book.kept.get(branch, 0), own)

    def clear(self) -> None:
        """Begin anew."""
        with self._lock:
            self._reasons.clear()
            self._settled.clear()
            self._books.clear()
            self._runs = self._peak = 0

    def settled(self) -> list[CallRecord]:
        """The calls, in order; of very many the latest."""
        with self._lock:
            return list(self._settled)

    def finished(self, run: int) -> None:
        """A run has ended: said to who listens."""
        if not self._log.isEnabledFor(logging.INFO):
            return
        with self._lock:
            book = self._books.get(run)
            found = None if book is None else book.stats(self.name, self.blocks, self.skippable)
        if found is not None:
            calls = f"{found.reused} of {found.computed + found.reused} calls reused"
            blocks = f"{found.blocks_run} of {found.blocks_total} blocks run"
            self._log.info("%s: run %d over: %s, %s, %.2f s", self.name, run, calls, blocks, found.seconds)

    def stats(self, bytes_held: int) -> CacheStats:
        """All of it."""
        with self._lock:
            counts = {key: number for key, number in self._reasons.items() if number}
            peak = self._peak
            runs = [book.stats(self.name, self.blocks, self.skippable) for book in self._books.values() if book.settled]
        reused = sum(number for (reuse, _), number in counts.items() if reuse)
        calls = sum(counts.values())
        reasons: Counter[str] = Counter()
        for (_, reason), number in counts.items():
            reasons[str(reason)] += number
        return CacheStats(
            calls=calls,
            computed_calls=calls - reused,
            reused_calls=reused,
            blocks_run=calls * self.blocks - reused * self.skippable,
            blocks_total=calls * self.blocks,
            bytes_held=bytes_held,
            bytes_peak=max(peak, bytes_held),
            reasons=dict(reasons),
            runs=tuple(runs),
        )

    def _tell(self, settled: CallRecord) -> None:
        if self._log.isEnabledFor(logging.DEBUG):
            how = "reused" if settled.reuse else "computed"
            value = "" if settled.value is None else f", difference {settled.value:.4g}"
            told = (self.name, settled.run, settled.step, settled.branch, how, settled.reason, value)
            self._log.debug("%s: run %d, step %d, branch %d: %s (%s)%s", *told)
        if self.on_decision is not None:
            self.on_decision(settled)
