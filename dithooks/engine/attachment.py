"""One transformer's cached range, put on and taken off; the latter from wherever the former was interrupted."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..blocks.block_lists import BlockRef, Chain
from ..blocks.observation import observed_blocks
from ..blocks.tap import Tap
from ..config.cache_config import DitCacheConfig
from ..errors import InvalidSetting, WrongType
from ..stats.log import Ledger
from ..stats.types import CachedRange, CacheStats, CallRecord
from .active_calls import PATIENCE
from .block_range import BlockRange
from .clock import StepClock
from .decider import Settler
from .hooks import hook_call, hook_lead, hook_observation, hook_range, unhook
from .range_cache import RangeCache
from .rank_consensus import RankConsensus
from .runs import Runs
from .stand_in import SkipBlock, classes_of, engage, is_engaged, outlive, retire, stand_in
from .weights_version import WeightsVersion


class Attachment:
    """Hooks and stand-ins of one range; made without touching the model.

    Args:
        chain: the transformer's blocks.
        flow: the runtime of the range.
        ledger: its counts.

    Raises:
        TypeError: a block of the range cannot be given a stand-in.
    """

    def __init__(self, chain: Chain, flow: RangeCache, ledger: Ledger) -> None:
        self.chain, self.flow, self.ledger = chain, flow, ledger
        self._all = chain.sites
        self._observing: list[Tap] = []
        self._choose()

    def attach(self) -> None:
        """Register the hooks and put the stand-ins in."""
        hook_call(self.flow, self.chain.owner)
        if self.flow.layout.wiring is None:
            self.flow.on_wired = self._wired
            self._observing = hook_observation(self.flow, [original(site.block) for site in self._all])
        self._occupy()
        self.flow.under_way.open()  # last: calls that began before are plain ones

    def detach(self) -> list[str]:
        """Take them off again. What could not be undone is returned, as remarks for the user."""
        owner, flow = self.chain.owner, self.flow
        through = flow.under_way.close()
        for hook in self._observing:  # also those that are half removed
            hook.remove()
        unhook(self.flow, [module for module in self._modules() if module is not owner])
        self._observing, self.flow.on_wired = [], None
        remarks = self._vacate()
        if not through:
            first, last = flow.layout.first, flow.layout.last
            remarks.append(
                f"{flow.runs.name}: a call had not come from {first} to {last} within {PATIENCE:g} s of the cache "
                "being taken off. If an exception has ended it there, all is well; else its output lacks the range's "
                "effect"
            )
        unhook(self.flow, [owner])  # last: interrupted before, it is found by these
        return remarks

    def stats(self) -> CacheStats:
        """The counts, with the memory held right now."""
        return self.ledger.stats(self.flow.runs.bytes_held())

    def where(self) -> CachedRange:
        """The blocks that are cached, in numbers."""
        layout = self.flow.layout
        return CachedRange(self.ledger.name, layout.start, len(layout.blocks), len(layout.order))

    def describe(self) -> str:
        """The range in words."""
        layout = self.flow.layout
        return f"{layout.first} … {layout.last} of {len(layout.order)} blocks"

    def _choose(self) -> None:
        """Stand-ins for the blocks that the range is now."""
        flow = self.flow
        sites = [self._all[index] for index in flow.layout.blocks]
        originals = [original(site.block) for site in sites]
        ends, classes = (0, len(originals) - 1), classes_of(self.chain.owner)
        skips = [stand_in(block, offset, offset in ends, classes) for offset, block in enumerate(originals)]
        flow.on_traced = partial(outlive, self.chain.owner, classes)
        self._range = sites, originals, skips  # at once: interrupted, what was there can still be taken off
        flow.company.among(self.chain.owner, [original(site.block) for site in self._all], originals)

    @property
    def _sites(self) -> list[BlockRef]:
        return self._range[0]

    @property
    def _originals(self) -> list[nn.Module]:
        return self._range[1]

    @property
    def skips(self) -> list[nn.Module]:
        """The stand-ins of the range."""
        return self._range[2]

    def _occupy(self) -> None:
        flow, layout = self.flow, self.flow.layout
        if layout.lead:
            first, last = (original(self._all[layout.order[index]].block) for index in (0, layout.lead - 1))
            hook_lead(flow, first, last)
        hook_range(flow, self._originals[0], self._originals[-1])
        for site, skip in zip(self._sites, self.skips, strict=True):
            engage(skip, self.flow)
            site.put(skip)

    def _vacate(self) -> list[str]:
        wrapped = {id(skip) for skip in self.skips if retire(skip)}
        back = {id(skip): block for skip, block in zip(self.skips, self._originals, strict=True)}
        lists: list[nn.Module] = [site.lane.blocks for site in self._sites]
        for parent in [*lists, *self._modules()]:  # a list may have been rebuilt of stand-ins
            for name, child in parent._modules.items():
                if id(child) in back and id(child) not in wrapped:
                    parent._modules[name] = back[id(child)]
        stuck = [site.path for site, block in zip(self._sites, self._originals, strict=True) if not site.holds(block)]
        if not stuck:
            return []
        return [
            f"{', '.join(stuck)}: wrapped by something else, or replaced, since the cache was attached; a stand-in "
            "that is wrapped stays where it is, inert. Attach the cache last and remove it first"
        ]

    def _modules(self) -> list[nn.Module]:
        return [self.chain.owner, *self._originals, *self.chain.owner.modules()]

    def _wired(self, moved: bool) -> None:
        """The streams are known: stop observing; and if blocks count otherwise than thought, go over to the range's."""
        for hook in self._observing:
            hook.remove()
        self._observing = []
        self.ledger.blocks, self.ledger.skippable = len(self.flow.layout.order), len(self.flow.layout.blocks)
        if moved:
            unhook(self.flow, [original(site.block) for site in self._all])
            self._vacate()
            self._choose()
            self._occupy()


def prepare(
    chain: Chain,
    config: DitCacheConfig,
    scheduler: Callable[[], Any],
    verify: bool,
    together: RankConsensus | None = None,
    on_decision: Callable[[CallRecord], object] | None = None,
) -> Attachment:
    """What caches a range of a chain, made without touching the model.

    Args:
        chain: the transformer's blocks.
        config: as it holds for them.
        scheduler: returns the pipeline's scheduler as it is now, or ``None``.
        verify: test the first residual on the call it was taken from.
        together: the ranks that decide as one.
        on_decision: is told of each call that is settled.

    Raises:
        TypeError: a block of the range cannot be given a stand-in.
    """
    spots = observed_blocks(chain, original)
    first, number = config.cache_block_start, config.cache_num_blocks
    end = -1 - config.compute_last if number is None else first + number - 1
    name = chain.lanes[0].path if len(chain.lanes) == 1 else chain.path or type(chain.owner).__name__
    ledger = Ledger(name, len(spots), (len(spots) + end if end < 0 else end) - first + 1, on_decision)
    runs = Runs(chain, config, StepClock(scheduler, chain.name), ledger, together)
    layout = BlockRange(
        spots, first, end, chain.weights() if chain.found else None, leads=runs.policy.metric == "change"
    )
    flow = RangeCache(Settler(runs, WeightsVersion(chain.owner)), layout, compiled_of(chain), verify)
    return Attachment(chain, flow, ledger)


def compiled_of(chain: Chain) -> Callable[[], bool]:
    """Tells whether a chain's transformer or a block of it is known to be compiled, as it is now."""
    compilable = (chain.owner, *(original(lane.blocks[0]) for lane in chain.lanes))
    return lambda: chain.compiled or any(module._compiled_call_impl is not None for module in compilable)


def original(block: nn.Module) -> nn.Module:
    """The block itself, behind a stand-in at work or not; an inert one, which others have wrapped, is a block."""
    return block._dithooks.original if isinstance(block, SkipBlock) and is_engaged(block) else block


def check(chain: Chain, config: DitCacheConfig, mine: list[nn.Module]) -> None:
    """Refuse what cannot work on this chain, before anything is touched. ``mine`` are stand-ins about to go.

    Raises:
        TypeError: a block is scripted.
        ValueError: the range goes past the end, its blocks are cached already, or another cache is enabled.
    """
    start, number = config.cache_block_start, config.cache_num_blocks
    has = f"{chain.name} has {len(chain.sites)} blocks, {chain.sites[0].path} … {chain.sites[-1].path}"
    if number is None and start + config.compute_last >= len(chain.sites):
        raise InvalidSetting(f"cache_block_start={start} and compute_last={config.compute_last} leave no block: {has}")
    if number is not None and start + number > len(chain.sites):
        raise InvalidSetting(f"cache_block_start={start} and cache_num_blocks={number} reach past the end: {has}")
    for site in chain.sites:
        if isinstance(site.block, torch.jit.ScriptModule):
            raise WrongType(
                f"{site.path} is a scripted module, which takes neither hooks nor a stand-in: cache before scripting, "
                "or name lists without any with blocks=..."
            )
        if is_engaged(site.block) and not any(site.block is skip for skip in mine):
            raise InvalidSetting(
                f"{site.path} is cached already: remove that cache first, or use its handle's update()"
            )
    if getattr(chain.owner, "is_cache_enabled", False) is True:
        raise InvalidSetting(f"{chain.name} has another cache enabled: call its disable_cache() first")
