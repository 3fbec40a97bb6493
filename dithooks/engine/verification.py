"""Calls made again: to take the first residual for granted only where it has been seen to hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Any, Protocol

import torch
from torch import Tensor

from ..blocks.block_io import BlockIO
from ..blocks.wiring import Wiring
from ..errors import WiringError
from .active_calls import ActiveCalls, ThreadCalls
from .block_range import BlockRange
from .call import Call, Mode, Shortcut, Stage
from .decider import CallDecider
from .noise_probe import ALIKE, NoiseProbe, few, likeness
from .protocols import Integrations
from .replay import Replay, difference, finite, tolerance


class CallHolder(Protocol):
    """Holds the call under way in this thread, and the last one that is over."""

    call: Call | None
    latest: Call | None
    shortcut: Shortcut
    thread: ThreadCalls


class RepeatableCache(Protocol):
    """What a range cache has to offer, so that its calls can be made again."""

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
    """Tries out a residual by replays of a call of its transformer.

    Args:
        cache: of the range.
    """

    def __init__(self, cache: RepeatableCache) -> None:
        self.cache = cache

    def repeat(self, replay: Replay, call: Call, eager: bool = False) -> Any:
        """The output of a call made again, as ``call``; other caches on the model do as they did in it."""
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
        """On the call it was taken from, the residual has to give that call's output.

        Returns whether that could be told: not where the output is not finite.

        Raises:
            WiringError: it does not; or what was recognised between the blocks is not what the model does there.
        """
        cache, block_range = self.cache, self.cache.block_range
        if not replay.safe:
            cache.decider.warn(
                "strange",
                f"{cache.decider.name} is given {replay.unsafe_argument}: if blocks write into it (keys and "
                "values, say), those of the range do not on reused steps; nor was the residual tested on its own call, "
                "which would have to be made again",
            )
            return True
        if not finite(output):
            return False
        allowed = tolerance(output, cache.decider.config.dtype)
        error = self._error(replay, deltas, output)
        if error is not None and not error <= allowed and cache.hands_on_results:
            cache.hands_on_results = False  # the model writes into what it is handed, in a way that no version shows
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
            for name, alike in zip(block_range.wiring.block_ios[-1].carries, likeness(quiet, noisy), strict=True):
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
        """Return how far off a call comes out where the residual is reused in it; ``None``: the range has changed."""
        trial = Call(mode=Mode.REUSE, deltas=deltas)
        try:
            error = difference(self.repeat(replay, trial), output)
        except WiringError:
            if not self.cache.hands_on_results:
                raise
            error = inf
        return None if trial.stale else error  # taken off, or moved, in the middle of it

    def _run_probe(self, replay: Replay, wiring: Wiring, seed: int | None) -> NoiseProbe | None:
        """One passage, wholly made by the range as it is; ``None``: it was taken off, or moved, in the middle."""
        probe = NoiseProbe(wiring, seed)
        trial = Call(mode=Mode.REUSE, probe=probe)
        self.repeat(replay, trial, eager=self.cache.is_compiled)
        return None if trial.stale else probe

    def pass_through(
        self, call: Call, wiring: Wiring, offset: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return a block's output where the range is only passed through, to see how its streams are handed on."""
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
    """What a block passes on, with zeros for outputs that carry on nothing, in the given shapes or as first seen."""
    if not any(io.new_forms):
        return list(values)
    like = next(value for value in values if isinstance(value, Tensor))
    return [
        value if form is None else like.new_zeros(shapes.get(position, form[0]), dtype=form[1])
        for position, (value, form) in enumerate(zip(values, io.new_forms, strict=True))
    ]


def _repeat_of(cache: RepeatableCache) -> Call | None:
    """A cache's call under way, or else its last, to be made again: reused with the same residuals, or plain."""
    call = cache.state.call or cache.state.latest
    if call is None or call.mode is not Mode.REUSE or call.stale:
        return None
    return Call(mode=Mode.REUSE, deltas=call.deltas)
