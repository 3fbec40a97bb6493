"""Settle a call: which run and branch it belongs to, compute or reuse, and with what."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .anchor import Anchor, Signature, combined
from .branch import choose_branch, tensors
from .clock import Session, StepClock, Tick, current_session
from .config import DitCacheConfig
from .gauge import Change, Gauge, Rate
from .policy.base import Decision, Policy, Schedule, Track
from .predictor import Moment, through
from .remarks import hopeless, useless
from .state import Branch, Call, Capture, Run, signature
from .stats import Ledger

UNFIT = ("no anchor", "unmeasured", "shape", "switch")  # reasons that are a branch's own
MAX_BRANCHES = 16  # calls at one step; more is a clock that stands still


class Runs:
    """The sampling runs of one range, at most one per thread or task, and what they remember.

    Args:
        name: of the transformer, for messages.
        config: when, what, and where it is kept.
        clock: tells the step of a call.
        ledger: counts the calls.
        primary: the transformer's argument that holds the latents: its first.
        separate_cfg: whether a step's calls are branches by their order (``True``) or all alike (``False``); ``None``:
            they are told apart by what they are given.
    """

    def __init__(
        self,
        name: str,
        config: DitCacheConfig,
        clock: StepClock,
        ledger: Ledger,
        primary: str | None,
        separate_cfg: bool | None = None,
    ) -> None:
        self.separate_cfg = separate_cfg
        self.name, self.config, self.clock, self.ledger = name, config, clock, ledger
        self.policy, self.predictor = config.when, config.predictor
        self.primary = primary
        self.peers: Sequence[Runs] = ()  # those of the handle, this one included
        self.on_kept: Callable[[Call, Sequence[Tensor]], None] | None = None  # is shown every residual
        self._runs: weakref.WeakKeyDictionary[Session, Run] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()  # of the dictionary; a run is its session's own
        self._said: set[str] = set()

    def settle(self, arguments: Mapping[str, Any] | None, seen: bool, capture: bool) -> Call:
        """The call that is about to begin; decided, or ``pending``.

        ``seen`` is whether the transformer itself was seen called; ``capture`` asks for the residual of every computed
        call, not only where it can be reused.
        """
        arguments = arguments or {}
        latents, conditioning = tensors(arguments, self.primary)
        run, tick = self._locate(arguments)
        number: int | None
        if tick.branch is not None:
            number = tick.branch
        elif self.separate_cfg is None:
            number = choose_branch(run, latents, conditioning)
        else:
            number = len(run.used) if self.separate_cfg else 0
        if number is None:
            run, tick = self._locate(arguments, anew=True)
            number = 0
        branch = run.branches.setdefault(number, Branch(Track(number, account=run.account)))
        if branch.open:  # its last computed call was cut short: nothing of it is to be reused
            branch.clear()
        if self.policy.gauge is not None and branch.gauge is None:
            branch.gauge = _GAUGES[self.policy.gauge](self.policy.reduce)
        run.account.branches = max(run.before[0], len(run.used) + 1)
        branch.latents, branch.conditioning, branch.called = latents, conditioning, tick.step
        run.used.append(number)
        call = self._begin(run, tick, branch, arguments, capture)
        run.in_flight = seen
        return call

    def judge(self, call: Call) -> None:
        """Settle a call that is pending, by what is seen at the range's first block."""
        run, branch = call.run, call.branch
        assert run is not None
        assert branch is not None
        assert run.policy is not None
        change = None if call.seen is None or branch.gauge is None else branch.gauge.look(call.seen)
        if change is None:  # a rate takes two computed steps
            decision = Decision(False, "unmeasured")
        else:
            decision = run.policy.judge(call.moment.step, branch.track, run.schedule, float(change.item()))
            run.shared = run.shared or decision
        self._conclude(call, decision)

    def inert(self) -> Call:
        """A call with gradients: trained models are not cached."""
        self.ledger.count(Decision(False, "gradients"))
        self.say(
            "gradients",
            f"{self.name} is called with gradients enabled, so nothing is cached or reused: "
            "sample under torch.no_grad() or torch.inference_mode()",
        )
        return Call()

    def keep(self, call: Call) -> None:
        """A call is over: what it computed is the branch's newest anchor."""
        branch, run = call.branch, call.run
        if branch is None or run is None:
            return
        if call.pending:
            self._conclude(call, Decision(False, "not reached"))
        if call.misfit:
            self._misfit(call, branch, run)
        branch.open = False
        computed = None
        if call.capture and call.range.left and call.range.deltas and not call.unsound:
            config, deltas, call.range.deltas = self.config, call.range.deltas, ()
            if self.on_kept is not None:
                self.on_kept(call, deltas)
            anchor = Anchor.keep(call.moment, call.signature, deltas, config.dtype, config.cache_device)
            branch.anchors.insert(0, anchor)
            branch.track.refreshed = call.moment.step
            computed = call.range.output or deltas
        elif not call.reuse:  # older ones are not to be used as if they were this one
            branch.clear()
        if branch.gauge is not None and call.seen is not None:
            branch.gauge.note(call.seen, computed)
        call.seen = None
        self.ledger.held(self.bytes_held())
        if run.last and not run.finished and len(run.used) >= max(run.before):
            self._finish(run)

    def bytes_held(self) -> int:
        """Memory of all that is kept now."""
        with self._lock:
            runs = list(self._runs.values())
        return sum(run.nbytes for run in runs)

    def release(self, session: Session, ended: Run) -> None:
        """Free a run that another transformer has taken over from this one, and brought to its end."""
        run = self._runs.get(session)
        if run is not None and run.epoch is ended.epoch and run.step is not None and run.step < ended.schedule.first:
            run.finished = True
            if remark := self._useless(run):
                self.say(f"useless in {run.steps}", remark)
            if self.config.free_at_end:
                run.clear()

    def forget(self) -> list[str]:
        """Drop all runs and their residuals; returns what is to be said of them."""
        with self._lock:
            runs = list(self._runs.values())
            self._runs.clear()
        remarks = [remark for run in runs if (remark := self._useless(run)) and self._once(f"useless in {run.steps}")]
        return remarks

    def say(self, topic: str, message: str) -> None:
        """Warn, once per topic."""
        if self._once(topic):
            warnings.warn(message, UserWarning, stacklevel=2)

    def _once(self, topic: str) -> bool:
        new = topic not in self._said
        self._said.add(topic)
        return new

    def _locate(self, arguments: Mapping[str, Any], anew: bool = False) -> tuple[Run, Tick]:
        """The run this call belongs to, and where in it; ``anew``: it is known to be the first of another."""
        session = current_session()
        run = self._runs.get(session)
        if run is None or run.in_flight or run.session_epoch != session.epoch or anew:
            run = self._start(session, run)
        tick = self.clock.read(arguments, run.history)
        if tick.restart or _breaks(run, tick):
            run = self._start(session, run)
            tick = self.clock.read(arguments, run.history)
        if tick.step == run.step and len(run.used) >= MAX_BRANCHES and tick.branch is None:
            self.say(
                "standstill",
                f"{self.name} was called {len(run.used)} times at step {tick.step} (told by the {tick.source}), so "
                "nothing could be reused: if these were different steps, say so with `with timestep_scope(step): ...`",
            )
            run = self._start(session, None)
        run.policy = run.policy or self._made_out(run, tick)
        if tick.step != run.step:
            run.before = (len(run.used), run.before[0])
            run.step, run.used, run.shared = tick.step, [], None
            run.steps += 1
            for branch in run.branches.values():
                idle = tick.step - branch.called
                if run.policy.outdated(tick.step, branch.track, idle, self.predictor.anchors):
                    branch.free()
            while len(run.branches) > MAX_BRANCHES:
                del run.branches[min(run.branches)]
        return run, tick

    def _start(self, session: Session, ended: Run | None) -> Run:
        run = Run(session.epoch, self.ledger.begin())
        with self._lock:
            self._runs[session] = run
        if ended is not None and ended.last and not ended.finished and not ended.in_flight:
            self._review(ended)
        if ended is not None and (remark := self._useless(ended)):
            self.say(f"useless in {ended.steps}", remark)
        return run

    def _made_out(self, run: Run, tick: Tick) -> Policy:
        """What is known of a run at its first call, and the policy for that."""
        wanted = self.predictor.anchors > 1 or self.policy.needs_sigmas
        run.epoch = tick.epoch
        run.schedule = Schedule(
            tick.steps,
            tick.step,
            self.clock.sigmas(tick) if wanted else None,
            self.ledger.blocks,
            self.ledger.skippable,
        )
        policy = self.policy.for_run(run.schedule)  # where this raises, the next call asks once more
        if remark := policy.remark(run.schedule):
            self.say("remark", f"{self.name}: {remark}")
        single = tick.steps is not None and tick.steps - tick.step < 2
        run.judged = self.on_kept is not None or single  # to record is all that is wanted, or can be
        if tick.steps is not None and not run.judged and (why := hopeless(policy, run.schedule)):
            run.judged = True
            steps = tick.steps - tick.step
            message = f"{self.name}: nothing will be reused in a run of {steps} steps: {why} ({self.policy})"
            self.say(f"useless in {steps}", message)
        return policy

    def _begin(self, run: Run, tick: Tick, branch: Branch, arguments: Mapping[str, Any], capture: bool) -> Call:
        assert run.policy is not None
        keeps = run.policy.keeps(tick.step, self.predictor.anchors) and not run.last
        capture = capture or keeps or self.on_kept is not None
        call = Call(
            capture=capture,
            gauged=branch.gauge is not None,
            lead=Capture() if run.policy.gauge == "change" else None,
            moment=self._moment(run, tick),
            signature=signature(arguments) if capture or branch.anchors else (),
            branch=branch,
            run=run,
        )
        decision: Decision | None
        if run.shared is not None and not run.policy.separate_branches:
            decision = run.shared._replace(value=None)
        else:
            decision = run.policy.before(tick.step, branch.track, run.schedule)
        if decision is None or decision.reuse:
            decision = self._unfit(call, branch) or decision
        if decision is None:
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

    def _unfit(self, call: Call, branch: Branch) -> Decision | None:
        """Why there is nothing to be reused, if so."""
        if not branch.anchors:
            return Decision(False, "no anchor")
        former = branch.anchors[0].signature
        if former == call.signature:
            return None
        return Decision(False, "switch" if _forms(former) == _forms(call.signature) else "shape")

    def _conclude(self, call: Call, decision: Decision) -> None:
        """A call is decided."""
        run, branch = call.run, call.branch
        assert run is not None
        assert branch is not None
        if run.policy is not None and not run.policy.separate_branches and run.shared is None:
            run.shared = decision if decision.reason not in UNFIT else None
        branch.track.note(call.moment.step, decision)
        self.ledger.count(decision, run.number, call.moment.step, branch.track.number)
        run.reasons[decision.reason] += 1
        run.reused += decision.reuse
        if decision.value is not None:
            run.values.append(decision.value)
        call.pending, call.reuse, call.unsound = False, decision.reuse, decision.reason == "non-finite"
        if decision.reuse:
            call.capture, call.deltas = False, self._predicted(branch, call.moment)
            return
        branch.open = True
        fitting = [anchor for anchor in branch.anchors if anchor.signature == call.signature]
        branch.anchors = fitting[: self.predictor.anchors - 1]  # freed before the new one is made

    def _predicted(self, branch: Branch, now: Moment) -> tuple[Tensor, ...]:
        """The residual of a reused step."""
        fitting = [each for each in branch.anchors if each.signature == branch.anchors[0].signature]
        moments = [anchor.moment for anchor in fitting]
        weights = self.predictor.weights(moments, now)
        if weights is None:
            self.say(
                "unfitted",
                f"{self.name}: step {now.step} follows computed steps {[m.step for m in moments]}, for which "
                f"{type(self.predictor).__name__} has no coefficients: the line through the last two is taken",
            )
            weights = through(moments[:2], now, "sigma")
        return combined(fitting[: len(weights)], weights)

    def _misfit(self, call: Call, branch: Branch, run: Run) -> None:
        """A call that was to be reused was computed after all."""
        self.ledger.recount(run.number, call.moment.step, branch.track.number, Decision(False, "shape"))
        track = branch.track
        track.reused, track.computed, track.streak, track.drift = track.reused - 1, track.computed + 1, 0, 0.0
        track.account.reused -= 1
        run.reused -= 1
        run.reasons.subtract({"reuse": 1, "shape": -1})
        call.misfit, branch.anchors = False, []

    def _useless(self, run: Run) -> str | None:
        """What to say of a run that has ended, if it reused nothing."""
        why = useless(run, self.policy)
        return None if why is None else f"{self.name}: {why}"

    def _finish(self, run: Run) -> None:
        """The last call of a run's last step is over, as far as is known."""
        run.finished = True
        if remark := self._useless(run):
            self.say(f"useless in {run.steps}", remark)
        self._review(run)
        if self.config.free_at_end:
            run.clear()
        for peer in self.peers:
            if peer is not self:
                peer.release(current_session(), run)

    def _review(self, run: Run) -> None:
        """Compare a run with what was wanted of it; with what others of the handle have done in it."""
        assert run.policy is not None
        session = current_session()
        alike = [peer for peer in self.peers or (self,) if peer.policy == self.policy]
        runs = [(peer, peer._runs.get(session)) for peer in alike]
        parts = [(peer, each.account) for peer, each in runs if each is not None and each.epoch is run.epoch]
        parts = [(self, run.account), *(part for part in parts if part[0] is not self)]
        total = sum(account.calls * peer.ledger.blocks for peer, account in parts)
        left_out = sum(account.reused * peer.ledger.skippable for peer, account in parts)
        if review := run.policy.review(total / max(total - left_out, 1)):
            self.say("review", f"{self.name}: {review}")


def _breaks(run: Run, tick: Tick) -> bool:
    """Whether a call cannot go on with a run: another schedule, a step back, or steps left out."""
    if tick.epoch is not None and run.epoch is not None and tick.epoch is not run.epoch:
        return True
    return run.step is not None and not 0 <= tick.step - run.step <= 1


def _forms(guard: Signature) -> list[tuple[Any, ...]]:
    """The part of a guard that is about tensors."""
    return [entry for entry in guard if len(entry) > 2]


_GAUGES: dict[str, type[Gauge]] = {"change": Change, "rate": Rate}
