"""The time that a fit takes within a run, which is none of the plan's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from ..environment.machine import synchronize
from ..recording.solver_watch import SolverCall, SolverWatcher


class FitTimer:
    """A watcher of a solver that hands all on to another one, and adds up the seconds that this one takes.

    The device is waited for before and after: else the fit would seem to take what the model has left to compute.

    Args:
        watcher: what fits the weights.
    """

    def __init__(self, watcher: SolverWatcher) -> None:
        self.watcher, self.seconds = watcher, 0.0

    def before(self, call: SolverCall) -> None:
        """Look at a call that is about to be made."""
        with self._timed():
            self.watcher.before(call)

    def after(self, call: SolverCall, following: Tensor) -> None:
        """Look at the sample that a call has returned."""
        with self._timed():
            self.watcher.after(call, following)

    def fails(self, error: Exception) -> None:
        """Note that a call cannot be looked at."""
        self.watcher.fails(error)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        synchronize()
        begun_at = time.perf_counter()
        try:
            yield
        finally:
            synchronize()
            self.seconds += time.perf_counter() - begun_at
