"""The calls under way in all threads, which a change of the cache expires or waits for."""

from __future__ import annotations

import threading
import time
import weakref

from ..fork import ForkAware
from .call import Call, is_passing

PATIENCE = 1.0  # seconds; from the first block of a reused range to its last, a call takes far less


class ThreadCalls:
    """The calls of one range that are under way in one thread: one, and another while that is made again."""

    __slots__ = ("__weakref__", "are_compiled", "calls", "thread")

    def __init__(self) -> None:
        self.calls: tuple[Call, ...] = ()
        self.thread = threading.get_ident()
        self.are_compiled = False  # they run compiled code, as far as that is known


class ActiveCalls(ForkAware):
    """The calls of one range that have begun, in whichever thread.

    A thread writes its own :class:`ThreadCalls`, and then asks ``is_closed``; who closes does so before looking at
    them. So a call is either seen here, or has begun as a plain one.
    """

    def __init__(self) -> None:
        self.is_closed = True  # until all hooks and stand-ins are in: a call that met some of them would see half
        self._threads: weakref.WeakSet[ThreadCalls] = weakref.WeakSet()
        super().__init__()

    def after_fork(self) -> None:
        """Drop the calls of threads that are not in a forked child."""
        for thread in self._all():
            if thread.thread != threading.get_ident():
                self._threads.discard(thread)

    def join(self) -> ThreadCalls:
        """Return the place for the calls of this thread."""
        calls = ThreadCalls()
        self._threads.add(calls)
        return calls

    def expire(self, but: Call | None = None) -> None:
        """Follow the calls that have begun no longer, other than to the end of a range that they are passing over.

        A flag in each call rather than a count to compare, for which compiled code would recompile.
        """
        for thread in self._all():
            for call in thread.calls:
                call.stale = call is not but

    def open(self) -> None:
        """Let calls be cached again."""
        self.is_closed = False

    def close(self) -> bool:
        """Make calls that begin from now on plain, and wait for those that pass over the range in other threads.

        Returns whether all of them left the range in time; a call that an exception ended inside never does.
        """
        self.is_closed = True
        self.expire()
        patience = time.monotonic() + PATIENCE
        while self._passing():
            if time.monotonic() > patience:
                return False
            time.sleep(0.0002)
        return True

    def _all(self) -> list[ThreadCalls]:
        return listed(self._threads)

    def _passing(self) -> bool:
        others = [thread for thread in self._all() if thread.thread != threading.get_ident()]
        return any(is_passing(call) for thread in others for call in thread.calls)


def listed(threads: weakref.WeakSet[ThreadCalls]) -> list[ThreadCalls]:
    """List the threads of a set, though others make their first calls, or end, meanwhile."""
    while True:
        try:
            return list(threads)
        except RuntimeError:
            continue
