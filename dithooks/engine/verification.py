"""The test of a range's first residual, by repeating the call it was taken from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from .noise_probe import ALIKE, NoiseProbe, few, likeness
from .protocols import Integrations
from .replay import Replay, difference, finite, tolerance


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

    def repeat(self, replay: Replay, call: Call, eager: bool = False) -> Any:
        """Repeat a call as ``call`` and return its output; other caches on the model act as they did before."""
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

    def check_residual(self, replay: Replay, deltas: tuple[Tensor, ...], output: Any) -> bool:
        """Check that a residual reproduces the output of the call that it was taken from.

        Returns:
            Whether the residual was tested or cannot be; ``False`` if the output is not finite, with noise or without,
            or the range changed meanwhile, so that another call has to be tested.

        Raises:
            WiringError: the output differs, or the model does more between the blocks than was recognised.
        """
        cache, block_range = self.cache, self.cache.block_range
        argument = replay.unsafe_argument
        if argument is not None:
            cache.decider.warn("strange", wording.argument_may_be_written(cache.decider.name, argument))
            return True
        if not finite(output):
            return False
        allowed = tolerance(output, cache.decider.config.dtype)
        error = self._error(replay, deltas, output)
        if error is not None and not error <= allowed and cache.hands_on_results:
            cache.hands_on_results = False  # the model writes into the results in a way that no version shows
            error = self._error(replay, deltas, output)
        if error is None:
            return False
        if not error <= allowed:
            raise WiringError(
                f"{cache.decider.name}: with {block_range.first} … {block_range.last} skipped and their residual "
                f"added, the call it was taken from comes out {error:.2g} off (relative L2): the model uses more of "
                "these blocks than what leaves the last one (outputs collected on the way, say), or is not "
                "deterministic. Choose other blocks; or, if you know better, give verify=False"
            )
        assert block_range.wiring is not None
        if block_range.wiring.certain:
            return True
        quiet = self._run_probe(replay, block_range.wiring, None)
        for seed in range(4):
            noisy = self._run_probe(replay, block_range.wiring, seed)
            if quiet is None or noisy is None:
                return False
            found = likeness(quiet, noisy)
            if not all(map(isfinite, found)):  # the noise was too much for the dtype: another call has to be tested
                return False
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
        return True

    def _error(self, replay: Replay, deltas: tuple[Tensor, ...], output: Any) -> float | None:
        """Return the error of the call's output if it reuses the residual; ``None`` if the range changed meanwhile."""
        trial = Call(mode=Mode.REUSE, deltas=deltas)
        try:
            error = difference(self.repeat(replay, trial), output)
        except WiringError:
            if not self.cache.hands_on_results:
                raise
            error = inf
        return None if trial.stale else error

    def _run_probe(self, replay: Replay, wiring: Wiring, seed: int | None) -> NoiseProbe | None:
        """Repeat the call with noise added at the range's start; ``None`` if the range changed meanwhile.

        A ``seed`` of ``None`` adds no noise.
        """
        probe = NoiseProbe(wiring, seed)
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
    return Call(mode=Mode.REUSE, deltas=call.deltas)
