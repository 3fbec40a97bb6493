"""What is remembered between calls: per sampling run and branch, the residuals last computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from ..policies.history import BranchHistory, Decision, RunHistory, Schedule
from ..policies.policy import Policy
from .anchor import Anchor
from .change_metrics import ChangeMetric
from .protocols import PipelineBar


@dataclass(eq=False)
class Branch:
    """One of the calls that every step makes (conditional, unconditional, …)."""

    history: BranchHistory
    metric: ChangeMetric | None = None
    anchors: list[Anchor] = field(default_factory=list)  # the newest first
    called: int = 0  # step of its last call
    interrupted: bool = False  # a computed call has begun, and not ended
    latents: dict[str, Tensor] = field(default_factory=dict)  # what it was given last, to tell it from the others
    conditioning: dict[str, Tensor] = field(default_factory=dict)
    nbytes: int = 0  # memory of all that is kept for the branch

    def free(self) -> None:
        """Keep nothing for the branch."""
        self.anchors, self.nbytes = [], 0
        if self.metric is not None:
            self.metric.clear()

    def update_nbytes(self) -> None:
        """Note how much memory is kept, after a change of it."""
        kept = sum([anchor.nbytes for anchor in self.anchors])
        self.nbytes = kept + (0 if self.metric is None else self.metric.nbytes)

    def clear(self) -> None:
        """Make the branch as if it had never been computed."""
        self.free()
        self.history.refreshed, self.interrupted = None, False


@dataclass(eq=False)
class Run:
    """One sampling run of one session: starts when the step goes back, ends when the next one starts."""

    session_epoch: int
    number: int = 0
    policy: Policy | None = None  # made out for the run
    history: RunHistory = field(default_factory=RunHistory)
    schedule: Schedule = field(default_factory=Schedule)
    epoch: object | None = None
    step: int | None = None
    is_last_step: bool = False  # as far as is known
    used: list[int] = field(default_factory=list)  # branches already called at this step
    most: int = 0  # calls that a step made, at most
    before: tuple[int, int] = (0, 0)  # calls of each of the two steps before
    branches: dict[int, Branch] = field(default_factory=dict)
    shared: Decision | None = None  # of this step, where its branches share one
    constant: set[str] = field(default_factory=set)  # conditioning that was seen to stay from one step to another
    unstable_conditioning: dict[str, set[int]] = field(default_factory=dict)  # … that was like nothing before, by step
    timesteps: list[float] = field(default_factory=list)  # distinct values so far, where they tell the step
    in_flight: bool = False  # a call of the transformer was entered and not left: an exception ended it
    steps: int = 0
    watched: bool = False  # the model was walked through for layers whose weights are to be watched
    judged: bool = False  # its warnings were given
    finished: bool = False  # its last call is over
    bar: PipelineBar | None = None  # progress bar of the pipeline
    scheduler_is_shared: bool = False  # the scheduler that tells its steps tells those of another session's run
    ranks_diverged: bool = False  # ranks that decide as one have computed different calls: none reuses any more

    @property
    def nbytes(self) -> int:
        """Memory of all that is kept for the run."""
        return sum([branch.nbytes for branch in list(self.branches.values())])

    def clear(self) -> None:
        """Keep nothing for the run, nor what its calls were given; a run of one step needs that to tell the next."""
        for branch in self.branches.values():
            branch.free()
            if self.schedule.steps != 1:
                branch.latents, branch.conditioning = {}, {}


class RunEnd(NamedTuple):
    """What a run was, at its end; of one that was not cut short.

    Args:
        name: of the transformer.
        steps: steps that the run made.
        most_calls: the most calls that one of its steps made.
        scheduled: steps of the whole schedule; ``None`` where the schedule is not known.
        is_over: whether the run is known to have ended; else it is dropped, and nothing shows whether it would go on.
    """

    name: str
    steps: int
    most_calls: int
    scheduled: int | None
    is_over: bool
