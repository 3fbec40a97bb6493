"""One request among others: what is cached for it is its own, in whichever thread or task its steps are made."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import Any

from ..errors import RunMismatch
from .sessions import Session, inside


class Request:
    """What :meth:`CacheHandle.request` returns: a context manager, entered once for a run, or once for each step of it.

    Args:
        scheduler: of the request, if it has one of its own.
    """

    def __init__(self, scheduler: Any = None) -> None:
        self._session: Session | None = Session(None, scheduler)
        self._busy = threading.Lock()
        self._entered = ExitStack()

    def close(self) -> None:
        """Free what is cached for it. That also happens when the last step is over, and when nothing refers to it.

        Raises:
            RuntimeError: it is entered.
        """
        if not self._busy.acquire(blocking=False):
            raise RunMismatch("this request is entered: leave it before it is closed")
        self._session = None
        self._busy.release()

    def __enter__(self) -> Request:
        """Calls made until it is left belong to it.

        Raises:
            RuntimeError: it is entered already, here or in another thread or task; or it was closed.
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
