"""The calls under way in all threads, which a change of the cache expires or waits for."""

from __future__ import annotations

import threading
import time
import weakref

from .call import Call, is_passing

PATIENCE = 1.0  # seconds; from the first block of a reused range to its last, a call takes far less


class ActiveCalls:
    """The calls of one range that are under way, in whichever thread."""

    def __init__(self) -> None:
        self._calls: weakref.WeakSet[Call] = weakref.WeakSet()
        self._lock = threading.Lock()
        self.is_closed = True  # until all hooks and stand-ins are in: a call that met some of them would see half

    def add(self, call: Call) -> None:
        """Add a call that begins; mark it stale while the range is being removed."""
        with self._lock:
            self._calls.add(call)
            call.thread = threading.get_ident()
            call.stale = call.stale or self.is_closed

    def expire(self, but: Call | None = None) -> None:
        """Mark all calls but one stale: they finish a range that they are passing over, and leave nothing behind.

        A flag in each call rather than a count to compare, for which compiled code would recompile.
        """
        with self._lock:
            for call in self._calls:
                call.stale = call is not but

    def open(self) -> None:
        """Let calls be cached again."""
        with self._lock:
            self.is_closed = False

    def close(self) -> bool:
        """Make calls that begin from now on plain, and wait for those that are passing over the range in other threads.

        Returns whether all of them left the range in time; a call that an exception ended inside never does.
        """
        with self._lock:
            self.is_closed = True
        self.expire()
        patience = time.monotonic() + PATIENCE
        while self._passing():
            if time.monotonic() > patience:
                return False
            time.sleep(0.0002)
        return True

    def _passing(self) -> bool:
        with self._lock:
            return any(is_passing(call) for call in self._calls if call.thread != threading.get_ident())
