"""The sampling step of a call, read at every call of a transformer without changing anything.

The first source that is there counts: an open :func:`timestep_scope`; a declared step (:func:`tell_step`); the
scheduler's own ``step_index``; the value of the ``timestep`` argument. A step is a sampling step, never a count of
calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from ..errors import InvalidSetting, WrongType
from .arguments import TIMESTEP_NAMES
from .sessions import ClockReading, DeclaredStep, Scope, Session, current_context

HELD = 16  # calls under a declared step while the run's own clock stands still; more belong to another loop

_MISSING = object()


class Tick(NamedTuple):
    """The place of a call in its run: ``Tick(3, "scheduler")`` is a call at step 3, as the scheduler counts.

    ``sigma`` comes from a scope; ``value`` is the timestep argument's, where it was read. ``epoch`` is an object that
    stays the same through a run and is another one in the next, where there is such an object. ``restart``: the call
    cannot belong to the run that was given.
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
    """The clock of one transformer: reads the step of each of its calls.

    Args:
        scheduler: returns the pipeline's scheduler as it is now, or ``None``.
        where: name of the transformer, for messages.
    """

    def __init__(self, scheduler: Callable[[], Any], where: str) -> None:
        self._attached, self._where, self._born = scheduler, where, time.monotonic_ns()
        self._way = 0.0  # in which timesteps went last: down, as a rule; 0: not known

    def read(self, session: Session, scope: Scope | None, arguments: Mapping[str, Any], history: list[float]) -> Tick:
        """Return the tick of a call.

        Args:
            session: the session that the call belongs to.
            scope: the innermost open scope.
            arguments: the call's arguments, by name.
            history: distinct timestep values of the run so far; extended where the step is read from them.

        Raises:
            InvalidSetting: no scope is open, no scheduler counts steps, and there is no timestep argument.
        """
        if scope is not None:
            return Tick(scope.step, "scope", scope.branch, scope.sigma, steps=scope.steps)
        if session.declared is not None:
            return self._declared(session, session.declared, arguments, history)
        own = self._scheduled(session) or self._timed(session, arguments, history)
        if own is None:
            raise InvalidSetting(
                f"{self._where}: which sampling step is this? No timestep_scope is open, no scheduler tells its "
                "step_index, and the call has no timestep argument. Write `with dithooks.timestep_scope(step): ...` "
                "around each step of your loop, or give dit_cache the pipeline or scheduler=..."
            )
        return own

    def knows(self, arguments: Mapping[str, Any] | None) -> bool:
        """Return whether the step of a call made here can be read."""
        session, scope = current_context()
        is_declared = scope is not None or session.declared is not None
        return is_declared or self._scheduled(session) is not None or _timestep(arguments) is not None

    def _declared(
        self, session: Session, declared: DeclaredStep, arguments: Mapping[str, Any] | None, history: list[float]
    ) -> Tick:
        """Return the tick of a call under a declared step; one that is out of date gives way to the run's own clock."""
        reading = declared.readings.get(self)
        if reading is None:  # missed: declared before the cache was attached
            reading = declared.readings[self] = ClockReading(missed=declared.at < self._born)
        own = self._scheduled(session)
        if own is None and (reading.missed or not declared.follows):  # else unread: reading may wait
            own = self._timed(session, arguments, history)
        first = reading.first if reading.calls else own
        if own is not None and (first is None or own.epoch is not first.epoch or own.step < first.step):
            reading.missed = reading.missed or declared.follows  # a run has begun without a declaration
            first, declared.run = own, object() if own.epoch is None else own.epoch
        if reading.calls and not arguments and reading.times < declared.times:
            declared.run = object()  # blocks are driven, at the same step again: another run rather than a branch
        reading.times = declared.times
        reading.calls = reading.calls + 1 if own is None or own.step == reading.last else 1
        reading.missed = reading.missed or reading.calls > HELD
        reading.first, reading.last = first, None if own is None else own.step
        if own is not None and reading.missed:
            return own
        moved = 0 if own is None or first is None or declared.follows else own.step - first.step
        tick = Tick(declared.step + moved, "loop", epoch=declared.run)
        agrees = own is not None and own.step == tick.step and own.source == "scheduler" and self._is_set(session)
        return tick._replace(steps=own.steps) if own is not None and agrees else tick

    def _is_set(self, session: Session) -> bool:
        """Return whether the scheduler has the steps of a run; a new one lists all those that it was trained on."""
        scheduler = self._scheduler(session)
        trained = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None)
        return getattr(scheduler, "num_inference_steps", trained != len(scheduler.timesteps)) not in (None, False)

    def _scheduler(self, session: Session) -> Any:
        """Return the scheduler: a request's own, else the one that the cache was attached with."""
        own = session.scheduler
        return self._attached() if own is None else own

    def _epoch(self, session: Session) -> torch.Tensor | None:
        timesteps = getattr(self._scheduler(session), "timesteps", None)
        return timesteps if isinstance(timesteps, torch.Tensor) else None

    def _scheduled(self, session: Session) -> Tick | None:
        """Return the scheduler's tick, if it counts steps."""
        scheduler = self._scheduler(session)
        epoch = getattr(scheduler, "timesteps", None)
        if not isinstance(epoch, torch.Tensor):
            return None
        index: Any = getattr(scheduler, "step_index", _MISSING)
        if index is _MISSING:
            return None
        step = index if index is not None else getattr(scheduler, "begin_index", None) or 0
        return Tick(int(step), "scheduler", epoch=epoch, steps=len(epoch))

    def _timed(self, session: Session, arguments: Mapping[str, Any] | None, history: list[float]) -> Tick | None:
        """Return the tick that the timestep argument shows, if there is one."""
        epoch = self._epoch(session)
        value = _timestep(arguments)
        if value is None:
            return None
        steps = None if epoch is None else len(epoch)
        listed = [] if epoch is None else (epoch.cpu() == value).nonzero().flatten().tolist()
        if listed and not history:  # DDIM and the like have no step_index, but list the timesteps
            return Tick(listed[0], "timestep", value=value, epoch=epoch, steps=steps)
        step, restart = self._ordinal(value, history)
        return Tick(step, "timestep", value=value, epoch=epoch, steps=steps, restart=restart)

    def _ordinal(self, value: float, history: list[float]) -> tuple[int, bool]:
        """Return which distinct value of the run this is, and whether it can only be the first of another run.

        Within a run the values go in one direction; a value that goes back starts the next run. After a run of one
        value (an interrupted one, say) the direction is that of the run before.
        """
        restart = False
        if not history or value != history[-1]:
            way = history[-1] - history[0] if len(history) > 1 else self._way
            moved = value - history[-1] if history else 0.0
            restart = moved * way < 0
            if restart:
                self._way = way if len(history) > 1 else 0.0
                history.clear()
            elif history:
                self._way = moved
            history.append(value)
        return len(history) - 1, restart

    def sigmas(self, session: Session, tick: Tick) -> tuple[float, ...] | None:
        """Return the noise levels of a tick's schedule, if the scheduler has one for each step.

        Called once a run, as it waits for the device where the levels are.
        """
        sigmas = getattr(self._scheduler(session), "sigmas", None)
        if tick.epoch is None or tick.steps is None or not isinstance(sigmas, torch.Tensor) or sigmas.is_meta:
            return None
        if sigmas.dim() != 1 or len(sigmas) not in (tick.steps, tick.steps + 1):
            return None
        levels = sigmas.detach().to("cpu", torch.float32).tolist()[: tick.steps]
        falls = all(
            a > b for a, b in pairwise(levels)
        )  # where a level repeats (Heun's method), σ does not identify the step
        return tuple(levels) if falls else None


def _timestep(arguments: Mapping[str, Any] | None) -> float | None:
    """Return the value of the timestep argument; of one per token, the largest (clean frames have 0).

    Reading it waits for the device that it is on: the price of having neither scope nor scheduler.
    """
    for name in TIMESTEP_NAMES:
        value = (arguments or {}).get(name)
        if isinstance(value, torch.Tensor) and value.numel():
            return float(value.item() if value.numel() == 1 else value.max().item())
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    return None


def scheduler_of(target: object, explicit: object) -> Callable[[], Any]:
    """Return a function that looks up the scheduler that counts the steps; pipelines get new ones between calls.

    Raises:
        WrongType: the explicit scheduler is none.
    """
    if explicit is not None and (isinstance(explicit, type) or not hasattr(explicit, "timesteps")):
        raise WrongType(f"scheduler={explicit!r} has no timesteps: give a scheduler as diffusers has them, or none")
    return lambda: getattr(target, "scheduler", None) if explicit is None else explicit
