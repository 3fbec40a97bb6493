"""A survey of a model's blocks: lists, patterns and streams, the gaps between blocks, and the ranges to cache."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..blocks.adapter import BlockAdapter
from ..blocks.block_io import BlockIO, show
from ..blocks.block_lists import Chain
from ..blocks.cache_target import CacheTarget
from ..blocks.discovery import Blocks, owners_of
from ..blocks.observation import BlockCall, Observation, observed_blocks
from ..blocks.pattern import pattern_of
from ..blocks.registry import chains_of
from ..blocks.stream_matching import block_io_of
from ..blocks.stream_transforms import text
from ..blocks.tap import Tap, tap
from ..blocks.trunk import Trunk, find_trunk, followable_ranges
from ..blocks.wiring import gap
from ..config.cache_config import DitCacheConfig
from ..engine.sessions import timestep_scope
from ..errors import NothingSeen, WiringError
from ..handle import dit_cache
from .range_trials import BlockPair, try_out, within


@dataclass(frozen=True)
class ListSurvey:
    """A list of blocks, such as ``transformer_blocks``.

    Args:
        path: the path of the list from the target.
        number: the number of its blocks.
        classes: the classes of its blocks.
        apart: the reason why the list is no part of the trunk; empty if it is one.
        pattern: how its blocks take and return streams, in words; empty if that was not observed.
        streams: the streams that its blocks take, each with its name, shape and dtype.
    """

    path: str
    number: int
    classes: tuple[str, ...]
    apart: str
    pattern: str
    streams: tuple[str, ...]


@dataclass(frozen=True)
class Survey:
    """The survey of one transformer of a target.

    Args:
        name: the path and the class of the transformer.
        path: the path of the transformer from the target.
        lists: all lists of blocks, those of the trunk first and in the order in which they are called.
        blocks: the paths of the trunk's blocks, in the order in which they are called.
        gaps: the numbers of blocks after which the model changes the streams, with the change in words.
        ranges: pairs of first and last block; any range within one of them can be cached.
        wholes: further ranges that can be cached, but not any part of them.
        refused: ranges that cannot be cached, by first and last block, with the reason; a shortest one for each reason.
        tested: the number of ranges that were cached and compared with the plain output.
    """

    name: str
    path: str
    lists: tuple[ListSurvey, ...]
    blocks: tuple[str, ...]
    gaps: tuple[tuple[tuple[int, ...], str], ...]
    ranges: tuple[BlockPair, ...]
    wholes: tuple[BlockPair, ...]
    refused: tuple[tuple[int, int, str], ...]
    tested: int

    @property
    def between(self) -> tuple[str, ...]:
        """The gaps in words, a line for each."""
        return tuple(f"after {spelled(numbers)}: {line}" for numbers, line in self.gaps)

    @property
    def largest(self) -> BlockPair | None:
        """The longest range that can be cached."""
        return max((*self.ranges, *self.wholes), key=lambda pair: pair[1] - pair[0], default=None)


def survey(target: CacheTarget, run: Callable[[], object], blocks: Blocks = None, test: int = 64) -> list[Survey]:
    """Observe the blocks of a target in one run; then try ranges of them.

    Args:
        target: a model, a pipeline or a :class:`~dithooks.BlockAdapter`, as for :func:`~dithooks.dit_cache`.
        run: calls it once, always with the same inputs; a pipeline with a scheduler, for two sampling steps or more.
        blocks: as for :func:`~dithooks.dit_cache`.
        test: the most ranges to cache and compare with the plain output; each needs three calls. A range that is not
            tried is refused if it holds one that failed.

    Raises:
        DitHooksError: as :func:`~dithooks.dit_cache`.
        NothingSeen: ``run`` does not call the blocks.

    Example:
        >>> from dithooks.tiny import build
        >>> model, inputs = build("FluxTransformer2DModel")
        >>> found = survey(model, lambda: model(**inputs()))[0]
        >>> [(each.path, each.pattern) for each in found.lists]
        [('transformer_blocks', '1: (h, e) -> (e, h)'), ('single_transformer_blocks', '1: (h, e) -> (e, h)')]
        >>> found.ranges
        ((0, 7),)
    """
    chains = [chain for chain, _ in chains_of(target, blocks)]
    calls = [_FirstCall(chain) for chain in chains]
    with torch.no_grad(), ExitStack() as taps:
        for call in calls:
            taps.enter_context(call.tap())
        run()
    found = []
    for chain, observation in ((call.chain, call.observation) for call in calls):
        if observation is None or observation.empty:
            raise NothingSeen(f"{chain.name}: the run did not call its blocks, so there is nothing to see")
        named = (
            blocks
            if len(chains) == 1 or isinstance(target, BlockAdapter)
            else [block_list.path for block_list in chain.block_lists]
        )
        found.append(_surveyed(target, run, named, chain, observation, test))
    return found


class _FirstCall:
    """The observation of the first call of a chain's transformer that returns; ``None`` until then."""

    def __init__(self, chain: Chain) -> None:
        self.chain, self._observed = chain, observed_blocks(chain)
        self.observation: Observation | None = None
        self._current: Observation | None = None  # of the call that runs

    def tap(self) -> Tap:
        blocks = [block_ref.block for block_ref in self.chain.block_refs]
        return tap(blocks, self._enter, self._leave, self._begin, self._end, model=self.chain.owner)

    def _begin(self, *_: object) -> None:
        if self.observation is None:
            self._current = Observation(self._observed)

    def _enter(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._current is not None:
            self._current.enter(index, args, kwargs)

    def _leave(self, index: int, output: object) -> None:
        if self._current is not None:
            self._current.leave(index, output)

    def _end(self, _: object) -> None:
        if self._current is not None:
            self._current.close()
            self.observation, self._current = self._current, None


def _surveyed(
    target: CacheTarget, run: Callable[[], object], blocks: Blocks, chain: Chain, observation: Observation, test: int
) -> Survey:
    trunk = find_trunk(observation, chain.weights() if chain.found else None)
    assert trunk is not None
    paths = tuple(observation.observed[index].path for index in trunk.order)
    allowed, refused = followable_ranges(observation, trunk)
    outcomes = try_out(allowed, len(paths), test, lambda pair: _tried(target, run, blocks, pair))
    failed = {pair: why for pair, why in outcomes.items() if why is not None}
    refused |= {pair: why for pair in allowed - set(outcomes) for inside, why in failed.items() if within(inside, pair)}
    refused |= failed
    allowed -= set(refused)
    reasons: dict[str, BlockPair] = {}
    for pair, why in sorted(refused.items(), key=lambda item: item[0][1] - item[0][0]):
        reasons.setdefault(why, pair)
    spans = _merged(allowed, len(paths))
    return Survey(
        chain.name,
        chain.path,
        _lists(target, chain, observation, trunk),
        paths,
        _gaps(observation, trunk),
        spans,
        tuple(sorted(pair for pair in allowed if not any(a <= pair[0] and pair[1] <= b for a, b in spans))),
        tuple((*pair, why) for why, pair in reasons.items()),
        len(outcomes),
    )


def _tried(target: CacheTarget, run: Callable[[], object], blocks: Blocks, pair: BlockPair) -> str | None:
    """Cache a range and compare; return the reason why it cannot be cached, or None."""
    pipe = target.pipe if isinstance(target, BlockAdapter) else target
    has_scheduler = getattr(pipe, "scheduler", None) is not None and not isinstance(pipe, nn.Module)
    config = DitCacheConfig(0, 2, pair[0], pair[1] - pair[0] + 1)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with dit_cache(target, config, blocks=blocks) as cache:
                if has_scheduler:  # one run makes several steps
                    run()
                for step in () if has_scheduler else (0, 1):
                    with timestep_scope(step):
                        run()
                return None if cache.stats.reused_calls else "nothing was reused"
        except WiringError as error:
            return str(error)


def _lists(target: object, chain: Chain, observation: Observation, trunk: Trunk) -> tuple[ListSurvey, ...]:
    block_ios: dict[str, tuple[BlockIO, int]] = {}
    for number, call in enumerate(observation.calls):
        group = observation.observed[call.index].group
        try:
            block_ios.setdefault(group, (block_io_of(observation, call), number))
        except WiringError:
            continue
    found = []
    groups = list(dict.fromkeys(observation.observed[index].group for index in trunk.order))
    for block_list in sorted(
        chain.block_lists,
        key=lambda block_list: groups.index(block_list.path) if block_list.path in groups else len(groups),
    ):
        classes = tuple(dict.fromkeys(type(block).__name__ for block in block_list.blocks))
        pattern, streams = "", tuple[str, ...]()
        if block_list.path in block_ios:
            io, number = block_ios[block_list.path]
            call = observation.calls[number]
            named = pattern_of(call.given, io.carries)
            names = [name for name in io.carries if name is not None]
            pattern = f"{named.value}: {named.text}" if named is not None else f"{', '.join(names)}, in and out"
            if io.output_builder.text not in ("Tensor", "tuple"):
                pattern += f", as {io.output_builder.text}"
            streams = tuple(f"{name} {show(call.inputs[name])}" for name in dict.fromkeys(names))
        apart = "" if block_list.path in groups else trunk.apart.get(block_list.path, "")
        found.append(ListSurvey(block_list.path, len(block_list.blocks), classes, apart, pattern, streams))
    if chain.found:
        for owner in owners_of(target.target if isinstance(target, BlockAdapter) else target):
            for listed in owner.lists:
                if listed.apart and owner.module is chain.owner:
                    classes = tuple(dict.fromkeys(type(block).__name__ for block in listed.blocks))
                    found.append(ListSurvey(listed.path, len(listed.blocks), classes, listed.apart, "", ()))
    return tuple(found)


def _gaps(observation: Observation, trunk: Trunk) -> tuple[tuple[tuple[int, ...], str], ...]:
    """The changes of the streams between blocks, in words, with the numbers of the blocks before them."""
    calls: dict[int, BlockCall] = {}
    for call in observation.calls:
        calls.setdefault(call.index, call)
    changes: dict[str, list[int]] = {}
    for number, (first, second) in enumerate(zip(trunk.order, trunk.order[1:], strict=False)):
        if first not in calls or second not in calls:
            continue
        before, after = calls[first], calls[second]
        try:
            sender, taker = block_io_of(observation, before), block_io_of(observation, after)
        except WiringError:
            continue
        here = gap(observation, before, sender, after, taker)

        def name_of(position: int, names: Sequence[str | None] = sender.carries) -> str:
            return names[position] or f"output {position}"

        lines = [f"{name}: {why}" for name, why in here.how.items()]
        for name, bridge in here.made.items():
            words = text(bridge, name_of)
            if name in after.made and words != name:
                lines.append(f"{name} = {words}")
        lines += [f"{name}: not followed" for name in here.lost]
        for line in lines:
            changes.setdefault(line, []).append(number)
    return tuple((tuple(numbers), line) for line, numbers in changes.items())


def spelled(numbers: Sequence[int]) -> str:
    """Numbers with runs joined: 0, 1, 2, 5 is "0–2, 5"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{a}–{b}" if b > a else str(a) for a, b in spans)


def _merged(allowed: set[BlockPair], number: int) -> tuple[BlockPair, ...]:
    """The largest ranges of which every part is allowed."""
    spans: list[BlockPair] = []
    for start in range(number):
        end = start - 1
        while end + 1 < number and all((first, end + 1) in allowed for first in range(start, end + 2)):
            end += 1
        if end >= start and not (spans and spans[-1][1] >= end):
            spans.append((start, end))
    return tuple(spans)
