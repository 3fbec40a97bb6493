"""The test of a range's first residual, by repeating the call it was taken from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from math import inf, isfinite
from typing import Any, Protocol

import torch
from torch import Tensor

from ..blocks.block_io import BlockIO
from ..blocks.wiring import Wiring
from ..errors import WiringError
from ..stats import warnings as wording
from .active_calls import ActiveCalls, ThreadCalls
from .block_range import BlockRange
from .call import Call, Mode, Shortcut, Stage
from .decider import CallDecider
from .noise_probe import ALIKE, NoiseProbe, are_independent, few, likeness
from .output_comparison import (
    autocast_of,
    difference,
    first_not_finite,
    first_unlike,
    is_zero,
    tensors_in,
    tolerance,
)
from .protocols import Integrations
from .replay import CallResult, Replay

# Steps whose calls may do more than the range's residual shows, as a first one that fills a cache of keys and values.
MOST_WRITING_STEPS = 2


class Verdict(Enum):
    """What the test of a residual has shown."""

    SETTLED = "the residual was tested, or cannot be"
    OPEN = "the range changed meanwhile, or this call could not have shown a fault: another call has to be tested"
    UNUSABLE = "this call proves nothing, and its residual must not be reused: another call has to be tested"


class CallHolder(Protocol):
    """Holder of the call under way in this thread, and of the last finished one."""

    call: Call | None
    latest: Call | None
    shortcut: Shortcut
    thread: ThreadCalls


class RepeatableCache(Protocol):
    """A range cache whose calls can be repeated."""

    decider: CallDecider
    block_range: BlockRange
    integrations: Integrations
    active_calls: ActiveCalls
    hands_on_results: bool

    @property
    def state(self) -> CallHolder: ...
    @property
    def others(self) -> Callable[[], Sequence[RepeatableCache]]: ...
    @property
    def is_compiled(self) -> bool: ...


class Verification:
    """Tester of a first residual: it repeats a call with the range skipped.

    Args:
        cache: the cache of the range.
    """

    def __init__(self, cache: RepeatableCache) -> None:
        self.cache = cache
        self._writing_steps: set[tuple[int, int]] = set()  # number of the run, and step

    def repeat(self, replay: Replay, call: Call, eager: bool = False) -> CallResult:
        """Repeat a call as ``call`` and return what it leaves; other caches on the model act as they did before."""
        cache = self.cache
        caches = [cache, *cache.others()]
        formers = [(each.state.call, each.state.shortcut) for each in caches]
        for other in caches[1:]:
            other.state.call = _repeat_of(other)
        thread = cache.state.thread
        cache.state.call, call.stale = call, False
        calls, thread.calls = thread.calls, (*thread.calls, call)
        if cache.active_calls.is_closed:
            call.stale = True
        try:
            return replay(eager)
        finally:
            for each, (former, shortcut) in zip(caches, formers, strict=True):
                each.state.call, each.state.shortcut = former, shortcut
            thread.calls = calls

    def check_residual(
        self, replay: Replay, call: Call, deltas: tuple[Tensor, ...], output: Any, counted: tuple[bool, ...] = ()
    ) -> Verdict:
        """Check that a residual reproduces the output of the call that it was taken from.

        A call whose blocks make or write what is not made or written without them (a cache of keys and values that
        is filled) proves nothing; nor does one whose numbers are not finite, with noise or without.

        Args:
            replay: of the call.
            call: that the residual was taken from.
            deltas: the residual.
            output: of the call.
            counted: by output of the range, whether what the model adds between the blocks is not in the residual.

        Raises:
            WiringError: the output differs, the model does more between the blocks than was recognised, or the blocks
                write into something at more than a few steps.
        """
        cache, block_range = self.cache, self.cache.block_range
        argument = replay.unsafe_argument
        if argument is not None:
            cache.decider.warn("strange", wording.argument_may_be_written(cache.decider.name, argument))
            return Verdict.SETTLED
        if (path := first_not_finite(output)) is not None:
            cache.decider.note_non_finite(call, f"output{path}")
            return Verdict.UNUSABLE
        allowed = tolerance((output, deltas), cache.decider.config.dtype, *autocast_of(tensors_in(output).values()))
        reference = replay.outcome(output)
        trial = self._trial(replay, deltas, reference, allowed, counted)
        if trial is not None and not trial[1] <= allowed and cache.hands_on_results:
            cache.hands_on_results = False  # the model writes into the results in a way that no version shows
            trial = self._trial(replay, deltas, reference, allowed, counted)
        if trial is None:
            return Verdict.OPEN
        unlike, error = trial
        if unlike is not None:
            self._refuse_if_often(call, unlike)
            return Verdict.UNUSABLE
        if not error <= allowed and first_not_finite(deltas) is not None:  # inside, or in float16's difference alone
            cache.decider.note_non_finite(call, f"the residual of {block_range.first} … {block_range.last}")
            return Verdict.UNUSABLE
        if not error <= allowed:
            raise WiringError(
                f"{cache.decider.name}: with {block_range.first} … {block_range.last} skipped and their residual "
                f"added, the call it was taken from comes out {error:.2g} off (relative L2): the model uses more of "
                "these blocks than what leaves the last one (outputs collected on the way, say), or is not "
                "deterministic. Choose other blocks; or, if you know better, give verify=False"
            )
        if is_zero(output):  # as of a model whose last layers are zeros before it is trained
            return Verdict.OPEN
        assert block_range.wiring is not None
        if block_range.wiring.certain:
            return Verdict.SETTLED
        quiet = self._run_probe(replay, block_range.wiring, None)
        for seed in range(4):
            noisy = self._run_probe(replay, block_range.wiring, seed)
            if quiet is None or noisy is None:
                return Verdict.OPEN
            found = likeness(quiet, noisy)
            if not all(map(isfinite, found)):  # the noise was too much for the dtype: another call has to be tested
                return Verdict.OPEN
            for name, alike in zip(block_range.wiring.block_ios[-1].carries, found, strict=True):
                if alike < ALIKE:
                    raise WiringError(
                        f"{cache.decider.name}: between {block_range.first} and {block_range.last} the model does more "
                        f"to {name} than was recognised: noise put in at the former comes out at the latter otherwise "
                        f"than expected (alike by {alike:.2f} of 1). Is it rearranged, or another stream? Choose a "
                        "range on one side of that; or, if you know better, give verify=False"
                    )
            if not few(noisy):
                break
        return Verdict.SETTLED

    def additions(self, replay: Replay, only_if_touched: bool) -> tuple[list[bool], list[Tensor | None]] | None:
        """Ask the model what it adds to the streams between the range's blocks, and whether that depends on them.

        Args:
            replay: of the call to ask in.
            only_if_touched: whether to leave it at one call if nothing is added.

        Returns:
            For each output of the range, whether additions can be counted, and their sum. ``None``: nothing is
            added, or it is not known, as the range has changed meanwhile.
        """
        wiring = self.cache.block_range.wiring
        assert wiring is not None
        quiet = self._run_probe(replay, wiring, None)
        if quiet is None or not quiet.is_whole:
            return None
        found = quiet.added()
        nothing = not quiet.is_touched and all(each is None or each.is_meta or not bool(each.any()) for each in found)
        if only_if_touched and nothing:
            return None
        noisy = self._run_probe(replay, wiring, 0, size=1.0)
        return None if noisy is None or not noisy.is_whole else (are_independent(quiet, noisy), found)

    def _trial(
        self,
        replay: Replay,
        deltas: tuple[Tensor, ...],
        reference: CallResult,
        allowed: float,
        counted: tuple[bool, ...],
    ) -> tuple[str | None, float] | None:
        """Make the call again with the residual reused; return what the blocks left out would have made or written
        elsewhere, and else the output's error; ``None`` if the range changed meanwhile.
        """
        trial = Call(mode=Mode.REUSE, deltas=deltas, counted=counted)
        try:
            outcome = self.repeat(replay, trial)
        except WiringError:
            if not self.cache.hands_on_results:
                raise
            return None if trial.stale else (None, inf)
        if trial.stale:
            return None
        unlike = first_unlike(outcome.tensors, reference.tensors)
        if unlike is None and reference.written and not difference(outcome.written, reference.written) <= allowed:
            unlike = next(iter(reference.written))
        return (unlike, 0.0) if unlike is not None else (None, difference(outcome.output, reference.output))

    def _refuse_if_often(self, call: Call, path: str) -> None:
        """Refuse a range whose blocks write into something at more than the first few steps."""
        block_range = self.cache.block_range
        self._writing_steps.add((0 if call.run is None else call.run.number, call.moment.step))
        if len(self._writing_steps) > MOST_WRITING_STEPS:
            raise WiringError(
                f"{self.cache.decider.name}: {path} is other without {block_range.first} … {block_range.last}, and was "
                f"at each of {len(self._writing_steps)} computed steps: these blocks write into it, which reused steps "
                "would leave out. Choose other blocks; or, if that does not matter, give verify=False"
            )

    def _run_probe(self, replay: Replay, wiring: Wiring, seed: int | None, size: float = 0.1) -> NoiseProbe | None:
        """Repeat the call with noise added at the range's start; ``None`` if the range changed meanwhile.

        A ``seed`` of ``None`` adds no noise; its ``size`` is relative to that of the streams.
        """
        probe = NoiseProbe(wiring, seed, size)
        trial = Call(mode=Mode.REUSE, probe=probe)
        self.repeat(replay, trial, eager=self.cache.is_compiled)
        return None if trial.stale else probe

    def pass_through(
        self, call: Call, wiring: Wiring, offset: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return a stand-in's output in a probing call, which hands the streams on as they are."""
        if offset == 0:
            args, kwargs = self.cache.integrations.range_arguments(args, kwargs)
        io, probe = wiring.block_ios[offset], call.probe
        assert probe is not None
        values = [None if name is None else io.read(name, args, kwargs) for name in io.carries]
        if offset == 0:
            values = probe.enter({name: io.read(name, args, kwargs) for name in wiring.entry}, values)
        if offset == len(wiring.block_ios) - 1:
            call.stage = Stage.AFTER
            probe.leave([None if name is None else io.read(name, args, kwargs) for name in io.carries])
        return io.build(fill_new_outputs(io, values, {}), args, kwargs)


def fill_new_outputs(io: BlockIO, values: Sequence[Any], shapes: Mapping[int, torch.Size]) -> list[Any]:
    """Return a block's outputs with zeros in those that hold no stream, of the given or else first observed shapes."""
    if not any(io.new_forms):
        return list(values)
    like = next(value for value in values if isinstance(value, Tensor))
    return [
        value if form is None else like.new_zeros(shapes.get(position, form[0]), dtype=form[1])
        for position, (value, form) in enumerate(zip(values, io.new_forms, strict=True))
    ]


def _repeat_of(cache: RepeatableCache) -> Call | None:
    """Return a call that repeats a cache's current or last one, if that reused; ``None``: repeat it as a plain one."""
    call = cache.state.call or cache.state.latest
    if call is None or call.mode is not Mode.REUSE or call.stale:
        return None
    return Call(mode=Mode.REUSE, deltas=call.deltas, counted=call.counted)
