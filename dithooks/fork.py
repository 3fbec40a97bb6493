"""What a forked child has to release: locks and calls of threads that are not in the child."""

from __future__ import annotations

import os
import threading
import weakref


class ForkAware:
    """The base of all objects that keep what belongs to a thread; each is notified where the process has been forked.

    Its ``__init__`` is called last: another thread may fork at any time.
    """

    def __init__(self) -> None:
        _EACH.add(self)

    def after_fork(self) -> None:
        """Release, in a forked child, what other threads held: of all threads, only the one that forks is there."""
        raise NotImplementedError


class ForkLock(ForkAware):
    """An object with a lock of its own, which a forked child replaces: held by another thread, it would be for ever.

    What the lock guards may be half changed there, as it may be after a Ctrl-C, and has to be of use at each point of a
    change. The lock is re-entrant: a finalizer or a signal handler may come in between.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        super().__init__()

    def after_fork(self) -> None:
        """Replace the lock by a new one."""
        self.lock = threading.RLock()


# The process's, as a fork is; weak, so that it keeps nothing alive.
_EACH: weakref.WeakSet[ForkAware] = weakref.WeakSet()


def _after_fork() -> None:
    for each in list(_EACH):
        each.after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=_after_fork)
