"""The sampling runs of one range: where they begin and end, what is known of them, and what is said of them."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..blocks.block_io import parameter_names
from ..blocks.block_lists import Chain
from ..config.cache_config import DitCacheConfig
from ..policies.history import Schedule
from ..policies.policy import Policy
from ..stats.log import Ledger
from .call import Call, Run
from .clock import StepClock, Tick
from .rank_consensus import RankConsensus, shared_by_ranks
from .remarks import hopeless, unexpected, useless
from .sessions import Session, current_session

MAX_BRANCHES = 16  # calls at one step; more is a clock that stands still


class Runs:
    """The sampling runs of one range, at most one per thread or task, and what they remember.

    Args:
        chain: the transformer's blocks, and what is declared of its calls.
        config: when, what, and where it is kept.
        clock: tells the step of a call.
        ledger: counts the calls.
        together: the ranks that decide as one, where it looks; ``None``: this one decides by itself.
    """

    def __init__(
        self,
        chain: Chain,
        config: DitCacheConfig,
        clock: StepClock,
        ledger: Ledger,
        together: RankConsensus | None = None,
    ) -> None:
        self.name, self.config, self.clock, self.ledger = chain.name, config, clock, ledger
        self.policy, self.predictor, self.together = config.when, config.predictor, together
        self._model = chain.owner
        self.primary = next(iter(parameter_names(chain.owner)), None)  # the argument that holds the latents: the first
        # Whether a step's calls are branches by their order, or all alike; None: told apart by what they are given.
        self.separate_cfg = chain.separate_cfg
        self.expected = chain.expected
        self.peers: Sequence[Runs] = ()  # those of the handle, this one included
        self.on_kept: Callable[[Call, Sequence[Tensor]], None] | None = None  # is shown every residual
        self._runs: weakref.WeakKeyDictionary[Session, Run] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()  # of the dictionary; a run is its session's own
        self._said: set[str] = set()

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
            self._sum_up(run)
            if self.config.free_at_end:
                run.clear()

    def forget(self) -> list[str]:
        """Drop all runs and their residuals; returns what is to be said of them."""
        with self._lock:
            runs = list(self._runs.values())
            self._runs.clear()
        return [message for run in runs for topic, message in self._remarks(run) if self._once(topic)]

    def say(self, topic: str, message: str) -> None:
        """Warn, once per topic."""
        if self._once(topic):
            warnings.warn(message, UserWarning, stacklevel=2)

    def alone(self) -> list[str]:
        """What is to be said, once, where ranks run the model together and each would decide by itself."""
        if self.together is not None or self.policy.metric is None or "alone" in self._said:
            return []
        how = shared_by_ranks(self._model)
        if how is None or not self._once("alone"):
            return []
        return [
            f"{self.name}: {how}, and {type(self.policy).__name__} decides on each rank by what that sees: ranks that "
            "decide differently wait for each other for ever, or go on with each other's wrong weights or tokens. Let "
            "them decide as one: dit_cache(..., process_group=...), of all ranks that share the model; or take a "
            "policy that does not look"
        ]

    def _once(self, topic: str) -> bool:
        new = topic not in self._said
        self._said.add(topic)
        return new

    def locate(self, arguments: Mapping[str, Any], anew: bool = False) -> tuple[Run, Tick]:
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
            if run.schedule.blocks != self.ledger.blocks:  # the first call of all has shown that some do not count
                run.schedule = replace(run.schedule, blocks=self.ledger.blocks, skipped=self.ledger.skippable)
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
        if ended is not None:
            self._sum_up(ended)
        return run

    def _made_out(self, run: Run, tick: Tick) -> Policy:
        """What is known of a run at its first call, and the policy for that."""
        wanted = self.predictor.needs_sigmas or self.policy.needs_sigmas
        run.epoch = tick.epoch
        run.schedule = Schedule(
            tick.steps,
            tick.step,
            self.clock.sigmas(tick) if wanted else None,
            self.ledger.blocks,
            self.ledger.skippable,
        )
        run.scheduler_is_shared = tick.source == "scheduler" and self._taken(run)
        policy = self.policy.for_run(run.schedule)  # where this raises, the next call asks once more
        if remark := policy.warning_at_start(run.schedule):
            self.say("remark", f"{self.name}: {remark}")
        if remark := self.predictor.warning_at_start(run.schedule):
            self.say("unfitted", f"{self.name}: {remark}")  # as for the steps where that is found only then
        for remark in self.alone():
            warnings.warn(remark, UserWarning, stacklevel=2)
        single = tick.steps is not None and tick.steps - tick.step < 2
        run.judged = self.on_kept is not None or single  # to record is all that is wanted, or can be
        if tick.steps is not None and not run.judged and (why := hopeless(policy, run.schedule)):
            run.judged = True
            steps = tick.steps - tick.step
            message = f"{self.name}: nothing will be reused in a run of {steps} steps: {why} ({self.policy})"
            self.say(f"useless in {steps}", message)
        return policy

    def _taken(self, run: Run) -> bool:
        """Whether the schedule of a run is also that of another thread's or task's, which is not over."""
        with self._lock:
            others = [other for other in self._runs.values() if other is not run]
        if not any(other.epoch is run.epoch and not other.finished for other in others):
            return False
        self.say(
            "shared scheduler",
            f"{self.name} is called in several threads or tasks at once, and one scheduler tells the steps of all: "
            "that is right for one of them at most, so all but the first are computed. Give each its own, by `with "
            "handle.request(scheduler=...):`, or tell the steps, by `with timestep_scope(step):`; if it is one run "
            "that goes from thread to thread, put `with handle.request():` around it",
        )
        return True

    def _sum_up(self, run: Run) -> None:
        """Say what there is to say of a run that has ended."""
        for topic, message in self._remarks(run, over=True):
            self.say(topic, message)

    def _remarks(self, run: Run, over: bool = False) -> list[tuple[str, str]]:
        """Of a run that has ended: that it reused nothing, and that it was another one than expected."""
        if run.scheduler_is_shared:  # that has been said
            return []
        found = (
            (f"useless in {run.steps}", useless(run, self.policy)),
            ("unexpected", unexpected(run, self.expected, over)),
        )
        return [(topic, f"{self.name}: {why}") for topic, why in found if why is not None]

    def finish(self, run: Run) -> None:
        """The last call of a run's last step is over, as far as is known."""
        run.finished = True
        self.ledger.finished(run.number)
        self._sum_up(run)
        self._review(run)
        if self.config.free_at_end:
            run.clear()
        for peer in self.peers:
            if peer is not self:
                peer.release(current_session(), run)

    def _review(self, run: Run) -> None:
        """Compare a run with what was wanted of it; with what others of the handle have done in it."""
        assert run.policy is not None
        if run.scheduler_is_shared:
            return
        session = current_session()
        alike = [peer for peer in self.peers or (self,) if peer.policy == self.policy]
        runs = [(peer, peer._runs.get(session)) for peer in alike]
        parts = [(peer, each.account) for peer, each in runs if each is not None and each.epoch is run.epoch]
        parts = [(self, run.account), *(part for part in parts if part[0] is not self)]
        total = sum(account.calls * peer.ledger.blocks for peer, account in parts)
        left_out = sum(account.reused * peer.ledger.skippable for peer, account in parts)
        if review := run.policy.warning_at_end(total / max(total - left_out, 1)):
            self.say("review", f"{self.name}: {review}")


def _breaks(run: Run, tick: Tick) -> bool:
    """Whether a call cannot go on with a run: another schedule, a step back, or steps left out."""
    if tick.epoch is not None and run.epoch is not None and tick.epoch is not run.epoch:
        return True
    return run.step is not None and not 0 <= tick.step - run.step <= 1
