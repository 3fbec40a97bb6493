"""The session of a call, and the sampling step that an open scope gives it.

Both belong to a thread, asyncio task or request; so do stored residuals.
"""

from __future__ import annotations

import asyncio
import math
import operator
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from ..errors import InvalidSetting, WrongType
from ..validation import shown
from .step_source import StepSource


class Session:
    """One thread, one asyncio task or one request, as far as cached state is concerned: each has its own.

    Args:
        owner: the thread or task; ``None`` for a request, which belongs to whoever has entered it.
        scheduler: counts the session's steps, in place of the scheduler that the cache was attached with.
        rows: of the batch, whose rows belong to several requests; ``None`` if a call belongs to one.
    """

    def __init__(self, owner: object | None, scheduler: object = None, rows: Sequence[Any] | None = None) -> None:
        self.owner = None if owner is None else weakref.ref(owner)
        self.scheduler, self.rows = scheduler, rows
        self.step_source: StepSource | None = None  # gives the steps of its calls, where no scope is open
        self.epoch = 0  # counts scopes left by an exception: what was cached before one is not trusted

    @property
    def has_ended(self) -> bool:
        """Whether it is a thread's that has ended, as in a forked child all but one have."""
        owner = None if self.owner is None else self.owner()
        return isinstance(owner, threading.Thread) and not owner.is_alive()

    def holds(self, owner: object) -> bool:
        """Whether it is this thread's or task's; a task inherits its parent's context, but not its state."""
        return self.owner is None or self.owner() is owner


@dataclass(eq=False)
class Scope:
    """The arguments of a :func:`timestep_scope` or of a step of :func:`steps`, and its session.

    Args:
        step: index of the sampling step.
        branch: number or name of the call at its step.
        sigma: noise level of the step.
        steps: number of steps of the run.
        session: to which the calls belong.
        loop: the loop whose step it is, the same for all of its steps.
        outer: the scope around it, which counts again once this one is closed.
        is_closed: whether its step is over, though the loop that opened it may not know it.
    """

    step: int
    branch: int | str | None
    sigma: float | None
    steps: int | None
    session: Session
    loop: object | None = None
    outer: Scope | None = None
    is_closed: bool = False


_scope: ContextVar[Scope | None] = ContextVar("dithooks.scope", default=None)
_session: ContextVar[Session | None] = ContextVar("dithooks.session", default=None)


def current_owner() -> object:
    """The running asyncio task, else thread."""
    # Asked at every call, so not by asyncio.current_task(), which raises where no event loop runs.
    looping = asyncio._get_running_loop() is not None
    return (asyncio.current_task() if looping else None) or threading.current_thread()


def current_session() -> Session:
    """The session of the request that is entered, else of the running task, else thread.

    Requests and scopes carry theirs along into worker threads.
    """
    if _scope.get() is not None and (scope := open_scope()) is not None:
        return scope.session
    session, owner = _session.get(), current_owner()
    if session is None or not session.holds(owner):
        session = Session(owner)
        _session.set(session)
    return session


def current_context() -> tuple[Session, Scope | None]:
    """The session that a call made here belongs to, and the innermost open scope."""
    scope = _scope.get()
    if scope is not None and scope.is_closed:
        scope = open_scope()
    return (current_session(), None) if scope is None else (scope.session, scope)


def open_scope() -> Scope | None:
    """The innermost scope that is open."""
    scope = _scope.get()
    while scope is not None and scope.is_closed:
        scope = scope.outer
    return scope


def enter_scope(scope: Scope | None) -> None:
    """Make a scope the innermost one; ``None``: none is open."""
    _scope.set(scope)


class SessionEntry:
    """Makes the calls made until it is left belong to a session, also those under a scope that is open already."""

    def __init__(self, session: Session) -> None:
        scope = open_scope()
        self._session = session
        self._former, self._within = _session.set(session), _scope.set(scope and replace(scope, session=session))

    def leave(self, failed: bool) -> None:
        """Let calls belong to the former session again; what was cached before an exception is not trusted."""
        self._session.epoch += failed
        _scope.reset(self._within)
        _session.reset(self._former)


@contextmanager
def timestep_scope(
    step: int, *, branch: int | str | None = None, sigma: float | None = None, steps: int | None = None
) -> Iterator[None]:
    """Declare which sampling step the calls inside belong to, in custom loops and with custom schedulers.

    Scopes nest (the innermost counts), belong to the current thread or asyncio task, and follow into
    ``asyncio.to_thread``. A step smaller than the last starts a new run. A scope left by an exception
    discards what the run had cached.

    Args:
        step: index of the sampling step, ≥ 0.
        branch: which of the calls at this step it is (conditional, unconditional, a window, …): a number ≥ 0 or a name;
            left out, the calls of a step are distinguished by what they are given, and by their order.
        sigma: noise level of the step, kept beside the residuals stored in it; forecasters count in it.
        steps: number of steps of the whole run, for policies that have to know it.

    Raises:
        TypeError: ``step`` or ``steps`` is not an integer, ``branch`` neither that nor text, or ``sigma`` not a number.
        ValueError: one of them is negative, ``sigma`` is not finite, or ``step`` is not below ``steps``.

    Example:
        >>> with timestep_scope(0):
        ...     pass  # model(x, t)
    """
    index = _index("step", step)
    number = branch if branch is None or isinstance(branch, str) else _index("branch", branch)
    level = None if sigma is None else _level(sigma)
    total = None if steps is None else _index("steps", steps)
    if total is not None and index >= total:
        raise InvalidSetting(f"timestep_scope: step={index} is not one of steps={total}: it counts from 0")
    session = current_session()
    token = _scope.set(Scope(index, number, level, total, session, outer=open_scope()))
    try:
        yield
    except BaseException:
        session.epoch += 1
        raise
    finally:
        _scope.reset(token)


def _index(name: str, value: object) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        index = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise WrongType(
            f"timestep_scope: {name} must be an integer, not {shown(value)} ({type(value).__name__})"
        ) from None
    if index < 0:
        raise InvalidSetting(f"timestep_scope: {name}={index} is negative: it counts from 0")
    return index


def _level(value: float) -> float:
    try:
        if isinstance(value, (bool, str)):
            raise TypeError
        level = float(value)
    except (TypeError, ValueError):
        raise WrongType(f"timestep_scope: sigma must be a number, not {shown(value)}") from None
    if not math.isfinite(level) or level < 0:
        raise InvalidSetting(f"timestep_scope: sigma={level} is not a noise level: it must be finite and not negative")
    return level
