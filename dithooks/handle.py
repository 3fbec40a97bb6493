"""Attach a cache to a model, and take it off again."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from html import escape
from typing import Any

from torch import nn

from .blocks.adapter import BlockAdapter
from .blocks.block_lists import Chain, fingerprint
from .blocks.cache_target import CacheTarget
from .blocks.discovery import Blocks
from .blocks.module_paths import dtype_of, modules_of
from .config.attachable import Attachable, attachable, selected, selected_for_request
from .config.cache_config import DitCacheConfig
from .config.cache_plan import CachePlan
from .config.plan_tiers import PlanTiers
from .engine.attachment import check_corrections, is_compiled
from .engine.clock import DEFAULT_STEP_SETTINGS, StepSettings, scheduler_of
from .engine.compiled_calls import CompiledCalls
from .engine.completion import complete
from .engine.model_lock import MODEL_LOCK
from .engine.payloads import (
    AnyAttachment,
    AnyCache,
    HandleSettings,
    all_caches_of,
    chains_for,
    check_payload,
    prepare_payload,
    unseen,
)
from .engine.range_settings import config_of_plan, configure_ranges
from .engine.rank_consensus import RankConsensus, consensus_of
from .engine.requests import Request
from .engine.row import Row, RowScope, row_of
from .engine.sessions import Session
from .engine.trunk_watch import Evidence, TrunkWatch
from .errors import InvalidSetting, RunMismatch, WrongType
from .integrations.dispatch import BlockIntegrations
from .integrations.dynamo_lock import DYNAMO_LOCK
from .markup import step_squares, table
from .stats.step_pictures import step_pictures
from .stats.table import summary
from .stats.types import CachedRange, CacheStats, CallRecord, total
from .stats.user_warning import warn_user
from .stats.warnings import (
    nothing_is_attached,
    refreshes_every_step,
    trunk_does_not_fit,
    trunk_is_another,
)
from .validation import shown


class HandleState(Enum):
    """How far a handle has come, for good: none of these is ever left for one above it."""

    ATTACHED = "its cache is on the model, or just being put on or changed"
    LEAVING = "its cache is coming off, or has come off in part"
    REMOVED = "nothing of it is left on the model"


@dataclass(frozen=True)
class Numbers:
    """What a removed handle still knows."""

    stats: CacheStats
    decisions: tuple[CallRecord, ...]
    ranges: tuple[CachedRange, ...]
    described: list[str]


def dit_cache(
    target: CacheTarget,
    config: Attachable,
    *,
    tier: str | None = None,
    blocks: Blocks = None,
    scheduler: object = None,
    timestep: str | None = None,
    calls_per_step: int | None = None,
    steps: int | None = None,
    verify: bool = True,
    process_group: object = None,
    on_decision: Callable[[CallRecord], object] | None = None,
    method: str | None = None,
) -> CacheHandle:
    """Cache a range of blocks of a diffusion transformer, until the handle is removed.

    The model's own forward keeps running; on a reused step the blocks of the range are passed over and the residual
    they last had is added instead. With ``payload="output"`` the transformer's whole call is left out. All errors below
    are raised before anything is touched.

    Args:
        target: a diffusers pipeline, a transformer or any ``nn.Module`` that calls lists of blocks; or a
            :class:`BlockAdapter`, which declares its blocks.
        config: which blocks, when to reuse, and what to add: a :class:`DitCacheConfig`; a :class:`CachePlan`, which a
            search has found, or several of them, :class:`PlanTiers`; the result of a search; the path of a file of any
            of these; or a policy alone, for all blocks.
        tier: which of several plans: its name, or ``"fastest at ≥ 35 dB"``, as for :meth:`PlanTiers.select`.
        blocks: where the blocks are, if they are not found by themselves: a dotted path from ``target`` to an
            ``nn.ModuleList`` (``"transformer.transformer_blocks"``), the list itself, or several of either,
            counted in the order in which the model calls them. Left out: the lists of the trunk, without
            refiners and the like (``dithooks inspect`` shows them). Where several parts of a model may be the trunk, it
            is the one whose input is another one at every step: the first two calls are computed and show that.
        scheduler: whose ``step_index`` is the sampling step; left out, the pipeline's, if there is one. Without
            either, and with one that stands still while timesteps move, the step comes from an argument called
            ``timestep``, ``sigma`` or the like, of the transformer or of a module around it. A loop over
            :func:`steps` and an open :func:`timestep_scope` come before all of these.
        timestep: name of the argument that gives the step, if it has another name: ``"tau"``, ``"options.tau"``.
        calls_per_step: count calls, for loops that tell nothing: this many are a step. Needs ``steps``.
        steps: of each run, where calls are counted.
        verify: test the first residual on the call it was taken from, which has to come out the same. This calls the
            transformer once more, the range left out, and up to five times more where it makes new tensors between
            two blocks of the range, to see how it hands the streams on; a model that is not deterministic needs
            ``False``. (Where blocks turn out to be called in another order than they are listed in, the first call
            is made again either way, to take the residual of the range meant.)
        process_group: ranks that have to leave out the same blocks, as they share the model: its weights are sharded
            over them (FSDP, tensor parallel), or its tokens (context parallel). A
            ``torch.distributed.ProcessGroup``, or a ``DeviceMesh`` of one dimension. Measuring policies then decide as
            one: each decision costs one small collective, in which a rank also reports whether it has a residual;
            if one has none, none reuses. The change is that of all ranks' tokens and samples together, whatever the
            split; with ``reduce="max"``, that of the rank and sample that changed most. Every rank has to make the
            same steps with as many calls each; one that does not is waited for as long as the group's own timeout.
            Policies that do not look cost no communication. ``None``: no rank is ever asked.
        on_decision: is called with a :class:`CallRecord` for each call of a transformer, when it is decided: before the
            range is run or skipped, in the thread that makes the call. A call that cannot be reused after all is
            reported once more. An exception of the callback ends the call.
        method: where the loop calls a method of ``target`` instead of ``target`` itself (``"forward_with_cfg"``,
            ``"decode"``), its name; of a target without such a method, that of the transformer found in it. Calls of
            it then are what calls of the transformer are otherwise: its timestep argument gives the step, its first
            parameter holds the latents, and the first residual is tested by calling it again. Where it runs the
            blocks several times, each pass is a call of the same step. Left out, blocks that run without their
            transformer's call are cached, too, but step and branch have to come from elsewhere, and the first residual
            is not tested: a range is refused if outputs from inside it are still held behind it.

    Returns:
        A handle that is also a context manager: leaving the ``with`` removes the cache.

    Raises:
        TypeError: ``target``, ``config``, ``blocks``, ``process_group``, ``on_decision`` or ``method`` is of the wrong
            type.
        ValueError: no block list there, the range goes past its end, its blocks are cached already, the config or plan
            was made for another model, this rank is not in ``process_group``, or there is no such ``method`` or
            ``tier``.
        TargetMissed: no tier promises what is asked for.

    Warns:
        UserWarning: the cache can never reuse anything (``cache_step_interval=1``); nothing is attached then. Or a plan
            was made with another dtype or scheduler; it is used all the same. Or the model is shared by ranks that
            would each decide by itself. Later, at a call of the model: another part of it turns out to be the trunk.

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
    if on_decision is not None and not callable(on_decision):
        raise WrongType(f"on_decision={shown(on_decision)} cannot be called: give a function of one argument, or none")
    step_settings = StepSettings(timestep, calls_per_step, steps)
    consensus = consensus_of(process_group)
    if isinstance(target, CacheHandle):
        raise WrongType("target is a CacheHandle, which is a cache already: use its update(), or give its pipeline")
    handle = CacheHandle(target, blocks, scheduler, verify, consensus, on_decision, step_settings, method)
    try:
        handle.update(config, tier)
        return handle
    except BaseException:
        handle.__exit__(*sys.exc_info())
        raise


class CacheHandle:
    """What :func:`dit_cache` returns: the attached cache, its numbers, and the way to be rid of it.

    Example: without a ``with``.
        >>> import torch
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
        ...     def forward(self, x, timestep):
        ...         for block in self.blocks:
        ...             x = block(x * timestep)
        ...         return x
        >>> @torch.no_grad()
        ... def run(model):
        ...     return [model(torch.ones(1, 4), t) for t in (1.0, 0.8, 0.6, 0.4, 0.2)]
        >>> model = Model()
        >>> cache = dit_cache(model, DitCacheConfig(1, 2, 0, 3))
        >>> _ = run(model)
        >>> cache.active, cache.stats.reused_calls, cache.ranges[0]
        (True, 2, CachedRange(range='blocks', first=0, blocks=3, total=3))
        >>> cache.remove()
        >>> cache.active, type(model.blocks[0]).__name__
        (False, 'Linear')
    """

    def __init__(
        self,
        target: object,
        blocks: Blocks,
        scheduler: object,
        verify: bool,
        consensus: RankConsensus | None = None,
        on_decision: Callable[[CallRecord], object] | None = None,
        step_settings: StepSettings = DEFAULT_STEP_SETTINGS,
        method: str | None = None,
    ) -> None:
        scheduler_of(target, scheduler)
        self._step_settings, self._is_interrupted = step_settings, False
        self._target, self._blocks, self._scheduler, self._verify = target, blocks, scheduler, verify
        self._consensus, self._on_decision, self._method = consensus, on_decision, method
        self._attached: list[AnyAttachment] = []
        self._config: DitCacheConfig | None = None
        self._given: DitCacheConfig | CachePlan | None = None
        self._tiers: PlanTiers | None = None  # of which that is one
        self._chosen = frozenset[str]()  # paths of the parts that first calls have shown to be trunks
        self._watches: list[TrunkWatch] = []
        self._requests: dict[Hashable, Request] = {}  # that have a name
        self._compiled_calls = CompiledCalls(DYNAMO_LOCK)
        self._last = Numbers(total([]), (), (), [])
        self._state = HandleState.ATTACHED

    @property
    def config(self) -> DitCacheConfig:
        """The configuration in force, with the model's fingerprint filled in."""
        assert self._config is not None
        return self._config

    @property
    def active(self) -> bool:
        """Whether the cache is attached."""
        return self._state is not HandleState.REMOVED

    @property
    def stats(self) -> CacheStats:
        """What was computed and reused since attaching, or since the last :meth:`update` or :meth:`reset`.

        Once the cache is removed, the numbers as they were then, with nothing held any more.
        """
        attached = self._attached  # before the state is asked: another thread may be removing the cache
        return total([each.stats() for each in attached]) if self.active else self._last.stats

    @property
    def decisions(self) -> tuple[CallRecord, ...]:
        """The decision on each call, since attaching, or since the last :meth:`update` or :meth:`reset`.

        Range by range, each in the order of its calls; of very many the latest ten thousand. Calls with gradients are
        not among them.

        Example:
            >>> import torch
            >>> from dithooks import Threshold
            >>> class Model(torch.nn.Module):
            ...     def __init__(self):
            ...         super().__init__()
            ...         self.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
            ...     def forward(self, x, timestep):
            ...         for block in self.blocks:
            ...             x = block(x)
            ...         return x
            >>> model, config = Model(), DitCacheConfig(cache_block_start=1, policy=Threshold(0.1, max_warmup_steps=1))
            >>> with torch.no_grad(), dit_cache(model, config) as cache:
            ...     for t in (1.0, 0.8):
            ...         _ = model(torch.ones(1, 4), t)
            ...     [(each.step, each.reason, each.value) for each in cache.decisions]
            [(0, 'warm-up', None), (1, 'reuse', 0.0)]
        """
        attached = self._attached
        return tuple(each for one in attached for each in one.log.records()) if self.active else self._last.decisions

    @property
    def ranges(self) -> tuple[CachedRange, ...]:
        """The blocks that are cached, of each transformer, or each list that is a range of its own; once the cache is
        removed, those that were.

        Until the first call they are counted list by list, from then on in the order in which the model calls them.
        """
        attached = self._attached
        return tuple(each.where() for each in attached) if self.active else self._last.ranges

    def summary(self) -> str:
        """The statistics as a table of at most 100 columns; ``print(handle)`` prints it.

        For each range, run and branch: steps, calls computed and reused, block executions of all, and the quantiles of
        the differences that decided, if any did. For each run: how many times fewer blocks, how many times as fast that
        should be by the blocks' times, and how many times as fast the calls were; see :class:`RunStats`.
        """
        attached = self._attached
        described = [each.describe() for each in attached] if self.active else self._last.described
        return summary(self.stats, described)

    def update(self, config: Attachable, tier: str | None = None) -> None:
        """Go on with another configuration or plan; what was cached is dropped. Errors leave the old one in force.

        Args:
            config: as for :func:`dit_cache`.
            tier: as for :func:`dit_cache`.

        Raises:
            RuntimeError: the handle was removed, or no tier promises what is asked for.
            TypeError, ValueError: as :func:`dit_cache`.
        """
        with self._compiled_calls.kept_out(), DYNAMO_LOCK.held(), MODEL_LOCK.lock:
            self._refuse_if_removed()
            given = attachable(config)
            changed = self._change(selected(given, tier))
            self._tiers = given if isinstance(given, PlanTiers) else None
        self._report(*changed)

    def _report(self, remarks: list[str], former: list[AnyAttachment]) -> None:
        """Conclude a change once the model's lock is free, as this waits for others: forget, log and warn."""
        remarks = remarks + _forgotten(former)
        for attached in self._attached:
            logging.getLogger("dithooks").info("%s: attached to %s", attached.log.name, attached.describe())
        _warn(remarks)

    def _refuse_if_removed(self) -> None:
        if self._state is not HandleState.ATTACHED:
            raise RunMismatch("this cache was removed: attach a new one with dit_cache(...)")

    def _change(self, config: DitCacheConfig | CachePlan) -> tuple[list[str], list[AnyAttachment]]:
        """Attach to the model as it is now; return the warnings that are due, and the former attachments.

        The model's lock has to be held. A finalizer or a signal handler may remove the cache meanwhile.
        """
        given = config
        mine = [skip for attached in self._attached for skip in attached.skips]
        found, plan = self._chains(config), config if isinstance(config, CachePlan) else None
        config = config_of_plan(config, found) if isinstance(config, CachePlan) else config
        chains = configure_ranges(found, config)
        settings = self._settings()
        for chain, own in chains:
            check_payload(chain, own, settings, mine)
        here = fingerprint([chain for chain, _ in chains])
        if config.fingerprint not in (None, here):
            raise InvalidSetting(
                f"the config was made for another model (fingerprint {config.fingerprint}, here {here}): "
                "search a new one, or take the numbers over with dataclasses.replace(config, fingerprint=None)"
            )
        useful = [(chain, own) for chain, own in chains if not own.when.never_reuses]
        check_corrections(useful, [each.cache for each in self._attached])
        prepared = [self._prepare(chain, own) for chain, own in useful]
        deciders = [attached.cache.decider for attached in prepared]
        for attached in prepared:
            attached.cache.handle, attached.cache.decider.deciders_of_handle = self, deciders
            attached.cache.compiled_calls = self._compiled_calls
        remarks = [] if plan is None else plan.mismatch_warnings(dtype_of(found[0][0].owner), self._scheduler_name())
        owners = [attached.chain.owner for attached in prepared]
        watches = [
            TrunkWatch((chain, *chain.rivals), self._settle)
            for chain, _ in found
            if chain.rivals and chain.owner in owners
        ]
        former, former_watches, before = self._attached, self._watches, (self._given, self._config)

        def take_back() -> None:
            for watch in (*watches, *former_watches):
                watch.remove()
            for attached in prepared:
                attached.detach()
            if self._state is not HandleState.ATTACHED:
                self._attached, self._watches = [], []
                return
            self._attached, self._watches, (self._given, self._config) = former, former_watches, before
            for watch in former_watches:
                watch.attach()
            for attached in former:  # as it was, less what was cached
                attached.detach()
                attached.cache.drop()
                attached.attach()

        try:
            for watch in former_watches:
                watch.remove()
            for attached in former:
                remarks += attached.detach()
            self._attached, self._watches = prepared, watches
            for watch in watches:
                watch.attach()
            for attached in prepared:
                attached.attach()
            self._given, self._config = given, replace(config, fingerprint=here)
            self._refuse_if_removed()
        except BaseException:
            complete(take_back)
            raise
        for attached in prepared:
            remarks += attached.cache.decider.rank_warnings()
        if not useful:
            remarks.append(refreshes_every_step())
        return remarks, former

    def reset(self) -> None:
        """Drop everything cached and set the counts to zero; the cache stays attached."""
        now = self._attached
        remarks = _forgotten(now)
        for attached in now:
            attached.log.clear()
        _warn(remarks)

    def request(
        self,
        name: Hashable = None,
        *,
        scheduler: object = None,
        plan: Attachable | None = None,
        tier: str | None = None,
        steps: int | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> Request:
        """A place of its own for the residuals of one run, among others in a thread or task, or across several.

        By itself a thread or asyncio task has one run at a time. A server that makes a step of this run and a step of
        that one, or each step in whichever thread is free, enters a run's request around its calls. One that makes
        steps of several runs in one call names the request of each row: :meth:`rows`.

        Args:
            name: by which :meth:`rows`, :meth:`forecast` and :meth:`forget` find it; left out, they are given the
                request itself.
            scheduler: of this run, where it is not the one that the cache was attached with: pipelines that share a
                transformer have each their own.
            plan: what its rows are cached by, in place of what the cache was attached with; of the same blocks.
            tier: which of the tiers that the cache was attached with, or of those that ``plan`` is: a name, or
                ``"fastest at ≥ 35 dB"``, as for :meth:`PlanTiers.select`. Left out, it is the one that was attached.
            steps: number of steps of the run; left out, its own scheduler's, if it has one.
            sigmas: the noise level of each of them; likewise.

        Raises:
            RuntimeError: the handle was removed.
            TypeError: ``scheduler`` or ``plan`` is none.
            ValueError: the plan is of another model or other blocks, its policy looks at what the cache was not
                attached to look at, there is no such tier, or there is a request of this name already.
            TargetMissed: no tier promises what is asked for.

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
            ...     cat, dog = cache.request(), cache.request()
            ...     for t in (1.0, 0.8, 0.6, 0.4):
            ...         for request, x in ((cat, torch.zeros(1, 4)), (dog, torch.ones(1, 4))):
            ...             with request:
            ...                 _ = model(x, t)
            ...     print(cache.stats.reused_calls, "of", cache.stats.computed_calls + cache.stats.reused_calls)
            2 of 8
        """
        self._refuse_if_removed()
        scheduler_of(self._target, scheduler)
        chosen, subject = selected_for_request(plan, tier, self._tiers)
        if chosen is not None:
            if not all(cache.row_states.knows(chosen) for cache in self._caches()):
                self._configs_of(chosen, subject)
            self._prepare_rows(chosen)
        request = Request(scheduler, chosen, steps, sigmas)
        if name is not None:
            if name in self._requests:
                raise InvalidSetting(f"there is a request {shown(name)} already: forget() it once it is over")
            self._requests[name] = request
        return request

    def rows(self, rows: Iterable[Row | tuple[Hashable, int] | object]) -> RowScope:
        """Makes the rows of a batch belong to several requests, each at a step of its own, for the calls within it.

        Each row is computed or reused as its request's plan says at its step. The blocks run on the rows to be computed
        alone; a batch of which none is runs none. Plans, ``Mask``, ``Interval`` and ``MagnitudeRatio`` settle that
        beforehand; policies that measure do so at the range's first block, each row by its own change.

        The latents' first dimension is the batch. Before the first batch, the transformer is called a few times more:
        to see which blocks take what, and which part of that is whose row.

        Args:
            rows: for each row, in the order of the batch: a :class:`Row`, ``(request, step)``, or an object with
                ``request_id`` and ``step_index``. A name that :meth:`request` was not called with stands for a new
                request by what the cache was attached with. Several rows may be of one request, in one call or in
                several: they are distinguished by their order, or by their branch.

        Raises:
            RuntimeError: the handle was removed, or a request was closed.
            TypeError, ValueError: an entry is no row, or its step is not one of its request's.

        Example:
            >>> import torch
            >>> class Model(torch.nn.Module):
            ...     def __init__(self):
            ...         super().__init__()
            ...         self.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
            ...     def forward(self, x, timestep):
            ...         for block in self.blocks:
            ...             x = block(x * timestep[:, None])
            ...         return x
            >>> model, config = Model(), DitCacheConfig(1, 2, cache_block_start=0, cache_num_blocks=3)
            >>> with torch.no_grad(), dit_cache(model, config) as cache:
            ...     for step in range(4):  # "dog" comes one step later
            ...         batch = [("cat", step), ("dog", step - 1)][: 1 + (step > 0)]
            ...         with cache.rows(batch):
            ...             _ = model(torch.ones(len(batch), 4), torch.tensor([1.0, 1.0])[: len(batch)])
            ...     print(cache.stats.reused_calls, "of", cache.stats.calls, "rows")
            2 of 7 rows
        """
        self._refuse_if_removed()
        listed = [row_of(entry) for entry in rows]
        named = {row.request for row in listed}
        for name, request in list(self._requests.items()):
            if name not in named and request.is_over(self._has_finished):
                self._requests.pop(name, None)
        requests = [self._request_of(row.request, makes=True) for row in listed]
        for plan in {id(request.plan): request.plan for request in requests}.values():
            self._prepare_rows(plan)
        return RowScope(listed, requests)

    def forget(self, request: Hashable) -> None:
        """Free the residuals of a request that is over or was cancelled; nothing happens if there is none.

        Args:
            request: its name, or what :meth:`request` has returned.

        Raises:
            RuntimeError: it is entered.
        """
        found = request if isinstance(request, Request) else self._requests.get(request)
        if found is not None:
            found.close()
            for name in [name for name, each in list(self._requests.items()) if each is found]:
                self._requests.pop(name, None)

    def forecast(self, request: Hashable) -> tuple[float, ...]:
        """What each coming step of a request costs, as a share of all blocks: 1.0 where all are computed.

        By this a server can put rows together that compute, and others that reuse. The number of steps has to be known.
        A step that a policy decides by looking counts as computed.

        Args:
            request: its name, or what :meth:`request` has returned.

        Raises:
            ValueError: there is no such request, or its number of steps is not known.
        """
        found = self._request_of(request, makes=False)
        if found.steps is None:
            raise InvalidSetting("forecast: give the request its number of steps: cache.request(name, steps=28)")
        caches = self._caches()
        costs = [cache.row_states.costs(found) for cache in caches]
        totals = [cache.decider.log.blocks for cache in caches]
        first = 0 if found.step is None else found.step + 1
        return tuple(
            sum(cost[step] * total for cost, total in zip(costs, totals, strict=True)) / sum(totals) if totals else 1.0
            for step in range(first, found.steps)
        )

    def config_of(self, plan: DitCacheConfig | CachePlan | None, cache: AnyCache) -> DitCacheConfig:
        """The configuration by a plan of what one cache of the handle is on; ``None``: by what it was attached with."""
        if plan is None:
            return cache.decider.config
        return next(own for attached, own in self._configs_of(plan) if attached.cache is cache)

    def _prepare_rows(self, plan: DitCacheConfig | CachePlan | None) -> None:
        """Make the deciders of rows by a plan, of all that is cached; raise where its policy cannot look."""
        deciders = [cache.row_states.decider(plan) for cache in self._caches()]
        for decider in deciders:
            decider.deciders_of_handle = deciders

    def _has_finished(self, session: Session) -> bool:
        return all(cache.row_states.has_finished(session) for cache in self._caches())

    def _caches(self) -> list[AnyCache]:
        return [attached.cache for attached in self._attached]

    def _request_of(self, request: Hashable, makes: bool) -> Request:
        if isinstance(request, Request):
            return request
        found = self._requests.get(request)
        if found is None:
            if not makes:
                raise InvalidSetting(f"there is no request {shown(request)}: cache.request(name, steps=28) makes one")
            found = self._requests[request] = Request()
        return found

    def _configs_of(
        self, plan: DitCacheConfig | CachePlan, subject: str = "the request's plan"
    ) -> list[tuple[AnyAttachment, DitCacheConfig]]:
        """Return the configuration of each attachment by the plan of a request, which messages call ``subject``."""
        found = self._chains(plan)
        config = config_of_plan(plan, found) if isinstance(plan, CachePlan) else plan
        chains = configure_ranges(found, config)
        if config.fingerprint not in (None, here := fingerprint([chain for chain, _ in chains])):
            raise InvalidSetting(
                f"{subject} was made for another model (fingerprint {config.fingerprint}, here {here}): "
                "search one for this model"
            )
        rest = {id(chain): chain.name for chain, own in chains if not own.when.never_reuses}
        configs, differences = [], []
        for attached in self._attached:
            its = attached.chain
            alike = [each for each in chains if _place(each[0]) == _place(its)]
            beside = [
                each for each in chains if each[0].path == its.path
            ]  # of one of several, only what reuses nothing
            pair = next(iter(alike or [each for each in beside if not its.span or each[1].when.never_reuses]), None)
            if pair is None:
                differences.append(f"nothing of {attached.log.name}")
                continue
            chain, own = pair
            rest.pop(id(chain), None)
            differences += _differences(own, attached)
            configs.append((attached, own))
        differences += [f"{name}, too, which the cache is not attached to" for name in rest.values()]
        if differences:
            raise InvalidSetting(
                f"{subject} caches {differences[0]:.140}: plans of one batch share blocks and payload, as those of one "
                "search(targets=...) do; give this one a cache of its own, dit_cache(...)"
            )
        settings, mine = self._settings(), [skip for attached in self._attached for skip in attached.skips]
        for attached, own in configs:
            if not own.when.never_reuses:
                check_payload(attached.chain, own, settings, mine)
        check_corrections([(attached.chain, own) for attached, own in configs], self._caches())
        return configs

    def remove(self) -> None:
        """Put the original blocks back, take the hooks off and free what was cached. A second call does nothing.

        Once begun, it is done to the end: what Ctrl-C or another thread raises in it meanwhile is raised afterwards.

        Warns:
            UserWarning: another library has wrapped a block since; its stand-in stays, as a plain way to the block.
        """
        try:  # before all else: errors raised in here are caught
            remarks = self._take_off()
        except BaseException:
            complete(self._take_off)
            raise
        _warn(remarks)

    def _take_off(self) -> list[str]:
        """Remove the cache, from wherever a removal was broken off; return the warnings that are due."""
        with self._compiled_calls.kept_out():
            for each in self._attached:  # before the locks, which a call that is passing over the range may need
                each.cache.active_calls.close()
            with DYNAMO_LOCK.held(), MODEL_LOCK.lock:
                remarks = self._detach()
        attached = self._attached  # before the state is asked: another thread may have come to the end
        if self._state is HandleState.REMOVED:
            return []
        last = Numbers(
            replace(total([each.stats() for each in attached]), bytes_held=0),
            tuple(record for each in attached for record in each.log.records()),
            tuple(each.where() for each in attached),
            [each.describe() for each in attached],
        )
        remarks += _forgotten(attached)
        if not self._is_interrupted:
            remarks += _silences(attached, last)
        self._last = last
        self._state = HandleState.REMOVED
        self._attached, self._watches, self._requests = [], [], {}
        self._target = self._scheduler = self._blocks = self._consensus = self._on_decision = None
        for each in attached:
            logging.getLogger("dithooks").info("%s: removed", each.log.name)
        return remarks

    def _detach(self) -> list[str]:
        """Leave the model as if there were no cache; return the warnings about that. The model's lock is held."""
        if self._state is HandleState.ATTACHED:
            self._state = HandleState.LEAVING
        for watch in self._watches:
            watch.remove()
        return [remark for attached in self._attached for remark in attached.detach()]

    def __enter__(self) -> CacheHandle:
        """Begin what removes the cache at its end.

        Raises:
            RuntimeError: the handle was removed.
        """
        try:
            self._refuse_if_removed()
            return self
        except RunMismatch:
            raise
        except BaseException:  # nobody would leave it
            complete(self._take_off)
            raise

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._is_interrupted = kind is not None
            self.remove()
        except BaseException:
            complete(self._take_off)
            raise

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be copied or pickled while attached: a copy would hold a model that it is not attached to.

        Raises:
            TypeError: it is attached.
        """
        if self._state is not HandleState.REMOVED:
            raise WrongType(
                "a cache that is attached cannot be copied or pickled: copy or save the model, which comes out without "
                "a cache, and attach another to it with dit_cache(copy, handle.config); handle.config, .stats and "
                ".decisions can be saved"
            )
        return super().__reduce_ex__(protocol)

    def __str__(self) -> str:
        return self.summary()

    def _repr_html_(self) -> str:
        """Return the ranges with the steps of their latest run as squares, and the totals, for a notebook."""
        decisions = self.decisions
        last = {each.range: each.run for each in decisions}
        pictures = step_pictures(each for each in decisions if each.run == last[each.range])
        rows = [[name or "model", step_squares(picture)] for name, picture in pictures.items()]
        seen = table(["range", "steps of the latest run"], rows) if rows else ""
        return f"<b>{escape(repr(self))}</b>{seen}{escape(str(self.stats))}"

    def __repr__(self) -> str:
        state = ", ".join(attached.describe() for attached in self._attached) or "nothing attached"
        return f"<CacheHandle {state if self.active else 'removed'}>"

    def _prepare(self, chain: Chain, config: DitCacheConfig) -> AnyAttachment:
        return prepare_payload(chain, config, self._settings(), BlockIntegrations())

    def _settings(self) -> HandleSettings:
        return HandleSettings(
            self._target,
            self._look_up(),
            self._verify,
            self._consensus,
            self._on_decision,
            self._step_settings,
            self._method,
        )

    def _chains(self, config: DitCacheConfig | CachePlan) -> list[tuple[Chain, DitCacheConfig | None]]:
        """Return the chains to cache; those with rivals only where calls have to show which one is the trunk.

        A config with a fingerprint says that. Ranks and compiled code cannot wait for it: there it is as found.
        """
        found = chains_for(config, self._target, self._blocks, self._chosen)
        made_for = (config.config if isinstance(config, CachePlan) else config).fingerprint
        if made_for is not None and len(found) == 1:
            chosen = {rival.path for rival in found[0][0].rivals if rival.fingerprint() == made_for}
            found = chains_for(config, self._target, self._blocks, chosen) if chosen else found
        is_known = isinstance(config, CachePlan) or made_for is not None or self._consensus is not None
        return [
            (replace(chain, rivals=()) if is_known or chain.path in self._chosen or is_compiled(chain) else chain, own)
            for chain, own in found
        ]

    def _settle(self, watch: TrunkWatch, chain: Chain, evidence: Evidence) -> None:
        """Cache the stack that is the trunk by its calls, after one of them."""
        remarks, former = list[str](), list[AnyAttachment]()
        with self._compiled_calls.kept_out(), DYNAMO_LOCK.held(), MODEL_LOCK.lock:
            if self._state is not HandleState.ATTACHED or not any(each is watch for each in self._watches):
                return
            if not watch.is_about(chain):
                remarks, former = self._move(watch, chain)
            if evidence is Evidence.CERTAIN:
                watch.remove()
                self._watches = [each for each in self._watches if each is not watch]
            for attached in self._attached:
                if watch.is_about(attached.chain):
                    attached.begin()
        _warn(remarks + _forgotten(former))

    def _move(self, watch: TrunkWatch, now: Chain) -> tuple[list[str], list[AnyAttachment]]:
        """Cache another stack; return the warnings about it, and the former attachments."""
        assert self._given is not None
        before, former = watch.chains[0], self._chosen
        names = [", ".join(each.path for each in chain.block_lists) for chain in (now, before)]
        lists = [each.path for each in now.block_lists]
        for attached in self._attached:
            if watch.is_about(attached.chain):
                attached.cache.drop()  # without a warning: that it reused nothing was not its fault
        self._chosen = former - {each.path for each in watch.chains} | {now.path}
        try:
            remarks, former_attachments = self._change(self._given)
        except (InvalidSetting, WrongType) as error:  # raised before anything is touched
            self._chosen = former
            return [trunk_does_not_fit(names[0], names[1], str(error), lists)], []
        except BaseException:
            self._chosen = former
            raise
        return [trunk_is_another(names[0], names[1], watch.inputs(before), lists), *remarks], former_attachments

    def _look_up(self) -> Callable[[], Any]:
        target = self._target.pipe if isinstance(self._target, BlockAdapter) else self._target
        return scheduler_of(target, self._scheduler)

    def _scheduler_name(self) -> str | None:
        scheduler = self._look_up()()
        return None if scheduler is None else type(scheduler).__name__


def _differences(config: DitCacheConfig, attached: AnyAttachment) -> list[str]:
    """Return what else than is attached the configuration of a request caches, if anything."""
    name, (payload, *blocks) = attached.log.name, _range_of(config, attached)
    its_payload, *its_blocks = _range_of(attached.cache.decider.config, attached)
    if config.when.never_reuses or (payload, blocks) == (its_payload, its_blocks):
        return []
    if payload != its_payload:
        return [f"the {payload} of {name}, and the cache is attached to its {its_payload}"]
    return [f"other blocks of {name} than {attached.describe()}, which the cache is attached to"]


def _place(chain: Chain) -> tuple[list[str], str]:
    """Return the lists of a chain, and which range of them it is."""
    return [each.path for each in chain.block_lists], chain.span


def _range_of(config: DitCacheConfig, attached: AnyAttachment) -> tuple[str, int, int]:
    """Return what a configuration forecasts, and the first and last block that it caches."""
    first, number = config.cache_block_start, config.cache_num_blocks
    total = len(attached.chain.block_refs)
    return config.payload, first, total - config.compute_last if number is None else first + number


def _warn(remarks: list[str]) -> None:
    """Issue the warnings that were collected while the model was being changed."""
    for remark in remarks:
        warn_user(remark)


def _forgotten(attachments: list[AnyAttachment]) -> list[str]:
    """Drop all that is cached; return the warnings that are due. This waits for logs: the model's lock is not held."""
    return [remark for attached in attachments for remark in attached.cache.forget()]


def _silences(attachments: list[AnyAttachment], last: Numbers) -> list[str]:
    """Return why a cache did nothing all the time, if no warning has given the reason yet."""
    if not attachments:
        return []
    if last.stats.calls == 0:
        return unseen(attachments)
    why = (attached.cache.decider.why_silent() for attached in attachments)
    return [message for message in why if message is not None][:1]


def handle_of(target: CacheTarget) -> CacheHandle | None:
    """Find the handle of the cache on a model, though nobody has kept it: its hooks on the model lead to it.

    Args:
        target: a pipeline, or what was cached in it: a model, a module around it, or a :class:`BlockAdapter`.

    Returns:
        The handle; ``None`` if nothing is cached there. A copy of a cached model has none.

    Raises:
        TypeError: ``target`` is none of these.
        ValueError: several caches are attached there.

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
        >>> model = Model()
        >>> _ = dit_cache(model, DitCacheConfig(1, 2, 0, 3))
        >>> handle_of(model)
        <CacheHandle blocks.0 … blocks.2 of 3 blocks>
    """
    found = _found(target)
    if len(found) > 1:
        ranges = ", ".join(each.range for handle in found for each in handle.ranges)
        raise InvalidSetting(
            f"{type(target).__name__} has {len(found)} caches attached ({ranges:.120}): give the part that one of them "
            "is on, or take off all of them with dithooks.detach(...)"
        )
    return found[0] if found else None


def detach(target: CacheTarget) -> None:
    """Remove every cache that is on a model or pipeline, whoever has attached it, and also where its handle is lost.

    A cache that was attached to several models at once is removed from all of them.

    Args:
        target: as for :func:`handle_of`.

    Raises:
        TypeError: ``target`` is none of these.

    Warns:
        UserWarning: nothing was attached.

    Example:
        >>> import torch
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
        ...     def forward(self, x, timestep):
        ...         for block in self.blocks:
        ...             x = block(x * timestep)
        ...         return x
        >>> model = Model()
        >>> _ = dit_cache(model, DitCacheConfig(1, 2, 0, 3))
        >>> with torch.no_grad():
        ...     _ = [model(torch.ones(1, 4), t) for t in (1.0, 0.8, 0.6, 0.4)]
        >>> detach(model)
        >>> print(handle_of(model))
        None
    """
    found = _found(target)
    for handle in found:
        handle.remove()
    if not found:
        warn_user(nothing_is_attached(type(target).__name__))


def _found(target: object) -> list[CacheHandle]:
    inside = target.target if isinstance(target, BlockAdapter) else target
    if not isinstance(inside, nn.Module) and not modules_of(inside):
        raise WrongType(f"{type(target).__name__} is neither a model nor holds one: give what was cached")
    return handles_of(target)


def handles_of(target: object) -> list[CacheHandle]:
    """The handles of all that is cached in a model, a pipeline or what an adapter names, found by the hooks in it.

    Nothing else holds them: a copy of a model has none, and one that is gone has taken them along.
    """
    target = target.target if isinstance(target, BlockAdapter) else target
    tops = [target] if isinstance(target, nn.Module) else modules_of(target).values()
    found = {id(cache.handle): cache.handle for top in tops for cache in all_caches_of(top.modules())}
    return list(found.values())
