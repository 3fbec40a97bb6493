"""Settle a call before its first block runs: which run and branch it belongs to, compute or reuse, and with what."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Mapping
from typing import Any

from .branch import choose_branch, tensors
from .clock import Session, StepClock, Tick, current_session
from .policy import Interval
from .predictor import Reuse
from .state import Anchor, Branch, Call, Run, Signature, signature
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
        primary: the transformer's argument that holds the latents: its first.
        separate_cfg: whether a step's calls are branches by their order (``True``) or all alike (``False``); ``None``:
            they are told apart by what they are given.
    """

    def __init__(
        self,
        name: str,
        policy: Interval,
        predictor: Reuse,
        clock: StepClock,
        ledger: Ledger,
        primary: str | None,
        separate_cfg: bool | None = None,
    ) -> None:
        self.separate_cfg = separate_cfg
        self.name, self.policy, self.predictor, self.clock, self.ledger = name, policy, predictor, clock, ledger
        self.primary = primary
        self._runs: weakref.WeakKeyDictionary[Session, Run] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()  # of the dictionary; a run is its session's own
        self._said: set[str] = set()

    def settle(self, arguments: Mapping[str, Any] | None, seen: bool, capture: bool) -> Call:
        """The call that is about to begin.

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
        branch = run.branches.setdefault(number, Branch())
        branch.latents, branch.conditioning = latents, conditioning
        run.used.append(number)
        capture = capture or self.policy.wants_anchor(tick.step)
        call = self._decide(run, tick, branch, capture, signature(arguments) if capture else ())
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
            call.misfit, branch.anchor, branch.refreshed = False, None, None
        if call.capture and call.left and call.deltas:
            branch.anchor = Anchor(call.step, call.sigma, call.signature, call.deltas)
            branch.refreshed, call.deltas = call.step, ()

    def bytes_held(self) -> int:
        """Memory of all residuals kept now."""
        with self._lock:
            runs = list(self._runs.values())
        return sum(b.anchor.nbytes for run in runs for b in list(run.branches.values()) if b.anchor is not None)

    def forget(self) -> list[str]:
        """Drop all runs and their residuals; returns what is to be said of them."""
        with self._lock:
            runs = list(self._runs.values())
            self._runs.clear()
        return [remark for run in runs if (remark := self._judge(run)) and self._once("useless")]

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
        if run.epoch is None:
            run.epoch, run.length = tick.epoch, tick.steps
        if run.step is None and tick.steps is not None and (why := self.policy.hopeless(tick.steps)):
            self.say("useless", f"{self.name}: nothing will be reused: {why}")
        if tick.step != run.step:
            self._advance(run, tick.step)
        return run, tick

    def _start(self, session: Session, ended: Run | None) -> Run:
        run = Run(session.epoch)
        with self._lock:
            self._runs[session] = run
        if ended is not None and (remark := self._judge(ended)):
            self.say("useless", remark)
        return run

    def _advance(self, run: Run, step: int) -> None:
        """A run reaches another step: what no call of it can need any more is freed."""
        refresh = self.policy.last_refresh(step)
        for branch in run.branches.values():
            if branch.refreshed is not None and branch.refreshed < refresh:
                branch.anchor = None
        while len(run.branches) > MAX_BRANCHES:
            del run.branches[min(set(run.branches) - set(run.used), default=min(run.branches))]
        run.step, run.used = step, []
        run.steps += 1

    def _decide(self, run: Run, tick: Tick, branch: Branch, capture: bool, guard: Signature) -> Call:
        anchor = branch.anchor
        decision = self.policy.decide(tick.step, branch.refreshed)
        if decision.reuse and (anchor is None or anchor.signature != guard):
            switched = anchor is not None and _forms(anchor.signature) == _forms(guard)
            decision = decision._replace(reuse=False, reason="switch" if switched else "shape")
        self.ledger.count(*decision)
        run.reasons[decision.reason] += 1
        run.reused += decision.reuse
        call = Call(
            reuse=decision.reuse,
            capture=capture and not decision.reuse,
            step=tick.step,
            sigma=tick.sigma,
            signature=guard,
            branch=branch,
            run=run,
        )
        if decision.reuse and anchor is not None:
            call.deltas = self.predictor.predict(anchor, tick.step, tick.sigma)
        else:  # freed before the new one is made; a call cut short leaves nothing to reuse
            branch.anchor = branch.refreshed = None
        return call

    def _judge(self, run: Run) -> str | None:
        """What to say of a run that has ended: nothing, unless it went to its end and never reused."""
        cut_short = run.in_flight or (run.length is not None and run.steps < run.length)
        if cut_short or run.steps < 2 or run.reused:
            return None
        reasons = ", ".join(f"{reason}: {count}" for reason, count in run.reasons.items())
        return f"{self.name}: a run of {run.steps} steps reused nothing (calls computed for {reasons})"


def _breaks(run: Run, tick: Tick) -> bool:
    """Whether a call cannot go on with a run: another schedule, a step back, or steps left out."""
    if tick.epoch is not None and run.epoch is not None and tick.epoch is not run.epoch:
        return True
    return run.step is not None and not 0 <= tick.step - run.step <= 1


def _forms(guard: Signature) -> list[tuple[Any, ...]]:
    """The part of a guard that is about tensors."""
    return [entry for entry in guard if len(entry) > 2]
