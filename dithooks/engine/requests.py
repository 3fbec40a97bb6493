"""A request: a run with a cache state of its own, in whichever thread or task its steps are made."""

from __future__ import annotations

import threading
from typing import Any

from ..errors import RunMismatch
from ..fork import ForkLock
from .sessions import Session, SessionEntry


class Request(ForkLock):
    """A context manager, entered once for a run or once for each of its steps; :meth:`CacheHandle.request` returns it.

    Args:
        scheduler: the request's own scheduler, if it has one.
    """

    def __init__(self, scheduler: Any = None) -> None:
        self._session: Session | None = Session(None, scheduler)
        self._entry: SessionEntry | None = None
        self._user: threading.Thread | None = None  # the thread that has entered it
        super().__init__()

    def close(self) -> None:
        """Free what is cached for the request, as after its last step, or when nothing refers to it any more.

        Raises:
            RunMismatch: the request is entered.
        """
        with self.lock:
            if self._user is not None:
                raise RunMismatch("this request is entered: leave it before it is closed")
            self._session = None

    def __enter__(self) -> Request:
        """Make the calls that follow belong to the request, until it is left.

        Raises:
            RunMismatch: the request is entered already, here or in another thread or task; or it was closed.
        """
        with self.lock:
            if self._user is not None:
                raise RunMismatch(
                    "this request is entered already, here or in another thread or task: it is one run, whose steps "
                    "follow each other. Give each run a request of its own, with handle.request()"
                )
            if self._session is None:
                raise RunMismatch("this request was closed: take another one, with handle.request()")
            self._user = threading.current_thread()
            try:
                self._entry = SessionEntry(self._session)
            except BaseException:
                self._user = None
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        entry, self._entry = self._entry, None
        try:
            if entry is not None:
                entry.leave(failed=kind is not None)
        finally:
            self._user = None

    def after_fork(self) -> None:
        """Free the lock in a forked child, and the request, if a thread had entered it that is not there."""
        super().after_fork()
        if self._user is not None and not self._user.is_alive():
            self._user = self._entry = None
            if self._session is not None:
                self._session.epoch += 1
