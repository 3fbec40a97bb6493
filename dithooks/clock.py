"""Which sampling step is this call? Asked at every call of a transformer, answered without touching anything.

The first that can tell is believed: an open :func:`timestep_scope`; the scheduler's own ``step_index``; the value of
the ``timestep`` argument. A step is a sampling step, never a count of calls.
"""

from __future__ import annotations

import asyncio
import math
import operator
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch

TIMESTEP_NAMES = ("timestep", "timesteps", "t")


class Session:
    """One thread or one asyncio task, as far as cached state is concerned; requests in others have their own."""

    def __init__(self, owner: object) -> None:
        self.owner = weakref.ref(owner)
        self.epoch = 0  # counts scopes left by an exception: what was cached before one is not trusted


@dataclass(frozen=True, eq=False)
class Telling:
    """What is known of a step that was told without an end.

    Args:
        again: another step was told before it; else it may be told for a whole run.
        at: when.
        stood: where the runs' own clocks were at their first call after it, by which one sees them move on.
    """

    again: bool
    at: int = field(default_factory=time.monotonic_ns)
    stood: weakref.WeakKeyDictionary[StepClock, Tick | None] = field(default_factory=weakref.WeakKeyDictionary)


@dataclass(frozen=True)
class Scope:
    """What an open :func:`timestep_scope` says, or :func:`tell_step`, whose has no end."""

    step: int
    branch: int | None
    sigma: float | None
    steps: int | None
    session: Session
    telling: Telling | None = None


_scope: ContextVar[Scope | None] = ContextVar("dithooks.scope", default=None)
_session: ContextVar[Session | None] = ContextVar("dithooks.session", default=None)


def current_session() -> Session:
    """The session of the running task, else thread. A scope carries its own along into worker threads."""
    if (scope := _scope.get()) is not None:
        return scope.session
    # Asked at every call, so not by asyncio.current_task(), which raises where no event loop runs.
    looping = asyncio._get_running_loop() is not None
    owner: object = (asyncio.current_task() if looping else None) or threading.current_thread()
    session = _session.get()
    if session is None or session.owner() is not owner:  # a task inherits its parent's context, but not its state
        session = Session(owner)
        _session.set(session)
    return session


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
        raise ValueError(f"timestep_scope: step={index} is not one of steps={total}: it counts from 0")
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
    """Tell which sampling step the calls that follow belong to, until it is told anew: a scope without an end.

    For loops that say where a step begins and not where it ends. It is told in the current thread or asyncio task, to
    the caches that are attached by then. It holds until a scheduler has moved on without it being told anew: from then
    on that tells; so does the timestep argument, where it is told only once.

    Args:
        step: as for :func:`timestep_scope`; ``None``: nothing is told any more.

    Raises:
        TypeError, ValueError: as :func:`timestep_scope`.

    Example:
        >>> for step in range(3):
        ...     tell_step(step)  # model(x, t)
        >>> tell_step(None)
    """
    before = _scope.get()
    if step is None:
        if before is not None and before.telling is not None:
            _scope.set(None)
        return
    index = _index("step", step)
    again = before is not None and before.telling is not None and before.step != index
    _scope.set(Scope(index, None, None, None, current_session(), Telling(again)))


def _index(name: str, value: object) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        index = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"timestep_scope: {name} must be an integer, not {value!r} ({type(value).__name__})") from None
    if index < 0:
        raise ValueError(f"timestep_scope: {name}={index} is negative: it counts from 0")
    return index


def _level(value: float) -> float:
    try:
        if isinstance(value, (bool, str)):
            raise TypeError
        level = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"timestep_scope: sigma must be a number, not {value!r}") from None
    if not math.isfinite(level) or level < 0:
        raise ValueError(f"timestep_scope: sigma={level} is not a noise level: it must be finite and not negative")
    return level


class Tick(NamedTuple):
    """Where in a run a call stands.

    ``sigma`` is told by a scope; ``value`` is that of the timestep argument, where it was read. ``epoch`` is an object
    that stays the same through a run and is another one in the next, if there is such a thing; ``restart`` says that
    the call cannot belong to the run that was given.
    """

    step: int
    source: str
    branch: int | None = None
    sigma: float | None = None
    value: float | None = None
    epoch: object | None = None
    steps: int | None = None
    restart: bool = False


class StepClock:
    """Tells the step of each call of one transformer.

    Args:
        scheduler: returns the pipeline's scheduler as it is now, or ``None``.
        where: names the transformer in errors.
    """

    def __init__(self, scheduler: Callable[[], Any], where: str) -> None:
        self._scheduler, self._where, self._born = scheduler, where, time.monotonic_ns()

    def read(self, arguments: Mapping[str, Any] | None, history: list[float]) -> Tick:
        """The tick of a call with these arguments (``None``: not seen).

        ``history`` holds the distinct timestep values of the run so far; it is extended when they are what tells.

        Raises:
            ValueError: no scope is open, no scheduler tells its step, and there is no timestep argument.
        """
        scope = _scope.get()
        if scope is not None and scope.telling is None:
            return Tick(scope.step, "scope", scope.branch, scope.sigma, steps=scope.steps)
        if scope is not None and scope.telling is not None:
            own = self._moved_on(scope.telling, arguments, history)
            return Tick(scope.step, "scope") if own is None else own
        own = self._scheduled() or self._timed(arguments, history)
        if own is None:
            raise ValueError(
                f"{self._where}: which sampling step is this? No timestep_scope is open, no scheduler tells its "
                "step_index, and the call has no timestep argument. Write `with dithooks.timestep_scope(step): ...` "
                "around each step of your loop, or give dit_cache the pipeline or scheduler=..."
            )
        return own

    def _moved_on(self, telling: Telling, arguments: Mapping[str, Any] | None, history: list[float]) -> Tick | None:
        """What tells in place of a step that was told and is out of date; ``None``: it holds."""
        missed = telling.at < self._born  # told when there was nothing yet that it could be for
        own = self._scheduled()
        if own is None and (missed or not telling.again):  # else not asked: that may mean to wait for a device
            own = self._timed(arguments, history)
        if own is None or missed or self not in telling.stood:
            telling.stood.setdefault(self, own)
            return own if missed else None
        stood = telling.stood[self]
        same = stood is not None and own.step == stood.step and own.epoch is stood.epoch
        return None if same else own

    def _epoch(self) -> torch.Tensor | None:
        timesteps = getattr(self._scheduler(), "timesteps", None)
        return timesteps if isinstance(timesteps, torch.Tensor) else None

    def _scheduled(self) -> Tick | None:
        """What the scheduler tells, if it counts steps."""
        scheduler, epoch = self._scheduler(), self._epoch()
        if epoch is None or not hasattr(scheduler, "step_index"):
            return None
        index = scheduler.step_index
        step = index if index is not None else getattr(scheduler, "begin_index", None) or 0
        return Tick(int(step), "scheduler", epoch=epoch, steps=len(epoch))

    def _timed(self, arguments: Mapping[str, Any] | None, history: list[float]) -> Tick | None:
        """What the timestep argument tells, if there is one."""
        epoch = self._epoch()
        value = _timestep(arguments)
        if value is None:
            return None
        steps = None if epoch is None else len(epoch)
        listed = [] if epoch is None else (epoch.cpu() == value).nonzero().flatten().tolist()
        if listed and not history:  # DDIM and the like: no step_index, but the list of timesteps tells
            return Tick(listed[0], "timestep", value=value, epoch=epoch, steps=steps)
        step, restart = _ordinal(value, history)
        return Tick(step, "timestep", value=value, epoch=epoch, steps=steps, restart=restart)

    def sigmas(self, tick: Tick) -> tuple[float, ...] | None:
        """The noise levels of the schedule that a tick belongs to, if the scheduler has one for each step.

        Asked once a run: where they lie on a device, this waits for it.
        """
        sigmas = getattr(self._scheduler(), "sigmas", None)
        if tick.epoch is None or tick.steps is None or not isinstance(sigmas, torch.Tensor) or sigmas.is_meta:
            return None
        if sigmas.dim() != 1 or len(sigmas) not in (tick.steps, tick.steps + 1):
            return None
        levels = sigmas.detach().to("cpu", torch.float32).tolist()[: tick.steps]
        falls = all(a > b for a, b in pairwise(levels))  # where one repeats (Heun's method), σ does not tell the step
        return tuple(levels) if falls else None


def _timestep(arguments: Mapping[str, Any] | None) -> float | None:
    """The value of the timestep argument; of one per token, the largest (clean frames have 0).

    Where it lies on a device, reading it has to wait for that: the price of having neither scope nor scheduler.
    """
    for name in TIMESTEP_NAMES:
        value = (arguments or {}).get(name)
        if isinstance(value, torch.Tensor) and value.numel():
            return float(value.item() if value.numel() == 1 else value.max().item())
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    return None


def _ordinal(value: float, history: list[float]) -> tuple[int, bool]:
    """Which distinct value of the run this is, and whether it can only be the first of another run.

    Within a run the values go one way; one that goes back starts the next.
    """
    restart = False
    if not history or value != history[-1]:
        restart = len(history) > 1 and (value - history[-1]) * (history[-1] - history[0]) < 0
        if restart:
            history.clear()
        history.append(value)
    return len(history) - 1, restart
