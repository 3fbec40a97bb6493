"""One call's way through a cached range: decide, then either watch the blocks run or stand in for them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..blocks.observation import Observation
from ..blocks.wiring import Wiring
from ..errors import InvalidSetting, RunMismatch, WiringError
from ..integrations.dispatch import Integrations
from ..stats.timing import device_of, mark
from .active_calls import ActiveCalls
from .anchor import weighted_sum
from .block_range import BlockRange
from .call import Call, Capture
from .capture import capture_input, capture_output, copied, effect, finish_capture, metric_inputs
from .compile_state import is_tracing_or_exporting, mark_compiled, mark_time
from .decider import Settler
from .replay import Replay, replaying
from .residual import apply_residual
from .sessions import current_telling
from .verification import Verification, filled


class RangeCache:
    """The runtime of one range of one transformer.

    Args:
        settler: of each call.
        layout: which blocks the range is.
        compiled: whether the transformer or a block of it is known to be compiled.
        verify: test the first residual on the call it was taken from.
    """

    def __init__(self, settler: Settler, layout: BlockRange, compiled: Callable[[], bool], verify: bool) -> None:
        self.settler, self.runs, self.layout = settler, settler.runs, layout
        self.compiled, self.unverified = compiled, verify
        self.company = Integrations()  # told by the attachment whose blocks they are
        self.on_wired: Callable[[bool], None] | None = None  # given whether the range is now other blocks
        self.on_traced: Callable[[], None] | None = None  # told once that compiled code has run the range
        self.handle: Any = None  # whose it is: found by the hooks, it need not be kept anywhere else
        self.others: Callable[[], Sequence[Any]] = tuple  # further flows on the transformer: aside in replays
        self._local = threading.local()  # a call never leaves its thread; two threads never see each other's
        self.under_way = ActiveCalls()
        self._learning = threading.Lock()  # one call at a time says how the blocks are wired …
        self._moving = False  # … and while it puts stand-ins elsewhere, others begin as plain ones
        self.trials = Verification(self)
        self._again = torch.compiler.disable(self._restart)  # not as a decorator: that would import the compiler early
        self._judge = torch.compiler.disable(settler.judge)

    # -- the transformer is called, and has returned ------------------------------------------------------------

    def begin(self, arguments: Mapping[str, Any] | None, replay: Replay | None = None) -> None:
        """Settle a call before its first block runs.

        ``arguments`` are the transformer's, if it was seen called, and ``replay`` calls it once more.
        """
        if is_tracing_or_exporting():
            self._local.call = None
            return
        begun, device = None, device_of(arguments)
        if replay is not None:
            begun = mark(device)
        self._local.arguments, self._local.replay, self._local.last = arguments, replay, None
        self._local.telling = current_telling()
        self.company.look()
        if self._moving:
            with self._learning:  # in another thread, which is waited for; or it was interrupted, and is done once more
                if self._moving:
                    self._arrive()
        if self.layout.wiring is None and replay is not None and self.compiled() and not self.under_way.closed:
            self._rehearse(replay)
        # Compiled code captures always: one graph less. Else warm-up steps are spared it.
        if self.under_way.closed:  # not all hooks are in yet, or not all off: a plain call, of which nothing is learnt
            call = Call()
        elif torch.is_grad_enabled():
            call = self.settler.inert()
        else:
            call = self.settler.settle(arguments, seen=replay is not None, capture=self.compiled())
        if self.layout.wiring is None and not self.under_way.closed:
            call.observation = Observation(self.layout.spots, whole=replay is not None)
        if replay is not None and (self.layout.wiring is None or (self.unverified and call.capture)):
            replay.keep()  # it may have to be made again, to learn from it
        call.stale, call.device, call.marks = self._moving, device, [] if begun is None else [begun]
        self.under_way.add(call)
        self._local.call = call

    def finish(self, output: Any) -> None:
        """The transformer has returned.

        Raises:
            WiringError: on the first call, when the streams of the range cannot be followed, or its residual, added
                on the very call it was taken from, does not give that call's output.
            RuntimeError: a reused range was entered and not left, so that its effect is missing.
        """
        call, replay = getattr(self._local, "call", None), getattr(self._local, "replay", None)
        self._local.call = self._local.arguments = self._local.replay = None
        if call is None:
            return
        if not call.stale:
            if call.reuse and call.entered and not call.left:
                first, last = self.layout.first, self.layout.last
                raise RunMismatch(
                    f"{self.runs.name}: step {call.moment.step} reused {first} … {last}, but the model did "
                    f"not call {last}: the output lacks the range's effect. Choose a range that ends before "
                    "blocks that are skipped at times"
                )
            self._conclude(call, replay, output)
            learning = any(other.unverified or other.layout.wiring is None for other in self.others())
            call.results, self._local.last = None, call if learning else None  # they may have to make it again
            self.settler.timed(call)
        if call.run is not None:
            call.run.in_flight = False

    @property
    def call(self) -> Call | None:
        """The call under way in this thread, if the range is still where it was when it began."""
        call = self.current
        return call if call is not None and not call.stale else None

    @property
    def current(self) -> Call | None:
        """The call under way in this thread."""
        call: Call | None = getattr(self._local, "call", None)
        return call

    @current.setter
    def current(self, call: Call | None) -> None:
        self._local.call = call

    @property
    def latest(self) -> Call | None:
        """The last call that is over, until the next begins."""
        call: Call | None = getattr(self._local, "last", None)
        return call

    # -- blocks -------------------------------------------------------------------------------------------------

    def passed(self, offset: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a stand-in returns in place of its block's output; ``NotImplemented`` where the block has to run.

        It is asked for every block of every call: what most of them come to is settled here, without further calls.
        """
        call: Call | None = getattr(self._local, "call", None)
        if offset == 0 or call is None or call.stale:
            call = self.visit(offset, args, kwargs)
        if call is None or not call.reuse or call.left:
            return NotImplemented
        if call.results is not None and call.probe is None and (ports := self.layout.inner[offset]) is not None:
            return ports.pass_on(args, kwargs)
        output = self.skip(offset, call, args, kwargs)
        return output if call.reuse else NotImplemented

    def visit(self, offset: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """The range's first block is called, or one that belongs to no call that is followed: the call it is of."""
        call: Call | None = getattr(self._local, "call", None)
        if call is not None and call.stale and not (offset and call.passing):
            if offset or getattr(self._local, "replay", None) is not None:
                return None
            call = None  # the blocks are driven without the transformer: nothing else ends it
        if offset == 0:
            if not torch.compiler.is_dynamo_compiling():
                self._check_told(call)
            if call is None or call.entered:  # the blocks are driven without the transformer, or once more in one call
                call = self._again(call)
            if call is None:
                return None
            call.entered = True
            mark_compiled(call)
            if call.stale:  # just now, in another thread
                call.reuse = call.pending = False
                return None
            if call.is_measured:
                if self.layout.wiring is not None:
                    call.seen = self._seen(call, self.layout.wiring, *self.company.entering(args, kwargs))
                if call.pending:
                    self._judge(call)
        return call

    def skip(self, offset: int, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A block's output on a reused step: its streams passed on, from the last block h_in + Δ̂.

        If the residual does not fit after all, ``call.reuse`` is taken back and the block has to run.
        """
        wiring = self.layout.wiring
        assert wiring is not None
        ports, first, last = wiring.ports[offset], call.results is None, offset == len(wiring.ports) - 1
        if offset == 0:
            args, kwargs = self.company.entering(args, kwargs)
        if call.probe is not None:
            if last:
                self.company.passed_over()
            return self.trials.passed(call, call.probe, offset, args, kwargs)
        if first:
            streams = [ports.read(name, args, kwargs) for name in wiring.entry] if offset == 0 else []
            call.results = apply_residual(wiring, streams, call.deltas)
            if call.results is None:
                call.reuse, call.capture, call.shape_mismatch, call.deltas = False, True, True, ()
                return None
        if last:
            self.company.passed_over()
            call.left = True
            assert call.results is not None
            results = iter(call.results)
            return ports.build([None if bridge is None else next(results) for bridge in wiring.leave], args, kwargs)
        read = ports.face.read
        passed = [None if name is None else read(name, args, kwargs) for name in ports.carries]
        if first:  # by value: a parent that adds in place must not reach what the range was given
            passed = [value.clone() if isinstance(value, Tensor) else value for value in passed]
        if any(ports.born):
            passed = filled(ports, passed, wiring.shapes(call.deltas))
        return ports.maker(passed, args, kwargs)

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The range's first block is about to run: keep −h_in, by value."""
        call = self.call
        if call is not None and call.capture:
            mark_compiled(call)
            layout = self.layout
            call.capture = capture_input(call.range, layout.wiring, layout.spot(layout.start), args, kwargs)
            mark_time(call)

    def leave(self, output: Any) -> None:
        """The range's last block has run: Δ = h_out − h_in."""
        call = self.call
        if call is not None and call.capture and not call.left:
            call.left = True
            mark_compiled(call)
            mark_time(call)
            layout, wholly = self.layout, self.runs.policy.metric == "rate"
            capture_output(call.range, layout.wiring, layout.spot(layout.end), output, wholly)

    def enter_lead(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The first block of those before the range is about to run."""
        call = self.call
        if call is not None and call.lead is not None and not call.entered:
            mark_compiled(call)
            capture_input(call.lead, self.layout.leading, self.layout.spot(0), args, kwargs)

    def leave_lead(self, output: Any) -> None:
        """The last block of those before the range has run."""
        call = self.call
        if call is not None and call.lead is not None and not call.entered and call.lead.entry is not None:
            mark_compiled(call)
            capture_output(call.lead, self.layout.leading, self.layout.spot(self.layout.lead - 1), output)

    def watch_enter(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Any block of the chain is about to run, on a call that is observed."""
        if torch.compiler.is_dynamo_compiling():
            return
        if (call := self.call) is not None and call.observation is not None:
            call.observation.enter(index, args, kwargs)

    def watch_leave(self, index: int, output: Any) -> None:
        """… and has run."""
        if torch.compiler.is_dynamo_compiling():
            return
        if (call := self.call) is not None and call.observation is not None:
            call.observation.leave(index, output)

    def forget(self) -> list[str]:
        """Drop all that was cached, and any call under way; returns what is to be said of it."""
        self.under_way.expire()
        self._local.last = None
        if (call := self.current) is not None:  # an exception has ended it, and whoever keeps that keeps the call
            call.run = call.branch = None
            if not call.passing:
                call.deltas, call.results, call.range, call.lead, call.seen = (), None, Capture(), None, None
                self._local.arguments, call.observation = None, None
        return self.runs.forget()

    # -- inside -------------------------------------------------------------------------------------------------

    def _restart(self, before: Call | None) -> Call | None:
        """The first block is reached without a call of the transformer, or once more in the same: start one here."""
        if replaying.get() or is_tracing_or_exporting():  # by another cache on this model, or as a plain one
            return None
        if before is None and self._is_unknown():
            return None
        if before is not None:
            self._settle(before)
            if self.unverified and getattr(self._local, "replay", None) is not None:
                raise WiringError(
                    f"{self.layout.first} runs several times in one call of {self.runs.name}: what happens in "
                    "between cannot be followed. Choose other blocks; or, if you know better, give verify=False"
                )
            if before.run is not None:
                before.run.in_flight = False
        self.begin(getattr(self._local, "arguments", None), getattr(self._local, "replay", None))
        return self.call

    def _is_unknown(self) -> bool:
        """Whether it may be the rest of a call that began before the hooks were in: nothing tells its step.

        That is so once in a thread, at most: the next such call says what is missing.
        """
        met, self._local.met = getattr(self._local, "met", False), True
        return not met and not self.runs.clock.knows(getattr(self._local, "arguments", None))

    def _check_told(self, call: Call | None) -> None:
        """See that the step of a call is the one that was told when it was settled."""
        seen = call is not None and not call.entered and getattr(self._local, "replay", None) is not None
        if seen and not replaying.get() and current_telling() is not self._local.telling:
            raise InvalidSetting(
                f"{self.runs.name}: a step was told between its call and that of {self.layout.first}, and by then the "
                "call was settled: tell it before the transformer is called"
            )

    def _conclude(self, call: Call, replay: Replay | None, output: Any) -> None:
        """Learn from a call that is over, keep its residual, and test the first."""
        unseen = call.observation is not None and call.observation.empty and call.entered
        wanted = call.capture
        moved = self._settle(call)
        if moved and wanted and replay is not None and replay.safe:  # of the range as it now is, nothing was kept
            again = replace(call, capture=True, entered=False, left=False, range=Capture(), seen=None)
            again.lead = None if call.lead is None else Capture()
            self.trials.repeat(replay, again)
            self._settle(again)
        if unseen and replay is not None:  # compiled from the outside: nothing could be watched
            self._rehearse(replay)
        branch = call.branch
        if self.unverified and replay is not None and branch is not None and branch.anchors and not call.reuse:
            anchors, refreshed = branch.anchors, branch.track.refreshed
            branch.anchors, branch.track.refreshed = [], None  # refused, or interrupted, they are not to be used
            self.unverified = not self.trials.test(replay, weighted_sum(anchors[:1], (1.0,)), output)
            branch.anchors, branch.track.refreshed = anchors, refreshed

    def _rehearse(self, replay: Replay) -> None:
        """Learn the wiring from a call of our own, outside of any compiled code. Happens once, if at all."""
        call = Call(observation=Observation(self.layout.spots))
        self.trials.repeat(replay, call, eager=self.compiled())
        self._settle(call)

    def _settle(self, call: Call) -> bool:
        """A call is over: learn the wiring if it was observed, and keep the residual it computed.

        Returns whether the range turned out to be other blocks than those it was attached to.
        """
        moved, layout = False, self.layout
        observation, call.observation = call.observation, None
        if observation is not None:
            observation.close()
            with self._learning:
                moved = layout.wiring is None and not call.stale and self._wire(observation, call)
        if call.stale:  # another thread's call has moved the range
            return False
        if layout.wiring is not None and isinstance(call.range.entry, dict):  # it was captured before that was known
            if call.is_measured and not layout.lead:
                named = call.range.entry
                call.seen = metric_inputs(layout.wiring, lambda name: None if name not in named else -named[name])
            finish_capture(call.range, layout.wiring, self.runs.policy.metric == "rate")
        if layout.leading is not None and call.lead is not None and isinstance(call.lead.entry, dict):
            finish_capture(call.lead, layout.leading)
            call.seen = effect(call.lead, layout.leading)
        if call.traced:  # with CUDA graphs the next call overwrites its outputs: what is kept must not be these
            own = [copied(each) for each in (call.range.deltas, call.range.output, call.seen)]
            call.range.deltas, call.range.output, call.seen = own[0] or (), own[1], own[2]
            if self.on_traced is not None:
                self.on_traced()
                self.on_traced = None
        self.settler.keep(call)
        return moved

    def _seen(
        self, call: Call, wiring: Wiring, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, ...] | None:
        """What the policy looks at: what the blocks before the range did, or what enters it."""
        mark_compiled(call)
        if self.layout.lead:
            leading = self.layout.leading
            return None if call.lead is None or leading is None else effect(call.lead, leading)
        seen = metric_inputs(wiring, lambda name: wiring.ports[0].read(name, args, kwargs))
        return None if seen is None else tuple(each.clone() for each in seen)

    def _wire(self, observation: Observation, call: Call) -> bool:
        """Count the blocks as they were called, and follow the streams through the range."""
        try:
            shown = self.layout.read(observation, self.runs.name)
        except WiringError:
            if call.stale:  # taken off in the middle of it: what was seen is not the whole
                return False
            raise
        if shown is None or call.stale:
            return False
        if shown.moved:  # other blocks than those that were thought to be the range: what was captured is not theirs
            call.capture, call.range, call.lead = False, Capture(), None if call.lead is None else Capture()
            self._moving = True
            self.under_way.expire(but=call)
        for remark in dict.fromkeys(ports.remark for ports in shown.wiring.ports if ports.remark):
            self.runs.say("pattern", f"{self.runs.name}: {remark}")
        self.layout.become(shown)
        self._arrive()
        return shown.moved

    def _arrive(self) -> None:
        """Let the attachment take note; interrupted, it is done when the next call begins."""
        if self.on_wired is not None:
            self.on_wired(self._moving)
        self._moving = False
