"""The samples of a batch, each decided by itself: a call without requests, whose rows are made implicitly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..config.cache_config import DitCacheConfig
from ..errors import InvalidSetting
from ..policies.policy import Policy
from ..predictors.predictor import Moment
from .arguments import CallArguments
from .branches import Match
from .call import Call
from .clock import StepClock
from .decider import CallDecider
from .row import PlacedRow
from .run import Branch, Run
from .sessions import Scope, Session, current_context
from .step_source import RunTime, Tick
from .weights_version import BatchWeightsVersion


@dataclass(eq=False)
class SampleScope(Scope):
    """The place of a sample in its run, which is that of the batch.

    Args:
        value: of the timestep argument, where that was read.
    """

    value: float | None = None


class SampleClock(StepClock):
    """The clock of the samples' runs: what that of the batch has read.

    Args:
        clock: of the batch.
    """

    def __init__(self, clock: StepClock) -> None:
        vars(self).update(vars(clock))

    def read(self, session: Session, scope: Scope | None, arguments: Any, run_time: RunTime) -> Tick:
        tick = super().read(session, scope, arguments, run_time)
        return tick._replace(value=scope.value) if isinstance(scope, SampleScope) else tick


class SampleDecider(CallDecider):
    """Decider of calls whose samples are decided one by one, each in a run of its own beside that of the batch.

    The run of the batch gives the step and the branch, and when another run begins; it reuses nothing by itself.
    """

    decide_samples: Callable[[Sequence[PlacedRow], Run, Moment], Call] | None = None  # of the batch of this call
    count_samples: Callable[[], int] | None = None  # of the batch of this call
    clear_branches: Callable[[Sequence[Session], int], None] | None = None  # of samples

    def for_rows(self, config: DitCacheConfig, weights: BatchWeightsVersion, kind: type[CallDecider]) -> CallDecider:
        rows = super().for_rows(config, weights, kind)
        rows.clock = SampleClock(self.clock)
        return rows

    def _match(self, run: Run, tick: Tick, given: CallArguments) -> Match | None:
        match = super()._match(run, tick, given)
        if match is not None and match.is_doubtful:
            run.samples = []
        return match

    def _change_source(self, run: Run, session: Session, tick: Tick) -> None:
        super()._change_source(run, session, tick)
        run.samples = []

    def _ask_policy(self, run: Run, tick: Tick, branch: Branch, given: CallArguments, capture: bool) -> Call:
        is_recorded = self.decide_samples is None or self.on_anchor is not None
        if is_recorded or self.count_samples is None or run.scheduler_is_shared:
            return super()._ask_policy(run, tick, branch, given, capture)
        session, number = current_context()[0], branch.history.number
        if branch.steps == 1 and self.clear_branches is not None:  # a former one may have had this number
            self.clear_branches(run.samples, number)
        count = self.count_samples()
        run.samples += [Session(None, session.scheduler) for _ in range(count - len(run.samples))]
        assert self.decide_samples is not None
        placed = [_placed(each, tick, number) for each in run.samples[:count]]
        return self.decide_samples(placed, run, self._moment(run, tick))

    def end(self, call: Call) -> None:
        """End a call, and its run after the last one."""
        run = call.run
        assert run is not None
        run.in_flight = False
        if run.is_last_step and not run.finished and len(run.used) >= max(run.before):
            self._finish(run, None if call.session is None else call.session())

    def why_silent(self) -> str | None:
        """Return ``None``: the samples' runs say that they have reused nothing."""
        return None

    def _nothing_was_reused(self, run: Run) -> str | None:
        """Return ``None``, likewise."""
        return None

    def _warn_of_missed_target(self, run: Run, session: Session) -> None:
        """Say nothing: the samples' runs do."""


def _placed(session: Session, tick: Tick, number: int) -> PlacedRow:
    """Return a sample of a batch as a row, at the batch's own step and in its branch of this number."""
    scope = SampleScope(tick.step, number, tick.sigma, tick.steps, session, tick.epoch, value=tick.value)
    return PlacedRow(None, session, scope)


def is_by_sample(policy: Policy) -> bool:
    """Return whether a policy decides each sample of a batch by itself."""
    return policy.metric is not None and policy.reduce == "each"


def refuse_ranks(name: str, grouped: bool, how: str | None) -> None:
    """Refuse to decide samples one by one where several ranks have to decide as one.

    Args:
        name: of the transformer.
        grouped: whether a process group was given.
        how: ranks share the model; ``None`` if they do not.

    Raises:
        InvalidSetting: a group was given, or the model is shared.
    """
    if grouped or how is not None:
        why = "a process_group was given" if grouped else how
        raise InvalidSetting(
            f"{name}: {why}, and ranks that decide as one decide on whole batches, not with reduce='each': give "
            "reduce='mean' or 'max', or a plan"
        )
