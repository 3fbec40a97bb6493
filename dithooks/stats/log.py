"""The log of one range's decisions, from which all counts, tables, bar texts and warnings are derived."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

from ..fork import ForkLock
from ..policies.history import BranchHistory, Decision
from ..policies.reason import Reason
from .timing import Mark, is_ready, seconds_between
from .types import CacheStats, CallRecord, RunStats, blocks_left_out, branch_stats

MAX_CALLS = 10_000  # latest calls of a range that are kept one by one
MAX_RUNS = 16  # latest runs of a range that have statistics of their own
MAX_MARKS = 64  # of a run, before their times are read

LoggedCall = list[CallRecord]  # all records of one call, the first decision first; the last one counts


def fold(branch: BranchHistory, step: int, decision: Decision) -> None:
    """Add the decision of a call that is over to the history of its branch, and to that of its run.

    Example: a computed step, then a reused one.
        >>> branch = BranchHistory()
        >>> fold(branch, 0, Decision(False, "warm-up"))
        >>> branch.refreshed = 0
        >>> fold(branch, 1, Decision(True, "reuse", 0.02))
        >>> branch.computed, branch.reused, branch.streak, branch.drift, branch.run.calls
        (1, 1, 1, 0.02, 2)
    """
    reuse, value, calls = decision.reuse, decision.value, branch.run
    calls.called = calls.called + 1 if step == calls.step else 1
    calls.calls, calls.reused, calls.step = calls.calls + 1, calls.reused + reuse, step
    if value is not None and branch.refreshed is not None and step > branch.refreshed and math.isfinite(value):
        branch.rates.append(value / (step - branch.refreshed))
    if reuse:
        branch.reused, branch.streak, branch.drift = branch.reused + 1, branch.streak + 1, branch.drift + (value or 0.0)
    else:
        branch.computed, branch.streak, branch.drift = branch.computed + 1, 0, 0.0


@dataclass
class RunCounts:
    """What the calls of one run come to so far.

    Args:
        calls: calls of the run.
        reused: calls that left the range out.
        reasons: number of calls by reason.
        values: differences that calls were decided by, in order; not all of them need be finite.
    """

    calls: int = 0
    reused: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    values: list[float] = field(default_factory=list)

    def add(self, record: CallRecord) -> None:
        """Count one more call."""
        self.calls += 1
        self.reused += record.reuse
        self.reasons[record.reason] += 1
        if record.value is not None:
            self.values.append(record.value)


@dataclass
class _RunLog:
    """The part of a log that belongs to one run, and how long its calls took, in seconds."""

    run: int
    began: float
    ended: float
    calls: list[LoggedCall] = field(default_factory=list)
    last: int = 0  # of the calls ever recorded, which one was its last; 0: it has none
    counted: RunCounts = field(default_factory=RunCounts)  # of the first ``counted.calls`` calls
    computed: list[float] = field(default_factory=list)
    reused: list[float] = field(default_factory=list)
    ranges: list[float] = field(default_factory=list)
    bytes_peak: dict[int, int] = field(default_factory=dict)  # by branch
    marks: deque[tuple[bool, list[Mark]]] = field(default_factory=deque)  # of calls that the device is still busy with

    def counts(self) -> RunCounts:
        """Count the calls that were added since the last count."""
        for call in self.calls[self.counted.calls :]:
            self.counted.add(call[-1])
        return self.counted

    def read_times(self) -> None:
        """Read the times of all calls that the device has finished by now."""
        while self.marks and is_ready(self.marks[0][1][-1]):
            reuse, marks = self.marks.popleft()
            whole = seconds_between(marks[0], marks[-1])
            within = seconds_between(marks[1], marks[2]) if len(marks) == 4 else None
            if whole is not None:
                (self.reused if reuse else self.computed).append(whole)
            if within is not None:
                self.ranges.append(within)

    def stats(self, range: str, blocks: int, skippable: int, is_alone: bool) -> RunStats:
        """Derive the statistics of the run; of a range that is not alone, its calls' times show no speedup."""
        self.read_times()
        by_branch: dict[int, list[CallRecord]] = {}
        for call in self.calls:
            by_branch.setdefault(call[-1].branch, []).append(call[-1])
        branches = tuple(
            branch_stats(records, blocks, skippable, self.bytes_peak.get(branch, 0))
            for branch, records in sorted(by_branch.items())
        )
        times = [*self.computed, *self.reused]
        counts = self.counts()
        return RunStats(
            range,
            self.run,
            branches,
            self.ended - self.began,
            sum(times) if times else None,
            *(self._speedups(counts.calls - counts.reused, counts.reused) if is_alone else (None, None)),
        )

    def _speedups(self, computed: int, reused: int) -> tuple[float | None, float | None]:
        """Estimate the speedup from block times, and measure it from call times.

        The first call counts for neither: it observes and verifies, and so takes longer.
        """
        plain = median(self.computed[1:] or self.computed) if self.computed else 0.0
        if not plain or not reused:
            return None, None
        estimated = None
        if self.ranges:
            rest = max(plain - median(self.ranges[1:] or self.ranges), 0.0)
            estimated = (computed + reused) * plain / (computed * plain + reused * rest)
        spent = [*self.computed[1:], *self.reused]
        return estimated, len(spent) * plain / sum(spent) if self.reused else None


class DecisionLog(ForkLock):
    """Every decision of one range, appended as it is made; threads may share the log.

    Nothing in it is changed or counted back: a correction is appended to the call that it corrects, and counts are
    derived from the last record of each call. Calls that fall off the end are added to totals.

    Args:
        name: path of the range's transformer, or of the block list that is a range of its own.
        blocks: number of blocks of the transformer.
        skippable: number of blocks that a reused call leaves out.
        on_decision: called with the record of each call, and once more where that is corrected.
        is_alone: whether the transformer has no other range that is cached, so that its calls' times are this one's.

    Example:
        >>> log = DecisionLog("transformer", blocks=4, skippable=2)
        >>> run = log.begin_run()
        >>> log.record(run, 0, 0, Decision(False, "warm-up"))
        >>> log.record(run, 1, 0, Decision(True, "reuse"))
        >>> log.correct(run, 1, 0, Decision(False, "shape"))  # the residual did not fit: the call was computed
        >>> [(record.step, record.reason) for record in log.records()], log.stats(bytes_held=0).reused_calls
        ([(0, 'warm-up'), (1, 'shape')], 0)
    """

    def __init__(
        self,
        name: str,
        blocks: int,
        skippable: int,
        on_decision: Callable[[CallRecord], object] | None = None,
        is_alone: bool = True,
    ) -> None:
        super().__init__()
        self.name, self.blocks, self.skippable, self.on_decision = name, blocks, skippable, on_decision
        self._is_alone = is_alone
        self._calls: deque[LoggedCall] = deque()
        self._totals: Counter[tuple[bool, str]] = Counter()  # of calls that are not in _calls (any more)
        self._runs: dict[int, _RunLog] = {}
        self._begun = self._recorded = self._peak = 0
        self._logger = logging.getLogger("dithooks")

    def begin_run(self) -> int:
        """Open another run, and return its number."""
        with self.lock:
            run, now = self._begun, time.perf_counter()
            self._begun += 1
            self._runs[run] = _RunLog(run, now, now)
            # A run that many others have overtaken may still be sampling: the engine still reads its records.
            former = self._runs.get(run - MAX_RUNS)
            if former is not None and former.last <= self._recorded - len(self._calls):
                del self._runs[former.run]
            return run

    def record(self, run: int | None, step: int, branch: int, decision: Decision) -> None:
        """Append the decision of a call.

        Args:
            run: number of the run; ``None`` for a call that was not considered at all, which is only counted.
            step: sampling step.
            branch: number of the branch.
            decision: how the call was decided.
        """
        if run is None:
            with self.lock:
                self._totals[decision.reuse, str.__str__(decision.reason)] += 1
            return
        record = CallRecord(self.name, run, step, branch, decision.reuse, str.__str__(decision.reason), decision.value)
        call = [record]
        with self.lock:
            self._calls.append(call)
            self._recorded += 1
            log = self._runs.get(run)
            if log is None and run < self._begun:  # overtaken by many others before its first call was decided
                now = time.perf_counter()
                log = self._runs[run] = _RunLog(run, now, now)
            if log is not None:
                log.calls.append(call)
                log.last = self._recorded
            if len(self._calls) > MAX_CALLS:
                self._fold_oldest()
        if self._logger.isEnabledFor(logging.DEBUG) or self.on_decision is not None:
            self._report(record)

    def correct(self, run: int, step: int, branch: int, decision: Decision) -> None:
        """Append another decision of the last call at this run, step and branch; it supersedes the former ones.

        A call that is no longer among the latest 10,000 stays as it is.
        """
        record = CallRecord(self.name, run, step, branch, decision.reuse, str.__str__(decision.reason), decision.value)
        with self.lock:
            call = next((call for call in reversed(self._calls) if call[-1][1:4] == (run, step, branch)), None)
            if call is None:
                return
            call.append(record)
            if run in self._runs:
                self._runs[run].counted = RunCounts()
        self._report(record)

    def records_of(self, run: int) -> list[CallRecord]:
        """The calls of a run in order, each as it was decided in the end."""
        with self.lock:
            return [call[-1] for call in self._runs[run].calls] if run in self._runs else []

    def counts_of(self, run: int) -> RunCounts:
        """The counts of a run so far, not to be written to. Only calls that are new since the last time are counted."""
        with self.lock:
            return self._runs[run].counts() if run in self._runs else RunCounts()

    def time_call(self, run: int, reuse: bool, marks: list[Mark]) -> None:
        """Note how long a call took.

        Args:
            run: number of the run.
            reuse: whether the range was left out.
            marks: the call's beginning and end; between them, where it could be timed, the range's beginning and end.
        """
        with self.lock:
            if (log := self._runs.get(run)) is not None:
                log.ended = time.perf_counter()
                log.marks.append((reuse, marks))
                if len(log.marks) > MAX_MARKS:
                    log.read_times()

    def hold(self, now_bytes: int, run: int, branch: int, own_bytes: int) -> None:
        """Note the memory held now: by the whole range, and by one branch of a run."""
        with self.lock:
            self._peak = max(self._peak, now_bytes)
            if (log := self._runs.get(run)) is not None:
                log.bytes_peak[branch] = max(log.bytes_peak.get(branch, 0), own_bytes)

    def hold_all(self, now_bytes: int) -> None:
        """Note the memory held now by the whole range, where several deciders hold a part of it."""
        with self.lock:
            self._peak = max(self._peak, now_bytes)

    def end_run(self, run: int) -> None:
        """Write the counts of a run that has ended to Python's ``logging``, at level INFO."""
        if not self._logger.isEnabledFor(logging.INFO):
            return
        with self.lock:
            log = self._runs.get(run)
            stats = None if log is None else log.stats(self.name, self.blocks, self.skippable, self._is_alone)
        if stats is not None:
            calls = f"{stats.reused} of {stats.computed + stats.reused} calls reused"
            blocks = f"{stats.blocks_run} of {stats.blocks_total} blocks run"
            self._logger.info("%s: run %d over: %s, %s, %.2f s", self.name, run, calls, blocks, stats.seconds)

    def clear(self) -> None:
        """Empty the log; the next run is number 0 again."""
        with self.lock:
            self._calls.clear()
            self._totals.clear()
            self._runs.clear()
            self._begun = self._recorded = self._peak = 0

    def records(self) -> list[CallRecord]:
        """The latest 10,000 calls of all runs in order, each as it was decided in the end."""
        with self.lock:
            return [call[-1] for call in self._calls]

    def stats(self, bytes_held: int) -> CacheStats:
        """Derive the statistics of all calls since the log was made or cleared, with the memory that is held now."""
        with self.lock:
            counts = Counter((call[-1].reuse, call[-1].reason) for call in self._calls)
            counts.update(self._totals)
            peak = self._peak
            latest = [log for run, log in sorted(self._runs.items()) if run >= self._begun - MAX_RUNS and log.calls]
            runs = tuple(log.stats(self.name, self.blocks, self.skippable, self._is_alone) for log in latest)
        calls = counts.total()
        reused = sum(number for (reuse, _), number in counts.items() if reuse)
        left_out = blocks_left_out(reused, counts[False, Reason.CONDITIONAL.value], self.skippable)
        reasons: Counter[str] = Counter()
        for (_, reason), number in counts.items():
            reasons[reason] += number
        return CacheStats(
            calls=calls,
            computed_calls=calls - reused,
            reused_calls=reused,
            blocks_run=calls * self.blocks - left_out,
            blocks_total=calls * self.blocks,
            bytes_held=bytes_held,
            bytes_peak=max(peak, bytes_held),
            reasons=dict(reasons),
            runs=runs,
        )

    def _fold_oldest(self) -> None:
        """Add the oldest call to the totals, and drop it; and its run's details, if it was the last of an old run."""
        call = self._calls.popleft()
        oldest = call[-1]
        self._totals[oldest.reuse, oldest.reason] += 1
        log = self._runs.get(oldest.run)
        if log is not None and log.calls and log.calls[-1] is call and log.run < self._begun - MAX_RUNS:
            del self._runs[oldest.run]

    def _report(self, record: CallRecord) -> None:
        """Write a record to the debug log, and hand it to the callback."""
        if self._logger.isEnabledFor(logging.DEBUG):
            verb = "reused" if record.reuse else "computed"
            value = "" if record.value is None else f", difference {record.value:.4g}"
            shown = (self.name, record.run, record.step, record.branch, verb, record.reason, value)
            self._logger.debug("%s: run %d, step %d, branch %d: %s (%s)%s", *shown)
        if self.on_decision is not None:
            self.on_decision(record)
