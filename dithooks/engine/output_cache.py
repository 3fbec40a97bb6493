"""The runtime of one cached transformer: what its stand-in calls in place of it, and after it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks.block_io import bind, parameter_names
from ..environment.torch_api import is_exporting
from ..stats import warnings as wording
from ..stats.timing import marker_for
from .active_calls import ActiveCalls
from .arguments import CallArguments
from .call import HALF, LEFT_OUT, MADE, MISMATCH, REUSE, ROWS, UNDECIDED, Call, Capture
from .change_metrics import METRICS
from .compiled_calls import CompiledCalls
from .compiled_code import run_eagerly
from .decider import CallDecider
from .held_difference import HALF_OF_BATCH, HeldDifference
from .output_correction import OutputCorrection
from .output_form import form_of
from .output_rows import OutputRows
from .protocols import Integrations
from .replay import Replay, replaying
from .residual import clones
from .row_states import RowStates
from .run import Run
from .sessions import current_context
from .verification import MOST_WRITING_STEPS

PLAIN_CALL = object()  # the transformer is to be called, and nothing learnt from it
_EAGERLY = "dithooks decides outside of compiled code"


class _OutputState(threading.local):
    """The call under way in one thread."""

    def __init__(self, active: ActiveCalls) -> None:  # once in each thread
        self.thread = active.join()
        self.call: Call | None = None  # a computed one, whose transformer is running
        self.arguments: Mapping[str, Any] = {}  # of that call, by name
        self.given: tuple[tuple[Any, ...], dict[str, Any]] = (), {}  # the same, as they are passed
        self.written: Callable[[], list[str]] = list  # returns what the call has put or changed in its arguments


class CacheMark(weakref.ref[nn.Module]):
    """A weak reference by which a cache is found from its transformer; nothing is put on that."""

    __slots__ = ("cache",)
    cache: OutputCache


class OutputCache:
    """The runtime of one transformer whose calls are left out on reused steps.

    Example: on a reused step ``pass_over`` returns the forecast output; on a computed one it returns
    ``NotImplemented``, the stand-in calls the transformer, and ``conclude`` keeps a copy of what that returned.

    Args:
        decider: the decider of each call.
        model: the transformer.
        integrations: the adapter to other libraries.
    """

    def __init__(self, decider: CallDecider, model: nn.Module, integrations: Integrations) -> None:
        self.decider, self.integrations, self._model = decider, integrations, model
        self._writing: set[tuple[int, int]] = set()  # number of the run, and step
        self.handle: Any = None  # the CacheHandle, found through the mark
        self._mark: CacheMark | None = None
        self.compiled_calls: CompiledCalls | None = None  # the handle's; compiled code has no stand-in in it
        self.active_calls = ActiveCalls()
        self.state = _OutputState(self.active_calls)
        self._names = parameter_names(model)
        metric = decider.policy.metric
        self._is_measured = metric is not None
        self._keeps_reused = metric is not None and METRICS[metric].keeps_reused
        self._look_at = decider.config.look_at or ()
        self.correction = OutputCorrection(decider) if decider.corrects else None
        self.row_states = RowStates(decider, lambda plan: self.handle.config_of(plan, self), sees_blocks=False)
        self._rows = OutputRows(decider, model, self.row_states)
        self._held: HeldDifference | None = None
        if decider.policy.has_conditional:
            self._held = HeldDifference(decider, model, self._rows, lambda: self.state.given)
            decider.alone = self._held.decide
        # Called with an output that the transformer has not returned as it is, and the arguments that it is for.
        # The last one says whether it completes one for half of the batch, which the transformer has returned.
        self.on_made: Callable[[Any, Mapping[str, Any], bool], None] | None = None
        decider.decide_rows = lambda rows, _: Call(mode=ROWS)  # one by one, by what makes the call
        self._marker: tuple[Any, Callable[[], Any]] = (None, marker_for(None))
        # Not as decorators: these would import the compiler with this file.
        self.pass_over = run_eagerly(self._pass_over, _EAGERLY)
        self.conclude = run_eagerly(self._conclude, _EAGERLY)

    # -- around the transformer's call -------------------------------------------------------------------------

    def _pass_over(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the forecast output of a call, ``NotImplemented`` if it is computed, or else ``PLAIN_CALL``."""
        state = self.state
        if self.active_calls.is_closed or state.call is not None or replaying.get() or _is_tracing_or_exporting():
            return PLAIN_CALL
        if torch.is_grad_enabled():
            self.decider.plain_call_with_gradients()
            return PLAIN_CALL
        arguments = bind(self._names, args, kwargs) if args else kwargs
        latents = arguments.get(self.decider.latents_name or "")
        device = latents.device if isinstance(latents, Tensor) else None
        if device != self._marker[0]:
            self._marker = device, marker_for(device)
        marks = [self._marker[1]()]
        if self._held is not None:
            state.given = args, kwargs
        call = self._decided(arguments)
        if call.mode is ROWS:
            return self._rows_called(call, arguments, args, kwargs)
        call.marks = marks
        state.thread.calls = (call,)
        call.stale = call.stale or self.active_calls.is_closed  # again: close() marks the calls that it sees
        if call.mode is REUSE:
            output = self._forecast(call)
            if output is not NotImplemented:
                self._end(call)
                state.thread.calls, state.given = (), ((), {})
                return output
        answer = NotImplemented
        if self._held is not None and call.decision is HALF_OF_BATCH:
            answer = self._held.half(call)
        state.call, state.arguments = call, arguments
        if call.mode is MADE:
            return self._made(call)
        if call.mode is HALF:
            args, kwargs = answer
            arguments = bind(self._names, args, kwargs)
        if call.range is not None:
            state.written = partial(
                written_into, Replay(self._model, args, kwargs), dict(arguments), versions(arguments)
            )
        return answer

    def _made(self, call: Call) -> Any:
        """Return the output of a call that is made of another branch's, and conclude it as a computed one."""
        assert call.branch is not None
        assert call.branch.output_form is not None
        try:
            output = call.branch.output_form.build(call.deltas)
            if self.on_made is not None:
                self.on_made(output, self.state.arguments, False)
            return self._conclude(output)
        finally:
            self.leave()

    def _rows_called(
        self, call: Call, arguments: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return the output for a batch of several requests' rows."""
        state = self.state
        state.call, state.thread.calls = call, (call,)  # what calls the transformer within is a plain call
        try:
            return self._rows.call(current_context()[0].rows or (), arguments, args, kwargs, self._watched)
        finally:
            self.leave()

    def _watched(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], list[str]]:
        """Return a function that finds, after a call, what it has written into its arguments."""
        arguments = bind(self._names, args, kwargs)
        return partial(written_into, Replay(self._model, args, kwargs), arguments, versions(arguments))

    def _conclude(self, output: Any) -> Any:
        """Conclude a computed call, and return what the pipeline is given: the transformer's output, or a corrected."""
        call = self.state.call
        if self._held is not None and call is not None and call.mode is HALF:
            output = self._whole(self._held, call, output)
        if self.correction is None:
            self._end_computed(call, output)
            return output
        corrected = self.correction(call, output, lambda: self._end_computed(call, output))
        return output if corrected is None else corrected

    def _whole(self, held: HeldDifference, call: Call, output: Any) -> Any:
        """Return the output for a whole batch, half of which was computed; the other half too, if that does not fit."""
        args, kwargs = self.state.given
        whole = NotImplemented if call.stale else held.whole(call, output)
        if whole is NotImplemented:
            call.mode, call.range = MISMATCH, None
            whole = self._model(*args, **kwargs)
        if self.on_made is not None:
            self.on_made(whole, self.state.arguments, True)
        return whole

    def _end_computed(self, call: Call | None, output: Any) -> None:
        """Keep what a computed call has returned, and commit it."""
        if call is None:
            return
        end = self._marker[1]()
        if not call.stale:
            self.decider.learn_latents(self.state.arguments, output)
            if written := self.state.written():
                self._note_written(call, written)
            elif call.range is not None:
                self._take(call, call.range, output)
            if call.marks and call.mode not in LEFT_OUT:
                call.marks += [call.marks[0], end]
        self._end(call)

    def leave(self) -> None:
        """End a computed call, whether the transformer has returned or an exception has ended it."""
        state = self.state
        state.call, state.arguments, state.written, state.thread.calls = None, {}, list, ()
        state.given = (), {}

    # -- a call ------------------------------------------------------------------------------------------------

    def _decided(self, arguments: Mapping[str, Any]) -> Call:
        """Decide a call by its arguments."""
        decider = self.decider
        self.integrations.refresh()
        call = decider.decide(arguments, True, self._held is not None)
        if self._is_measured and call.branch is not None:
            call.metric_inputs = self._seen(call.branch.given)
        if call.mode is UNDECIDED:
            decider.judge(call)
        if call.mode is not REUSE or self._keeps_reused:
            # Copy: the model and the pipeline may write into them, and later steps are compared with them.
            call.metric_inputs = clones(call.metric_inputs)
        return call

    def _seen(self, given: CallArguments) -> tuple[Tensor, ...] | None:
        """Return what a policy decides by: the latents of a call, or the arguments that are named."""
        tensors = given.latents
        if self._look_at:
            everything = {**given.latents, **given.conditioning}
            tensors = {path: each for path, each in everything.items() if _is_named(path, self._look_at)}
        return tuple(tensor for tensor in tensors.values() if tensor.is_floating_point()) or None

    def _forecast(self, call: Call) -> Any:
        """Return the output of a reused call; ``NotImplemented`` if it is given tensors of other shapes."""
        branch = call.branch
        assert branch is not None
        form = branch.output_form
        if form is None or not form.fits(branch.given):
            call.mode, call.deltas, call.range = MISMATCH, (), Capture()
            return NotImplemented
        # Stored outputs are not handed out: the pipeline may write into them.
        kept = {id(tensor) for anchor in branch.anchors for tensor in anchor.kept}
        tensors = [tensor.clone() if id(tensor) in kept else tensor for tensor in call.deltas]
        return form.build(tensors)

    def _take(self, call: Call, captured: Capture, output: Any) -> None:
        """Copy the tensors of an output, which the pipeline may write into, and note its form."""
        branch = call.branch
        assert branch is not None
        taken = form_of(output, branch.given)
        if taken is None:
            self.decider.warn("output", wording.output_cannot_be_made(self.decider.name, type(output).__name__))
            return
        form, tensors = taken
        branch.take_form(form)
        captured.deltas, captured.complete = tuple(tensor.detach().clone() for tensor in tensors), True
        if self._held is not None:
            self._held.take(call, captured.deltas, output)
        if self.decider.policy.metric == "rate" and call.metric_inputs is not None:
            captured.output = captured.deltas[: len(call.metric_inputs)]

    def _note_written(self, call: Call, paths: list[str]) -> None:
        """Note that a call has done more than to return its output, so that it must not be left out; warn if often."""
        call.range = None
        if call.run is None:
            return
        self._writing = {each for each in self._writing if each[0] == call.run.number}
        self._writing.add((call.run.number, call.moment.step))
        if len(self._writing) > MOST_WRITING_STEPS:
            self.decider.warn("written", wording.arguments_are_written(self.decider.name, paths))

    def _end(self, call: Call) -> None:
        """Commit a call that is over."""
        if not call.stale:
            self.decider.commit(call)
            if call.marks:
                self.decider.time(call, self._marker[1])
        if call.run is not None:
            call.run.in_flight = False

    # -- attached, reset and removed ---------------------------------------------------------------------------

    def mark_model(self, model: nn.Module | None) -> None:
        """Let the cache be found from a transformer; ``None``: from none any more."""
        self._mark = None if model is None else CacheMark(model)
        if self._mark is not None:
            self._mark.cache = self

    def forget(self) -> list[str]:
        """Drop all cached state; return the pending warnings."""
        return self.decider.warnings_of(self.drop())

    def drop(self) -> list[Run]:
        """Do the same, and return the runs; waits for no lock."""
        self.active_calls.expire()
        return [*self.decider.drop(), *self.row_states.drop()]


def output_caches_of(modules: Iterable[nn.Module]) -> list[OutputCache]:
    """Return the caches of those of some modules that are transformers with a stand-in, each once."""
    marks = [mark for module in modules for mark in weakref.getweakrefs(module) if isinstance(mark, CacheMark)]
    return list({id(mark.cache): mark.cache for mark in marks}.values())


def versions(arguments: Mapping[str, Any]) -> dict[str, int]:
    """Return torch's count of the writes into each tensor among some arguments; inference tensors have none."""
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    return {name: tensor._version for name, tensor in tensors.items() if not tensor.is_inference()}


def written_into(replay: Replay, arguments: Mapping[str, Any], before: Mapping[str, int]) -> list[str]:
    """Return the paths of what a call has put or changed in its arguments: into themselves, or into what they hold."""
    changed = [name for name, version in versions(arguments).items() if version != before[name]]
    return [*changed, *replay.outcome(None).written]


def _is_named(path: str, names: Iterable[str]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in names)


def _is_tracing_or_exporting() -> bool:
    """Return whether a call is being traced or exported: that makes a copy of the model, which is not cached."""
    return torch.jit.is_tracing() or bool(is_exporting())  # type: ignore[attr-defined, no-untyped-call]
