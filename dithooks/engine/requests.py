"""A request: a run with a cache state of its own, in whichever thread or task its steps are made."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import InvalidSetting, RunMismatch
from ..fork import ForkLock
from ..validation import check_count, check_number, shown
from .sessions import Session, SessionEntry


class RequestSchedule:
    """The noise levels of a request's steps, in the place of a scheduler.

    Args:
        sigmas: a level for each step.
    """

    def __init__(self, sigmas: Sequence[float]) -> None:
        self.sigmas = torch.tensor(sigmas)
        self.timesteps = self.sigmas


class Request(ForkLock):
    """A context manager, entered once for a run or once for each of its steps; :meth:`CacheHandle.request` returns it.

    Args:
        scheduler: the request's own scheduler, if it has one.
        plan: what its rows are cached by, if that is not what the cache was attached with.
        steps: number of steps of its run, if known; left out, its scheduler's.
        sigmas: the noise level of each of them, if known; left out, its scheduler's.

    Raises:
        WrongType, InvalidSetting: ``steps`` or ``sigmas`` is not such a number or list, or they do not fit each other.
    """

    def __init__(
        self, scheduler: Any = None, plan: Any = None, steps: int | None = None, sigmas: Sequence[float] | None = None
    ) -> None:
        levels = None if sigmas is None else [check_number("a sigma", each, 0) for each in sigmas]
        if levels is not None and steps is not None and len(levels) != steps:
            raise InvalidSetting(f"request: steps={shown(steps)}, but sigmas has {len(levels)} levels: give one a step")
        self._steps = len(levels) if levels else None if steps is None else check_count("steps", steps, 1)
        self.sigmas, self.plan = levels, plan
        self.step: int | None = None  # the last one whose rows were computed or reused
        self._session: Session | None = Session(None, RequestSchedule(levels) if levels else scheduler)
        self._entry: SessionEntry | None = None
        self._user: threading.Thread | None = None  # the thread that has entered it
        super().__init__()

    @property
    def steps(self) -> int | None:
        """Number of steps of its run, if known: as given, or its scheduler's."""
        if self._steps is not None or self._session is None:
            return self._steps
        timesteps = getattr(self._session.scheduler, "timesteps", None)
        return None if timesteps is None else len(timesteps)

    def is_over(self, has_finished: Callable[[Session], bool]) -> bool:
        """Return whether it was closed, or has made its last step; ``has_finished``: whether a session's runs have."""
        if self._session is None:
            return True
        return self.step is not None and self.step + 1 == self.steps and has_finished(self._session)

    def take(self) -> Session:
        """Take the request for a batch of rows; return its session.

        Raises:
            RunMismatch: it is entered or taken already, or was closed.
        """
        with self.lock:
            session = self._free_session()
            self._user = threading.current_thread()
        return session

    def give_back(self, failed: bool) -> None:
        """End a :meth:`take`; what was cached before an exception is not trusted."""
        if self._session is not None:
            self._session.epoch += failed
        self._user = None

    def close(self) -> None:
        """Free the residuals of the request, as after its last step, or when nothing refers to it any more.

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
            session = self._free_session()
            if self.plan is not None:
                raise RunMismatch(
                    "this request has a plan of its own, which holds for its rows: write `with cache.rows([(request, "
                    "step)]):` around its calls, also where it is the only one"
                )
            self._user = threading.current_thread()
            try:
                self._entry = SessionEntry(session)
            except BaseException:
                self._user = None
                raise
        return self

    def _free_session(self) -> Session:
        """Return its session, if nobody has entered it."""
        if self._user is not None:
            raise RunMismatch(
                "this request is entered already, here or in another thread or task: it is one run, whose steps "
                "follow each other. Give each run a request of its own, with handle.request()"
            )
        if self._session is None:
            raise RunMismatch("this request was closed: take another one, with handle.request()")
        return self._session

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
