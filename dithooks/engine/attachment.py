"""The attachment of a range's cache to one transformer: attached and detached completely, even if interrupted."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from textwrap import shorten
from typing import Any

import torch
from torch import nn

from ..blocks.block_lists import BlockRef, Chain
from ..blocks.model_kinds import is_controlnet, why_not_a_trunk
from ..blocks.observation import observed_blocks
from ..blocks.tap import Tap
from ..config.cache_config import DitCacheConfig
from ..errors import InvalidSetting, WiringError, WrongType
from ..stats.log import DecisionLog
from ..stats.types import CachedRange, CacheStats, CallRecord
from ..stats.warnings import range_left_late, stand_in_is_wrapped
from ..validation import shown
from .active_calls import PATIENCE
from .block_range import BlockRange
from .clock import DEFAULT_STEP_SETTINGS, StepClock, StepSettings
from .compiled_code import are_compiled
from .hooks import (
    caches_of,
    hook_call,
    hook_enclosing,
    hook_lead,
    hook_method,
    hook_observation,
    hook_range,
    unhook,
    unhook_method,
)
from .model_lock import MODEL_LOCK
from .part_decider import decider_for
from .protocols import Integrations
from .range_cache import RangeCache
from .rank_consensus import RankConsensus
from .sample_decider import SampleDecider, is_by_sample, refuse_ranks
from .stand_in import SkipBlock, classes_of, disengage, engage, is_engaged, outlive, set_streams, stand_in


class Attachment:
    """The hooks and stand-ins of one range; creating it does not touch the model.

    Args:
        chain: the blocks of the transformer.
        cache: the runtime of the range.
        log: the log of the range's decisions.
        around: the modules around the transformer, from the inside out.
        waits: whether calls stay plain ones until :meth:`begin`.
        method: a module and the name of its method that stands for the transformer's call; ``None``: its own call.

    Raises:
        WrongType: a block of the range cannot be given a stand-in.
    """

    def __init__(
        self,
        chain: Chain,
        cache: RangeCache,
        log: DecisionLog,
        around: Sequence[nn.Module] = (),
        waits: bool = False,
        method: tuple[nn.Module, str] | None = None,
    ) -> None:
        self.chain, self.cache, self.log = chain, cache, log
        self._around, self._waits, self.method = around, waits, method
        self._all = chain.block_refs
        self._observing: Tap | None = None
        self._make_stand_ins()

    def attach(self) -> None:
        """Register the hooks and put the stand-ins in place of the blocks."""
        if self.method is None:
            hook_call(self.cache, self.chain.owner)
        else:
            hook_method(self.cache, self.chain.owner, *self.method)
        hook_enclosing(self.cache, self._around)
        self._hook_lead()  # before the observation: where the model is not called, a call begins here
        if self.cache.block_range.wiring is None:
            self.cache.on_wired = self._on_wired
            self._observing = hook_observation(self.cache, [original(block_ref.block) for block_ref in self._all])
        self._put_stand_ins()
        if not self._waits:
            self.begin()  # last: calls that began before it are plain ones

    def begin(self) -> None:
        """Let calls be cached from now on."""
        self._waits = False
        self.cache.active_calls.open()

    def detach(self) -> list[str]:
        """Remove hooks and stand-ins; return a warning for each that could not be removed."""
        owner, cache = self.chain.owner, self.cache
        all_calls_left = cache.active_calls.close()
        with MODEL_LOCK.lock:  # a call that records the wiring and moves the range ends first, or sees it is stale
            if self._observing is not None:  # also from blocks that are no longer in the model
                self._observing.remove()
            others = [*self._around, *(module for module in self._modules() if module is not owner)]
            unhook(self.cache, others)
            self._observing, self.cache.on_wired = None, None
            warnings = self._put_blocks_back()
        if not all_calls_left:
            first, last = cache.block_range.first, cache.block_range.last
            warnings.append(range_left_late(cache.decider.name, first, last, PATIENCE))
        if self.method is not None:
            unhook_method(cache, *self.method)
        unhook(self.cache, [owner])  # last: after an interruption, these hooks lead to the handle
        return warnings

    def stats(self) -> CacheStats:
        """Return the counts and the memory held now."""
        return self.log.stats(self.cache.decider.bytes_held() + self.cache.row_states.nbytes)

    def where(self) -> CachedRange:
        """Return the cached blocks as numbers."""
        block_range = self.cache.block_range
        return CachedRange(self.log.name, block_range.start, len(block_range.blocks), len(block_range.order))

    def describe(self) -> str:
        """Return the range as text."""
        block_range = self.cache.block_range
        return f"{block_range.first} … {block_range.last} of {len(block_range.order)} blocks"

    def _make_stand_ins(self) -> None:
        """Create stand-ins for the blocks that the range consists of now."""
        cache = self.cache
        block_refs = [self._all[index] for index in cache.block_range.blocks]
        originals = [original(block_ref.block) for block_ref in block_refs]
        ends, classes = (0, len(originals) - 1), classes_of(self.chain.owner)
        skips = [stand_in(block, offset, offset in ends, classes) for offset, block in enumerate(originals)]
        cache.on_compiled = partial(outlive, self.chain.owner, classes)
        # One assignment: an interruption leaves the old stand-ins to be removed.
        self._range = block_refs, originals, skips
        cache.integrations.bind(self.chain.owner, [original(block_ref.block) for block_ref in self._all], originals)

    @property
    def _block_refs(self) -> list[BlockRef]:
        return self._range[0]

    @property
    def _originals(self) -> list[nn.Module]:
        return self._range[1]

    @property
    def skips(self) -> list[nn.Module]:
        """The stand-ins of the range."""
        return self._range[2]

    def _hook_lead(self) -> None:
        """Hook the blocks before the range, if the policy looks at them."""
        block_range = self.cache.block_range
        if block_range.lead:
            first, last = (original(self._all[block_range.order[index]].block) for index in (0, block_range.lead - 1))
            hook_lead(self.cache, first, last)

    def _put_stand_ins(self) -> None:
        """Hook the range, and put its stand-ins in place of the blocks."""
        cache = self.cache
        hook_range(cache, self._originals[0], self._originals[-1])
        for block_ref, skip in zip(self._block_refs, self.skips, strict=True):
            engage(skip, self.cache)
            block_ref.put(skip)
        self._set_streams()

    def _set_streams(self) -> None:
        """Give the stand-ins inside the range their blocks' streams, if the wiring is known."""
        wiring = self.cache.block_range.wiring
        if wiring is not None:
            for skip, io in zip(self.skips[1:-1], wiring.block_ios[1:-1], strict=True):
                set_streams(skip, io)

    def _put_blocks_back(self) -> list[str]:
        """Put the blocks back in place of the stand-ins; return a warning if some could not be."""
        wrapped = {id(skip) for skip in self.skips if disengage(skip)}
        back = {id(skip): block for skip, block in zip(self.skips, self._originals, strict=True)}
        lists: list[nn.Module] = [block_ref.block_list.blocks for block_ref in self._block_refs]
        for parent in [*lists, *self._modules()]:  # stand-ins may have been moved into other lists
            for name, child in parent._modules.items():
                if id(child) in back and id(child) not in wrapped:
                    parent._modules[name] = back[id(child)]
        stuck = [
            block_ref.path
            for block_ref, block in zip(self._block_refs, self._originals, strict=True)
            if not block_ref.holds(block)
        ]
        if not stuck:
            return []
        return [stand_in_is_wrapped(stuck)]

    def _modules(self) -> list[nn.Module]:
        return [self.chain.owner, *self._originals, *self.chain.owner.modules()]

    def _on_wired(self, moved: bool) -> None:
        """Stop observing, as the wiring is known; if the range has moved, move hooks and stand-ins to its blocks."""
        if self._observing is not None:
            self._observing.remove()
        self._observing = None
        block_range = self.cache.block_range
        self.log.skippable = len(block_range.blocks)
        self.log.blocks = self.chain.counted(len(block_range.order), self.log.skippable)
        if moved:
            unhook(self.cache, [original(block_ref.block) for block_ref in self._all])
            self._put_blocks_back()
            self._make_stand_ins()
            self._hook_lead()
            self._put_stand_ins()
        else:
            self._set_streams()


def prepare(
    chain: Chain,
    config: DitCacheConfig,
    scheduler: Callable[[], Any],
    verify: bool,
    integrations: Integrations,
    consensus: RankConsensus | None = None,
    on_decision: Callable[[CallRecord], object] | None = None,
    step_settings: StepSettings = DEFAULT_STEP_SETTINGS,
    around: Sequence[nn.Module] = (),
    waits: bool = False,
    method: tuple[nn.Module, str] | None = None,
) -> Attachment:
    """Return the attachment of a range's cache, created without touching the model.

    Args:
        chain: the blocks of the transformer.
        config: the configuration of this transformer.
        scheduler: a function that returns the pipeline's current scheduler, or ``None``.
        verify: whether the first residual is tested on its own call.
        integrations: the adapter to other libraries.
        consensus: the ranks that decide together; ``None`` if this rank decides alone.
        on_decision: a callback for the record of each decision.
        step_settings: the user's settings of what identifies the steps.
        around: the modules around the transformer, from the inside out.
        waits: whether calls stay plain ones until it is known that these blocks are the trunk.
        method: a module and the name of its method that stands for the transformer's call; ``None``: its own call.

    Raises:
        WrongType: a block of the range cannot be given a stand-in.
        InvalidSetting: another library's cache is at work in the model, or ranks share samples that are each to be
            decided by itself.
    """
    if (other := integrations.other_cache(chain.owner)) is not None:
        raise InvalidSetting(
            f"{chain.name} has another cache at work ({other}): take it off first, as it would stand still where "
            "blocks are passed over"
        )
    if is_by_sample(config.when):
        refuse_ranks(chain.name, consensus is not None, integrations.ranks_sharing(chain.owner))
    observed = observed_blocks(chain, original)
    first, number = config.cache_block_start, config.cache_num_blocks
    end = -1 - config.compute_last if number is None else first + number - 1
    name = chain.block_lists[0].path if len(chain.block_lists) == 1 else chain.path or type(chain.owner).__name__
    length = (len(observed) + end if end < 0 else end) - first + 1
    counted, is_alone = chain.counted(len(observed), length), not (chain.span or chain.part)
    log = DecisionLog(f"{name}{chain.span}", counted, length, on_decision, is_alone)
    kind = SampleDecider if is_by_sample(config.when) else decider_for(config)
    decider = kind(chain, config, StepClock(scheduler, chain.name, step_settings), log, integrations, consensus)
    weights = chain.weights() if chain.found else None
    metric = decider.policy.metric
    look_at = () if metric is None else config.look_at or ()
    leads, is_fixed = metric == "change" and not chain.is_behind, bool(chain.span)
    block_range = BlockRange(observed, first, end, weights, leads, look_at, is_fixed)
    cache = RangeCache(decider, block_range, compilable_of(chain), verify, integrations)
    cache.callees = lambda: (chain.owner, *(block_ref.block for block_ref in chain.block_refs))
    return Attachment(chain, cache, log, around, waits, method)


def compilable_of(chain: Chain) -> tuple[nn.Module, ...]:
    """Return the modules to check for compiled code; none if the transformer is known to be compiled."""
    return (
        () if chain.compiled else (chain.owner, *(original(block_list.blocks[0]) for block_list in chain.block_lists))
    )


def is_compiled(chain: Chain) -> bool:
    """Return whether a chain's transformer or a block of it is known to be compiled."""
    modules = compilable_of(chain)
    return not modules or are_compiled(modules)


def original(block: nn.Module) -> nn.Module:
    """Return the block behind an engaged stand-in, or the module itself."""
    return block._dithooks.original if isinstance(block, SkipBlock) and is_engaged(block) else block


def check(chain: Chain, config: DitCacheConfig, mine: list[nn.Module]) -> None:
    """Raise if a range cannot be attached, before the model is touched; ``mine``: stand-ins about to be removed.

    Raises:
        WrongType: a block is scripted.
        WiringError: the model is a ControlNet.
        InvalidSetting: the range goes past the end, its blocks are cached already, another cache is enabled, or a
            stream to look at is an argument of no block.
    """
    if is_controlnet(chain.owner):
        raise WiringError(str(why_not_a_trunk(chain.owner)))
    start, number = config.cache_block_start, config.cache_num_blocks
    name, refs = replace(chain, span="").name, chain.block_refs
    has = f"{name} has {len(refs)} blocks, {refs[0].path} … {refs[-1].path}"
    if number is None and start + config.compute_last >= len(chain.block_refs):
        raise InvalidSetting(
            f"cache_block_start={shown(start)} and compute_last={shown(config.compute_last)} leave no block: {has}"
        )
    if number is not None and start + number > len(chain.block_refs):
        raise InvalidSetting(
            f"cache_block_start={shown(start)} and cache_num_blocks={shown(number)} reach past the end: {has}"
        )
    if config.look_at is not None and config.when.metric is not None:
        _check_looked_at(chain, config.look_at)
    for block_ref in chain.block_refs:
        if isinstance(block_ref.block, torch.jit.ScriptModule):
            raise WrongType(
                f"{block_ref.path} is a scripted module, which takes neither hooks nor a stand-in: cache before "
                "scripting, or name lists without any with blocks=..."
            )
        if is_engaged(block_ref.block) and not any(block_ref.block is skip for skip in mine):
            raise InvalidSetting(
                f"{block_ref.path} is cached already: remove that cache first, or use its handle's update(). Where the "
                "handle is lost, dithooks.handle_of(model) finds it, and dithooks.detach(model) takes the cache off"
            )
    if getattr(chain.owner, "is_cache_enabled", False) is True:
        raise InvalidSetting(f"{chain.name} has another cache enabled: call its disable_cache() first")


def check_corrections(ranges: Sequence[tuple[Chain, DitCacheConfig]], mine: Sequence[object]) -> None:
    """Raise if the output of one transformer would be corrected twice, before the model is touched.

    Args:
        ranges: the ranges that are to be attached.
        mine: caches about to be removed.

    Raises:
        InvalidSetting: two ranges of a transformer, or one and a range that is cached already, correct its output.
    """
    owners: list[nn.Module] = []
    for chain, own in ranges:
        if not own.predictor.corrects:
            continue
        before = [cache for cache in caches_of([chain.owner]) if cache.correction is not None and cache not in mine]
        if before or any(chain.owner is owner for owner in owners):
            raise InvalidSetting(
                f"two ranges of {chain.path or type(chain.owner).__name__} have a predictor with corrections, and its "
                "output can be corrected once: give the other one a predictor without them"
            )
        owners.append(chain.owner)


def _check_looked_at(chain: Chain, look_at: Sequence[str]) -> None:
    """Refuse a stream that no block has an argument for; whether an argument is a stream, the first call shows."""
    if any(block_list.functor is not None for block_list in chain.block_lists):
        return
    taken: dict[str, Any] = {}
    for block_ref in chain.block_refs:
        try:
            taken |= inspect.signature(original(block_ref.block).forward).parameters
        except (TypeError, ValueError):  # no signature
            return
    if any(argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD) for argument in taken.values()):
        return
    if unknown := [stream for stream in look_at if stream.partition("[")[0] not in taken]:
        raise InvalidSetting(
            f"look_at: {', '.join(map(repr, unknown))} is an argument of no block of {chain.name}: "
            f"they take {shorten(', '.join(taken), 160, placeholder=' …')}"
        )
