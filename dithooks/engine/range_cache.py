"""One cached range at run time: what hooks and stand-ins call, from the transformer's call to its return."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks.block_io import bind
from ..blocks.observation import Observation
from ..blocks.wiring import Wiring
from ..errors import InvalidSetting, RunMismatch, WiringError
from ..stats.timing import marker_for
from .active_calls import ActiveCalls
from .anchor import weighted_sum
from .block_range import BlockRange
from .call import (
    AFTER,
    ASK,
    BEFORE,
    CAPTURE,
    INSIDE,
    MISMATCH,
    PLAIN,
    REUSE,
    RUN,
    SKIP,
    UNDECIDED,
    Call,
    Capture,
    Shortcut,
)
from .change_metrics import METRICS
from .decider import CallDecider
from .protocols import Integrations
from .replay import Replay, replaying
from .residual import (
    apply_residual,
    capture_input,
    capture_output,
    clones,
    finish_capture,
    measured_deltas,
    metric_inputs,
)
from .verification import Verification, fill_new_outputs

_COMPILED_CALL, _VERSION = attrgetter("_compiled_call_impl"), attrgetter("_version")


class CallState(threading.local):
    """The call under way in a thread: it never leaves its thread, and two threads never see each other's."""

    call: Call | None = None
    shortcut: Shortcut = ASK  # of stand-ins between the two ends of the range
    latest: Call | None = None  # the last one that is over, until the next begins, where others may repeat it
    arguments: Mapping[str, Any] | None = None  # of the transformer
    replay: Replay | None = None  # makes the call again, where it may have to be made again
    transformer_was_called: bool = False  # the transformer itself was called, not only its blocks
    met_unknown_step: bool = False  # a call was met of which nothing was known

    def __init__(self, active: ActiveCalls) -> None:  # once in each thread
        self.thread = active.join()


class RangeCache:
    """The runtime of one range of one transformer.

    Example: on a reused step the hook on the transformer calls ``begin``, each stand-in ``pass_over`` in place of its
    block, and the hook on the transformer ``finish``; on a computed one ``enter`` and ``leave`` take the residual.

    Args:
        decider: of each call.
        block_range: which blocks the range is.
        compilable: modules of which one is compiled if the transformer is; empty where it is known to be.
        verify: test the first residual on the call it was taken from.
        integrations: other libraries at work.
    """

    def __init__(
        self,
        decider: CallDecider,
        block_range: BlockRange,
        compilable: Sequence[nn.Module],
        verify: bool,
        integrations: Integrations,
    ) -> None:
        self.decider, self.block_range, self.integrations = decider, block_range, integrations
        metric = decider.policy.metric
        self.unverified, self.is_measured = verify, metric is not None
        # Results are handed on from block to block where that was tested: else the model might write into them unseen.
        self.hands_on_results = verify
        self._keeps_reused = metric is not None and METRICS[metric].keeps_reused
        self.argument_names: tuple[str, ...] = ()
        self.on_wired: Callable[[bool], None] | None = None  # given whether the range is now other blocks
        self.on_compiled: Callable[[], None] | None = None  # called once compiled code has run the range
        self.handle: Any = None  # whose it is: found by the hooks, it need not be kept anywhere else
        self.others: Callable[[], Sequence[RangeCache]] = tuple  # further caches on the transformer: aside in replays
        self.active_calls = ActiveCalls()
        self.state = CallState(self.active_calls)
        self.verification = Verification(self)
        self._compilable = tuple(compilable)
        self._wiring_lock = threading.Lock()  # one call at a time says how the blocks are wired …
        self._is_reattaching = False  # … and while it puts stand-ins elsewhere, others begin as plain ones
        self._marker: tuple[Any, Callable[[], Any]] = (None, marker_for(None))
        self._restart_eagerly = torch.compiler.disable(
            self._restart
        )  # not as a decorator: that would import the compiler early
        self._judge = torch.compiler.disable(decider.judge)

    # -- the transformer is called, and has returned -----------------------------------------------------------

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decide a call of the transformer before its first block runs."""
        needed = self.unverified or self.block_range.wiring is None
        arguments = bind(self.argument_names, args, kwargs) if args else kwargs
        self._begin_call(arguments, Replay(module, args, kwargs) if needed else None, True)

    def _begin_call(self, arguments: Mapping[str, Any] | None, replay: Replay | None, seen: bool) -> None:
        state, decider, block_range = self.state, self.decider, self.block_range
        state.shortcut = ASK
        if _is_tracing_or_exporting():
            state.call = None
            return
        marks = None
        if seen:
            latents = (arguments or {}).get(decider.latents_name)  # type: ignore[arg-type]
            device = latents.device if isinstance(latents, Tensor) else None
            if device != self._marker[0]:
                self._marker = device, marker_for(device)
            marks = [self._marker[1]()]
        state.arguments, state.replay, state.transformer_was_called, state.latest = arguments, replay, seen, None
        self.integrations.refresh()
        if self._is_reattaching:
            with (
                self._wiring_lock
            ):  # in another thread, which is waited for; or it was interrupted, and is done once more
                if self._is_reattaching:
                    self._follow_wiring()
        active, compiled = self.active_calls, not self._compilable or any(map(_COMPILED_CALL, self._compilable))
        if compiled and seen and block_range.wiring is None and replay is not None and not active.is_closed:
            self._rehearse(replay)
        if active.is_closed:  # not all hooks are in yet, or not all off: a plain call, of which nothing is learnt
            call = Call()
        elif torch.is_grad_enabled():
            call = decider.plain_call_with_gradients()
        else:  # compiled code captures always: one graph less. Else warm-up steps are spared it
            call = decider.decide(arguments, seen, compiled)
        if block_range.wiring is None and not active.is_closed:
            call.observation = Observation(block_range.observed, whole=seen)
        if replay is not None and (block_range.wiring is None or (self.unverified and call.mode is not PLAIN)):
            replay.keep()  # it may have to be made again, to learn from it
        call.marks, call.stale = marks, self._is_reattaching
        state.call, state.thread.calls = call, (call,)
        if active.is_closed:  # asked last: whoever closes from here on sees the call
            call.stale = True

    def finish(self, output: Any) -> None:
        """Conclude a call, as the transformer has returned.

        Raises:
            WiringError: on the first call, when the streams of the range cannot be followed, or its residual, added
                on the very call it was taken from, does not give that call's output.
            RunMismatch: a skipped range was entered and not left, so that its effect is missing.
        """
        state = self.state
        call, replay = state.call, state.replay
        state.call = state.arguments = state.replay = None
        state.shortcut, state.transformer_was_called, state.thread.calls = ASK, False, ()
        if call is None:
            return
        if not call.stale:
            if call.stage is INSIDE and call.mode is REUSE:
                first, last = self.block_range.first, self.block_range.last
                raise RunMismatch(
                    f"{self.decider.name}: step {call.moment.step} reused {first} … {last}, but the model did "
                    f"not call {last}: the output lacks the range's effect. Choose a range that ends before "
                    "blocks that are skipped at times"
                )
            if replay is None:
                self._after_call(call)
            else:
                self._conclude(call, replay, output)
            for other in self.others():
                if other.unverified or other.block_range.wiring is None:  # it may have to make the call again
                    state.latest = call
            if call.marks:
                self.decider.time(call, self._marker[1])
        if call.run is not None:
            call.run.in_flight = False

    @property
    def is_compiled(self) -> bool:
        """Whether the transformer or a block of it is known to be compiled, as it is now."""
        return not self._compilable or any(map(_COMPILED_CALL, self._compilable))

    def forget(self) -> list[str]:
        """Drop all that was cached, and any call under way; return the warnings that are due."""
        self.active_calls.expire()
        state = self.state
        state.latest = None
        if (call := state.call) is not None:  # an exception has ended it, and whoever keeps that keeps the call
            call.run = call.branch = None
            if not (call.stage is INSIDE and call.mode in (REUSE, UNDECIDED)):
                call.deltas, call.results, call.streams, call.metric_inputs = (), None, (), None
                call.range = call.lead = call.observation = state.arguments = None
        return self.decider.forget()

    # -- blocks of a skipped range -----------------------------------------------------------------------------

    def pass_over(self, offset: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a stand-in returns in place of its block's output; ``NotImplemented``: the block has to run.

        Args:
            offset: the block's place in the range.
            args: that the stand-in was called with.
            kwargs: that the stand-in was called with.
        """
        call = self.state.call
        if offset == 0:
            call = self._enter_range(call, args, kwargs)
        if call is None or call.mode is not REUSE:
            return NotImplemented
        if call.stage is not INSIDE:
            if call.stage is BEFORE and not call.stale:  # the model has left out the range's first block
                self._mismatch(call)
            return NotImplemented
        wiring = self.block_range.wiring
        assert wiring is not None
        is_last = offset == len(wiring.block_ios) - 1
        if call.probe is not None:
            if is_last:
                self.integrations.after_skip()
            return self.verification.pass_through(call, wiring, offset, args, kwargs)
        if offset == 0 and not self._apply(call, wiring, args, kwargs):
            return NotImplemented
        if is_last:
            return self._leave_skipped(call, wiring, args, kwargs)
        io = wiring.block_ios[offset]
        values = self._handed_on(call, wiring) if offset == 0 else None
        if values is None:
            values = [None if name is None else io.read(name, args, kwargs) for name in io.carries]
            if offset == 0:  # by value: a parent that adds in place must not reach what the range was given
                values = [value.clone() if isinstance(value, Tensor) else value for value in values]
        if any(io.new_forms):
            values = fill_new_outputs(io, values, wiring.shapes(call.deltas))
        return tuple(values) if io.output_builder.is_tuple else io.output_builder(values, args, kwargs)

    def _enter_range(self, call: Call | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """Note that the range's first block is called, and decide if that is still to be done; return the call."""
        if call is not None and call.stale:
            if self.state.transformer_was_called:
                return None
            call = None  # the blocks are driven without the transformer: nothing else ends it
        compiling = torch.compiler.is_dynamo_compiling()
        if not compiling and call is not None and call.stage is BEFORE and call.session is not None:
            session = call.session()
            if session is not None and session.step_source is not call.step_source:
                self._refuse_late_step()
        if call is None or call.stage is not BEFORE:  # driven without the transformer, or once more in one call
            call = self._restart_eagerly(call)
        if call is None:
            return None
        call.stage = INSIDE
        if compiling:
            call.compiled = True
        if call.stale:  # just now, in another thread
            call.mode = PLAIN
            return None
        if self.is_measured and call.branch is not None:
            if self.block_range.wiring is not None:
                call.metric_inputs = self._metric_inputs(call, self.block_range.wiring, args, kwargs)
            if call.mode is UNDECIDED:
                self._judge(call)
            if (
                call.metric_inputs is not None
                and not self.block_range.lead
                and (call.mode is not REUSE or self._keeps_reused)
            ):  # by value: the model may write into what enters, and later steps are compared with it
                call.metric_inputs = clones(call.metric_inputs)
        if not compiling and call.mode is not REUSE:  # not in compiled code, which would be made anew for each value
            self.state.shortcut = RUN
        return call

    def _apply(self, call: Call, wiring: Wiring, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Make h_in + Δ̂ of what enters the range; return whether the residual fits."""
        if self.integrations.alters_arguments:
            args, kwargs = self.integrations.range_arguments(args, kwargs)
        if args or not wiring.is_plainly_read:
            streams = [wiring.block_ios[0].read(name, args, kwargs) for name in wiring.entry]
        else:
            streams = list(map(kwargs.get, wiring.entry))
        call.results = apply_residual(wiring, streams, call.deltas)
        if call.results is None:
            self._mismatch(call)
            return False
        call.streams = tuple(streams)
        if not call.compiled:
            self.state.shortcut = SKIP
        return True

    def _mismatch(self, call: Call) -> None:
        """Run the blocks after all, and take a residual that fits."""
        call.mode, call.deltas, call.range = MISMATCH, (), Capture()

    def _handed_on(self, call: Call, wiring: Wiring) -> list[Any] | None:
        """Return what the first stand-in hands on: h_in + Δ̂ itself, where each output is a stream that entered.

        That spares a copy of h_in; what the model writes into it shows in its version, and it is made again then.
        A copy it is in compiled code, which has no versions, and leaves a copy out that nobody reads; and of tensors
        that were made in inference mode, which have none either. ``None``: other streams are handed on, too.
        """
        if not wiring.hands_on:
            return None
        results = call.results
        assert results is not None
        if not self.hands_on_results or call.compiled or any(map(Tensor.is_inference, (*results, *call.streams))):
            handed = dict(zip(wiring.entry, map(torch.clone, call.streams), strict=True))
        else:
            handed = dict(zip(wiring.hands_on, results, strict=True))
            call.versions = _versions((*results, *call.streams))
        return [None if name is None else handed[name] for name in wiring.block_ios[0].carries]

    def _leave_skipped(self, call: Call, wiring: Wiring, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the last block of a skipped range would: h_in + Δ̂."""
        self.integrations.after_skip()
        call.stage = AFTER
        if not call.compiled:
            self.state.shortcut = ASK
        results, streams, versions = call.results, call.streams, call.versions
        # Dropped here, not at the end of the call: compiled code then stores nothing of a stream that nobody reads.
        call.results, call.streams, call.versions = None, (), None
        assert results is not None
        # Compiled code has no versions: where it meets what code that is not compiled has handed on, it is made again.
        if versions is not None and (
            torch.compiler.is_dynamo_compiling() or _versions(results) != versions[: len(results)]
        ):
            if not torch.compiler.is_dynamo_compiling() and _versions(streams) != versions[len(results) :]:
                raise WiringError(
                    f"{self.decider.name}: between {self.block_range.first} and {self.block_range.last} the model "
                    "writes into what the range was given, so that a reused step cannot be made of it. "
                    "Choose other blocks"
                )
            results = apply_residual(wiring, streams, call.deltas)
            assert results is not None
        io = wiring.block_ios[-1]
        if len(results) == len(wiring.leave):
            return tuple(results) if io.output_builder.is_tuple else io.output_builder(results, args, kwargs)
        each = iter(results)
        return io.output_builder([None if bridge is None else next(each) for bridge in wiring.leave], args, kwargs)

    # -- blocks of a computed range ----------------------------------------------------------------------------

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep −h_in, by value, as the range's first block is about to run."""
        call = self.state.call
        if call is not None and not call.stale and call.range is not None:
            _mark_compiled(call)
            blocks = self.block_range
            if not capture_input(call.range, blocks.wiring, blocks.spot(blocks.start), args, kwargs):
                call.mode, call.range = (PLAIN if call.mode is CAPTURE else call.mode), None
            _mark_time(call, self._marker[1])

    def leave(self, output: Any) -> None:
        """Take Δ = h_out − h_in as the range's last block has run."""
        call = self.state.call
        if call is None or call.stale or call.stage is not INSIDE or call.range is None:
            return
        call.stage = AFTER
        _mark_compiled(call)
        _mark_time(call, self._marker[1])
        blocks, with_output = self.block_range, self.decider.policy.metric == "rate"
        capture_output(call.range, blocks.wiring, blocks.spot(blocks.end), output, with_output)

    def enter_lead(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what enters the blocks before the range."""
        call = self.state.call
        if call is not None and not call.stale and call.lead is not None and call.stage is BEFORE:
            _mark_compiled(call)
            capture_input(call.lead, self.block_range.leading, self.block_range.spot(0), args, kwargs)

    def leave_lead(self, output: Any) -> None:
        """Take the effect of the blocks before the range."""
        call = self.state.call
        if call is None or call.stale or call.lead is None or call.stage is not BEFORE or call.lead.entry is None:
            return
        _mark_compiled(call)
        capture_output(call.lead, self.block_range.leading, self.block_range.spot(self.block_range.lead - 1), output)

    def _metric_inputs(
        self, call: Call, wiring: Wiring, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, ...] | None:
        """Return what the change metric looks at: the effect of the blocks before the range, or what enters it."""
        _mark_compiled(call)
        if self.block_range.lead:
            leading = self.block_range.leading
            return None if call.lead is None or leading is None else measured_deltas(call.lead, leading)
        if self.integrations.alters_arguments:
            args, kwargs = self.integrations.range_arguments(args, kwargs)
        return metric_inputs(wiring, lambda name: wiring.block_ios[0].read(name, args, kwargs))

    # -- blocks that are observed ------------------------------------------------------------------------------

    def observe_enter(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Show a block's arguments to the observation of the call, if there is one."""
        if torch.compiler.is_dynamo_compiling():
            return
        call = self.state.call
        if call is not None and call.observation is not None and not call.stale:
            call.observation.enter(index, args, kwargs)

    def observe_leave(self, index: int, output: Any) -> None:
        """Show a block's output to the observation of the call, if there is one."""
        if torch.compiler.is_dynamo_compiling():
            return
        call = self.state.call
        if call is not None and call.observation is not None and not call.stale:
            call.observation.leave(index, output)

    # -- inside ------------------------------------------------------------------------------------------------

    def _restart(self, before: Call | None) -> Call | None:
        """Start a call at the range's first block: the transformer was not called, or calls it once more."""
        state = self.state
        if replaying.get() or _is_tracing_or_exporting():  # by another cache on this model, or as a plain one
            return None
        if before is None:
            # The rest of a call that began before the hooks were in: once in a thread, at most. The next says what
            # is missing.
            met_unknown_step, state.met_unknown_step = state.met_unknown_step, True
            if not met_unknown_step and not self.decider.clock.knows(state.arguments):
                return None
        else:
            self._after_call(before)
            if self.unverified and state.transformer_was_called:
                raise WiringError(
                    f"{self.block_range.first} runs several times in one call of {self.decider.name}: what happens in "
                    "between cannot be followed. Choose other blocks; or, if you know better, give verify=False"
                )
            if before.run is not None:
                before.run.in_flight = False
        self._begin_call(state.arguments, state.replay, state.transformer_was_called)
        call = state.call
        return None if call is None or call.stale else call

    def _refuse_late_step(self) -> None:
        """Refuse a step source that was set after the call had been decided."""
        if self.state.transformer_was_called and not replaying.get():
            raise InvalidSetting(
                f"{self.decider.name}: a step index was set between the transformer's call and that of "
                f"{self.block_range.first}, when the call was decided already: set it before the transformer is called"
            )

    def _conclude(self, call: Call, replay: Replay, output: Any) -> None:
        """Learn from a call that is over, keep its residual, and test the first."""
        unseen = call.observation is not None and call.observation.empty and call.stage is not BEFORE
        wanted = call.range is not None
        moved = self._after_call(call)
        if moved and wanted and replay.safe:  # of the range as it now is, nothing was kept
            again = replace(call, mode=CAPTURE, stage=BEFORE, decision=None, range=Capture(), metric_inputs=None)
            again.lead = None if call.lead is None else Capture()
            self.verification.repeat(replay, again)
            self._after_call(again)
        if unseen:  # compiled from the outside: nothing could be watched
            self._rehearse(replay)
        branch = call.branch
        if self.unverified and branch is not None and branch.anchors and call.mode is not REUSE:
            anchors, refreshed = branch.anchors, branch.history.refreshed
            branch.anchors, branch.history.refreshed = [], None  # refused, or interrupted, they are not to be used
            branch.update_nbytes()
            self.unverified = not self.verification.check_residual(replay, weighted_sum(anchors[:1], (1.0,)), output)
            branch.anchors, branch.history.refreshed = anchors, refreshed
            branch.update_nbytes()

    def _rehearse(self, replay: Replay) -> None:
        """Learn the wiring from a call of our own, outside of any compiled code. Happens once, if at all."""
        call = Call(observation=Observation(self.block_range.observed))
        self.verification.repeat(replay, call, eager=self.is_compiled)
        self._after_call(call)

    def _after_call(self, call: Call) -> bool:
        """Learn the wiring if it was observed, and commit a call that is over.

        Returns whether the range turned out to be other blocks than those it was attached to.
        """
        moved, block_range = False, self.block_range
        observation, call.observation = call.observation, None
        if observation is not None:
            observation.close()
            with self._wiring_lock:
                moved = block_range.wiring is None and not call.stale and self._record_wiring(observation, call)
        if call.stale:  # another thread's call has moved the range
            return False
        captured = call.range
        if captured is not None and isinstance(captured.entry, dict) and block_range.wiring is not None:
            named = captured.entry  # −h_in by name: it was taken before the wiring was known
            if self.is_measured and call.branch is not None and not block_range.lead:
                call.metric_inputs = metric_inputs(
                    block_range.wiring, lambda name: -named[name] if name in named else None
                )
            finish_capture(captured, block_range.wiring, self.decider.policy.metric == "rate")
        if call.lead is not None and block_range.leading is not None and isinstance(call.lead.entry, dict):
            finish_capture(call.lead, block_range.leading)
            call.metric_inputs = measured_deltas(call.lead, block_range.leading)
        if call.compiled:  # with CUDA graphs the next call overwrites its outputs: what is kept must not be these
            if captured is not None:
                captured.deltas, captured.output = clones(captured.deltas) or (), clones(captured.output)
            call.metric_inputs = clones(call.metric_inputs)
            if self.on_compiled is not None:
                self.on_compiled()
                self.on_compiled = None
        self.decider.commit(call)
        return moved

    def _record_wiring(self, observation: Observation, call: Call) -> bool:
        """Count the blocks as they were called, and follow the streams through the range; return whether it moved."""
        try:
            shown = self.block_range.read(observation, self.decider.name)
        except WiringError:
            if call.stale:  # taken off in the middle of it: what was seen is not the whole
                return False
            raise
        if shown is None or call.stale:
            return False
        if shown.moved:  # other blocks than those that were thought to be the range: what was captured is not theirs
            call.mode = PLAIN if call.mode is CAPTURE else call.mode
            call.range, call.lead = None, None if call.lead is None else Capture()
            self._is_reattaching = True
            self.active_calls.expire(but=call)
        for remark in dict.fromkeys(io.remark for io in shown.wiring.block_ios if io.remark):
            self.decider.warn("pattern", f"{self.decider.name}: {remark}")
        self.block_range.become(shown)
        self._follow_wiring()
        return shown.moved

    def _follow_wiring(self) -> None:
        """Let the attachment follow what was learnt; interrupted, it is done when the next call begins."""
        if self.on_wired is not None:
            self.on_wired(self._is_reattaching)
        self._is_reattaching = False


def _mark_compiled(call: Call) -> None:
    """Note that what is taken of a call comes out of compiled code; functions may be compiled each by itself."""
    if torch.compiler.is_dynamo_compiling():
        call.compiled = True


def _mark_time(call: Call, mark: Callable[[], Any]) -> None:
    """Note the time, at either end of a computed range; compiled code has none."""
    if not torch.compiler.is_dynamo_compiling() and call.marks:
        call.marks.append(mark())


def _is_tracing_or_exporting() -> bool:
    """Return whether a call is traced or exported: a copy of the model comes of it, and copies are not cached."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return True
    return bool(getattr(torch.compiler, "is_exporting", bool)())  # which came with 2.7


def _versions(tensors: Iterable[Tensor]) -> list[int]:
    """Return how often each tensor was written to, as torch counts it."""
    return list(map(_VERSION, tensors))
