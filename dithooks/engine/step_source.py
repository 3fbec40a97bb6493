"""The sampling step of a call, and what gives it where neither a scope nor the pipeline's own clock does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol


class Tick(NamedTuple):
    """Where in a run a call stands.

    Args:
        step: index of the sampling step.
        source: what gave the step, in a word.
        branch: number of the call at its step, where a scope gives it.
        sigma: noise level of the step, where a scope gives it.
        value: value of the timestep argument, where it was read.
        epoch: an object that stays the same through a run and is another one in the next, if there is such an object.
        steps: number of steps of the run, where it is known.
        restart: whether the call cannot belong to the run whose history was given.
    """

    step: int
    source: str
    branch: int | None = None
    sigma: float | None = None
    value: float | None = None
    epoch: object | None = None
    steps: int | None = None
    restart: bool = False


class RunClock(Protocol):
    """The clock of one transformer, as a step source may ask it: what scheduler and timestep argument make of a call.

    ``created_at`` is the clock's first moment, by ``time.monotonic_ns``.
    """

    created_at: int

    def scheduled(self, scheduler: Any) -> Tick | None:
        """Return the step that a scheduler counts, if it counts steps."""

    def timed(self, scheduler: Any, arguments: Mapping[str, Any] | None, history: list[float]) -> Tick | None:
        """Return the step that the timestep argument implies, if there is one. Ask once a call: it extends history."""


class StepSource(Protocol):
    """A source of the sampling steps of a session's calls, such as a loop that sets an index at each step.

    A session's source is asked at each call without an open scope, before the scheduler and the timestep argument.
    Whoever changes what the source answers for the calls to come replaces it by another object: a source that is
    another one at the range than it was when the call was decided is an error.
    """

    def tick(
        self, clock: RunClock, scheduler: Any, arguments: Mapping[str, Any] | None, history: list[float]
    ) -> Tick | None:
        """Return where in a run a call stands; ``None``: this source does not know, and the next one is asked.

        Args:
            clock: of the transformer that is called.
            scheduler: of the session, or else of the pipeline; ``None`` without one.
            arguments: of the call, by name; none where blocks are driven without the transformer.
            history: distinct timestep values of the run so far.
        """
