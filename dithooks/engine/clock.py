"""The sampling step of a call, asked of several sources in order, without changing anything.

The first source that knows counts: an open :func:`timestep_scope` or :func:`steps`; the session's own step source; a
count of calls, if one was asked for; the scheduler's ``step_index``, as long as it moves when timesteps do; the
timestep argument of the transformer or of a module around it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from itertools import pairwise
from time import monotonic_ns
from typing import Any, Protocol

import torch
from torch import Tensor

from ..environment.torch_api import OutOfMemoryError
from ..errors import InvalidSetting, WrongType
from ..validation import check_count, shown
from .sessions import Scope, Session, current_context
from .step_source import Asked, RunTime, Tick
from .timestep_argument import Reading, check_name, host_reader, note, read, timesteps_in

_MISSING = object()
SCHEDULER, TIMESTEP, SCOPE, COUNT = "scheduler", "timestep", "scope", "count"


class Standing(Enum):
    """Whether timesteps stood still while the scheduler moved: never so far, once, or as this loop's always do."""

    NEVER = auto()
    ONCE = auto()
    KNOWN = auto()


class TimeSource(Protocol):
    """A source of the step of each call."""

    def tick(self, asked: Asked) -> Tick | None:
        """Return the step of a call; ``None``: unknown, ask the next source. Ask once a call: it is noted."""


class CountedCalls:
    """The step by a count of calls, for loops that tell nothing.

    Example: of two calls per step and four steps, the sixth call is of step 2, and the ninth of the next run's step 0.

    Args:
        calls_per_step: calls that each step makes.
        steps: of a run.
        timesteps: asked as well, where there is a timestep: one that goes back shows a run that was cut short.
    """

    def __init__(self, calls_per_step: int, steps: int, timesteps: TimestepArgument) -> None:
        self.calls_per_step, self.steps, self._timesteps = calls_per_step, steps, timesteps

    def tick(self, asked: Asked) -> Tick | None:
        """Return the step of a call, which is counted."""
        seen, time = self._timesteps.tick(asked), asked.time
        step = time.calls // self.calls_per_step
        time.calls += 1
        restart = step >= self.steps or (seen is not None and seen.restart)
        return Tick(step, COUNT, value=None if seen is None else seen.value, steps=self.steps, restart=restart)


class SchedulerIndex:
    """The step by a scheduler's ``step_index``, unless that stands still or is beyond the schedule's end."""

    def __init__(self, timesteps: TimestepArgument) -> None:
        self._timesteps = timesteps
        # A scheduler that has moved in an earlier run, and after how many calls: so many are not looked at again.
        self._proven: weakref.ref[Any] | None = None
        self._calls = 0
        self._standing = Standing.NEVER

    def tick(self, asked: Asked) -> Tick | None:
        """Return the scheduler's step, or ``None`` if another one seems to make the steps."""
        tick, time = scheduled(asked.scheduler), asked.time
        if tick is None:
            return None
        assert tick.steps is not None
        if tick.step >= tick.steps:  # its schedule is over: another one makes the steps
            time.trusts_scheduler, time.index = False, tick.step
            return None
        if time.trusts_scheduler is False:
            # It moves after all: calls with several timesteps at one step had looked like steps.
            return tick._replace(restart=True) if tick.step != time.index else None
        if not time.trusts_scheduler:
            if self._moves_alone(tick, asked):
                return tick._replace(restart=True)
            if not self._trusts(tick, asked):
                return None
        time.index = tick.step
        return tick

    def _moves_alone(self, tick: Tick, asked: Asked) -> bool:
        """Whether the scheduler moved for the first time in a run, and the timestep did not: the run was broken off.

        Another pipeline makes this call, whose timesteps begin as that run's did. A loop whose timesteps stand still at
        each step is known by the second time.
        """
        time = asked.time
        if self._standing is Standing.KNOWN or not time.first or time.index in (None, tick.step):
            return False
        if self._moved(asked):
            self._standing = Standing.NEVER
            return False
        self._standing = Standing.KNOWN if self._standing is Standing.ONCE else Standing.ONCE
        return self._standing is Standing.ONCE

    def _trusts(self, tick: Tick, asked: Asked) -> bool:
        """Whether the scheduler counts this run's steps: it moved, or nothing else did."""
        time = asked.time
        time.calls += 1
        if time.index is None:  # the run's first call
            given = timesteps_in(asked.arguments, self._timesteps.names)
            time.first = [note(found) for found in given if not getattr(found.given, "is_meta", False)]
            for found in time.first[:1]:
                time.watched, time.reader = found.path, host_reader(found.original)
                shown = 0.0 if time.reader is None else time.reader(found.original)
                time.start = time.shown = shown if isinstance(shown, float) else shown.item(0)
            return True
        if tick.step != time.index:
            time.trusts_scheduler, time.first = True, []
            self._proven, self._calls = weak(asked.scheduler), time.calls - 1
            goes_back(asked.arguments[0], time)
            return True
        is_proven = self._proven is not None and self._proven() is asked.scheduler and time.calls <= self._calls
        if time.trusts_scheduler is None and not is_proven and self._moved(asked):
            time.trusts_scheduler, time.stood_at, time.offset = False, tick.step, tick.step
            self._standing = Standing.NEVER
            for found in time.first:  # as if they had been asked from the first call on
                if (reading := read(found.given)) is not None:
                    time.path, time.readings = found.path, [reading]
                    break
        return time.trusts_scheduler is None

    def _moved(self, asked: Asked) -> bool:
        """Whether the timestep is another one than at the run's first call."""
        time = asked.time
        now = {found.path: found.given for found in timesteps_in(asked.arguments, self._timesteps.names)}
        for noted in time.first:
            if noted.path not in now or noted.is_still(now[noted.path]):
                continue
            if noted.differs(now[noted.path]):
                return True
        return False


class TimestepArgument:
    """The step by the timestep argument: the number of different values that it had in the run.

    Args:
        names: that the argument may have.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._way = 0.0  # in which timesteps went last: down, as a rule; 0: not known

    def tick(self, asked: Asked) -> Tick | None:
        """Return the step that the timestep implies. A value that goes back is the first of another run."""
        time = asked.time
        reading = self._reading(asked)
        if reading is None:
            return None
        timesteps = getattr(asked.scheduler, "timesteps", None) if time.trusts_scheduler is None else None
        epoch = timesteps if isinstance(timesteps, Tensor) else None
        restart = False
        if not time.readings:
            listed = [] if epoch is None else list(dict.fromkeys(epoch.cpu().tolist()))  # once each: some repeat them
            time.readings, time.moves, time.steps = [reading], 0, len(listed) or None
            time.offset = listed.index(reading.highest) if reading.highest in listed else 0  # image-to-image
        elif reading.values != time.readings[-1].values:
            restart = self._goes_back(reading, time)
            if restart:
                time.readings, time.moves, time.offset = [reading], 0, 0
            else:
                time.readings[1:] = [reading]
                time.moves += 1
        step = time.offset + time.moves
        return Tick(step, TIMESTEP, value=reading.highest, epoch=epoch, steps=time.steps, restart=restart)

    def _reading(self, asked: Asked) -> Reading | None:
        """Read the timestep argument in charge: the first that has a value, until another one moves instead."""
        time, given = asked.time, [*timesteps_in(asked.arguments, self.names)]
        if time.path is None:  # the run's first call
            for found in given:
                if (reading := read(found.given)) is None:
                    continue
                if time.path is None:
                    time.path, first = found.path, reading
                else:
                    time.others[found.path] = reading
            return None if time.path is None else first
        now = {found.path: found.given for found in given}
        reading = read(now.get(time.path))
        moved = reading is not None and time.readings and reading.values != time.readings[-1].values
        if moved or time.moves or not time.others:
            return reading
        for path, first in time.others.items():
            other = read(now.get(path))
            if other is not None and other.values != first.values:  # the one in charge stands still: it is no timestep
                time.path, time.readings = path, [first]
                return other
        return reading

    def _goes_back(self, reading: Reading, time: RunTime) -> bool:
        """Whether a value goes against the way of those before it; after a run of one value, of the run before."""
        first, last = time.readings[0], time.readings[-1]
        way = last.highest - first.highest if len(time.readings) > 1 else self._way
        moved = reading.highest - last.highest
        if moved * way < 0:
            self._way = way if len(time.readings) > 1 else 0.0
            return True
        if moved:
            self._way = moved
        return False


@dataclass(frozen=True)
class StepSettings:
    """The user's settings of what identifies the steps.

    Args:
        timestep: name of the timestep argument, such as ``sigma`` or ``video.sigma``.
        calls_per_step: calls of each step, if they are to be counted.
        steps: of a run, if calls are counted.

    Raises:
        WrongType: one of them is of another type.
        InvalidSetting: the name is no name, a number is below 1, or only one of the two numbers is given.
    """

    timestep: str | None = None
    calls_per_step: int | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        check_name(self.timestep)
        for name in ("calls_per_step", "steps"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), 1)
        if (self.calls_per_step is None) != (self.steps is None):
            raise InvalidSetting(
                f"calls_per_step={self.calls_per_step} and steps={self.steps}: to count calls, both have to be known, "
                "as in dit_cache(..., calls_per_step=1, steps=50)"
            )


DEFAULT_STEP_SETTINGS = StepSettings()


class StepClock:
    """The clock of one transformer: asks its sources for the step of each of its calls.

    Args:
        scheduler: returns the pipeline's scheduler as it is now, or ``None``.
        where: name of the transformer, for messages.
        step_settings: the user's settings of what identifies the steps.
    """

    def __init__(
        self, scheduler: Callable[[], Any], where: str, step_settings: StepSettings = DEFAULT_STEP_SETTINGS
    ) -> None:
        self._attached, self._where, self.created_at = scheduler, where, monotonic_ns()
        self.enclosing: Callable[[], Sequence[Mapping[str, Any]]] = tuple  # arguments of modules around the transformer
        self.timestep = TimestepArgument(check_name(step_settings.timestep))
        self.sources: list[TimeSource] = [SchedulerIndex(self.timestep), self.timestep]
        if step_settings.timestep is not None:  # the user's word comes before a scheduler's
            self.sources.reverse()
        if step_settings.calls_per_step is not None and step_settings.steps is not None:
            self.sources = [CountedCalls(step_settings.calls_per_step, step_settings.steps, self.timestep)]

    def read(self, session: Session, scope: Scope | None, arguments: Mapping[str, Any], run_time: RunTime) -> Tick:
        """Return the tick of a call.

        Args:
            session: the session that the call belongs to.
            scope: the innermost open scope.
            arguments: the call's arguments, by name.
            run_time: what the sources have shown in the run so far; they note what they show now.

        Raises:
            InvalidSetting: no source knows the step.
        """
        if scope is not None:
            return Tick(scope.step, SCOPE, scope.branch, scope.sigma, epoch=scope.loop, steps=scope.steps)
        scheduler = self.scheduler_of(session)
        if session.step_source is not None:
            tick = session.step_source.tick(self, scheduler, arguments, run_time)
            if tick is not None:
                return tick
        if run_time.trusts_scheduler:  # for speed: it has moved, so nothing else is asked
            tick = scheduled(scheduler)
            if tick is not None and tick.step < tick.steps:  # type: ignore[operator]
                is_new_step = tick.step != run_time.index
                run_time.index = tick.step
                return tick._replace(restart=True) if goes_back(arguments, run_time, is_new_step) else tick
        asked = Asked(scheduler, (arguments, *self.enclosing()), run_time)
        for source in self.sources:
            tick = source.tick(asked)
            if tick is not None:
                return tick
        raise InvalidSetting(
            f"{self._where}: which sampling step is this? No scope is open, no scheduler moves with the calls, and no "
            "argument is called timestep, sigma or the like. Write `for t in dithooks.steps(timesteps):`, or give "
            "dit_cache(..., timestep='its name') or calls_per_step=1, steps=50"
        )

    def knows(self, arguments: Mapping[str, Any] | None) -> bool:
        """Return whether anything gives the step of a call made here; a session's step source counts unasked."""
        session, scope = current_context()
        if (
            scope is not None
            or session.step_source is not None
            or session.rows
            or isinstance(self.sources[0], CountedCalls)
        ):
            return True
        given = (arguments or {}, *self.enclosing())
        return scheduled(self.scheduler_of(session)) is not None or any(
            read(found.given) is not None for found in timesteps_in(given, self.timestep.names)
        )

    def scheduler_of(self, session: Session) -> Any:
        """Return the scheduler: a request's own, else the one that the cache was attached with."""
        own = session.scheduler
        return self._attached() if own is None else own

    def scheduled(self, scheduler: Any) -> Tick | None:
        """Return the step that a scheduler counts, if it counts steps."""
        return scheduled(scheduler)

    def timed(self, scheduler: Any, arguments: Mapping[str, Any] | None, time: RunTime) -> Tick | None:
        """Return the step that the timestep argument implies, if there is one. Ask once a call: it is noted."""
        return self.timestep.tick(Asked(scheduler, (arguments or {}, *self.enclosing()), time))

    def sigmas(self, session: Session, tick: Tick) -> tuple[float, ...] | None:
        """Return the noise levels of a tick's schedule, if the scheduler has one for each step.

        Called once a run, as it waits for the device where the levels are.
        """
        sigmas = getattr(self.scheduler_of(session), "sigmas", None)
        if tick.epoch is None or tick.steps is None or not isinstance(sigmas, Tensor) or sigmas.is_meta:
            return None
        if sigmas.dim() != 1 or len(sigmas) not in (tick.steps, tick.steps + 1):
            return None
        levels = sigmas.detach().to("cpu", torch.float32).tolist()[: tick.steps]
        falls = all(
            a > b for a, b in pairwise(levels)
        )  # where a level repeats (Heun's method), σ does not identify the step
        return tuple(levels) if falls else None


def goes_back(arguments: Mapping[str, Any], time: RunTime, is_new_step: bool = True) -> bool:
    """Return whether the timestep goes back and the scheduler does not: a call of a pipeline with another scheduler.

    Only where that can be seen without waiting for a device. Within a step it has to go back to the run's first value.
    """
    if time.reader is None:
        return False
    try:
        value = time.reader(arguments[time.watched])
        value = value if value.__class__ is float else value.item(0)
    except OutOfMemoryError:
        raise
    except (LookupError, TypeError, ValueError, RuntimeError):  # left out, or given otherwise
        return False
    moved = value - time.shown
    if not is_new_step:
        return moved * time.way < 0 and (value - time.start) * time.way <= 0
    time.shown = value
    if not moved:
        return False
    way, time.way = time.way, moved
    return moved * way < 0


def scheduled(scheduler: Any) -> Tick | None:
    """Return the step that a scheduler counts, if it counts steps."""
    epoch = getattr(scheduler, "timesteps", None)
    if not isinstance(epoch, Tensor):
        return None
    index: Any = getattr(scheduler, "step_index", _MISSING)
    if index is _MISSING:
        return None
    step = index if index is not None else getattr(scheduler, "begin_index", None) or 0
    return Tick(int(step), SCHEDULER, epoch=epoch, steps=len(epoch))


def weak(scheduler: object) -> weakref.ref[Any] | None:
    """Return a weak reference; ``None`` to what cannot be referred to so."""
    try:
        return weakref.ref(scheduler)
    except TypeError:
        return None


def scheduler_of(target: object, explicit: object) -> Callable[[], Any]:
    """Return a function that looks up the scheduler that counts the steps; pipelines get new ones between calls.

    Raises:
        WrongType: the explicit scheduler is none.
    """
    if explicit is not None and (isinstance(explicit, type) or not hasattr(explicit, "timesteps")):
        raise WrongType(
            f"scheduler={shown(explicit)} has no timesteps: give a scheduler as diffusers has them, or none"
        )
    return lambda: getattr(target, "scheduler", None) if explicit is None else explicit
