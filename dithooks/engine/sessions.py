"""What a loop tells of its calls: the sampling step, for the length of a ``with``, or until it is told anew.

Both belong to the thread, asyncio task or request that tells; what is cached does, too.
"""

from __future__ import annotations

import asyncio
import math
import operator
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import InvalidSetting, WrongType


class Session:
    """One thread, one asyncio task or one request, as far as cached state is concerned: each has its own.

    Args:
        owner: the thread or task; ``None``: a request, which is of whoever is inside of it.
        scheduler: tells its steps, rather than the one a cache was attached with.
    """

    def __init__(self, owner: object | None, scheduler: object = None) -> None:
        self.owner = None if owner is None else weakref.ref(owner)
        self.scheduler = scheduler
        self.telling: Telling | None = None  # what was told last in it
        self.epoch = 0  # counts scopes left by an exception: what was cached before one is not trusted

    def holds(self, owner: object) -> bool:
        """Whether it is this thread's or task's; a task inherits its parent's context, but not its state."""
        return self.owner is None or self.owner() is owner


@dataclass(frozen=True)
class Scope:
    """What an open :func:`timestep_scope` says."""

    step: int
    branch: int | None
    sigma: float | None
    steps: int | None
    session: Session


@dataclass(eq=False)
class Telling:
    """A step that was told without an end.

    Args:
        step: the step.
        run: stays the same from one step to the next, and is another one when another run is told.
        follows: the step before it was told as well; else it may be told for a whole run.
        at: when, the last time of
        times: so many.
        stood: what each clock has seen since.
    """

    step: int
    run: object
    follows: bool = False
    at: int = field(default_factory=time.monotonic_ns)
    times: int = 1
    stood: weakref.WeakKeyDictionary[Any, Stood] = field(default_factory=weakref.WeakKeyDictionary)


@dataclass(eq=False)
class Stood:
    """What a clock has seen since a step was told.

    Args:
        missed: that it is not for this clock's runs.
        first: what the clock said by itself then, and
        last: its step at the last call, of
        calls: so many at that;
        times: that it had been told by then.
    """

    missed: bool = False
    first: Any = None
    last: int | None = None
    calls: int = 0
    times: int = 0


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
    if (scope := _scope.get()) is not None:
        return scope.session
    session, owner = _session.get(), current_owner()
    if session is None or not session.holds(owner):
        session = Session(owner)
        _session.set(session)
    return session


def current_context() -> tuple[Session, Scope | None]:
    """The session that a call made here belongs to, and the innermost open scope."""
    scope = _scope.get()
    return (current_session(), None) if scope is None else (scope.session, scope)


def current_telling() -> Telling | None:
    """What was told last in this thread, task or request."""
    return current_session().telling


@contextmanager
def inside(session: Session) -> Iterator[None]:
    """Calls made here are of this session; also of those under a scope that is open already."""
    scope = _scope.get()
    former, within = _session.set(session), _scope.set(scope and replace(scope, session=session))
    try:
        yield
    except BaseException:
        session.epoch += 1
        raise
    finally:
        _scope.reset(within)
        _session.reset(former)


@contextmanager
def timestep_scope(
    step: int, *, branch: int | None = None, sigma: float | None = None, steps: int | None = None
) -> Iterator[None]:
    """Tell attached caches which sampling step the calls inside belong to, in custom loops and with custom schedulers.

    Scopes nest (the innermost counts), belong to the current thread or asyncio task, and follow into
    ``asyncio.to_thread``. A step smaller than the last starts a new run. A scope left by an exception
    discards what the run had cached.

    Args:
        step: index of the sampling step, ≥ 0.
        branch: which of the calls at this step it is (conditional, unconditional, …), ≥ 0;
            left out, the calls of a step are counted.
        sigma: noise level of the step, kept beside the residuals stored in it; forecasters count in it.
        steps: number of steps of the whole run, for policies that have to know it.

    Raises:
        TypeError: ``step``, ``branch`` or ``steps`` is not an integer, or ``sigma`` not a number.
        ValueError: one of them is negative, ``sigma`` is not finite, or ``step`` is not below ``steps``.

    Example:
        >>> with timestep_scope(0):
        ...     pass  # model(x, t)
    """
    index = _index("step", step)
    number = None if branch is None else _index("branch", branch)
    level = None if sigma is None else _level(sigma)
    total = None if steps is None else _index("steps", steps)
    if total is not None and index >= total:
        raise InvalidSetting(f"timestep_scope: step={index} is not one of steps={total}: it counts from 0")
    session = current_session()
    token = _scope.set(Scope(index, number, level, total, session))
    try:
        yield
    except BaseException:
        session.epoch += 1
        raise
    finally:
        _scope.reset(token)


def tell_step(step: int | None) -> None:
    """Tell which sampling step the calls that follow belong to, until another is told: a scope without an end.

    For loops that say where a step begins and not where it ends. It is told before the transformer is called, in the
    thread or asyncio task that calls it, to caches that are attached by then; an open :func:`timestep_scope` goes
    first. Told step by step, it holds however the sampler gets on. Told once, it is where runs begin, and the
    scheduler, or else the timestep argument, counts on from there.

    Args:
        step: as for :func:`timestep_scope`; ``None``: nothing is told any more.

    Raises:
        TypeError, ValueError: as :func:`timestep_scope`.

    Example:
        >>> for step in range(3):
        ...     tell_step(step)  # model(x, t)
        >>> tell_step(None)
    """
    session = current_session()
    if step is None:
        session.telling = None
        return
    index, before = _index("step", step), session.telling
    if before is not None and index == before.step:  # once more, between two calls or blocks
        before.at, before.times = time.monotonic_ns(), before.times + 1
        return
    follows = before is not None and index == before.step + 1
    run = before.run if before is not None and follows else object()
    session.telling = Telling(index, run, follows)


def _index(name: str, value: object) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        index = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise WrongType(f"timestep_scope: {name} must be an integer, not {value!r} ({type(value).__name__})") from None
    if index < 0:
        raise InvalidSetting(f"timestep_scope: {name}={index} is negative: it counts from 0")
    return index


def _level(value: float) -> float:
    try:
        if isinstance(value, (bool, str)):
            raise TypeError
        level = float(value)
    except (TypeError, ValueError):
        raise WrongType(f"timestep_scope: sigma must be a number, not {value!r}") from None
    if not math.isfinite(level) or level < 0:
        raise InvalidSetting(f"timestep_scope: sigma={level} is not a noise level: it must be finite and not negative")
    return level
