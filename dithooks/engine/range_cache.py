"""The runtime of one cached range: what hooks and stand-ins call, from the transformer's call to its return."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import compress
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks.block_io import bind
from ..blocks.held_outputs import HeldOutputs
from ..blocks.observation import Observation
from ..blocks.wiring import Wiring
from ..environment.compiler_support import refusing_compiled
from ..environment.torch_api import OutOfMemoryError, is_dynamo_compiling, is_exporting
from ..errors import InvalidSetting, RunMismatch, WiringError
from ..predictors.predictor import Moment
from ..stats import warnings as wording
from ..stats.timing import marker_for
from .active_calls import ActiveCalls
from .additions import AdditionSum, added, arriving
from .anchor import Anchor, weighted_sum
from .arguments import Signature
from .batch_dimensions import BatchSurvey
from .block_range import BlockRange, LearntRange
from .call import (
    AFTER,
    ASK,
    BEFORE,
    CAPTURE,
    INSIDE,
    LOOK,
    MISMATCH,
    PLAIN,
    REUSE,
    ROWS,
    RUN,
    SKIP,
    UNDECIDED,
    Call,
    Capture,
    Shortcut,
)
from .change_metrics import METRICS
from .compiled_calls import CompiledCalls, is_called_here
from .compiled_code import are_compiled, run_eagerly
from .decider import CallDecider
from .model_lock import MODEL_LOCK
from .output_comparison import first_not_finite
from .output_correction import OutputCorrection
from .protocols import Integrations
from .replay import Callee, Replay, replaying
from .residual import (
    apply_residual,
    capture_input,
    capture_output,
    clones,
    finish_capture,
    measured_deltas,
    metric_inputs,
)
from .row import PlacedRow
from .row_batch import RowBatch
from .row_states import RowStates
from .row_survey import RowSurvey
from .run import Run
from .sample_decider import SampleDecider
from .verification import Verdict, Verification, fill_new_outputs

# What the compiler says of a graph break that fullgraph=True rules out.
_UNCALLED = (
    "dithooks decides outside of compiled code, where the transformer is called, but its blocks were reached without "
    "that: compile the transformer (torch.compile(transformer), transformer.compile()) instead of its forward or a "
    "function that calls its blocks; or leave fullgraph=True out"
)
_LOOKS = (
    "this dithooks policy decides between two blocks, by what it sees there: compile the blocks "
    "(compile_repeated_blocks(fullgraph=True)); or take a plan, Mask or Interval; or leave fullgraph=True out"
)

_COMPILED_CALL, _VERSION = attrgetter("_compiled_call_impl"), attrgetter("_version")


class CallState(threading.local):
    """The call under way in one thread; threads never see each other's.

    The values are set in each thread, none is a default of the class: the compiler of some releases would read that.
    """

    def __init__(self, active: ActiveCalls) -> None:  # once in each thread
        self.thread = active.join()
        self.call: Call | None = None
        self.shortcut: Shortcut = ASK  # what stand-ins between the range's two ends may do without asking the cache
        self.latest: Call | None = None  # the last finished call, until the next begins; for caches that may repeat it
        self.arguments: Mapping[str, Any] | None = None  # arguments of the transformer, by name
        # How to repeat the call, or to end it where it is of several requests' rows; None if it is neither.
        self.replay: Replay | RowBatch | None = None
        self.given: tuple[Callee, tuple[Any, ...], dict[str, Any]] | None = None  # the call that is being decided
        self.transformer_was_called = False  # else its blocks are called without it
        self.rows: RowBatch | BatchSurvey | None = None  # the batch of several requests' rows that the call is of
        self.held: HeldOutputs | None = None  # beside the observation of a call that cannot be repeated
        self.in_method = False  # the method that stands for the transformer's call is under way
        self.corrected: tuple[Any, Any] | None = None  # the last output in place of another, and that; for other caches
        self.passes: tuple[Call, ...] = ()  # passes over the blocks that the watched method has made before this one
        self.met_unknown_step = False  # whether a call without a readable step was let pass once in this thread


class RangeCache:
    """The runtime of one range of one transformer.

    Example: on a reused step the hook on the transformer calls ``begin``, each stand-in ``pass_over`` in place of its
    block, and the hook on the transformer ``finish``; on a computed one ``enter`` and ``leave`` take the residual.

    Args:
        decider: the decider of each call.
        block_range: the blocks of the range and their wiring.
        compilable: modules to check for compiled code; empty if the transformer is known to be compiled.
        verify: whether the first residual is tested on its own call.
        integrations: the adapter to other libraries.
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
        # Hand h_in + Δ̂ itself from block to block only where it is tested: the model might write into it unnoticed.
        self.hands_on_results = verify
        self.passes_are_calls = False  # a method is watched: each pass that it makes over the blocks is a call
        self._keeps_reused = metric is not None and METRICS[metric].keeps_reused
        self.argument_names: tuple[str, ...] = ()
        self.on_wired: Callable[[bool], None] | None = None  # called with whether the range has moved to other blocks
        self.on_compiled: Callable[[], None] | None = None  # called once compiled code has run the range
        self.handle: Any = None  # the CacheHandle: found through the hooks, it need not be kept anywhere else
        self.callees: Callable[[], Iterable[nn.Module]] = tuple  # returns the transformer and its blocks
        self.others: Callable[[], Sequence[RangeCache]] = tuple  # returns the other caches on the transformer
        self.active_calls = ActiveCalls()
        self.compiled_calls: CompiledCalls | None = None  # the handle's
        self.state = CallState(self.active_calls)
        self.correction = OutputCorrection(decider) if decider.corrects else None
        self.verification = Verification(self)
        self.additions = decider.additions
        self.row_states = RowStates(decider, lambda plan: self.handle.config_of(plan, self))
        self.row_survey = RowSurvey(self, is_compared=verify)
        decider.decide_rows = self._decide_rows
        if isinstance(decider, SampleDecider):
            decider.decide_samples, decider.count_samples = self._decide_samples, self._count_samples
            decider.clear_branches = self.row_states.clear_branch
        if verify:  # without a test, additions cannot be separated from other work on the streams
            self.additions.ask = self._ask_for_additions
        self.compilable = tuple(compilable)
        self._is_reattaching = False  # stand-ins are being exchanged: other calls begin as plain ones
        self._marker: tuple[Any, Callable[[], Any]] = (None, marker_for(None))
        # Not as a decorator: that would import the compiler with this file.
        self._restart_eagerly = run_eagerly(refusing_compiled(self._restart, lambda: self.is_compiled), _UNCALLED)
        self._begin_pass_eagerly = run_eagerly(refusing_compiled(self._begin_pass, lambda: self.is_compiled), _UNCALLED)
        self._judge = run_eagerly(decider.judge, _LOOKS)

    # -- the transformer is called and returns -----------------------------------------------------------------

    def begin(self, module: Callee, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decide a call of the transformer before its first block runs."""
        needed = self.unverified or self.block_range.wiring is None
        arguments = bind(self.argument_names, args, kwargs) if args else kwargs
        state = self.state
        state.given = module, args, kwargs
        self._begin_call(arguments, Replay(module, args, kwargs) if needed else None, True)
        state.given = None

    def announce(self, arguments: Mapping[str, Any]) -> None:
        """Note a call of the transformer where a method is watched, which it may call: else the first block decides."""
        state = self.state
        state.arguments, state.replay, state.transformer_was_called = arguments, None, False

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
            # Another thread is re-attaching: wait. If that was interrupted, do it here.
            with MODEL_LOCK.lock:
                if self._is_reattaching:
                    self._follow_wiring()
        active, compiled = self.active_calls, not self.compilable or any(map(_COMPILED_CALL, self.compilable))
        differentiated = torch.is_grad_enabled()
        if differentiated or active.is_closed:  # run a plain call and learn nothing from it
            call = Call() if active.is_closed else decider.plain_call_with_gradients()
            state.replay = replay = None
        else:
            if seen and block_range.wiring is None and replay is not None:
                compiled = compiled or are_compiled(self.callees())
                if compiled:  # before it is traced: all that holds then stays true, and nothing is compiled again
                    self._rehearse(replay)
            # Compiled code always captures, to keep one graph fewer; eager code skips it at steps whose residual is
            # never reused.
            call = decider.decide(arguments, seen, compiled)
        if block_range.wiring is None and not active.is_closed and not differentiated:
            call.observation, state.held = Observation(block_range.observed, whole=seen), None
            if self.unverified and not seen:
                state.held = HeldOutputs(block_range.observed)
        if replay is not None and (block_range.wiring is None or (self.unverified and call.mode is not PLAIN)):
            replay.keep()
        call.marks, call.stale = marks, self._is_reattaching
        state.call, state.thread.calls = call, (call,)
        if compiled and seen and self.compiled_calls is not None:
            self.compiled_calls.enter(state.thread)
        if active.is_closed:  # check again: close() marks the calls it sees, and this one was registered only just now
            call.stale = True

    def _count_samples(self) -> int:
        """Return the number of samples of the batch of a call that is to be decided.

        Raises:
            InvalidSetting: the latents are no batch.
        """
        latents = (self.state.arguments or {}).get(self.decider.latents_name or "")
        if not isinstance(latents, Tensor) or not latents.dim():
            raise InvalidSetting(
                f"{self.decider.name}: reduce='each' decides each sample of a batch, the first dimension of the "
                f"latents, and these are {type(latents).__name__}: give reduce='mean' or 'max'"
            )
        return len(latents)

    def _decide_samples(self, placed: Sequence[PlacedRow], run: Run, moment: Moment) -> Call:
        """Decide a batch, each sample by itself; in a batch of another size, none is known to be the same.

        Args:
            placed: the samples.
            run: of the batch.
            moment: of the call.
        """
        call = self._decide_rows(placed, self.state.arguments or {}, (("samples", len(placed), "in a batch"),))
        call.run, call.moment = run, moment
        return call

    def _decide_rows(self, placed: Sequence[PlacedRow], arguments: Mapping[str, Any], more: Signature = ()) -> Call:
        """Decide a batch of several requests' rows, each by its own plan.

        Args:
            placed: the rows.
            arguments: of the batch, by name.
            more: on which residuals depend, beside the streams themselves.

        Raises:
            InvalidSetting: the model is compiled, its blocks are called without it, or the batch has another size.
            WiringError: it is unknown which part of the call is whose row.
        """
        given = self.state.given
        self.row_survey.check(placed, arguments, given)
        assert given is not None
        if not self.row_survey.learn(Replay(*given)):
            return Call()
        if (ask := self.additions.ask) is not None:
            names = frozenset(self.decider.given_to(arguments).conditioning)
            if names not in self.additions.asked:
                ask(names)
            self.additions.asked.add(frozenset())  # rows are not asked about one by one
        dimensions = self.row_survey.look(len(placed), *given)
        wiring = self.block_range.wiring
        assert wiring is not None
        # With a sum of additions, whether there are any or not: so its blocks ask.
        call = Call(mode=ROWS, counted=self.additions.counted, sums=AdditionSum(wiring, True))
        rows = self.row_states.decide(placed, arguments, more)
        batch = RowBatch(self.decider.name, call, rows, self.row_states, dimensions, arguments)
        if batch.looks and self.block_range.lead:
            call.lead = Capture()
        self.state.rows = self.state.replay = batch
        return call

    def learn_in_extra_calls(self, replay: Replay) -> bool:
        """Learn the wiring, and test a residual, before the first batch of several requests' rows.

        Returns:
            Whether residuals can be kept from now on.
        """
        if self.block_range.wiring is None:
            self.decider.learn_latents(self.state.arguments or {}, self._rehearse(replay))
        if self.block_range.wiring is None or not self.unverified:
            return self.block_range.wiring is not None
        call = Call(mode=CAPTURE, range=(captured := Capture()))
        outcome = self.verification.repeat(replay, call)
        if not captured.deltas:
            return False
        verdict = self.verification.check_residual(replay, call, captured.deltas, outcome.output)
        self.unverified = verdict is not Verdict.SETTLED
        return verdict is not Verdict.UNUSABLE

    def finish(self, output: Any) -> Any:
        """Conclude a call when the transformer returns; return another output in its place, or ``None``.

        Raises:
            WiringError: on the first call, the streams of the range cannot be followed, or adding its residual does not
                reproduce the output of the call that it was taken from.
            RunMismatch: the call entered a skipped range and did not leave it, so that the range's effect is missing.
        """
        state = self.state
        call, replay, arguments = state.call, state.replay, state.arguments
        state.call = state.arguments = state.replay = None
        state.shortcut = ASK
        if call is None:
            state.thread.calls, state.transformer_was_called = (), False
            return None
        try:
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
                elif isinstance(replay, RowBatch):
                    state.rows = None
                    corrected = replay.finish(output)
                    if isinstance(self.decider, SampleDecider) and call.run is not None:
                        self.decider.end(call)
                    return corrected
                else:
                    output = self._as_returned(output)
                    self.decider.learn_latents(arguments or {}, output)
                    self._conclude(call, replay, output)
                for other in self.others():
                    if other.unverified or other.block_range.wiring is None:  # it may have to repeat the call
                        state.latest = call
                if call.marks:
                    self.decider.time(call, self._marker[1])
            if call.run is not None:
                call.run.in_flight = False
        finally:
            # Only now: until it is committed, another thread that moves the range expires it, and it may be repeated.
            state.thread.calls, state.transformer_was_called = (), False

    def finish_corrected(self, output: Any) -> Any:
        """Do as :meth:`finish`, and return the corrected output; ``None``: the output is used as it is."""
        state, correction = self.state, self.correction
        assert correction is not None
        if isinstance(state.replay, RowBatch):
            corrected = self.finish(output)  # another cache has corrected other rows, if any
            state.corrected = None if corrected is None or not self.others() else (corrected, output)
            return corrected
        corrected = correction(None if replaying.get() else state.call, output, lambda: self.finish(output))
        state.corrected = None if corrected is None or not self.others() else (corrected, output)
        return corrected

    @property
    def ends(self) -> Callable[[Any], Any]:
        """The function to call when the transformer returns: it returns another output, or ``None`` for the same."""
        return self.finish if self.correction is None else self.finish_corrected

    def _as_returned(self, output: Any) -> Any:
        """Return the transformer's own output, if another cache on it has corrected that already."""
        pairs = [other.state.corrected for other in self.others()]
        return next((raw for pair in pairs if pair is not None for made, raw in [pair] if made is output), output)

    def abandon(self) -> None:
        """Drop a call that an exception has ended, if one has: blocks that run after it are no part of it."""
        state = self.state
        state.call = state.arguments = state.replay = state.rows = None
        state.shortcut, state.transformer_was_called, state.thread.calls = ASK, False, ()

    def passes_over(self) -> bool:
        """Return whether blocks of the range that this thread's call comes to next are passed over."""
        call = self.state.call
        if call is None or call.stale or call.mode is not REUSE:
            return False
        return call.stage is INSIDE or (call.stage is BEFORE and self.state.transformer_was_called)

    @property
    def is_compiled(self) -> bool:
        """Whether the transformer or a block of it is known to be compiled now."""
        return not self.compilable or any(map(_COMPILED_CALL, self.compilable))

    def forget(self) -> list[str]:
        """Drop all cached state and abandon calls under way; return the pending warnings."""
        return self.decider.warnings_of(self.drop())

    def drop(self) -> list[Run]:
        """Do the same, and return the runs; waits for no lock."""
        self.active_calls.expire()
        state = self.state
        of_rows = self.row_states.drop()
        state.latest = state.given = state.corrected = state.rows = None
        self.additions.forget()
        if (call := state.call) is not None:
            # An exception ended this call; its traceback may keep the call alive, so release its tensors.
            call.run = call.branch = None
            if not (call.stage is INSIDE and call.mode in (REUSE, UNDECIDED)):
                call.deltas, call.results, call.streams, call.metric_inputs, call.sums = (), None, (), None, None
                call.range = call.lead = call.observation = state.arguments = None
        return [*self.decider.drop(), *of_rows]

    # -- blocks of a skipped range -----------------------------------------------------------------------------

    def pass_over(self, offset: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the output of a stand-in on a reused step, or ``NotImplemented`` if its block has to run.

        Args:
            offset: index of the block within the range.
            args: positional arguments of the stand-in's call.
            kwargs: keyword arguments of the stand-in's call.
        """
        call = self.state.call
        if offset == 0:
            call = self._enter_range(call, args, kwargs)
        if call is None:
            return NotImplemented
        if call.mode is not REUSE:
            return NotImplemented if call.sums is None else self._look_before(call, offset, args, kwargs)
        if call.stage is not INSIDE:
            if call.stage is BEFORE and not call.stale:  # the model left out the range's first block
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
            return NotImplemented if call.sums is None else self._look_before(call, offset, args, kwargs)
        if is_last:
            return self._leave_skipped(call, wiring, args, kwargs)
        io = wiring.block_ios[offset]
        values = self._handed_on(call, wiring) if offset == 0 else None
        if values is None:
            values = [None if name is None else io.read(name, args, kwargs) for name in io.carries]
            if offset == 0 and call.counted and self.integrations.alters_arguments:
                values = list(map(dict(zip(wiring.entry, call.streams, strict=True)).get, io.carries))  # type: ignore[arg-type]
            if offset == 0:  # copy: a parent that adds in place must not write into h_in
                values = [value.clone() if isinstance(value, Tensor) else value for value in values]
        if any(io.new_forms):
            values = fill_new_outputs(io, values, wiring.shapes(call.deltas))
        return tuple(values) if io.output_builder.is_tuple else io.output_builder(values, args, kwargs)

    def _enter_range(self, call: Call | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """Mark the call as inside the range, and decide it if undecided; return it, or ``None`` for a plain one."""
        if call is not None and call.stale:
            if self.state.transformer_was_called:
                return None
            call = None  # the blocks are called without the transformer, so that no hook has ended the stale call
        compiling = is_dynamo_compiling()
        if not compiling and call is not None and call.stage is BEFORE and call.session is not None:
            session = call.session()
            if session is not None and session.step_source is not call.step_source:
                self._refuse_late_step()
        if call is None or call.stage is not BEFORE:  # called without the transformer, or a second time in one call
            call = self._restart_eagerly(call)
        if call is None:
            return None
        call.stage = INSIDE
        if compiling:
            call.compiled = True
        if call.stale:  # another thread marked it just now
            call.mode = PLAIN
            return None
        if self.is_measured and call.branch is not None:
            if self.block_range.wiring is not None:
                call.metric_inputs = self._metric_inputs(call, self.block_range.wiring, args, kwargs)
            if call.mode is UNDECIDED:
                self._judge(call)
            if not self.block_range.lead and (call.mode is not REUSE or self._keeps_reused):
                # Copy: the model may write into them, and later steps are compared with them.
                call.metric_inputs = clones(call.metric_inputs)
        if call.mode is not REUSE:
            if call.mode is ROWS:
                self._settle_rows(call, args, kwargs)
                if call.mode is ROWS or call.mode is REUSE:
                    return call
            if call.counted:
                self._sum_additions(call)
            if not compiling and call.sums is None:  # compiled code would be recompiled for each value
                self.state.shortcut = RUN
        return call

    def _settle_rows(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Settle what a batch of several requests' rows does, now that the range's first block is reached."""
        rows, wiring = self.state.rows, self.block_range.wiring
        if isinstance(rows, RowBatch) and wiring is not None:
            if rows.looks:
                self.row_states.judge(rows.rows, self._metric_inputs(call, wiring, args, kwargs))
            if self.integrations.alters_arguments:
                args, kwargs = self.integrations.range_arguments(args, kwargs)
            rows.settle(wiring, args, kwargs)
            call.sums = call.sums if call.mode is ROWS else None

    def _apply(self, call: Call, wiring: Wiring, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Compute h_in + Δ̂ from the arguments of the first block; return whether the residual fits."""
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
        """Turn a reused call into one that runs the blocks and captures a residual that fits."""
        call.mode, call.deltas, call.range = MISMATCH, (), Capture()
        self._sum_additions(call)

    def _sum_additions(self, call: Call) -> None:
        """Prepare a computed call to sum up additions between the blocks, if they are not to be in its residual."""
        wiring = self.block_range.wiring
        if call.counted and call.range is not None and wiring is not None:
            call.sums = AdditionSum(wiring, not is_dynamo_compiling())

    def _look_before(self, call: Call, offset: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Add up what was added since the block before; return ``LOOK``, for the block to be run and looked at."""
        if call.mode is ROWS:
            return LOOK
        if call.stage is not INSIDE or call.stale or call.sums is None:
            return NotImplemented
        call.sums.enter(offset, args, kwargs)
        return LOOK

    def look(self, offset: int, output: Any) -> None:
        """Note the output of a block of the range, if the call sums up additions after it."""
        call = self.state.call
        if call is not None and call.sums is not None and not call.stale:
            call.sums.leave(offset, output)

    def _handed_on(self, call: Call, wiring: Wiring) -> list[Any] | None:
        """Return the outputs of the first stand-in: h_in + Δ̂ where possible, which saves a copy of h_in.

        If the model writes into them, their tensor versions change and ``_leave_skipped`` recomputes them. Compiled
        code and inference tensors have no versions: there the outputs are a copy of h_in, which the compiler leaves out
        if nothing reads it. Return ``None`` if the first block also returns streams that the range does not.
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
        """End a skipped range: return h_in + Δ̂ in the form of the last block's output."""
        self.integrations.after_skip()
        call.stage = AFTER
        if not call.compiled:
            self.state.shortcut = ASK
        results, streams, versions = call.results, call.streams, call.versions
        # Drop them here, not at the end of the call, so that compiled code does not store streams that nothing reads.
        call.results, call.streams, call.versions = None, (), None
        assert results is not None
        remade, all_counted = None, call.counted and all(call.counted)
        # Compiled code cannot read versions: there, recompute results that eager code has handed on.
        if (
            versions is not None
            and not all_counted
            and (is_dynamo_compiling() or _versions(results) != versions[: len(results)])
        ):
            if not is_dynamo_compiling() and _versions(streams) != versions[len(results) :]:
                raise WiringError(
                    f"{self.decider.name}: between {self.block_range.first} and {self.block_range.last} the model "
                    "writes into what the range was given, so that a reused step cannot be made of it. "
                    "Choose other blocks"
                )
            remade = apply_residual(wiring, streams, call.deltas)
            assert remade is not None
        if call.counted:
            results = self._with_additions(call, wiring, remade or results, versions is not None, args, kwargs)
        else:
            if self.additions.is_watched and not call.compiled and call.branch is not None:
                self._watch_additions(
                    call, wiring, None if versions is None else results, remade, streams, args, kwargs
                )
            results = remade or results
        io = wiring.block_ios[-1]
        if len(results) == len(wiring.leave):
            return tuple(results) if io.output_builder.is_tuple else io.output_builder(results, args, kwargs)
        remaining = iter(results)
        values = [None if bridge is None else next(remaining) for bridge in wiring.leave]
        return io.output_builder(values, args, kwargs)

    def _with_additions(
        self,
        call: Call,
        wiring: Wiring,
        results: list[Tensor],
        were_handed_on: bool,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> list[Tensor]:
        """Return what reached the last block, and Δ̂ added to it if that was not handed on with it.

        ``results`` are h_in + Δ̂, for the outputs whose additions are not counted.
        """
        found = []
        for number, value in enumerate(arriving(wiring, args, kwargs)):
            if not call.counted[number]:
                value = results[number]
            elif not isinstance(value, Tensor) or value.shape != call.deltas[number].shape:
                raise RunMismatch(
                    f"{self.decider.name}: step {call.moment.step} reused {self.block_range.first} … "
                    f"{self.block_range.last}, but the model brought a stream to the latter in another form than on "
                    "the computed step. Choose other blocks"
                )
            elif not (were_handed_on and wiring.is_handed_on[number]):
                value = value.to(call.deltas[number].dtype) + call.deltas[number]
            found.append(value.to(call.deltas[number].dtype))
        return found

    def _watch_additions(
        self,
        call: Call,
        wiring: Wiring,
        handed: list[Tensor] | None,
        remade: list[Tensor] | None,
        streams: Sequence[Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Notice additions that are not counted: ask the model again, or warn if they change from step to step.

        This call returns the last computed step's, whole: whether the residual holds any is not known if it was not
        looked at, and to add this step's to those of another would count twice.

        Args:
            call: the call, which leaves the range.
            wiring: of the range.
            handed: h_in + Δ̂ as it was handed on; ``None`` if copies of h_in were.
            remade: h_in + Δ̂ made again, if the model has written into it.
            streams: h_in.
            args: positional arguments of the last block.
            kwargs: keyword arguments of the last block.
        """
        additions = self.additions
        if remade is None and wiring.touched is None:
            # Only where the very objects are handed from block to block does another one show an addition.
            given = set(map(id, (*args, *kwargs.values())))
            if handed is None or not wiring.certain or given.issuperset(map(id, compress(handed, wiring.is_handed_on))):
                return
        arrived, results = arriving(wiring, args, kwargs), remade or handed
        found = added(wiring, arrived, streams)
        if results is not None:
            pairs = zip(arrived, results, wiring.is_handed_on, strict=True)
            if remade is None and all(value is result or not is_own for value, result, is_own in pairs):
                return  # nothing was added; or blocks take their streams in a list, say
            for number, is_own in enumerate(wiring.is_handed_on):
                if is_own and found[number] is not None:
                    found[number] = arrived[number] - results[number]
        if additions.ask is not None and not additions.were_seen:
            additions.were_seen, additions.asked = True, set()
        elif additions.changed(call.branch, found):
            additions.is_watched = False
            additions.forget()
            first, last = wiring.touched or (self.block_range.first, self.block_range.last)
            self.decider.warn("between", wording.additions_are_stale(self.decider.name, first, last))

    # -- blocks of a computed range ----------------------------------------------------------------------------

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Store −h_in, copied, before the range's first block runs."""
        call = self.state.call
        if call is not None and not call.stale and call.range is not None:
            _mark_compiled(call)
            blocks = self.block_range
            if not capture_input(call.range, blocks.wiring, blocks.spot(blocks.start), args, kwargs):
                call.mode, call.range = (PLAIN if call.mode is CAPTURE else call.mode), None
            _mark_time(call, self._marker[1])

    def leave(self, output: Any) -> None:
        """Take Δ = h_out − h_in after the range's last block has run."""
        call = self.state.call
        if call is None or call.stale or call.stage is not INSIDE or call.range is None:
            wired = self.block_range.wiring is not None
            if wired and call is not None and call.stage is BEFORE and not self.state.transformer_was_called:
                call.stage = AFTER  # the range has just moved here, and its first block was on its way already
            return
        call.stage = AFTER
        _mark_compiled(call)
        _mark_time(call, self._marker[1])
        blocks, with_output = self.block_range, self.decider.policy.metric == "rate"
        capture_output(call.range, blocks.wiring, blocks.spot(blocks.end), output, with_output)
        if call.sums is not None:
            call.range.deltas, call.sums = call.sums.taken_from(call.range.deltas, call.counted), None

    def enter_lead(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Store the input of the blocks before the range, negated and copied."""
        state = self.state
        call = state.call
        if call is None or call.stage is not BEFORE or not state.transformer_was_called:
            call = self._begin_pass_eagerly(call)
        if call is not None and not call.stale and call.lead is not None:
            _mark_compiled(call)
            blocks = self.block_range
            capture_input(call.lead, blocks.leading, blocks.observed[blocks.order[0]], args, kwargs)

    def leave_lead(self, output: Any) -> None:
        """Take the residual of the blocks before the range."""
        call = self.state.call
        if call is None or call.stale or call.lead is None or call.stage is not BEFORE or call.lead.entry is None:
            return
        _mark_compiled(call)
        capture_output(call.lead, self.block_range.leading, self.block_range.spot(self.block_range.lead - 1), output)

    def _metric_inputs(
        self, call: Call, wiring: Wiring, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, ...] | None:
        """Return the change metric's inputs: the residual of the blocks before the range, or else the range's input."""
        _mark_compiled(call)
        if self.block_range.lead:
            leading = self.block_range.leading
            return None if call.lead is None or leading is None else measured_deltas(call.lead, leading)
        if self.integrations.alters_arguments:
            args, kwargs = self.integrations.range_arguments(args, kwargs)
        return metric_inputs(wiring, lambda name: wiring.block_ios[0].read(name, args, kwargs))

    # -- observed blocks ---------------------------------------------------------------------------------------

    def observe_enter(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pass a block's arguments to the call's observation, if it has one."""
        state = self.state
        if is_dynamo_compiling():
            if state.call is not None:
                state.call.compiled = True
            return
        blocks = self.block_range
        if index == blocks.order[0] and blocks.start and not blocks.lead and not state.transformer_was_called:
            begun = None if state.call is None else state.call.observation
            if begun is None or begun.first == index:  # else the range runs before the block that is listed first
                self._begin_pass(state.call, is_observed=True)
        call = state.call
        if call is not None and call.observation is not None and not call.stale:
            if state.held is not None:
                state.held.enter(index, args, kwargs)
            call.observation.enter(index, args, kwargs)

    def observe_leave(self, index: int, output: Any) -> None:
        """Pass a block's output to the call's observation, if it has one."""
        if is_dynamo_compiling():
            return
        state = self.state
        call = state.call
        if call is not None and call.observation is not None and not call.stale:
            call.observation.leave(index, output)
            if state.held is not None:
                state.held.leave(index, output)

    # -- begin and end of a call -------------------------------------------------------------------------------

    def _begin_pass(self, call: Call | None, is_observed: bool = False) -> Call | None:
        """Begin a call at the first of all blocks, if the transformer is not called or makes another pass.

        Args:
            call: the call before.
            is_observed: whether that is only to observe it whole.

        Returns:
            The call whose blocks before the range these are; ``None`` for a plain one, or blocks that run once more.
        """
        if replaying.get():
            return call if call is not None and call.stage is BEFORE else None
        if not self.state.transformer_was_called:
            return self._restart(None if call is not None and call.stale else call, is_observed)
        return self._restart(call) if self.passes_are_calls and call is not None and not call.stale else None

    def _restart(self, before: Call | None, is_observed: bool = False) -> Call | None:
        """Start a call at the first block, for blocks called without their transformer or a second time in one call.

        One that was to be observed is left to the range's first block, if the call before has shown the wiring.
        """
        state = self.state
        # Another cache repeats the call, this is a copy, or checkpointed blocks run again for their gradients.
        if replaying.get() or _is_tracing_or_exporting() or _is_in_backward_pass():
            return None
        if self._began_unhooked(before):
            state.call = Call()
            return state.call
        if before is None:
            # Once per thread, let a call pass whose step is unknown: it may have begun before the hooks were attached.
            # The next one raises.
            met_unknown_step, state.met_unknown_step = state.met_unknown_step, True
            if not met_unknown_step and not self.decider.clock.knows(state.arguments):
                state.call = Call()
                return state.call
        else:
            if isinstance(state.replay, RowBatch):
                raise self._runs_several_times()
            moved = self._after_call(before)
            if self.correction is not None and not state.transformer_was_called:
                self.decider.warn("unfitted", wording.output_is_not_seen(self.decider.name))
            if self.passes_are_calls and state.transformer_was_called:
                state.passes += (before,)
            elif self.unverified and state.transformer_was_called:
                raise self._runs_several_times()
            if before.run is not None:
                before.run.in_flight = False
            if is_observed and not moved and self.block_range.wiring is not None:
                state.call = None
                return None
        replay = state.replay
        assert not isinstance(replay, RowBatch)
        self._begin_call(state.arguments, replay, state.transformer_was_called)
        call = state.call
        return None if call is None or call.stale else call

    def _began_unhooked(self, before: Call | None) -> bool:
        """Return whether the transformer's call that this is in began before the hooks were on it: a plain one."""
        if (
            self.state.transformer_was_called
            or self.passes_are_calls
            or (before is not None and before.run is not None)
        ):
            return False
        return any(is_called_here(module) for module in list(self.callees())[:1])

    def _runs_several_times(self) -> WiringError:
        return WiringError(
            f"{self.block_range.first} runs several times in one call of {self.decider.name}: what happens in between "
            "cannot be followed. Choose other blocks; or, if you know better, give verify=False"
        )

    def _refuse_late_step(self) -> None:
        """Raise for a step source that was set after the call had been decided."""
        if self.state.transformer_was_called and not replaying.get():
            raise InvalidSetting(
                f"{self.decider.name}: a step index was set between the transformer's call and that of "
                f"{self.block_range.first}, when the call was decided already: set it before the transformer is called"
            )

    def _conclude(self, call: Call, replay: Replay, output: Any) -> None:
        """Commit a finished call whose arguments were kept, and test its residual if none has been tested yet.

        Of several passes that one call of a watched method makes, the first one's residual is tested.
        """
        passes = self.state.passes
        if call.observation is not None:
            call.observation.end(output)
            unseen = call.observation.empty and call.stage is not BEFORE
            if unseen or call.compiled:  # compiled in a way that did not show beforehand
                self._rehearse(replay)
        wanted, observed = call.range is not None, call.observation is not None
        moved = self._after_observed(call, output)
        if moved and wanted and replay.safe and not passes:  # it captured the wrong blocks: repeat it
            again = replace(call, mode=CAPTURE, stage=BEFORE, decision=None, range=Capture(), metric_inputs=None)
            again.lead = None if call.lead is None else Capture()
            self.verification.repeat(replay, again)
            self._after_call(again)
        calls = (*passes, call)
        branches = [each.branch for each in calls if each.branch is not None]
        if not self.unverified or len(branches) < len(calls) or any(each.mode is REUSE for each in calls):
            return
        if len(set(map(id, branches))) < len(calls):
            raise self._runs_several_times()
        # Hide the untested residuals: if the test fails or is interrupted, they must not be reused.
        hidden = [(branch, branch.anchors, branch.history.refreshed) for branch in branches]
        for branch in branches:
            branch.anchors, branch.history.refreshed = [], None
            branch.update_nbytes()
        if anchors := hidden[0][1]:
            deltas, counted = weighted_sum(anchors[:1], (1.0,)), calls[0].counted
            verdict = self.verification.check_residual(replay, calls[0], deltas, output, counted)
            self.unverified = verdict is not Verdict.SETTLED
            if verdict is Verdict.UNUSABLE:
                for branch in branches:
                    branch.clear()
                return
            if observed and not self.unverified and not counted and not passes:
                names = frozenset(branches[0].given.conditioning)
                first = self._without_additions(replay, anchors[0], deltas, names)
                hidden[0] = branches[0], [first, *anchors[1:]], hidden[0][2]
                if first.check is not None and first is not anchors[0]:
                    branches[0].unread.append(first.check)
        if passes and self.unverified:  # a later pass of the next call must not reuse what has not been tested
            return
        for branch, anchors, refreshed in hidden:
            branch.anchors, branch.history.refreshed = anchors, refreshed
            branch.update_nbytes()

    def _without_additions(
        self, replay: Replay, anchor: Anchor, deltas: tuple[Tensor, ...], names: frozenset[str]
    ) -> Anchor:
        """Return the first residual without what the model adds between the blocks, if that can be separated."""
        wiring, additions = self.block_range.wiring, self.additions
        additions.asked.add(names)
        if wiring is None or wiring.touched is None or additions.ask is None or not replay.safe:
            return anchor
        sums = self._count_additions(replay, only_if_touched=False)
        if not additions.signature:
            return anchor
        pure = [
            delta if total is None or not counts else (delta - total).to(delta.dtype)
            for delta, total, counts in zip(deltas, sums, additions.counted, strict=True)
        ]
        config, is_checked = self.decider.config, anchor.check is not None
        signature = (*anchor.signature, *additions.signature)
        return Anchor.keep(anchor.moment, signature, pure, config.dtype, config.cache_device, is_checked)

    def _ask_for_additions(self, names: frozenset[str]) -> None:
        """Ask the model whether it adds anything between the blocks in the call that is being decided.

        It is asked in calls with arguments that no call had yet: a ControlNet may begin at a later step. Of the first
        call, its observation has shown whether there is anything to ask for.
        """
        wiring, given, additions = self.block_range.wiring, self.state.given, self.additions
        if wiring is None or given is None or self.active_calls.is_closed or self.decider.on_anchor is not None:
            return
        is_first = not additions.asked
        additions.asked.add(names)
        if not wiring.joints or (is_first and wiring.touched is None and not additions.were_seen):
            return
        replay = Replay(*given)
        if replay.safe:
            try:
                self._count_additions(replay, only_if_touched=not is_first)
            except OutOfMemoryError:
                raise
            except Exception:  # the call may take another way through the blocks, on which they have to run
                return

    def _count_additions(self, replay: Replay, only_if_touched: bool) -> list[Tensor | None]:
        """Count the additions that do not depend on the streams from now on; return their sums in the repeated call."""
        found = self.verification.additions(replay, only_if_touched)
        if found is None:
            return []
        independent, sums = found
        self.additions.were_seen = True
        self.additions.count(independent)
        return sums

    def _rehearse(self, replay: Replay) -> Any:
        """Record the wiring from an extra call without compiled code, and return its output; needed once at most."""
        call, self.state.held = Call(observation=(observation := Observation(self.block_range.observed))), None
        outcome = self.verification.repeat(replay, call, eager=True)
        observation.end(outcome.output)
        calls = self.compiled_calls
        if calls is None:
            self._after_observed(call, outcome.output)
            return outcome.output
        with calls.kept_out(), calls.nothing_compiled():  # it takes hooks off
            self._after_observed(call, outcome.output)
        return outcome.output

    def _after_observed(self, call: Call, output: Any) -> bool:
        """Do as :meth:`_after_call`, but learn nothing of a call whose numbers are not finite and show no streams."""
        try:
            return self._after_call(call)
        except WiringError:
            path = first_not_finite(output)
            if path is None:
                raise
            self.decider.note_non_finite(call, f"output{path}")
            call.range = call.lead = None
            return self._after_call(call)

    def _after_call(self, call: Call) -> bool:
        """Record the wiring if the call was observed, and commit the call.

        Returns:
            Whether the range has moved to other blocks than those that it was attached to.
        """
        moved, block_range = False, self.block_range
        observation, call.observation = call.observation, None
        if observation is not None:
            observation.close()
            with MODEL_LOCK.lock:
                moved = block_range.wiring is None and not call.stale and self._record_wiring(observation, call)
        if call.stale:  # a call of another thread has moved the range
            return False
        captured = call.range
        if captured is not None and isinstance(captured.entry, dict) and block_range.wiring is not None:
            named = captured.entry  # −h_in by argument name, as it was taken before the wiring was known
            if self.is_measured and call.branch is not None and not block_range.lead:
                call.metric_inputs = metric_inputs(
                    block_range.wiring, lambda name: -named[name] if name in named else None
                )
            finish_capture(captured, block_range.wiring, self.decider.policy.metric == "rate")
        if call.lead is not None and block_range.leading is not None and isinstance(call.lead.entry, dict):
            finish_capture(call.lead, block_range.leading)
            call.metric_inputs = measured_deltas(call.lead, block_range.leading)
        if call.compiled:
            self.compilable = ()
            # Copy: with CUDA graphs the next call overwrites the outputs of this one.
            if captured is not None:
                captured.deltas, captured.output = clones(captured.deltas) or (), clones(captured.output)
            call.metric_inputs = clones(call.metric_inputs)
            if self.on_compiled is not None:
                self.on_compiled()
                self.on_compiled = None
        self.decider.commit(call)
        return moved

    def _record_wiring(self, observation: Observation, call: Call) -> bool:
        """Take the order and wiring of the blocks from an observation; return whether the range has moved."""
        if observation.first == self.block_range.order[0]:  # blocks without their transformer, but all of them
            observation.whole = True
        try:
            shown = self.block_range.read(observation, self.decider.name)
        except WiringError:
            if call.stale:  # the cache was detached during the call, whose observation is incomplete
                return False
            raise
        if shown is None or call.stale:
            return False
        if self.state.held is not None:
            self._refuse_held(self.state.held, shown)
        if shown.moved:  # the range consists of other blocks than expected: drop what was captured from those
            call.mode = PLAIN if call.mode is CAPTURE else call.mode
            call.range, call.lead = None, None if call.lead is None else Capture()
            self._is_reattaching = True
            self.active_calls.expire(but=call)
        for warning in dict.fromkeys(io.remark for io in shown.wiring.block_ios if io.remark):
            self.decider.warn("pattern", f"{self.decider.name}: {warning}")
        self.block_range.become(shown)
        self._follow_wiring()
        return shown.moved

    def _refuse_held(self, held: HeldOutputs, shown: LearntRange) -> None:
        """Raise for an output of a block inside the range that is held behind it, in a call that cannot be repeated."""
        observed, start = self.block_range.observed, self.block_range.start
        blocks = shown.order[start : start + len(shown.wiring.block_ios)]
        index = held.inside(blocks)
        if index is not None:
            inner, last = observed[index].path, observed[blocks[-1]].path
            raise WiringError(
                f"{self.decider.name}: what {inner} returned is still held when {last} has run: the model uses more of "
                "these blocks than what leaves the last one (outputs collected on the way, say). Choose other blocks; "
                "or, if you know better, give verify=False"
            )

    def _follow_wiring(self) -> None:
        """Re-attach according to the recorded wiring; if that is interrupted, the next call does it."""
        if self.on_wired is not None:
            self.on_wired(self._is_reattaching)
        self._is_reattaching = False


def _mark_compiled(call: Call) -> None:
    """Mark a call whose tensors come from compiled code; checked in each hook, as blocks may be compiled one by one."""
    if is_dynamo_compiling():
        call.compiled = True


def _mark_time(call: Call, mark: Callable[[], Any]) -> None:
    """Add a time mark at the start or end of a computed range; compiled code cannot."""
    if not is_dynamo_compiling() and call.marks:
        call.marks.append(mark())


def _is_tracing_or_exporting() -> bool:
    """Return whether a call is being traced or exported: that makes a copy of the model, which is not cached."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return True
    return bool(is_exporting())


def _is_in_backward_pass() -> bool:
    """Return whether autograd is at work in this thread, asked as ``torch.utils.checkpoint`` asks it."""
    return torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1


def _versions(tensors: Iterable[Tensor]) -> list[int]:
    """Return torch's count of the writes into each tensor."""
    return list(map(_VERSION, tensors))
