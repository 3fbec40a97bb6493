"""The step index of ``DitCacheAdaptor.set_timestep_idx``: in force from its call until the next, without an end."""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...engine.sessions import current_session
from ...engine.step_source import RunClock, RunTime, Tick
from ...errors import InvalidSetting
from ...validation import check_count

MAX_CALLS = 16  # calls under one index while the run's own clock stands still: more are another loop's


@dataclass(eq=False)
class ClockHistory:
    """What the clock of one transformer has shown under one step index.

    Args:
        is_another_loops: whether the index is not for the runs of this clock.
        first: what the run's own clock showed at the first call.
        last: step that the run's own clock showed at the latest call.
        calls: calls in a row at which the run's own clock showed that step.
        times_set: how many times the index had been set by the latest call.
    """

    is_another_loops: bool = False
    first: Tick | None = None
    last: int | None = None
    calls: int = 0
    times_set: int = 0


@dataclass(eq=False)
class StepIndex:
    """A step source: an index that a loop has set, for a step or for a whole run.

    After ``set_step_index(4)`` and ``set_step_index(5)`` the index 5 follows another, and is the step of each call. An
    index that follows none may be set for a whole run: the steps count on from there, as the run's own clock does.

    Args:
        index: of the sampling step.
        run: an object that stays the same from one index to the next, and is another one for another run.
        follows: whether the index before was that of the step before.
        set_at: when the index was set, the last time.
        times_set: how many times the index was set in a row.
        histories: what each clock has shown since.
    """

    index: int
    run: object
    follows: bool = False
    set_at: int = field(default_factory=time.monotonic_ns)
    times_set: int = 1
    histories: weakref.WeakKeyDictionary[RunClock, ClockHistory] = field(default_factory=weakref.WeakKeyDictionary)

    def tick(self, clock: RunClock, scheduler: Any, arguments: Mapping[str, Any] | None, time: RunTime) -> Tick | None:
        """Return where in a run a call stands; an index of another loop gives way to the run's own clock."""
        shown = self.histories.get(clock)
        if shown is None:  # an index set before there was a cache cannot have been for it
            shown = self.histories[clock] = ClockHistory(is_another_loops=self.set_at < clock.created_at)
        own = clock.scheduled(scheduler)
        if own is None and (shown.is_another_loops or not self.follows):  # else not asked: it may wait for a device
            own = clock.timed(scheduler, arguments, time)
        first = shown.first if shown.calls else own
        if own is not None and (first is None or own.epoch is not first.epoch or own.step < first.step):
            shown.is_another_loops = shown.is_another_loops or self.follows  # a run has begun, without an index set
            first, self.run = own, object() if own.epoch is None else own.epoch
        if shown.calls and not arguments and shown.times_set < self.times_set:
            self.run = object()  # the same index again, for blocks driven by themselves: another run, not a branch
        shown.times_set = self.times_set
        shown.calls = shown.calls + 1 if own is None or own.step == shown.last else 1
        shown.is_another_loops = shown.is_another_loops or shown.calls > MAX_CALLS
        shown.first, shown.last = first, None if own is None else own.step
        if own is not None and shown.is_another_loops:
            return own
        moved = 0 if own is None or first is None or self.follows else own.step - first.step
        tick = Tick(self.index + moved, "loop", epoch=self.run)
        agrees = own is not None and own.step == tick.step and own.source == "scheduler" and _has_run_steps(scheduler)
        return tick._replace(steps=own.steps) if own is not None and agrees else tick


def set_step_index(index: int | None) -> None:
    """Set the sampling step of the calls that follow in this thread, asyncio task or request, until the next is set.

    For loops that mark where a step begins and not where it ends. The index is set before the transformer is called,
    for caches that are attached by then; an open :func:`timestep_scope` comes first. Set at each step, the index
    decides, however the sampler moves on. Set once, it is where runs begin, and the scheduler, or else the timestep
    argument, counts on from there.

    Args:
        index: of the step, ≥ 0; ``None``: no index is in force any more.

    Raises:
        TypeError: ``index`` is not an integer.
        ValueError: ``index`` is negative.

    Example:
        >>> for step in range(3):
        ...     set_step_index(step)  # model(x, t)
        >>> set_step_index(None)
    """
    session = current_session()
    if index is None:
        session.step_source = None
        return
    index, before = check_count("step", index, 0), session.step_source
    if not isinstance(before, StepIndex):
        session.step_source = StepIndex(index, object())
    elif index == before.index:  # once more, between two calls or blocks
        before.set_at, before.times_set = time.monotonic_ns(), before.times_set + 1
    else:
        follows = index == before.index + 1
        session.step_source = StepIndex(index, before.run if follows else object(), follows)


def get_step_index() -> int:
    """Return the index in force in this thread, asyncio task or request.

    Raises:
        ValueError: none has been set.

    Example:
        >>> set_step_index(4)
        >>> get_step_index()
        4
        >>> set_step_index(None)
    """
    source = current_session().step_source
    if not isinstance(source, StepIndex):
        raise InvalidSetting("no step index is set in this thread: call DitCacheAdaptor.set_timestep_idx(step) first")
    return source.index


def _has_run_steps(scheduler: Any) -> bool:
    """Whether a scheduler was given the steps of a run: at first it has all those that it was trained on."""
    trained = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None)
    return getattr(scheduler, "num_inference_steps", trained != len(scheduler.timesteps)) not in (None, False)
