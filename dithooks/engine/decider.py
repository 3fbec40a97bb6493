"""The decider of one range: compute or reuse each call, and keep the residuals of computed ones."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from operator import is_
from typing import Any

from torch import Tensor

from ..blocks.block_io import parameter_names
from ..blocks.block_lists import Chain
from ..config.cache_config import DitCacheConfig
from ..errors import InvalidSetting
from ..fork import ForkAware
from ..policies.history import BranchHistory, Decision, Schedule
from ..policies.policy import Policy
from ..policies.reason import Reason
from ..policies.uncached import Uncached
from ..predictors.polynomial import lagrange_weights
from ..predictors.predictor import Moment, Predictor
from ..stats import warnings as wording
from ..stats.log import DecisionLog, fold
from ..stats.user_warning import warn_user
from .additions import Additions
from .anchor import Anchor, weighted_sum
from .arguments import TIME, CallArguments, Signature, latents_among
from .branches import Match, choose_branch, settle_claims
from .call import CAPTURE, LEFT_OUT, MADE, MISMATCH, PLAIN, REUSE, UNDECIDED, Call, Capture
from .change_metrics import METRICS
from .clock import SCHEDULER, TIMESTEP, StepClock, weak
from .finite_check import is_beyond
from .protocols import Integrations
from .rank_consensus import RankConsensus, RankVerdict
from .run import Branch, Run, RunEnd
from .sessions import Scope, Session, current_context, current_session
from .step_source import RunTime, Tick
from .weights_version import BatchWeightsVersion, WeightsVersion

MAX_CAPTURED = 16  # calls of a run's first step whose residuals are kept; are there more, then from the next step on
MAX_CALLS = 64  # at one step; more mean that the step is not advancing
LEAST_CALLS = 2  # that reuse nothing and are worth a word
EXPLANATIONS = ("standstill", "shared scheduler", "gradients", "diverged", "not alone", "not finite", "remark")
FIRST = Match(0)
DECISION = {reuse: {reason: Decision(reuse, reason) for reason in Reason} for reuse in (False, True)}
COMPUTE = DECISION[False]


class CallDecider(ForkAware):
    """Decider of the calls of one range; holds one sampling run per thread, task or request.

    Example: with ``Interval(1, 2)``, ``decide`` answers the calls of a run with mode CAPTURE, CAPTURE, REUSE, CAPTURE,
    …, and ``commit`` keeps the residual of each captured call.

    Args:
        chain: the blocks of the transformer, and how its branches are separated, if that is declared.
        config: the policy, the predictor, and the form in which residuals are kept.
        clock: the reader of a call's step.
        log: the log of decisions.
        integrations: the adapter to other libraries.
        consensus: the ranks that decide together; ``None`` if this rank decides alone.
    """

    def __init__(
        self,
        chain: Chain,
        config: DitCacheConfig,
        clock: StepClock,
        log: DecisionLog,
        integrations: Integrations,
        consensus: RankConsensus | None = None,
    ) -> None:
        self.name, self.config, self.clock, self.log = chain.name, config, clock, log
        self._chain = chain
        self.policy, self.predictor, self.consensus = config.when, config.predictor, consensus
        self.additions = Additions()
        self._anchors, self.corrects = config.predictor.anchors, bool(config.predictor.corrects)
        self._for_all = None if config.predictor.by_branch else config.predictor
        self._takes_the_last = config.predictor.takes_the_last
        self.latents_name = next(iter(parameter_names(chain.owner)), None)  # the first one
        # True: a step's calls are branches by their order; False: one branch; None: recognised by their arguments.
        self.separate_cfg = chain.separate_cfg
        self.deciders_of_handle: Sequence[CallDecider] = ()  # this one included
        self.on_anchor: Callable[[Call, Sequence[Tensor]], None] | None = None  # called with every new residual
        self.on_run_end: Callable[[RunEnd], tuple[str, str] | None] | None = None  # returns topic and text of a warning
        self.decide_rows: Callable[[Sequence[Any], Mapping[str, Any]], Call] | None = None  # of several requests
        # Decides calls of steps at which one branch of guidance alone is computed; None: each is computed.
        self.alone: Callable[[Call, Run, Branch], Decision] | None = None
        self._latents = frozenset[str]([self.latents_name] if self.latents_name is not None else [])
        self._knows_latents = False  # before its first output is known, the first argument of a model is taken for them
        self._time_names = TIME.union(clock.timestep.names)
        self._model, self._integrations = chain.owner, integrations
        self._weights: WeightsVersion | BatchWeightsVersion = WeightsVersion(chain.owner, integrations.adapters())
        self._runs: weakref.WeakKeyDictionary[Session, Run] = weakref.WeakKeyDictionary()  # a run is its session's
        self._warned: set[str] = set()
        self._is_explained = False  # a warning has given the reason why nothing was reused
        self._explained_calls = 0  # of runs that a warning has named as having reused nothing, and by which policy
        self._epoch: weakref.ref[Any] | None = None  # of the latest run
        self._could_reuse, self._source = False, ""  # whether a run had two steps, and what gave the latest one's
        self._not_finite: set[tuple[int, int]] = set()  # number of the run, and step
        super().__init__()

    # -- before the range --------------------------------------------------------------------------------------

    def decide(
        self,
        arguments: Mapping[str, Any] | None,
        seen: bool,
        capture: bool,
        row: tuple[Session, Scope, CallArguments] | None = None,
    ) -> Call:
        """Decide a call before its first block runs, or leave it UNDECIDED for :meth:`judge`.

        Args:
            arguments: the transformer's arguments, by name.
            seen: whether the transformer itself was called, not only its blocks.
            capture: whether to take the residual of every computed call, even one that will never be reused.
            row: of a batch of several requests' rows: session and scope of one row, and what it is given.

        Raises:
            InvalidSetting: the sampling step cannot be read.
        """
        arguments = arguments or {}
        if row is None:
            session, scope = current_context()
            if session.rows is not None:
                return self._decided_by_row(session.rows, arguments)
            given = CallArguments(arguments, self._latents, self._time_names)
        else:
            session, scope, given = row
        run, tick = self._locate(session, scope, arguments)
        match = self._match(run, tick, given)
        if match is None:  # the first call of another run
            run.in_flight = False
            run, tick = self._locate(session, scope, arguments, another=True)
            match = Match(0)
        branch = run.branches.get(number := match.number)
        if branch is None:
            branch = run.branches[number] = self._new_branch(run, match)
            run.newcomers += 1
        elif branch.interrupted or match.is_doubtful:  # an exception ended its last call: keep nothing of it
            branch.clear()
        branch.given = given
        branch.called = tick.step
        branch.position = len(run.used)
        branch.steps += 1
        if match.changes:
            branch.changes.update(match.changes)
            branch.is_steady = False
        run.used.append(number)
        calls = len(run.used)
        if calls > run.most:
            run.most = calls
        run.history.branches = max(run.before[0], calls)
        call = self._ask_policy(run, tick, branch, given, capture)
        call.session = weakref.ref(session)
        call.step_source = session.step_source
        run.in_flight = seen
        return call

    def _decided_by_row(self, rows: Sequence[Any], arguments: Mapping[str, Any]) -> Call:
        if self.decide_rows is None:
            raise InvalidSetting(
                f"{self.name}: cache.rows is for a cache, and this call is recorded: call it once for each request"
            )
        return self.decide_rows(rows, arguments)

    def weights_of_batches(self) -> BatchWeightsVersion:
        """Return what reads the version of the weights once for all rows of a batch."""
        assert isinstance(self._weights, WeightsVersion)
        return BatchWeightsVersion(self._weights)

    def for_rows(self, config: DitCacheConfig, weights: BatchWeightsVersion, kind: type[CallDecider]) -> CallDecider:
        """Return a decider of rows by another configuration, with the same clock and log.

        Args:
            config: of the rows.
            weights: that the rows of a batch share.
            kind: of decider.
        """
        chain = replace(self._chain, separate_cfg=True)  # a request's rows at one step are distinguished by their order
        other = kind(chain, config, self.clock, self.log, self._integrations, self.consensus)
        other._weights = weights
        other.additions, other._warned, other._latents = self.additions, self._warned, self._latents
        return other

    def has_finished(self, session: Session) -> bool:
        """Return whether a session has no run here that goes on."""
        run = self._runs.get(session)
        return run is None or run.finished

    def clear_branch(self, session: Session, number: int) -> None:
        """Drop the residuals of one branch of a session's run."""
        run = self._runs.get(session)
        if run is not None and number in run.branches:
            run.branches[number].clear()

    def given_to(self, arguments: Mapping[str, Any]) -> CallArguments:
        """Return the arguments of a call, sorted."""
        return CallArguments(arguments, self._latents, self._time_names)

    def learn_latents(self, arguments: Mapping[str, Any], output: Any) -> None:
        """Learn from a first call which of its arguments are latents."""
        if self._knows_latents or not arguments:
            return
        self._latents, self._knows_latents = latents_among(arguments, self.latents_name, output), True
        for branch in [branch for _, run in self._sessions() for branch in run.branches.values()]:
            branch.given.sort(self._latents)

    def plain_call_with_gradients(self) -> Call:
        """Return a plain call for a forward with gradients, which is never cached."""
        self.log.record(None, 0, 0, COMPUTE[Reason.GRADIENTS])
        self.warn("gradients", wording.gradients_are_enabled(self.name))
        return Call()

    def _new_branch(self, run: Run, match: Match) -> Branch:
        kind = self.policy.metric
        return Branch(
            BranchHistory(match.number, run=run.history),
            None if kind is None else METRICS[kind](self.policy.reduce),
            is_first=run.steps == 1,
            claim=match.claim,
        )

    def _match(self, run: Run, tick: Tick, given: CallArguments) -> Match | None:
        """Return the branch of a call, or ``None`` if the call is the first of another run."""
        if tick.branch is not None:
            name = tick.branch
            if isinstance(name, str):
                return Match(run.names.setdefault(name, max([*run.branches, *run.names.values()], default=-1) + 1))
            return Match(name)
        if self.separate_cfg is not None:
            return Match(len(run.used) if self.separate_cfg else 0)
        if not run.branches:
            return FIRST
        if not run.used and len(run.branches) == 1:  # the common case, for speed
            ((number, first),) = run.branches.items()
            before, now = first.given.conditioning, given.conditioning
            if [*before] == [*now] and all(map(is_, before.values(), now.values())) and first.given.form == given.form:
                if not first.is_steady:
                    first.changes.update(dict.fromkeys(now, 0.0))
                    first.is_steady = True
                return Match(number) if number else FIRST
        return choose_branch(run, given)

    def _ask_policy(self, run: Run, tick: Tick, branch: Branch, given: CallArguments, capture: bool) -> Call:
        """Create the call of a branch and ask the policy.

        Without an answer the call stays UNDECIDED. So it does with a process group, where the ranks have to agree.
        """
        policy = run.policy
        assert policy is not None
        step = tick.step
        keeps = capture or self.on_anchor is not None
        crowded = run.steps == 1 and len(run.used) > MAX_CAPTURED and self.on_anchor is None
        if not keeps and not crowded and not run.is_last_step:
            keeps = policy.keeps(step, self._anchors)
        signature: Signature = ()
        between: Signature = ()
        if keeps or branch.anchors or self.corrects:
            additions = self.additions
            if additions.ask is not None and (names := frozenset(given.conditioning)) not in additions.asked:
                additions.ask(names)
            version, run.watched = self._weights.version(walk=not run.watched), True
            between = additions.signature
            signature = ("weights", (version, *given.scales)), *given.form, *between
        call = Call(
            keeps=keeps,
            counted=between[0][1] if between else (),
            lead=Capture() if policy.metric == "change" else None,
            moment=self._moment(run, tick),
            signature=signature,
            branch=branch,
            run=run,
        )
        decision: Decision | None
        needs_consensus = self.consensus is not None and policy.metric is not None
        if run.scheduler_is_shared and not needs_consensus:
            decision = COMPUTE[Reason.SHARED_SCHEDULER]
        elif run.ranks_diverged:
            decision = COMPUTE[Reason.RANKS_DIFFER]
        elif run.shared is not None and not policy.separate_branches:
            decision = run.shared._replace(value=None)
        else:
            decision = policy.before(step, branch.history, run.schedule)
        if decision is None or decision.reuse:
            reason = self._why_unusable(run, branch, signature, step)
            if reason is not None:
                decision = COMPUTE[reason]
            if decision is None or needs_consensus:  # whatever it is here, the other ranks may be of another opinion
                call.decision, call.mode = decision, UNDECIDED
                return call
        elif decision.reason is Reason.CONDITIONAL:
            decision = COMPUTE[Reason.MASK] if self.alone is None else self.alone(call, run, branch)
            if decision.reuse:
                self._record_made(call, run, branch, decision)
                return call
        self._record(call, run, branch, decision)
        return call

    def _moment(self, run: Run, tick: Tick) -> Moment:
        sigmas = run.schedule.sigmas
        if tick.sigma is not None:
            return Moment(tick.step, tick.sigma, "sigma")
        if sigmas is not None and tick.step < len(sigmas):
            return Moment(tick.step, sigmas[tick.step], "sigma")
        if tick.value is not None:
            return Moment(tick.step, tick.value, "timestep")
        return Moment(tick.step, float(tick.step), "step")

    def _why_unusable(self, run: Run, branch: Branch, signature: Signature, step: int) -> Reason | None:
        """Return the reason that no residual can be reused, or ``None`` if one can."""
        if run.scheduler_is_shared:
            return Reason.SHARED_SCHEDULER
        if not branch.anchors:
            return Reason.NO_ANCHOR
        if branch.unread and not self._is_finite(run, branch):
            return Reason.NOT_FINITE
        former = branch.anchors[0].signature
        if former == signature:
            return None if branch.anchors[0].moment.step < step else Reason.NO_ANCHOR  # of a run that was broken off
        return what_has_changed(former, signature)

    def _is_finite(self, run: Run, branch: Branch) -> bool:
        """Read whether the residuals that are new are finite, and drop those that are not.

        This waits until the device has come to where they were taken. Returns whether the newest one is still there.
        """
        unread, branch.unread, are_finite = branch.unread, [], True
        for check in unread:
            if check.event is None:
                peaks = check.norms.tolist()
            elif check.is_out_of_reach:  # reused as it is, and read at a later step
                branch.unread = unread
                return True
            else:
                peaks = check.peaks
            if not all(map(isfinite, peaks)):
                are_finite = False
        if are_finite:
            return True
        former, newest = branch.anchors, branch.anchors[0]
        branch.anchors = [each for each in former if each.check is None or isfinite(each.check.peak)]
        branch.update_nbytes()
        if len(branch.anchors) == len(former):  # those that are not were dropped before
            return True
        run.judged = True  # that nothing is reused is no wonder
        self._say_not_finite(newest.moment.step)
        return newest in branch.anchors

    def _say_not_finite(self, step: int) -> None:
        """Warn once of all ranges of the handle that a residual is not finite."""
        if self._claim_topic("not finite residual"):
            for peer in self.deciders_of_handle:
                peer._claim_topic("not finite residual")
            warn_user(wording.residual_is_not_finite(self.name, step))

    def _record(self, call: Call, run: Run, branch: Branch, decision: Decision) -> None:
        """Log a decision and set the call's mode and tensors accordingly."""
        assert run.policy is not None
        if decision.reuse:
            call.deltas = self._predicted(call, branch)
            if not call.deltas:
                decision = COMPUTE[Reason.NOT_FINITE]
        if not run.policy.separate_branches and run.shared is None:
            own = isinstance(decision.reason, Reason) and decision.reason.is_own
            run.shared = None if own else decision
        call.decision = decision
        self.log.record(run.number, call.moment.step, branch.history.number, decision)
        if decision.reuse:
            call.mode = REUSE
            return
        call.mode = PLAIN
        if call.keeps:
            call.mode, call.range = CAPTURE, Capture()
        self._make_room(call, branch)

    def _record_made(self, call: Call, run: Run, branch: Branch, decision: Decision) -> None:
        """Log that a call's output is made of another branch's; it is kept as that of a computed call is."""
        call.decision, call.mode, call.range = decision, MADE, Capture()
        self.log.record(run.number, call.moment.step, branch.history.number, decision)
        self._make_room(call, branch)

    def _make_room(self, call: Call, branch: Branch) -> None:
        """Free the oldest anchor before a new one is allocated; until the call has ended, it may be interrupted."""
        branch.interrupted = True
        fitting = [anchor for anchor in branch.anchors if anchor.signature == call.signature]
        branch.anchors = fitting[: self._anchors - 1]
        branch.update_nbytes()

    def _predicted(self, call: Call, branch: Branch) -> tuple[Tensor, ...]:
        """Return Δ̂, the residual that a reused step adds; nothing where half precision may have no such numbers."""
        newest = branch.anchors[0]
        if self._takes_the_last and newest.is_as_taken:
            return newest.kept
        fitting = [anchor for anchor in branch.anchors if anchor.signature == newest.signature]
        moments = [anchor.moment for anchor in fitting]
        weights = (self._for_all or self.predictor_of(call.run, branch)).weights(moments, call.moment)
        if weights is None:
            steps = [moment.step for moment in moments]
            self.warn(
                "unfitted",
                wording.coefficients_are_missing(self.name, call.moment.step, steps, self.predictor, self._anchors),
            )
            weights = lagrange_weights(moments[:2], call.moment, "sigma")
        if newest.check is not None and newest.check.is_narrow and self._is_beyond(call, fitting, weights):
            return ()
        return weighted_sum(fitting[: len(weights)], weights)

    def _is_beyond(self, call: Call, anchors: Sequence[Anchor], weights: Sequence[float]) -> bool:
        """Return whether half precision may have no such numbers as a sum's, and warn of it."""
        checks = [anchor.check for anchor in anchors[: len(weights)] if anchor.check is not None]
        if any(check.is_out_of_reach for check in checks) or not is_beyond(checks, weights):
            return False
        self._say_not_finite(call.moment.step)
        return True

    def weights_by_part(
        self, call: Call, tensors: Sequence[Tensor], weights_of: Callable[[Predictor], tuple[float, ...] | None]
    ) -> list[tuple[float, ...]]:
        """Return the weights of each equal part of a call's batch; none where all have the same, as here.

        Args:
            call: of a branch of a run.
            tensors: the terms of the sum.
            weights_of: returns the weights that a predictor has for the call.
        """
        return []

    def predictor_of(self, run: Run | None, branch: Branch) -> Predictor:
        """Return what a branch's residuals and outputs are forecast with."""
        return self.predictor.of_branch(branch.history.number, 0 if run is None else len(run.branches))

    # -- at the first block ------------------------------------------------------------------------------------

    def judge(self, call: Call) -> None:
        """Decide an undecided call by its change metric, at the range's first block."""
        run, branch = call.run, call.branch
        assert run is not None
        assert branch is not None
        if self.consensus is not None:
            self._record(call, run, branch, self._agreed(call, run, branch, self.consensus))
            return
        change = None if call.metric_inputs is None or branch.metric is None else branch.metric.look(call.metric_inputs)
        if change is None:  # a rate needs two computed steps, so there is no value yet
            decision = COMPUTE[Reason.UNMEASURED]
        else:
            assert run.policy is not None
            value = float(change.item())  # waits for the device, the only time in a decision
            decision = run.policy.judge(call.moment.step, branch.history, run.schedule, value)
        self._record(call, run, branch, decision)

    def settle(self, call: Call, value: float | None) -> None:
        """Decide an undecided row by a change that was measured with those of others; ``None``: there is none yet."""
        run, branch = call.run, call.branch
        assert run is not None
        assert run.policy is not None
        assert branch is not None
        if run.shared is not None and not run.policy.separate_branches:  # a row before this one has decided
            decision = run.shared._replace(value=None)
        elif value is None:
            decision = COMPUTE[Reason.UNMEASURED]
        else:
            decision = run.policy.judge(call.moment.step, branch.history, run.schedule, value)
        self._record(call, run, branch, decision)

    def _agreed(self, call: Call, run: Run, branch: Branch, consensus: RankConsensus) -> Decision:
        """Return a decision made with the other ranks: all of them reuse, or each computes for its own reason."""
        mine, sums = call.decision, None
        if mine is None:
            sums = (
                None if call.metric_inputs is None or branch.metric is None else branch.metric.sums(call.metric_inputs)
            )
            mine = COMPUTE[Reason.UNMEASURED] if sums is None else None
        if mine is None or mine.reuse:  # asked before the ranks agree: afterwards, this one would compute alone
            check = branch.anchors[0].check
            if check is not None and check.is_narrow and not self._predicted(call, branch):
                mine = COMPUTE[Reason.NOT_FINITE]
        place = next((place for place, peer in enumerate(self.deciders_of_handle) if peer is self), 0)
        verdict: RankVerdict = consensus.ask(
            self.name,
            consensus.report(place, call.moment.step, run, branch.history, mine is None or mine.reuse, sums),
            branch.metric,
            sums,
            (*(call.metric_inputs or ()), *branch.given.latents.values()),
        )
        if not verdict.alike:
            run.ranks_diverged = True
            self.warn("diverged", wording.ranks_have_diverged(self.name, call.moment.step))
            return COMPUTE[Reason.RANKS_DIFFER]
        if mine is not None and not mine.reuse:
            return mine
        if not verdict.fit:
            return COMPUTE[Reason.ANOTHER_RANK]
        if mine is None:
            assert verdict.value is not None
            assert run.policy is not None
            mine = run.policy.judge(call.moment.step, branch.history, run.schedule, verdict.value)
        return mine

    # -- after the call ----------------------------------------------------------------------------------------

    def commit(self, call: Call) -> None:
        """Commit a finished call: count its decision, and keep its residual as the branch's newest anchor."""
        branch, run = call.branch, call.run
        if branch is None or run is None:
            return
        step = call.moment.step
        if call.mode is UNDECIDED:
            call.decision = COMPUTE[Reason.NOT_REACHED]
            consensus = self.consensus
            decision = call.decision if consensus is None else self._agreed(call, run, branch, consensus)
            self._record(call, run, branch, decision)
        elif call.mode is MISMATCH:
            call.decision, branch.anchors, branch.changes_length = COMPUTE[Reason.SHAPE], [], True
            self.log.correct(run.number, step, branch.history.number, call.decision)
        decided = call.decision
        if decided is not None:
            fold(branch.history, step, decided)
        branch.interrupted = False
        computed: Sequence[Tensor] | None = None
        reused = call.mode is REUSE
        if not reused:
            captured, is_finite = call.range, decided is None or decided.reason is not Reason.NON_FINITE
            if captured is not None and captured.complete and captured.deltas and is_finite:
                computed = self._keep(call, branch, captured)
            else:  # nothing was captured: an older residual must not pass for this step's
                branch.clear()
                if not is_finite:
                    self._note_cause(call)
        if branch.metric is not None and call.metric_inputs is not None:
            branch.metric.note(call.metric_inputs, computed)
        call.metric_inputs = None
        if not reused or branch.metric is not None:  # otherwise the memory held is unchanged
            branch.update_nbytes()
            self.log.hold(self.bytes_held(), run.number, branch.history.number, branch.nbytes)
        self._show_progress(run)
        if run.is_last_step:
            if not run.finished and len(run.used) >= max(run.before):
                self._finish(run, None if call.session is None else call.session())
            elif run.finished and self.config.free_at_end:  # a call more than the step before had
                branch.free()

    def time(self, call: Call, mark: Callable[[], Any]) -> None:
        """Log the times of a call that began at the transformer, not only at its blocks."""
        if call.run is not None and call.marks:
            self.log.time_call(call.run.number, call.mode in LEFT_OUT, [*call.marks, mark()])
            call.marks = None

    def _keep(self, call: Call, branch: Branch, captured: Capture) -> Sequence[Tensor]:
        """Keep a residual as the branch's newest anchor; return the outputs, or else Δ, for the change metric."""
        deltas, captured.deltas = captured.deltas, ()
        if self.on_anchor is not None:
            self.on_anchor(call, deltas)
        assert call.run is not None
        form = self.config.dtype, self.config.cache_device
        anchor = Anchor.keep(call.moment, call.signature, deltas, *form, is_checked=call.run.checks)
        if anchor.check is not None:
            branch.unread.append(anchor.check)
        branch.anchors.insert(0, anchor)
        if branch.changes_length:  # by a number that is no tensor: residuals of two shapes cannot be summed
            branch.anchors = [each for each in branch.anchors if each.shapes == anchor.shapes]
        branch.history.refreshed = call.moment.step
        return captured.output or deltas

    def _show_progress(self, run: Run) -> None:
        if run.history.calls == 1:
            run.bar = self._integrations.progress_bar(run.schedule.steps, run.schedule.first)
        if run.bar is not None:
            run.bar.show(run.history.reused, run.history.calls)

    # -- runs --------------------------------------------------------------------------------------------------

    def after_fork(self) -> None:
        """Drop the runs of threads that are not in a forked child, and say that no call of theirs is under way."""
        for session, _ in self._sessions():
            if session.has_ended:
                self._runs.pop(session, None)

    def _sessions(self) -> list[tuple[Session, Run]]:
        """List the sessions and their runs, though other threads may begin and end some meanwhile."""
        while True:
            try:
                return list(self._runs.items())
            except RuntimeError:  # "changed size during iteration"
                continue

    def bytes_held(self) -> int:
        """Return the memory that all runs hold now, in bytes."""
        while True:  # as in _sessions, without a call more: it is asked at every computed step
            try:
                runs = list(self._runs.values())
                return sum([branch.nbytes for run in runs for branch in list(run.branches.values())])
            except RuntimeError:
                continue

    def drop(self) -> list[Run]:
        """Drop all runs and their residuals, and return them."""
        runs = [run for _, run in self._sessions()]
        self._runs.clear()
        return runs

    def warnings_of(self, runs: Sequence[Run]) -> list[str]:
        """Return the pending warnings of runs."""
        due = [(topic, message) for run in runs for topic, message in self._warnings(run)]
        return [message for topic, message in due if self._claim_topic(topic)]

    def why_silent(self) -> str | None:
        """Word why nothing was reused since attaching, where no warning has done so; ``None`` if something was."""
        if not self._could_reuse or self._is_explained or self.on_anchor is not None:
            return None
        records = self.log.records()
        if len(records) < LEAST_CALLS or any(each.reuse or each.reason == Reason.CONDITIONAL for each in records):
            return None
        if 2 * self._explained_calls >= len(records):
            return None
        return wording.nothing_was_ever_reused(self.name, self._source, records)

    def _locate(
        self, session: Session, scope: Scope | None, arguments: Mapping[str, Any], another: bool = False
    ) -> tuple[Run, Tick]:
        """Return the run and the tick of a call; start a new run if the call cannot continue the session's last one.

        A new run starts where the session has none yet, an exception ended a call or scope, the schedule or step
        breaks (:func:`_breaks`), a timestep goes back, or a step has too many calls. ``another`` forces one.
        """
        run = self._runs.get(session)
        if run is None or another or run.in_flight or run.session_epoch != session.epoch:
            run = self._start(session, run)
        run.in_flight = True  # before anything that may raise
        tick = self.clock.read(session, scope, arguments, run.time)
        if tick.restart or _breaks(run, tick):
            if run.time.moves_after_all(tick):
                run.judged, next_time = True, RunTime(trusts_scheduler=True)
            else:
                next_time = RunTime()
            run.in_flight = False
            run = self._start(session, run)
            run.time = next_time
            tick = self.clock.read(session, scope, arguments, run.time)
        step = tick.step
        if step == run.step and len(run.used) >= max(MAX_CALLS, 2 * run.before[0]) and tick.branch is None:
            self.warn("standstill", wording.step_stands_still(self.name, len(run.used), step, tick.source))
            run = self._start(session, None)
        if run.policy is None:
            run.policy = self._policy_for(run, session, tick)
        elif run.source == SCHEDULER and tick.source == TIMESTEP and run.time.trusts_scheduler is False:
            self._change_source(run, session, tick)
        if step != run.step:
            self._enter_step(run, step)
        return run, tick

    def _change_source(self, run: Run, session: Session, tick: Tick) -> None:
        """Go on by the timestep argument, as it has moved and the scheduler has not."""
        run.policy = self._policy_for(run, session, tick._replace(step=run.schedule.first))
        run.is_last_step = False

    def _enter_step(self, run: Run, step: int) -> None:
        """Begin a step of a run, and free branches that are no longer called."""
        assert run.policy is not None
        if run.time.moves == 2 and run.time.stood_at is not None:  # once could be calls with two timesteps at one step
            time, (first, *_, last) = run.time, run.time.readings
            moved = (first.highest, last.highest) if first.highest != last.highest else (first.mean, last.mean)
            self.warn("source", wording.scheduler_stands_still(self.name, time.stood_at, time.path, *moved))
        if run.newcomers:  # who was not called at a step with new calls, in whose stead these may have come, is retired
            settle_claims(run)
            for branch in run.branches.values():
                if branch.called != run.step:
                    branch.free()
        run.before, run.newcomers = (len(run.used), run.before[0]), 0
        run.last_step, run.step, run.used, run.shared = run.step, step, [], None
        run.is_last_step = run.schedule.steps is not None and step >= run.schedule.steps - 1
        run.steps += 1
        if run.schedule.blocks != self.log.blocks:  # updated by the first call
            run.schedule = replace(run.schedule, blocks=self.log.blocks, skipped=self.log.skippable)
        for branch in run.branches.values():
            idle = step - branch.called
            if idle > 1 and run.policy.outdated(step, branch.history, idle, self._anchors):
                branch.free()
        while len(run.branches) > max(MAX_CAPTURED, 2 * run.before[0]):  # the longest idle: numbers are reused
            del run.branches[min(run.branches, key=lambda number: run.branches[number].called)]

    def _start(self, session: Session, ended: Run | None) -> Run:
        """Start a run of a session, and emit the warnings of the run that it replaces."""
        run = Run(session.epoch, self.log.begin_run(), in_flight=True)
        self._runs[session] = run
        if ended is not None:
            if ended.is_last_step and not ended.finished and not ended.in_flight:
                self._warn_of_missed_target(ended, session)
            self._warn_of(ended, over=True)
        return run

    def _policy_for(self, run: Run, session: Session, tick: Tick) -> Policy:
        """Set a run's schedule at its first call, warn of what it rules out, and return the policy adapted to it."""
        wanted = self.predictor.needs_sigmas or self.policy.needs_sigmas
        run.epoch, run.source = tick.epoch, tick.source
        run.scheduler = None if tick.epoch is None else weak(self.clock.scheduler_of(session))
        self._free_abandoned(run)
        sigmas = self.clock.sigmas(session, tick) if wanted else None
        run.schedule = Schedule(tick.steps, tick.step, sigmas, self.log.blocks, self.log.skippable)
        run.scheduler_is_shared = tick.source == "scheduler" and self._shares_scheduler(run)
        policy = self.policy.for_run(run.schedule)
        if (other := self._integrations.other_cache(self._model)) is not None:  # since the cache was attached
            policy = Uncached()
            self.warn("not alone", wording.another_cache_is_at_work(self.name, other))
        agreed = self.consensus is not None and policy.metric is not None
        alone = self.consensus is None and self._integrations.ranks_sharing(self._model) is None
        run.checks = agreed or alone
        if warning := policy.warning_at_start(run.schedule):
            self._remark(warning)
        if warning := self.predictor.warning_at_start(run.schedule):
            self.warn("unfitted", f"{self.name}: {warning}")  # the topic of coefficients_are_missing: one of the two
        for warning in self.rank_warnings():
            warn_user(warning)
        single = tick.steps is not None and tick.steps - tick.step < 2
        self._source = tick.source
        # Nothing is to be reused, so that is no warning, or the policy has warned of it.
        run.judged = self.on_anchor is not None or single or policy.never_reuses
        if tick.steps is not None and not run.judged:
            message = wording.nothing_will_be_reused(self.name, policy, run.schedule, self.policy)
            if message is not None:
                run.judged = True
                self.warn(f"useless in {tick.steps - tick.step}", message)
        # A scheduler that has the same timesteps in another run, though of one step, is not the one that steps.
        again = tick.epoch is not None and self._epoch is not None and self._epoch() is tick.epoch
        self._could_reuse = self._could_reuse or not run.judged or (again and single)
        self._epoch = weak(tick.epoch)
        return policy

    def _free_abandoned(self, begun: Run) -> None:
        """Free the residuals of runs that can never go on, now that another has begun.

        Their session was left by an exception, or their scheduler has been given other timesteps: cancelled requests.
        """
        for session, run in self._sessions():
            if run is begun:
                continue
            scheduler = None if run.scheduler is None else run.scheduler()
            is_over = scheduler is not None and getattr(scheduler, "timesteps", None) is not run.epoch
            if is_over or run.session_epoch != session.epoch:
                run.clear()

    def _shares_scheduler(self, run: Run) -> bool:
        """Return whether an unfinished run of another thread, task or request has the same schedule, and warn if so."""
        others = [other for _, other in self._sessions() if other is not run]
        if not any(other.epoch is run.epoch and not other.finished for other in others):
            return False
        self.warn("shared scheduler", wording.scheduler_is_shared(self.name))
        return True

    def _finish(self, run: Run, session: Session | None) -> None:
        """Finish a run after its last call: emit its warnings, and free its residuals."""
        run.finished = True
        self.log.end_run(run.number)
        self._warn_of(run, over=True)
        if session is None:
            session = current_session()
        self._warn_of_missed_target(run, session)
        if self.config.free_at_end:
            run.clear()
        for peer in self.deciders_of_handle:
            if peer is not self:
                peer.release(session, run)

    def release(self, session: Session, ended: Run) -> None:
        """Finish a run whose later steps another transformer of the handle took over and completed."""
        run = self._runs.get(session)
        if run is not None and run.epoch is ended.epoch and run.step is not None and run.step < ended.schedule.first:
            run.finished = True
            self._warn_of(run, over=True)
            if self.config.free_at_end:
                run.clear()

    # -- warnings ----------------------------------------------------------------------------------------------

    def warn(self, topic: str, message: str) -> None:
        """Warn once per topic."""
        if self._claim_topic(topic):
            warn_user(message)

    def _remark(self, warning: str) -> None:
        """Warn of what a policy says of a run, once for all ranges that have this policy, whatever its numbers."""
        topic = "remark " + re.sub(r"[\d.]+", "#", warning)
        if self._claim_topic(topic):
            for peer in self.deciders_of_handle:
                if peer.policy == self.policy:
                    peer._claim_topic(topic)
            warn_user(f"{self.name}: {warning}")

    def note_non_finite(self, call: Call, what: str) -> None:
        """Note that a computed call gave NaN or infinity in ``what``; warn if it is not the first step of its run."""
        run = call.run
        if run is None:
            return
        self._not_finite = {each for each in self._not_finite if each[0] == run.number} | {
            (run.number, call.moment.step)
        }
        if len(self._not_finite) > 1:
            run.judged = True  # that nothing is reused is no wonder
            self.warn("not finite", wording.model_is_not_finite(self.name, what, call.moment.step))

    def _note_cause(self, call: Call) -> None:
        """Note a change that is not finite if what it was measured by is not: else it is one from nothing."""
        captured = call.range
        if not all(bool(tensor.isfinite().all()) for tensor in call.metric_inputs or ()):
            self.note_non_finite(call, "what enters the range")
        elif captured is not None and not all(bool(delta.isfinite().all()) for delta in captured.deltas):
            self.note_non_finite(call, "what leaves the range")

    def rank_warnings(self) -> list[str]:
        """Return a warning, once, if ranks share the model but each decides alone."""
        if self.consensus is not None or self.policy.metric is None or "alone" in self._warned:
            return []
        how = self._integrations.ranks_sharing(self._model)
        if how is None or not self._claim_topic("alone"):
            return []
        return [wording.ranks_decide_alone(self.name, how, self.policy)]

    def _claim_topic(self, topic: str) -> bool:
        """Return whether a topic has not been warned of yet, and mark it as warned of."""
        new = topic not in self._warned
        self._warned.add(topic)
        self._is_explained = self._is_explained or topic.startswith(EXPLANATIONS)
        return new

    def _warn_of(self, run: Run, over: bool = False) -> None:
        """Emit the warnings of an ended run; ``over``: it is known to have ended, not only replaced or dropped."""
        for topic, message in self._warnings(run, over):
            self.warn(topic, message)

    def _warnings(self, run: Run, over: bool = False) -> list[tuple[str, str]]:
        """Return the topic and text of each warning due for an ended run."""
        under_way = run.in_flight or (run.schedule.steps is not None and not run.is_last_step)
        cut_short = under_way and not run.finished
        if run.scheduler_is_shared or cut_short:  # a shared scheduler has a warning of its own
            return []
        due: list[tuple[str, str]] = []
        if not run.judged and (nothing := self._nothing_was_reused(run)):
            run.judged = True
            self._explained_calls += run.history.calls
            due.append((f"useless in {run.steps}", nothing))
        if self.on_run_end is not None:
            warning = self.on_run_end(RunEnd(self.name, run.steps, run.most, run.schedule.steps, over))
            if warning is not None:
                due.append(warning)
        return due

    def _nothing_was_reused(self, run: Run) -> str | None:
        return wording.nothing_was_reused(self.name, run.steps, self.log.counts_of(run.number), self.policy)

    def _warn_of_missed_target(self, run: Run, session: Session) -> None:
        """Warn if a run missed its policy's target speed-up, over all transformers that took part in the run."""
        assert run.policy is not None
        if run.scheduler_is_shared:
            return
        alike = [peer for peer in self.deciders_of_handle or (self,) if peer.policy == self.policy]
        runs = [(peer, peer._runs.get(session)) for peer in alike]
        parts = [(peer, other.history) for peer, other in runs if other is not None and other.epoch is run.epoch]
        parts = [(self, run.history), *(part for part in parts if part[0] is not self)]
        total = sum(history.calls * peer.log.blocks for peer, history in parts)
        skipped = sum(history.reused * peer.log.skippable for peer, history in parts)
        if warning := run.policy.warning_at_end(total / max(total - skipped, 1)):
            self.warn("review", f"{self.name}: {warning}")


def _breaks(run: Run, tick: Tick) -> bool:
    """Return whether a call cannot continue a run: its schedule is another, or its step goes back or skips some."""
    if tick.epoch is not None and run.epoch is not None and tick.epoch is not run.epoch:
        return True
    if run.policy is not None and None not in (tick.steps, run.schedule.steps) and tick.steps != run.schedule.steps:
        return True
    return run.step is not None and not 0 <= tick.step - run.step <= 1


def what_has_changed(former: Signature, signature: Signature) -> Reason:
    """Return why what was computed with one signature does not fit a call of another."""
    if former[0] != signature[0]:
        return Reason.WEIGHTS
    return Reason.SWITCH if _tensor_forms(former) == _tensor_forms(signature) else Reason.SHAPE


def _tensor_forms(signature: Signature) -> list[tuple[Any, ...]]:
    """Return the entries of a signature that describe tensors."""
    return [entry for entry in signature if len(entry) > 2]
