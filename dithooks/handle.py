"""Attach a cache to a model, and take it off again."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from .blocks.find import Blocks, Chain, find_chains
from .clock import StepClock
from .config import DitCacheConfig
from .flow import Flow
from .hooks import hook_call, hook_observation, hook_range
from .policy import Interval
from .predictor import Reuse
from .runs import Runs
from .skip import SkipBlock, engage, is_engaged, retire, stand_in
from .stats import CacheStats, Ledger, total


def dit_cache(
    target: object, config: DitCacheConfig, *, blocks: Blocks = None, scheduler: object = None
) -> CacheHandle:
    """Cache a range of blocks of a diffusion transformer, until the handle is removed.

    The model's own forward keeps running; on a reused step the blocks of the range are passed over and the residual
    they last had is added instead. All errors below are raised before anything is touched.

    Args:
        target: a diffusers pipeline with a ``transformer`` (or several), a transformer, or any ``nn.Module``.
        config: when to refresh, and which blocks.
        blocks: where the blocks are, if they are not found by themselves: a dotted path from ``target`` to an
            ``nn.ModuleList`` (``"transformer.transformer_blocks"``), the list itself, or several of either,
            counted one after another. Left out: the transformer's own lists of repeated blocks.
        scheduler: whose ``step_index`` tells the sampling step; left out, the pipeline's, if there is one. Without
            either, an open :func:`timestep_scope` or the transformer's ``timestep`` argument tells.

    Returns:
        A handle that is also a context manager: leaving the ``with`` removes the cache.

    Raises:
        TypeError: ``target``, ``config`` or ``blocks`` is of the wrong type.
        ValueError: no block list there, the range goes past its end, its blocks are cached already, or the config
            was made for another model.

    Warns:
        UserWarning: the cache can never reuse anything (``cache_step_interval=1``); nothing is attached then.

    Example:
        >>> import torch
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
        ...     def forward(self, x, timestep):
        ...         for block in self.blocks:
        ...             x = block(x)
        ...         return x
        >>> model, config = Model(), DitCacheConfig(1, 2, cache_block_start=0, cache_num_blocks=3)
        >>> with torch.no_grad(), dit_cache(model, config) as cache:
        ...     for t in (1.0, 0.8, 0.6, 0.4):
        ...         _ = model(torch.ones(1, 4), t)
        ...     print(cache.stats.blocks_run, "of", cache.stats.blocks_total)
        9 of 12
    """
    handle = CacheHandle(target, blocks, scheduler)
    handle.update(config)
    return handle


class CacheHandle:
    """What :func:`dit_cache` returns: the attached cache, its numbers, and the way to be rid of it."""

    def __init__(self, target: object, blocks: Blocks, scheduler: object) -> None:
        self._target, self._blocks, self._scheduler = target, blocks, scheduler
        self._attached: list[_Attachment] = []
        self._config: DitCacheConfig | None = None
        self._last = total([])
        self._active = True

    @property
    def config(self) -> DitCacheConfig:
        """The configuration in force, with the model's fingerprint filled in."""
        assert self._config is not None
        return self._config

    @property
    def active(self) -> bool:
        """Whether the cache is attached."""
        return self._active

    @property
    def stats(self) -> CacheStats:
        """What was computed and reused since attaching, or since the last :meth:`update` or :meth:`reset`.

        Once the cache is removed, the numbers as they were then, with nothing held any more.
        """
        if not self.active:
            return self._last
        return total([attached.stats() for attached in self._attached])

    def update(self, config: DitCacheConfig) -> None:
        """Go on with another schedule or range; what was cached is dropped. Errors leave the old one in force.

        Raises:
            RuntimeError: the handle was removed.
            TypeError, ValueError: as :func:`dit_cache`.
        """
        if not self.active:
            raise RuntimeError("this cache was removed: attach a new one with dit_cache(...)")
        if not isinstance(config, DitCacheConfig):
            raise TypeError(f"config must be a DitCacheConfig, not {config!r} ({type(config).__name__})")
        mine = [skip for attached in self._attached for skip in attached.skips]
        chains = find_chains(self._target, self._blocks)
        for chain in chains:
            _check(chain, config, mine)
        fingerprint = "+".join(chain.fingerprint() for chain in chains)
        if config.fingerprint not in (None, fingerprint):
            raise ValueError(
                f"the config was made for another model (fingerprint {config.fingerprint}, here {fingerprint}): "
                "search a new one, or take the numbers over with dataclasses.replace(config, fingerprint=None)"
            )
        prepared = [] if config.cache_step_interval == 1 else [self._prepare(chain, config) for chain in chains]
        if not prepared:
            warnings.warn(
                "cache_step_interval=1 refreshes at every step: nothing can be reused, and nothing is attached",
                UserWarning,
                stacklevel=3,
            )
        former, self._attached = self._attached, []
        for attached in former:
            attached.detach()
        try:
            for attached in prepared:
                self._attached.append(attached)
                attached.attach()
        except BaseException:
            for attached in self._attached:
                attached.detach()
            self._attached = []
            for attached in former:  # as it was, less what was cached
                attached.attach()
                self._attached.append(attached)
            raise
        self._config = replace(config, fingerprint=fingerprint)

    def reset(self) -> None:
        """Drop everything cached and set the counts to zero; the cache stays attached."""
        for attached in self._attached:
            attached.flow.forget()
            attached.ledger.clear()

    def remove(self) -> None:
        """Put the original blocks back, take the hooks off and free what was cached. A second call does nothing.

        Warns:
            UserWarning: another library has wrapped a block since; its stand-in stays, as a plain way to the block.
        """
        if not self.active:
            return
        self._last = replace(self.stats, bytes_held=0)
        attached, self._attached = self._attached, []
        self._active, self._target, self._scheduler, self._blocks = False, None, None, None
        for one in attached:
            one.detach()

    def __enter__(self) -> CacheHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = ", ".join(attached.describe() for attached in self._attached) or "nothing attached"
        return f"<CacheHandle {state if self.active else 'removed'}>"

    def _prepare(self, chain: Chain, config: DitCacheConfig) -> _Attachment:
        target = self._target
        explicit = self._scheduler

        def scheduler() -> Any:  # looked up at every call: pipelines get new schedulers
            return getattr(target, "scheduler", None) if explicit is None else explicit

        originals = [_original(site.block) for site in chain.sites]
        ledger = Ledger(len(chain.sites), config.cache_num_blocks)
        policy = Interval(config.cache_step_start, config.cache_step_interval)
        flow = Flow(
            Runs(chain.name, policy, Reuse(), StepClock(scheduler, chain.name), ledger),
            paths=[site.path for site in chain.sites],
            classes=[type(block) for block in originals],
            start=config.cache_block_start,
            end=config.cache_block_start + config.cache_num_blocks - 1,
            compiled=lambda: any(m._compiled_call_impl is not None for m in (chain.owner, *originals)),
        )
        return _Attachment(chain, flow, ledger)


class _Attachment:
    """One transformer's cached range: attach and detach undo each other."""

    def __init__(self, chain: Chain, flow: Flow, ledger: Ledger) -> None:
        self.chain, self.flow, self.ledger = chain, flow, ledger
        self.sites = chain.sites[flow.start : flow.end + 1]
        self.originals = [_original(site.block) for site in self.sites]
        self.skips = [stand_in(block, offset) for offset, block in enumerate(self.originals)]
        self._hooks: list[RemovableHandle] = []
        self._observing: list[RemovableHandle] = []

    def attach(self) -> None:
        self._hooks += hook_call(self.flow, self.chain.owner)
        self._hooks += hook_range(self.flow, self.originals[0], self.originals[-1])
        self._observing += hook_observation(self.flow, [_original(site.block) for site in self.chain.sites])
        self.flow.on_wired = self._wired
        for site, skip in zip(self.sites, self.skips, strict=True):
            engage(skip, self.flow)
            site.put(skip)

    def detach(self) -> None:
        for hook in self._hooks + self._observing:
            hook.remove()
        self._hooks, self._observing, self.flow.on_wired = [], [], None
        stuck = []
        for site, skip, original in zip(self.sites, self.skips, self.originals, strict=True):
            if site.block is skip and not retire(skip):
                site.put(original)
            elif site.block is not original:
                retire(skip)
                stuck.append(site.path)
        self.flow.forget()
        if stuck:
            warnings.warn(
                f"{', '.join(stuck)}: wrapped by something else since the cache was attached, so the stand-in, now "
                "inert, stays inside that wrapper. Attach the cache last and remove it first",
                UserWarning,
                stacklevel=4,
            )

    def _wired(self) -> None:
        for hook in self._observing:
            hook.remove()
        self._observing = []

    def stats(self) -> CacheStats:
        return self.ledger.stats(self.flow.runs.bytes_held())

    def describe(self) -> str:
        start, end = self.flow.start, self.flow.end
        return f"{self.flow.paths[start]} … {self.flow.paths[end]} of {len(self.flow.paths)} blocks"


def _original(block: nn.Module) -> nn.Module:
    return block._dithooks.original if isinstance(block, SkipBlock) else block


def _check(chain: Chain, config: DitCacheConfig, mine: list[nn.Module]) -> None:
    """Refuse what cannot work on this chain, before anything is touched."""
    start, end, count = config.cache_block_start, config.cache_block_start + config.cache_num_blocks, len(chain.sites)
    if end > count:
        raise ValueError(
            f"cache_block_start={start} and cache_num_blocks={config.cache_num_blocks} reach past the end: "
            f"{chain.name} has {count} blocks, {chain.sites[0].path} … {chain.sites[-1].path}"
        )
    for site in chain.sites:
        if is_engaged(site.block) and not any(site.block is skip for skip in mine):
            raise ValueError(f"{site.path} is cached already: remove that cache first, or use its handle's update()")
    if getattr(chain.owner, "is_cache_enabled", False) is True:
        raise ValueError(f"{chain.name} has another cache enabled: call its disable_cache() first")
