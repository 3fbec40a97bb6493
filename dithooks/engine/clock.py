"""The sampling step of a call, read at every call of a transformer without changing anything.

The first source that knows the step counts: an open :func:`timestep_scope`; the session's own step source; the
scheduler's own ``step_index``; the value of the ``timestep`` argument. A step is a sampling step, never a count of
calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch

from ..errors import InvalidSetting, WrongType
from .arguments import TIMESTEP_NAMES
from .sessions import Scope, Session, current_context
from .step_source import Tick

_MISSING = object()


class StepClock:
    """The clock of one transformer: reads the step of each of its calls.

    Args:
        scheduler: returns the pipeline's scheduler as it is now, or ``None``.
        where: name of the transformer, for messages.
    """

    def __init__(self, scheduler: Callable[[], Any], where: str) -> None:
        self._attached, self._where, self.created_at = scheduler, where, time.monotonic_ns()
        self._way = 0.0  # in which timesteps went last: down, as a rule; 0: not known

    def read(self, session: Session, scope: Scope | None, arguments: Mapping[str, Any], history: list[float]) -> Tick:
        """Return the tick of a call.

        Args:
            session: the session that the call belongs to.
            scope: the innermost open scope.
            arguments: the call's arguments, by name.
            history: distinct timestep values of the run so far; extended where the step is read from them.

        Raises:
            InvalidSetting: no scope is open, the session has no step source, no scheduler tells its step, and there is
                no timestep argument.
        """
        if scope is not None:
            return Tick(scope.step, "scope", scope.branch, scope.sigma, steps=scope.steps)
        scheduler = self._scheduler(session)
        if session.step_source is not None:
            tick = session.step_source.tick(self, scheduler, arguments, history)
            if tick is not None:
                return tick
        tick = self.scheduled(scheduler) or self.timed(scheduler, arguments, history)
        if tick is None:
            raise InvalidSetting(
                f"{self._where}: which sampling step is this? No timestep_scope is open, no scheduler tells its "
                "step_index, and the call has no timestep argument. Write `with dithooks.timestep_scope(step): ...` "
                "around each step of your loop, or give dit_cache the pipeline or scheduler=..."
            )
        return tick

    def knows(self, arguments: Mapping[str, Any] | None) -> bool:
        """Return whether anything tells the step of a call made here; a session's step source counts unasked."""
        session, scope = current_context()
        if scope is not None or session.step_source is not None:
            return True
        return self.scheduled(self._scheduler(session)) is not None or _timestep(arguments) is not None

    def _scheduler(self, session: Session) -> Any:
        """Return the scheduler: a request's own, else the one that the cache was attached with."""
        own = session.scheduler
        return self._attached() if own is None else own

    def scheduled(self, scheduler: Any) -> Tick | None:
        """Return the step that a scheduler counts, if it counts steps."""
        epoch = getattr(scheduler, "timesteps", None)
        if not isinstance(epoch, torch.Tensor):
            return None
        index: Any = getattr(scheduler, "step_index", _MISSING)
        if index is _MISSING:
            return None
        step = index if index is not None else getattr(scheduler, "begin_index", None) or 0
        return Tick(int(step), "scheduler", epoch=epoch, steps=len(epoch))

    def timed(self, scheduler: Any, arguments: Mapping[str, Any] | None, history: list[float]) -> Tick | None:
        """Return the step that the timestep argument implies, if there is one. Ask once a call: it extends history."""
        value = _timestep(arguments)
        if value is None:
            return None
        timesteps = getattr(scheduler, "timesteps", None)
        epoch = timesteps if isinstance(timesteps, torch.Tensor) else None
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
