"""Settle a call before its first block runs: which run and branch it belongs to, compute or reuse, and with what."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from typing import Any

from .branch import choose_branch, remember
from .clock import Session, StepClock, Tick, current_session
from .policy import Interval
from .predictor import Reuse
from .state import Anchor, Branch, Call, Run, signature
from .stats import Ledger

MAX_BRANCHES = 16  # calls at one step; more is a clock that stands still


class Runs:
    """The sampling runs of one transformer, at most one per thread or task, and what they remember.

    Args:
        name: of the transformer, for messages.
        policy: when.
        predictor: what.
        clock: tells the step of a call.
        ledger: counts the calls.
    """

    def __init__(self, name: str, policy: Interval, predictor: Reuse, clock: StepClock, ledger: Ledger) -> None:
        self.name, self.policy, self.predictor, self.clock, self.ledger = name, policy, predictor, clock, ledger
        self._runs: weakref.WeakKeyDictionary[Session, Run] = weakref.WeakKeyDictionary()
        self._said: set[str] = set()

    def settle(self, arguments: Mapping[str, Any] | None, seen: bool) -> Call:
        """The call that is about to begin; ``seen`` is whether the transformer itself was seen called."""
        run, tick = self._locate(arguments)
        call = self._decide(run, tick, arguments or {})
        run.in_flight = seen
        return call

    def inert(self) -> Call:
        """A call with gradients: trained models are not cached."""
        self.ledger.count(False, "gradients")
        self.say(
            "gradients",
            f"{self.name} is called with gradients enabled, so nothing is cached or reused: "
            "sample under torch.no_grad() or torch.inference_mode()",
        )
        return Call()

    def keep(self, call: Call) -> None:
        """A call is over: what it computed is the branch's new anchor."""
        branch = call.branch
        if branch is None:
            return
        if call.misfit:
            self.ledger.recount((True, "reuse"), (False, "shape"))
            call.misfit, branch.anchor = False, None
        if call.capture and call.left and call.deltas:
            branch.anchor = Anchor(call.step, call.sigma, call.signature, call.deltas)
            call.deltas = ()

    def bytes_held(self) -> int:
        """Memory of all residuals kept now."""
        runs = list(self._runs.values())
        return sum(b.anchor.nbytes for run in runs for b in list(run.branches.values()) if b.anchor is not None)

    def forget(self) -> None:
        """Drop all runs and their residuals."""
        for run in list(self._runs.values()):
            self._judge(run)
        self._runs.clear()

    def say(self, topic: str, message: str) -> None:
        """Warn, once per topic."""
        if topic not in self._said:
            self._said.add(topic)
            warnings.warn(message, UserWarning, stacklevel=2)

    def _locate(self, arguments: Mapping[str, Any] | None) -> tuple[Run, Tick]:
        """The run this call belongs to, and where in it."""
        session = current_session()
        run = self._runs.get(session)
        if run is None or run.in_flight or run.session_epoch != session.epoch:
            run = self._start(session, run)
        tick = self.clock.read(arguments, run.history)
        other = tick.epoch is not None and run.epoch is not None and tick.epoch is not run.epoch
        if tick.restart or other or (run.step is not None and tick.step < run.step):
            run = self._start(session, run)
            tick = self.clock.read(arguments, run.history)
        if tick.step == run.step and len(run.used) >= MAX_BRANCHES and tick.branch is None:
            self.say(
                "standstill",
                f"{self.name} was called {len(run.used)} times at step {tick.step} (told by the {tick.source}), so "
                "nothing could be reused: if these were different steps, say so with `with timestep_scope(step): ...`",
            )
            run = self._start(session, None)
        if run.epoch is None:
            run.epoch, run.length = tick.epoch, tick.steps
        if run.step is None and tick.steps is not None and (why := self.policy.hopeless(tick.steps)):
            self.say("useless", f"{self.name}: nothing will be reused: {why}")
        if tick.step != run.step:
            run.step, run.used = tick.step, set()
            run.steps += 1
        return run, tick

    def _start(self, session: Session, ended: Run | None) -> Run:
        if ended is not None:
            self._judge(ended)
        run = self._runs[session] = Run(session.epoch)
        return run

    def _decide(self, run: Run, tick: Tick, arguments: Mapping[str, Any]) -> Call:
        number = choose_branch(run, arguments) if tick.branch is None else tick.branch
        branch = run.branches.setdefault(number, Branch())
        remember(branch, arguments)
        run.used.add(number)
        anchor, guard = branch.anchor, signature(arguments)
        decision = self.policy.decide(tick.step, None if anchor is None else anchor.step)
        if decision.reuse and anchor is not None and anchor.signature != guard:
            decision = decision._replace(reuse=False, reason="shape")
        self.ledger.count(*decision)
        run.reasons[decision.reason] += 1
        run.reused += decision.reuse
        call = Call(
            reuse=decision.reuse,
            capture=not decision.reuse,
            step=tick.step,
            sigma=tick.sigma,
            signature=guard,
            branch=branch,
            run=run,
        )
        if decision.reuse and anchor is not None:
            call.deltas = self.predictor.predict(anchor, tick.step, tick.sigma)
        else:
            branch.anchor = None  # freed before the new one is made; a call cut short leaves nothing to reuse
        return call

    def _judge(self, run: Run) -> None:
        """A run has ended: if it never reused, say so, unless it was cut short."""
        if run.in_flight or (run.length is not None and run.steps < run.length):
            return
        if run.steps > 1 and not run.reused:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in run.reasons.items())
            self.say(
                "useless", f"{self.name}: a run of {run.steps} steps reused nothing (calls computed for {reasons})"
            )
