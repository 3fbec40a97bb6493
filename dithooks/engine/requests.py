"""A request: a run with a cache state of its own, in whichever thread or task its steps are made."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import Any

from ..errors import RunMismatch
from .sessions import Session, inside


class Request:
    """A context manager, entered once for a run or once for each of its steps; :meth:`CacheHandle.request` returns it.

    Args:
        scheduler: the request's own scheduler, if it has one.
    """

    def __init__(self, scheduler: Any = None) -> None:
        self._session: Session | None = Session(None, scheduler)
        self._busy = threading.Lock()
        self._entered = ExitStack()

    def close(self) -> None:
        """Free what is cached for the request, as after its last step, or when nothing refers to it any more.

        Raises:
            RunMismatch: the request is entered.
        """
        if not self._busy.acquire(blocking=False):
            raise RunMismatch("this request is entered: leave it before it is closed")
        self._session = None
        self._busy.release()

    def __enter__(self) -> Request:
        """Make the calls that follow belong to the request, until it is left.

        Raises:
            RunMismatch: the request is entered already, here or in another thread or task; or it was closed.
        """
        if not self._busy.acquire(blocking=False):
            raise RunMismatch(
                "this request is entered already, here or in another thread or task: it is one run, whose steps "
                "follow each other. Give each run a request of its own, with handle.request()"
            )
        try:
            if self._session is None:
                raise RunMismatch("this request was closed: take another one, with handle.request()")
            self._entered.enter_context(inside(self._session))
        except BaseException:
            self._busy.release()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            self._entered.__exit__(*error)
        finally:
            self._busy.release()
