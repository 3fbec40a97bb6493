"""A method and its knob; and what methods have to be told of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from bench.compare.subject import Subject

Knob = float | int | str


@dataclass(frozen=True)
class Spent:
    """What a search, or a calibration, took.

    Args:
        run_equivalents: block executions over those of one uncached run of the same cases.
        seconds: on this machine, with whatever else ran there.
        runs: of the pipeline.
    """

    run_equivalents: float
    seconds: float
    runs: int


@dataclass
class Attached:
    """What a method has to say of itself, once it is attached.

    Args:
        steps: of the run, if they are not the subject's.
        shown: what was found or set, in short.
        spent: on finding it.
        by: who runs it, where that is not the library itself.
    """

    steps: int | None = None
    shown: str = ""
    spent: Spent | None = None
    by: str = ""


@dataclass(frozen=True)
class Method:
    """One way to run fewer blocks, with what its user turns to say how many.

    Args:
        library: whose it is, with its version.
        name: which of its methods, with what is set beside the knob.
        knob: what is turned.
        values: that are tried.
        attach: a context manager that is given the subject and a value.
        static: decides without looking at what it draws.
    """

    library: str
    name: str
    knob: str
    values: tuple[Knob, ...]
    attach: Callable[[Subject, Any], AbstractContextManager[Attached]] = field(compare=False)
    static: bool = True

    @property
    def title(self) -> str:
        return f"{self.library}: {self.name}"


@dataclass
class Clock:
    """Where a run is, as the calls of the transformer tell.

    Args:
        timestep: in 0…1000, however the model is told it.
        step: steps before this one in the run.
        call: calls before this one in the step.
    """

    timestep: float = -1.0
    step: int = -1
    call: int = -1
    scale: float | None = None

    def tell(self, given: float) -> None:
        """A call begins, with this timestep. The first of all tells whether they are shares of 1000."""
        self.scale = self.scale or (1000.0 if given <= 1 else 1.0)
        now = given * self.scale
        if now == self.timestep:
            self.call += 1
            return
        self.step = 0 if now > self.timestep else self.step + 1
        self.timestep, self.call = now, 0

    @property
    def begins(self) -> bool:
        """Whether this call is the first of a run."""
        return self.step == self.call == 0


@contextmanager
def clock(subject: Subject, then: Callable[[Clock], None] = lambda _: None) -> Iterator[Clock]:
    """A clock on the subject's transformer; ``then`` is called after each reading, before the transformer runs."""
    watch = Clock()

    def read(_: nn.Module, __: tuple[Any, ...], given: dict[str, Any]) -> None:
        watch.tell(float(given["timestep"].flatten()[0]))
        then(watch)

    hook = subject.pipe.transformer.register_forward_pre_hook(read, with_kwargs=True)
    try:
        yield watch
    finally:
        hook.remove()
