"""The calls under way in all threads: those that a change of the cache must not touch, and those it must wait for."""

from __future__ import annotations

import threading
import time
import weakref

from .call import Call, is_passing

PATIENCE = 1.0  # seconds; from the first block of a reused range to its last, a call takes far less


class ActiveCalls:
    """The calls of one range that have begun, wherever; those that are over are not kept."""

    def __init__(self) -> None:
        self._calls: weakref.WeakSet[Call] = weakref.WeakSet()
        self._lock = threading.Lock()
        self.is_closed = True  # until all hooks and stand-ins are in: a call that met some of them would see half

    def add(self, call: Call) -> None:
        """A call begins; as a plain one, where the range is being taken off."""
        with self._lock:
            self._calls.add(call)
            call.thread = threading.get_ident()
            call.stale = call.stale or self.is_closed

    def expire(self, but: Call | None = None) -> None:
        """What has begun is no longer followed, other than to the end of a range that it is passing over.

        A flag in each call, not a count that they compare: compiled code would have to be made anew for each count.
        """
        with self._lock:
            for call in self._calls:
                call.stale = call is not but

    def open(self) -> None:
        """Calls are followed again."""
        with self._lock:
            self.is_closed = False

    def close(self) -> bool:
        """Calls that begin from now on are plain; wait for those that are passing over the range in other threads.

        Returns whether all were through in time: one that an exception has ended in there never will be.
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
