"""Settle a call: compute or reuse, and with what; and take in what it computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..integrations.tqdm_bar import find_bar, write_behind
from ..policies.history import BranchHistory, Decision
from ..policies.reason import Reason
from ..predictors.polynomial import lagrange_weights
from ..predictors.predictor import Moment
from ..stats.timing import mark
from .anchor import Anchor, Signature, weighted_sum
from .branches import choose_branch, tensors
from .call import Branch, Call, Capture, Run, signature
from .change_metrics import ChangeMetric, OutputChangeEstimate, RelativeChange
from .clock import Tick
from .rank_consensus import RankConsensus, RankReport, checksum
from .runs import Runs
from .weights_version import WeightsVersion, lora_scales


class Settler:
    """Decides the calls of one range, and keeps what they computed.

    Args:
        runs: which the calls belong to.
        weights: of the transformer.
    """

    def __init__(self, runs: Runs, weights: WeightsVersion) -> None:
        self.runs, self.weights = runs, weights

    def settle(self, arguments: Mapping[str, Any] | None, seen: bool, capture: bool) -> Call:
        """The call that is about to begin; decided, or ``pending``.

        ``seen`` is whether the transformer itself was seen called; ``capture`` asks for the residual of every computed
        call, not only where it can be reused.
        """
        arguments = arguments or {}
        latents, conditioning = tensors(arguments, self.runs.primary)
        run, tick = self.runs.locate(arguments)
        number: int | None
        if tick.branch is not None:
            number = tick.branch
        elif self.runs.separate_cfg is None:
            number = choose_branch(run, latents, conditioning)
        else:
            number = len(run.used) if self.runs.separate_cfg else 0
        if number is None:
            run, tick = self.runs.locate(arguments, anew=True)
            number = 0
        branch = run.branches.setdefault(number, Branch(BranchHistory(number, run=run.account)))
        if branch.open:  # its last computed call was cut short: nothing of it is to be reused
            branch.clear()
        if self.runs.policy.metric is not None and branch.metric is None:
            branch.metric = _GAUGES[self.runs.policy.metric](self.runs.policy.reduce)
        run.account.branches = max(run.before[0], len(run.used) + 1)
        branch.latents, branch.conditioning, branch.called = latents, conditioning, tick.step
        run.in_flight = True  # already: an exception may end it while it is settled
        run.used.append(number)
        run.most = max(run.most, len(run.used))
        call = self._begin(run, tick, branch, arguments, capture)
        run.in_flight = seen
        return call

    def judge(self, call: Call) -> None:
        """Settle a call that is pending, by what is seen at the range's first block."""
        run, branch = call.run, call.branch
        assert run is not None
        assert branch is not None
        assert run.policy is not None
        if self.runs.together is not None:
            self._conclude(call, self._agreed(call, self.runs.together))
            return
        change = None if call.seen is None or branch.metric is None else branch.metric.look(call.seen)
        if change is None:  # a rate takes two computed steps
            decision = Decision(False, Reason.UNMEASURED)
        else:
            value = float(change.item())  # the one wait for the device that a decision costs
            decision = run.policy.judge(call.moment.step, branch.track, run.schedule, value)
            run.shared = run.shared or decision
        self._conclude(call, decision)

    def inert(self) -> Call:
        """A call with gradients: trained models are not cached."""
        self.runs.ledger.count(Decision(False, Reason.GRADIENTS))
        self.runs.say(
            "gradients",
            f"{self.runs.name} is called with gradients enabled, so nothing is cached or reused: "
            "sample under torch.no_grad() or torch.inference_mode()",
        )
        return Call()

    def keep(self, call: Call) -> None:
        """A call is over: what it computed is the branch's newest anchor."""
        branch, run = call.branch, call.run
        if branch is None or run is None:
            return
        if call.pending:
            call.proposal = Decision(False, Reason.NOT_REACHED)
            together = self.runs.together
            self._conclude(call, call.proposal if together is None else self._agreed(call, together))
        if call.shape_mismatch:
            self._misfit(call, branch, run)
        branch.open = False
        computed = None
        if call.capture and call.range.left and call.range.deltas and not call.non_finite:
            config, deltas, call.range.deltas = self.runs.config, call.range.deltas, ()
            if self.runs.on_kept is not None:
                self.runs.on_kept(call, deltas)
            anchor = Anchor.keep(call.moment, call.signature, deltas, config.dtype, config.cache_device)
            branch.anchors.insert(0, anchor)
            branch.track.refreshed = call.moment.step
            computed = call.range.output or deltas
        elif not call.reuse:  # older ones are not to be used as if they were this one
            branch.clear()
        if branch.metric is not None and call.seen is not None:
            branch.metric.note(call.seen, computed)
        call.seen = None
        if not call.reuse or branch.metric is not None:  # else nothing was kept
            self.runs.ledger.held(self.runs.bytes_held(), run.number, branch.track.number, branch.nbytes)
        if run.last and not run.finished and len(run.used) >= max(run.before):
            self.runs.finish(run)

    def timed(self, call: Call) -> None:
        """A call is over, in which the transformer was seen called: note how long it took."""
        if call.run is not None and call.marks:
            self.runs.ledger.timed(call.run.number, call.reuse, [*call.marks, mark(call.device)])
            call.marks = []

    def _begin(self, run: Run, tick: Tick, branch: Branch, arguments: Mapping[str, Any], capture: bool) -> Call:
        assert run.policy is not None
        keeps = run.policy.keeps(tick.step, self.runs.predictor.anchors) and not run.last
        capture = capture or keeps or self.runs.on_kept is not None
        call = Call(
            capture=capture,
            is_measured=branch.metric is not None,
            lead=Capture() if run.policy.metric == "change" else None,
            moment=self._moment(run, tick),
            signature=self._guard(run, arguments) if capture or branch.anchors else (),
            branch=branch,
            run=run,
        )
        decision: Decision | None
        asks = self.runs.together is not None and run.policy.metric is not None
        if run.scheduler_is_shared and not asks:
            decision = Decision(False, Reason.SHARED_SCHEDULER)
        elif run.ranks_diverged:
            decision = Decision(False, Reason.RANKS_DIFFER)
        elif run.shared is not None and not run.policy.separate_branches:
            decision = run.shared._replace(value=None)
        else:
            decision = run.policy.before(tick.step, branch.track, run.schedule)
        if decision is None or decision.reuse:
            decision = self._unfit(call, branch) or decision
            call.proposal, call.pending = decision, asks  # whatever it is here, the others may be of another opinion
        if decision is None or call.pending:
            call.pending = True
        else:
            self._conclude(call, decision)
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

    def _guard(self, run: Run, arguments: Mapping[str, Any]) -> Signature:
        """What must be the same for a residual to be used: the weights, and the form of the arguments."""
        count, run.watched = self.weights.changes(anew=not run.watched), True
        return ("weights", (count, *lora_scales(arguments))), *signature(arguments)

    def _unfit(self, call: Call, branch: Branch) -> Decision | None:
        """Why there is nothing to be reused, if so."""
        if call.run is not None and call.run.scheduler_is_shared:
            return Decision(False, Reason.SHARED_SCHEDULER)
        if not branch.anchors:
            return Decision(False, Reason.NO_ANCHOR)
        former = branch.anchors[0].signature
        if former == call.signature:
            return None
        if former[0] != call.signature[0]:
            return Decision(False, Reason.WEIGHTS)
        return Decision(False, Reason.SWITCH if _forms(former) == _forms(call.signature) else Reason.SHAPE)

    def _agreed(self, call: Call, together: RankConsensus) -> Decision:
        """Settle a call with the other ranks: all of them reuse, or none does, each for its own reason."""
        run, branch, mine = call.run, call.branch, call.proposal
        assert run is not None
        assert branch is not None
        assert run.policy is not None
        sums = None
        if mine is None:
            sums = None if call.seen is None or branch.metric is None else branch.metric.sums(call.seen)
            mine = Decision(False, Reason.UNMEASURED) if sums is None else None
        track, account, schedule = branch.track, run.account, run.schedule
        report = RankReport(
            range=next((place for place, peer in enumerate(self.runs.peers) if peer is self.runs), 0),
            step=call.moment.step,
            steps=-1 if schedule.steps is None else schedule.steps,
            number=len(run.used) - 1,
            policy=checksum(run.policy),
            computed=track.computed,
            reused=track.reused,
            streak=track.streak,
            refreshed=-1 if track.refreshed is None else track.refreshed,
            calls=account.calls,
            left_out=account.reused,
            branches=account.branches,
            fit=mine is None or mine.reuse,
            streams=0 if sums is None else len(sums),
        )
        near = (*(call.seen or ()), *branch.latents.values())
        found = together.ask(self.runs.name, report, branch.metric, sums, near)
        if not found.alike:
            run.ranks_diverged = True
            self.runs.say(
                "parted",
                f"{self.runs.name}, step {call.moment.step}: the ranks of the process group have come here by other "
                "ways than each other (one has computed what others reused, or takes this call for another branch "
                "than they do), so none of them reuses anything more in this run",
            )
            return Decision(False, Reason.RANKS_DIFFER)
        if mine is not None and not mine.reuse:
            return mine
        if not found.fit:
            return Decision(False, Reason.ANOTHER_RANK)
        if mine is None:
            assert found.value is not None
            mine = run.policy.judge(call.moment.step, track, schedule, found.value)
            run.shared = run.shared or mine
        return mine

    def _conclude(self, call: Call, decision: Decision) -> None:
        """A call is decided."""
        run, branch = call.run, call.branch
        assert run is not None
        assert branch is not None
        if run.policy is not None and not run.policy.separate_branches and run.shared is None:
            own = isinstance(decision.reason, Reason) and decision.reason.is_own
            run.shared = None if own else decision
        branch.track.record(call.moment.step, decision)
        self.runs.ledger.count(decision, run.number, call.moment.step, branch.track.number)
        run.reasons[decision.reason] += 1
        run.reused += decision.reuse
        calls = sum(run.reasons.values())
        if calls == 1:
            run.bar = find_bar(run.schedule.steps, run.schedule.first)
        write_behind(run.bar, run.reused, calls)
        if decision.value is not None:
            run.values.append(decision.value)
        call.pending, call.reuse, call.non_finite = False, decision.reuse, decision.reason == Reason.NON_FINITE
        if decision.reuse:
            call.capture, call.deltas = False, self._predicted(branch, call.moment)
            return
        branch.open = True
        fitting = [anchor for anchor in branch.anchors if anchor.signature == call.signature]
        branch.anchors = fitting[: self.runs.predictor.anchors - 1]  # freed before the new one is made

    def _predicted(self, branch: Branch, now: Moment) -> tuple[Tensor, ...]:
        """The residual of a reused step."""
        fitting = [each for each in branch.anchors if each.signature == branch.anchors[0].signature]
        moments = [anchor.moment for anchor in fitting]
        weights = self.runs.predictor.weights(moments, now)
        if weights is None:
            alone = self.runs.predictor.anchors == 1
            instead = "the last residual is taken as it is" if alone else "the line through the last two is taken"
            self.runs.say(
                "unfitted",
                f"{self.runs.name}: step {now.step} follows computed steps {[m.step for m in moments]}, for which "
                f"{type(self.runs.predictor).__name__} has no coefficients: {instead}",
            )
            weights = lagrange_weights(moments[:2], now, "sigma")
        return weighted_sum(fitting[: len(weights)], weights)

    def _misfit(self, call: Call, branch: Branch, run: Run) -> None:
        """A call that was to be reused was computed after all."""
        self.runs.ledger.recount(run.number, call.moment.step, branch.track.number, Decision(False, Reason.SHAPE))
        track = branch.track
        track.reused, track.computed, track.streak, track.drift = track.reused - 1, track.computed + 1, 0, 0.0
        track.run.reused -= 1
        run.reused -= 1
        run.reasons.subtract({Reason.REUSE: 1, Reason.SHAPE: -1})
        call.shape_mismatch, branch.anchors = False, []


def _forms(guard: Signature) -> list[tuple[Any, ...]]:
    """The part of a guard that is about tensors."""
    return [entry for entry in guard if len(entry) > 2]


_GAUGES: dict[str, type[ChangeMetric]] = {"change": RelativeChange, "rate": OutputChangeEstimate}
