"""Which sampling step is this call? Asked at every call of a transformer, answered without touching anything.

The first that can tell is believed: an open :func:`timestep_scope`; a step that was told (:func:`tell_step`); the
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
from .sessions import Scope, Session, Stood, Telling, current_context

HELD = 16  # calls under a step that was told, while the run's own clock stands: more are another loop's

_MISSING = object()


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
        self._attached, self._where, self._born = scheduler, where, time.monotonic_ns()
        self._way = 0.0  # in which timesteps went last: down, as a rule; 0: not known

    def read(self, session: Session, scope: Scope | None, arguments: Mapping[str, Any], history: list[float]) -> Tick:
        """Return the tick of a call.

        Args:
            session: that the call belongs to.
            scope: the innermost that is open.
            arguments: of the call, by name.
            history: distinct timestep values of the run so far; extended when they are what tells.

        Raises:
            InvalidSetting: no scope is open, no scheduler tells its step, and there is no timestep argument.
        """
        if scope is not None:
            return Tick(scope.step, "scope", scope.branch, scope.sigma, steps=scope.steps)
        if session.telling is not None:
            return self._told(session, session.telling, arguments, history)
        own = self._scheduled(session) or self._timed(session, arguments, history)
        if own is None:
            raise InvalidSetting(
                f"{self._where}: which sampling step is this? No timestep_scope is open, no scheduler tells its "
                "step_index, and the call has no timestep argument. Write `with dithooks.timestep_scope(step): ...` "
                "around each step of your loop, or give dit_cache the pipeline or scheduler=..."
            )
        return own

    def knows(self, arguments: Mapping[str, Any] | None) -> bool:
        """Return whether anything tells the step of a call made here."""
        session, scope = current_context()
        told = scope is not None or session.telling is not None
        return told or self._scheduled(session) is not None or _timestep(arguments) is not None

    def _told(
        self, session: Session, telling: Telling, arguments: Mapping[str, Any] | None, history: list[float]
    ) -> Tick:
        """The tick of a call under a step that was told; one that is out of date gives way to the run's own clock."""
        stood = telling.stood.get(self)
        if stood is None:  # missed: told when there was nothing yet that it could be for
            stood = telling.stood[self] = Stood(missed=telling.at < self._born)
        own = self._scheduled(session)
        if own is None and (stood.missed or not telling.follows):  # else not asked: that may mean to wait for a device
            own = self._timed(session, arguments, history)
        first = stood.first if stood.calls else own
        if own is not None and (first is None or own.epoch is not first.epoch or own.step < first.step):
            stood.missed = stood.missed or telling.follows  # a run has begun, and nothing was told of it
            first, telling.run = own, object() if own.epoch is None else own.epoch
        if stood.calls and not arguments and stood.times < telling.times:
            telling.run = object()  # blocks are driven, told the same step anew: rather another run than another branch
        stood.times = telling.times
        stood.calls = stood.calls + 1 if own is None or own.step == stood.last else 1
        stood.missed = stood.missed or stood.calls > HELD
        stood.first, stood.last = first, None if own is None else own.step
        if own is not None and stood.missed:
            return own
        moved = 0 if own is None or first is None or telling.follows else own.step - first.step
        tick = Tick(telling.step + moved, "loop", epoch=telling.run)
        agrees = own is not None and own.step == tick.step and own.source == "scheduler" and self._is_set(session)
        return tick._replace(steps=own.steps) if own is not None and agrees else tick

    def _is_set(self, session: Session) -> bool:
        """Whether the scheduler was given the steps of a run: it begins with all those that it was trained on."""
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
        """Return what the scheduler tells, if it counts steps."""
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
        """Return what the timestep argument tells, if there is one."""
        epoch = self._epoch(session)
        value = _timestep(arguments)
        if value is None:
            return None
        steps = None if epoch is None else len(epoch)
        listed = [] if epoch is None else (epoch.cpu() == value).nonzero().flatten().tolist()
        if listed and not history:  # DDIM and the like: no step_index, but the list of timesteps tells
            return Tick(listed[0], "timestep", value=value, epoch=epoch, steps=steps)
        step, restart = self._ordinal(value, history)
        return Tick(step, "timestep", value=value, epoch=epoch, steps=steps, restart=restart)

    def _ordinal(self, value: float, history: list[float]) -> tuple[int, bool]:
        """Which distinct value of the run this is, and whether it can only be the first of another run.

        Within a run the values go one way; one that goes back starts the next. After a run of one value (broken off,
        say) the way is that of the run before; and if the values have turned, that is known from the next on.
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
        """The noise levels of the schedule that a tick belongs to, if the scheduler has one for each step.

        Asked once a run: where they lie on a device, this waits for it.
        """
        sigmas = getattr(self._scheduler(session), "sigmas", None)
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


def scheduler_of(target: object, explicit: object) -> Callable[[], Any]:
    """What looks up the scheduler that tells the steps: at every call, as pipelines get new ones.

    Raises:
        TypeError: what was given explicitly is no scheduler.
    """
    if explicit is not None and (isinstance(explicit, type) or not hasattr(explicit, "timesteps")):
        raise WrongType(f"scheduler={explicit!r} has no timesteps: give a scheduler as diffusers has them, or none")
    return lambda: getattr(target, "scheduler", None) if explicit is None else explicit
