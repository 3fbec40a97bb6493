"""The sampling step of a call, and what may tell it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from .timestep_argument import Noted, Reading


class Tick(NamedTuple):
    """Where in a run a call stands.

    Args:
        step: index of the sampling step.
        source: what gave the step, in a word.
        branch: number or name of the call at its step, where a scope gives it.
        sigma: noise level of the step, where a scope gives it.
        value: value of the timestep argument, where it was read.
        epoch: an object that stays the same through a run and is another one in the next, if there is such an object.
        steps: number of steps of the run, where it is known.
        restart: whether the call cannot belong to the run whose history was given.
    """

    step: int
    source: str
    branch: int | str | None = None
    sigma: float | None = None
    value: float | None = None
    epoch: object | None = None
    steps: int | None = None
    restart: bool = False


@dataclass(eq=False)
class RunTime:
    """What the sources of a step have shown in one run so far.

    Args:
        calls: number of calls, counted where nothing else gives the step.
        index: the scheduler's step at the run's latest call.
        first: the timestep arguments of the run's first call, by which a scheduler that stands still is found out.
        trusts_scheduler: whether the scheduler has moved in this run; ``False``: it stood still while timesteps moved;
            ``None``: not known yet.
        watched: name of the timestep argument that is compared with the scheduler's steps.
        reader: reads its value without waiting for a device; ``None`` where that cannot be.
        start: the value at the run's first call.
        shown: the value at the scheduler's latest step.
        way: in which that went.
        stood_at: the step at which a scheduler stood still.
        path: of the timestep argument in charge.
        readings: different values of it, the first and the latest.
        moves: how many times it moved.
        offset: the step of its first value.
        steps: number of different values that a scheduler lists.
        others: what the timestep arguments that are not in charge showed first.
    """

    calls: int = 0
    index: int | None = None
    first: list[Noted] = field(default_factory=list)
    trusts_scheduler: bool | None = None
    watched: str = ""
    reader: Callable[[Any], Any] | None = None
    start: float = 0.0
    shown: float = 0.0
    way: float = 0.0
    stood_at: int | None = None
    path: str | None = None
    readings: list[Reading] = field(default_factory=list)
    moves: int = 0
    offset: int = 0
    steps: int | None = None
    others: dict[str, Reading] = field(default_factory=dict)

    def moves_after_all(self, tick: Tick) -> bool:
        """Return whether a scheduler that had seemed to stand still moves: calls have several timesteps at one step."""
        is_next = self.trusts_scheduler is False and self.index is not None and tick.step == self.index + 1
        return is_next and tick.source == "scheduler"


class RunClock(Protocol):
    """The clock of one transformer, as a step source may ask it: what scheduler and timestep argument make of a call.

    ``created_at`` is the clock's first moment, by ``time.monotonic_ns``.
    """

    created_at: int

    def scheduled(self, scheduler: Any) -> Tick | None:
        """Return the step that a scheduler counts, if it counts steps."""

    def timed(self, scheduler: Any, arguments: Mapping[str, Any] | None, time: RunTime) -> Tick | None:
        """Return the step that the timestep argument implies, if there is one. Ask once a call: it is noted."""


class StepSource(Protocol):
    """A source of the sampling steps of a session's calls, such as a loop that sets an index at each step.

    A session's source is asked at each call without an open scope, before the scheduler and the timestep argument.
    Whoever changes what the source answers for the calls to come replaces it by another object: a source that is
    another one at the range than it was when the call was decided is an error.
    """

    def tick(self, clock: RunClock, scheduler: Any, arguments: Mapping[str, Any] | None, time: RunTime) -> Tick | None:
        """Return where in a run a call stands; ``None``: this source does not know, and the next one is asked.

        Args:
            clock: of the transformer that is called.
            scheduler: of the session, or else of the pipeline; ``None`` without one.
            arguments: of the call, by name; none where blocks are driven without the transformer.
            time: what has been shown in the run so far.
        """


class Asked(NamedTuple):
    """What a source of a step is shown of a call.

    Args:
        scheduler: of the session, or else of the pipeline; ``None`` without one.
        arguments: of the transformer, and then of the modules around it, from the inside out.
        time: what has been shown in the run so far.
    """

    scheduler: Any
    arguments: Sequence[Mapping[str, Any]]
    time: RunTime
