"""The progress of a search, with the time that is left of all of it."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..progress_bars import ProgressReport

RECORD, PLAN = "record", "plan"  # stages
CHECKS = 2  # runs of the best plan at last, where weights are fitted


class SearchProgress:
    """A progress report that adds the time until the search is over, from the first step of the recorded run on.

    The unit is one uncached run: its time is estimated by the recorded run's steps, and known once one was timed.

    Args:
        show: the display.
        runs_ahead: what follows the recorded run, in uncached runs.
        clock: returns seconds.

    Example:
        >>> now, lines = [0.0], []
        >>> def show(stage, done, total, note="", seconds_left=None):
        ...     lines.append(f"{stage} {done}: {seconds_left}")
        >>> report = SearchProgress(show, 3.0, clock=lambda: now[0])
        >>> for step in (1, 2):
        ...     now[0] += 10.0
        ...     report("record", step, 4)
        >>> report.expect(2.0, run_seconds=30.0)
        >>> report("uncached run", 0, None)
        >>> lines
        ['record 1: 150.0', 'record 2: 140.0', 'uncached run 0: 60.0']
    """

    def __init__(self, show: ProgressReport, runs_ahead: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self._show, self._clock, self._runs_ahead = show, clock, runs_ahead
        self._begun_at = clock()
        self._first: tuple[int, float] | None = None  # of the recorded run's steps: how many were done, and when
        self._is_recorded = self._is_planned = False
        self._run_seconds: float | None = None
        self._over_at: float | None = None

    def __call__(
        self, stage: str, done: int, total: int | None, note: str = "", seconds_left: float | None = None
    ) -> None:
        """Show how far a stage is; ``seconds_left``: of the trials for one target."""
        now = self._clock()
        if stage == PLAN and self._is_planned:
            return  # between two trials, whose bar stays
        if stage == RECORD and total and not self._is_recorded:
            self._time_steps(done, total, now)
        if seconds_left is not None:
            self._is_planned = True
            self._over_at = now + seconds_left + self._runs_ahead * (self._run_seconds or 0.0)
        self._show(stage, done, total, note, None if self._over_at is None else max(0.0, self._over_at - now))

    def expect(self, runs_ahead: float, run_seconds: float | None = None) -> None:
        """Note that the recorded run is over, what follows, in uncached runs, and the time of one, if it was taken."""
        self._is_recorded, self._runs_ahead = True, runs_ahead
        self._run_seconds = run_seconds or self._run_seconds
        if self._run_seconds is not None:
            self._over_at = self._clock() + runs_ahead * self._run_seconds

    def begin_trials(self, runs_after: float) -> None:
        """Note what follows the trials for the next target, in uncached runs."""
        self._runs_ahead = runs_after

    def _time_steps(self, done: int, total: int, now: float) -> None:
        """Estimate the time of a run by its steps; the first is slower, and left out once there are others."""
        if self._first is None:
            self._first, step = (done, now), (now - self._begun_at) / max(1, done)
        elif done > self._first[0]:
            step = (now - self._first[1]) / (done - self._first[0])
        else:  # another call at the first step
            return
        self._run_seconds = step * total
        self._over_at = now + step * (total - done) + self._runs_ahead * self._run_seconds


def expected_trials(most: int, runs_left: float | None, speedup: float) -> int:
    """Return how many plans will probably be run, before the best one is checked.

    Args:
        most: plans that may be run.
        runs_left: uncached runs that may still be spent; ``None``: no limit.
        speedup: of a plan.

    Example:
        >>> expected_trials(14, 1.95, 2.0), expected_trials(14, None, 2.0)
        (1, 14)
    """
    affordable = most if runs_left is None else int(runs_left * speedup + 1e-9) - CHECKS
    return max(0, min(most, affordable))
