"""What is remembered: the residual last computed, per transformer, range, branch and run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .clock import TIMESTEP_NAMES

# What must not change between storing a residual and adding it: shape, dtype and device of every tensor argument, and
# every argument that switches something (flags, names, lists of layers); numbers may change.
Signature = tuple[tuple[Any, ...], ...]


def signature(arguments: Mapping[str, Any]) -> Signature:
    """The guard of a call, from the arguments of the transformer."""
    guard: list[tuple[Any, ...]] = []
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            guard.append((name, value.shape, value.dtype, value.device))
        elif isinstance(value, (bool, str)):
            guard.append((name, value))
        elif isinstance(value, (list, tuple)) and name not in TIMESTEP_NAMES and _switches(value):
            guard.append((name, repr(value)))
    return tuple(guard)


def _switches(value: Any) -> bool:
    """Whether a sequence holds whole numbers, flags and names only."""
    if isinstance(value, (list, tuple)):
        return all(map(_switches, value))
    return value is None or isinstance(value, (bool, int, str))


@dataclass(frozen=True)
class Anchor:
    """The range's effect on each stream at a computed step: output of its last block − input of its first."""

    step: int
    sigma: float | None
    signature: Signature
    deltas: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(delta.nbytes for delta in self.deltas)


@dataclass
class Branch:
    """One of the calls that every step makes (conditional, unconditional, …)."""

    anchor: Anchor | None = None
    refreshed: int | None = None  # step of its last anchor, which may have been freed since
    latents: dict[str, Tensor] = field(default_factory=dict)  # what it was given last, to tell it from the others
    conditioning: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Run:
    """One sampling run of one session: starts when the step goes back, ends when the next one starts."""

    session_epoch: int
    epoch: object | None = None
    step: int | None = None
    used: list[int] = field(default_factory=list)  # branches already called at this step
    branches: dict[int, Branch] = field(default_factory=dict)
    constant: set[str] = field(default_factory=set)  # conditioning that was seen to stay from one step to another
    strange: dict[str, set[int]] = field(default_factory=dict)  # … that was like nothing before it, and at which steps
    history: list[float] = field(default_factory=list)  # distinct timestep values, where they are the clock
    in_flight: bool = False  # a call of the transformer was entered and not left: an exception ended it
    length: int | None = None  # steps it is going to have, where the scheduler tells
    steps: int = 0
    reused: int = 0
    reasons: Counter[str] = field(default_factory=Counter)


@dataclass(eq=False)
class Call:
    """One call of the transformer under way in its thread.

    Compiled code reads and writes the upper part only: a number that changes with every step would recompile it.
    """

    reuse: bool = False
    capture: bool = False  # computed, and the residual is to be kept
    entered: bool = False  # the range's first block was reached
    left: bool = False  # … and its last one left
    misfit: bool = False  # the residual did not fit after all
    deltas: tuple[Tensor, ...] = ()  # reused: Δ̂ per stream; computed: Δ per stream, once known
    entry: list[Tensor] | dict[str, Tensor] | None = None  # computed: −h_in; reused: h_in + Δ̂
    exit: tuple[Tensor | None, ...] = ()  # h_out by position, while the wiring is unknown
    probe: Any = None  # reused, but only to see how the streams are handed on
    generation: int = 0  # of the flow, when the call began

    step: int = 0
    sigma: float | None = None
    signature: Signature = ()
    branch: Branch | None = None
    run: Run | None = None
    observation: Any = None
