"""What is remembered: per run and branch, the residuals last computed; and the call that is under way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..policies.history import BranchHistory, Decision, RunHistory, Schedule
from ..policies.policy import Policy
from ..predictors.predictor import Moment
from .anchor import Anchor, Signature
from .change_metrics import ChangeMetric
from .clock import TIMESTEP_NAMES


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


@dataclass
class Branch:
    """One of the calls that every step makes (conditional, unconditional, …)."""

    track: BranchHistory
    metric: ChangeMetric | None = None
    anchors: list[Anchor] = field(default_factory=list)  # the newest first
    called: int = 0  # step of its last call
    open: bool = False  # a computed call has begun, and not ended
    latents: dict[str, Tensor] = field(default_factory=dict)  # what it was given last, to tell it from the others
    conditioning: dict[str, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Memory of all that is kept for it."""
        return sum(anchor.nbytes for anchor in self.anchors) + (0 if self.metric is None else self.metric.nbytes)

    def free(self) -> None:
        """Keep nothing for it."""
        self.anchors = []
        if self.metric is not None:
            self.metric.clear()

    def clear(self) -> None:
        """The same, as if it had never been computed."""
        self.free()
        self.track.refreshed, self.open = None, False


@dataclass
class Run:
    """One sampling run of one session: starts when the step goes back, ends when the next one starts."""

    session_epoch: int
    number: int = 0
    policy: Policy | None = None  # made out for it
    account: RunHistory = field(default_factory=RunHistory)
    schedule: Schedule = field(default_factory=Schedule)
    epoch: object | None = None
    step: int | None = None
    used: list[int] = field(default_factory=list)  # branches already called at this step
    most: int = 0  # calls that a step made
    before: tuple[int, int] = (0, 0)  # how many there were at each of the two steps before
    branches: dict[int, Branch] = field(default_factory=dict)
    shared: Decision | None = None  # of this step, where its branches share one
    constant: set[str] = field(default_factory=set)  # conditioning that was seen to stay from one step to another
    unstable_conditioning: dict[str, set[int]] = field(
        default_factory=dict
    )  # … that was like nothing before it, and at which steps
    history: list[float] = field(default_factory=list)  # distinct timestep values, where they are the clock
    in_flight: bool = False  # a call of the transformer was entered and not left: an exception ended it
    steps: int = 0
    watched: bool = False  # what is looked at to see whether the weights change was looked for in it
    judged: bool = False  # what there was to say of it has been said
    finished: bool = False  # its last call is over
    bar: Any = None  # of the pipeline, by a weak reference
    scheduler_is_shared: bool = False  # the scheduler that tells its steps tells those of another session's run
    ranks_diverged: bool = False  # the ranks that decide as one have come different ways: none reuses anything any more

    @property
    def last(self) -> bool:
        """Whether it is at its last step, as far as is known."""
        return self.schedule.steps is not None and self.step is not None and self.step >= self.schedule.steps - 1

    @property
    def nbytes(self) -> int:
        """Memory of all that is kept for it."""
        return sum(branch.nbytes for branch in list(self.branches.values()))

    def clear(self) -> None:
        """Keep nothing for it, nor what its calls were given; of a run of one step that tells the next from it."""
        for branch in self.branches.values():
            branch.free()
            if self.schedule.steps != 1:
                branch.latents, branch.conditioning = {}, {}


@dataclass(eq=False)
class Capture:
    """What some blocks were given and returned in one call; −h_in and h_out by value."""

    entry: list[Tensor] | dict[str, Tensor] | None = None  # −h_in: by stream or, while the wiring is unknown, by name
    exit: tuple[Tensor | None, ...] = ()  # h_out by position, while the wiring is unknown
    deltas: tuple[Tensor, ...] = ()  # Δ for each output, once known
    output: tuple[Tensor, ...] | None = None  # h_out of what is looked at, where it is asked for
    left: bool = False


@dataclass(eq=False)
class Call:
    """One call of the transformer under way in its thread.

    Compiled code reads and writes the upper part only: a number that changes with every step would recompile it.
    """

    reuse: bool = False
    capture: bool = False  # computed, and the residual is to be kept
    pending: bool = False  # to be decided by what is seen at the range's first block
    is_measured: bool = False  # what is seen there is of interest
    entered: bool = False  # the range's first block was reached
    left: bool = False  # … and its last one left
    shape_mismatch: bool = False  # the residual did not fit after all
    non_finite: bool = False  # what was seen is not finite: nothing of it is to be kept
    traced: bool = False  # compiled code ran it, and may write its next outputs where those of this call lie
    deltas: tuple[Tensor, ...] = ()  # reused: Δ̂ for each output
    results: list[Tensor] | None = None  # reused: h_in + Δ̂
    range: Capture = field(default_factory=Capture)
    lead: Capture | None = None  # of the blocks before the range, where they decide
    seen: tuple[Tensor, ...] | None = None  # what the gauge looks at
    probe: Any = None  # reused, but only to see how the streams are handed on
    stale: bool = False  # all was forgotten, or the range taken off, since it began: it is followed no longer

    moment: Moment = field(default_factory=lambda: Moment(0, 0.0))
    signature: Signature = ()
    branch: Branch | None = None
    run: Run | None = None
    proposal: Decision | None = None  # pending, and settled as far as this rank goes: the others are to be asked
    observation: Any = None
    thread: int = 0
    device: Any = None
    marks: list[Any] = field(default_factory=list)  # its beginning, that of its range, the range's end, its end

    @property
    def passing(self) -> bool:
        """Whether it is between the first block of a reused range and the last."""
        return self.entered and not self.left and (self.reuse or self.pending)
