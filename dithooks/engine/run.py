"""The state kept between calls: sampling runs, their branches, and the residuals of each."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Size

from ..policies.history import BranchHistory, Decision, RunHistory, Schedule
from ..policies.policy import Policy
from .anchor import Anchor
from .arguments import CallArguments
from .change_metrics import ChangeMetric
from .finite_check import FiniteCheck
from .output_form import OutputForm
from .protocols import PipelineBar
from .sessions import Session
from .step_source import RunTime


def _nothing() -> CallArguments:
    return CallArguments({}, frozenset())


class Claim(NamedTuple):
    """The claim of a new branch to be another one going on.

    Args:
        number: of the other branch.
        far: number of arguments that changed as much as another prompt would.
    """

    number: int
    far: int


@dataclass(eq=False)
class Branch:
    """One of the calls that every step makes (conditional, unconditional, …), followed through a run."""

    history: BranchHistory
    metric: ChangeMetric | None = None
    anchors: list[Anchor] = field(default_factory=list)  # newest first
    called: int = 0  # step of the last call
    steps: int = 0  # at which it was called
    is_first: bool = False  # it was new at the run's first step
    position: int = 0  # of the last call among those of its step
    outputs: list[Anchor] = field(default_factory=list)  # of computed steps, before any correction; newest first
    held: list[Anchor] = field(default_factory=list)  # for steps of one branch alone; see HeldDifference
    written: list[int | None] = field(default_factory=list)  # how often its latents were, by its last call; likewise
    unread: list[FiniteCheck] = field(default_factory=list)  # of the residuals that nothing has been made of yet
    interrupted: bool = False  # a computed call began and has not ended
    given: CallArguments = field(default_factory=_nothing)  # to its last call, to recognise the branch by
    changes: dict[str, float] = field(default_factory=dict)  # of each argument at its last call; 0: it repeats
    is_steady: bool = False  # its last call was given the very same as the one before
    jumps: set[str] = field(default_factory=set)  # arguments that changed as much as another prompt would, once
    claim: Claim | None = None  # to the place of another branch, until the step is over
    output_form: OutputForm | None = None  # of the last computed output, where outputs are kept
    nbytes: int = 0  # memory held, in bytes
    changes_length: bool = False  # a residual did not fit once: those that are kept may differ in shape

    def free(self) -> None:
        """Drop all tensors of the branch's residuals, outputs and metric."""
        self.anchors, self.outputs, self.held, self.unread, self.output_form, self.nbytes = [], [], [], [], None, 0
        if self.metric is not None:
            self.metric.clear()

    def take_form(self, form: OutputForm) -> None:
        """Note the form of a computed output; residuals of another form are dropped."""
        if self.output_form is not None and not self.output_form.is_like(form):
            self.anchors, self.held = [], []
        self.output_form = form

    def update_nbytes(self) -> None:
        """Update ``nbytes`` after a change of the tensors held."""
        kept = sum([anchor.nbytes for anchor in (*self.anchors, *self.outputs, *self.held)])
        self.nbytes = kept + (0 if self.metric is None else self.metric.nbytes)

    def clear(self) -> None:
        """Reset the branch to one that has never been computed."""
        self.free()
        self.history.refreshed, self.interrupted = None, False


@dataclass(eq=False)
class Run:
    """One sampling run of one session; ends when a call does not continue it (see ``CallDecider._locate``)."""

    session_epoch: int
    number: int = 0
    policy: Policy | None = None  # adapted to the run
    history: RunHistory = field(default_factory=RunHistory)
    schedule: Schedule = field(default_factory=Schedule)
    epoch: object | None = None  # the scheduler's timesteps: other ones belong to another run
    step: int | None = None  # of the last call
    last_step: int | None = None  # the one before
    is_last_step: bool = False  # as far as is known
    used: list[int] = field(default_factory=list)  # branches already called at this step
    most: int = 0  # the most calls that one step made
    before: tuple[int, int] = (0, 0)  # number of calls at each of the two previous steps, the last one first
    branches: dict[int, Branch] = field(default_factory=dict)
    shared: Decision | None = None  # this step's, if its branches share one
    names: dict[str, int] = field(default_factory=dict)  # numbers of branches that a scope names
    checks: bool = True  # whether its residuals are finite decides; not where ranks would decide differently
    newcomers: int = 0  # branches that are new at this step
    time: RunTime = field(default_factory=RunTime)  # what the sources of its steps have shown
    source: str = ""  # of its steps, in a word
    scheduler: weakref.ref[Any] | None = None  # that counts its steps
    in_flight: bool = False  # a call of the transformer is under way; at the next call: an exception ended it
    steps: int = 0  # begun so far
    watched: bool = False  # the model was searched for layers whose weights may change
    judged: bool = False  # its warning that nothing is reused was given or is not due
    finished: bool = False  # its last call has ended
    bar: PipelineBar | None = None  # progress bar of the pipeline
    scheduler_is_shared: bool = False  # its scheduler counts the steps of another session's run, too
    samples: list[Session] = field(default_factory=list)  # of its batch, each with a run of its own
    parts: tuple[Size, int] | None = None  # shape of a call's latents, and of how many equal parts they are
    ranks_diverged: bool = False  # the ranks' calls differ: none reuses for the rest of the run

    def clear(self) -> None:
        """Drop all tensors of the run; a run of one step keeps what its calls were given, to recognise the next run."""
        is_recognised, self.samples = self.schedule.steps == 1, []
        if not is_recognised:
            self.time.first = []
        for branch in self.branches.values():
            branch.free()
            if not is_recognised:
                branch.given = _nothing()


class RunEnd(NamedTuple):
    """Summary of a run that was not cut short.

    Args:
        name: the name of the transformer.
        steps: the number of steps made.
        most_calls: the most calls that one step made.
        scheduled: the number of steps of the schedule; ``None`` if unknown.
        is_over: whether the run is known to have ended; otherwise it was dropped and might have gone on.
    """

    name: str
    steps: int
    most_calls: int
    scheduled: int | None
    is_over: bool
