"""The attachment of a cache to one transformer as a whole: its stand-in, put into its places and taken out again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..blocks.adapter import BlockAdapter
from ..blocks.block_io import parameter_names
from ..blocks.block_lists import WRAPPED, Chain
from ..blocks.module_paths import walk
from ..config.cache_config import DitCacheConfig
from ..errors import InvalidSetting, WrongType
from ..stats.log import DecisionLog
from ..stats.types import CachedRange, CacheStats, CallRecord
from .clock import DEFAULT_STEP_SETTINGS, StepClock, StepSettings
from .hooks import hook_enclosing, unhook
from .model_lock import MODEL_LOCK
from .model_stand_in import cache_behind, engage_model, model_stand_in, original_model
from .module_places import ModulePlace, places_of
from .output_cache import OutputCache, output_caches_of
from .part_decider import decider_for
from .protocols import Integrations
from .rank_consensus import RankConsensus
from .sample_decider import is_by_sample
from .stand_in import is_engaged


class OutputAttachment:
    """The stand-in of one transformer; creating it touches nothing.

    Args:
        chain: the transformer, and its blocks where these were found.
        cache: the runtime of its calls.
        log: the log of their decisions.
        target: the pipeline or module that holds the transformer, or an adapter of it.
        model: the transformer as it is held there: it may be in a wrapper of ``torch.compile``.
        around: the modules around the transformer, from the inside out.
        waits: whether calls stay plain ones until :meth:`begin`.

    Raises:
        WrongType: the transformer cannot be given a stand-in.
    """

    def __init__(
        self,
        chain: Chain,
        cache: OutputCache,
        log: DecisionLog,
        target: object,
        model: nn.Module,
        around: Sequence[nn.Module] = (),
        waits: bool = False,
    ) -> None:
        self.chain, self.cache, self.log = chain, cache, log
        self._target, self._model, self._around, self._waits = target, model, around, waits
        self._stand_in = model_stand_in(model)
        self._places: list[ModulePlace] = []

    @property
    def skips(self) -> list[nn.Module]:
        """The stand-in."""
        return [self._stand_in]

    def attach(self) -> None:
        """Put the stand-in in place of the transformer wherever its target holds it."""
        self.cache.mark_model(self.chain.owner)
        hook_enclosing(self.cache, self._around)
        engage_model(self._stand_in, self.cache)
        self._places = places_of(self._target, [self._model])  # first: after an interruption these are looked at
        for place in self._places:
            place.put(self._stand_in)
        if not self._waits:
            self.begin()

    def begin(self) -> None:
        """Let calls be cached from now on."""
        self._waits = False
        self.cache.active_calls.open()

    def detach(self) -> list[str]:
        """Put the transformer back in place of the stand-in, wherever that is now; return no warnings."""
        self.cache.active_calls.close()
        with MODEL_LOCK.lock:
            unhook(self.cache, self._around)
            engage_model(self._stand_in, None)
            for place in [*self._places, *places_of(self._target, [self._stand_in])]:
                if place.holds(self._stand_in):
                    place.put(self._model)
        self.cache.mark_model(None)  # last: after an interruption, the mark leads to the handle
        return []

    def stats(self) -> CacheStats:
        """Return the counts and the memory held now."""
        return self.log.stats(self.cache.decider.bytes_held() + self.cache.row_states.nbytes)

    def where(self) -> CachedRange:
        """Return the blocks that are left out with the transformer as numbers; 1 of 1 where none are known."""
        return CachedRange(self.log.name, 0, self.log.blocks, self.log.blocks)

    def describe(self) -> str:
        """Return the cached range as text."""
        return f"output of {self.chain.name}"


def prepare_output(
    chain: Chain,
    config: DitCacheConfig,
    target: object,
    scheduler: Callable[[], Any],
    integrations: Integrations,
    consensus: RankConsensus | None = None,
    on_decision: Callable[[CallRecord], object] | None = None,
    step_settings: StepSettings = DEFAULT_STEP_SETTINGS,
    around: Sequence[nn.Module] = (),
    waits: bool = False,
) -> OutputAttachment:
    """Return the attachment of a cache to a transformer as a whole, created without touching anything.

    Args:
        chain: the transformer.
        config: the configuration of this transformer.
        target: the pipeline or module that holds it, or an adapter of it.
        scheduler: a function that returns the pipeline's current scheduler, or ``None``.
        integrations: the adapter to other libraries.
        consensus: the ranks that decide together; ``None`` if this rank decides alone.
        on_decision: a callback for the record of each decision.
        step_settings: the user's settings of what identifies the steps.
        around: the modules around the transformer, from the inside out.
        waits: whether calls stay plain ones until it is known that this is the denoiser.

    Raises:
        WrongType: the transformer cannot be given a stand-in.
        InvalidSetting: another library's cache is at work in the model.
    """
    if (other := integrations.other_cache(chain.owner)) is not None:
        raise InvalidSetting(
            f"{chain.name} has another cache at work ({other}): take it off first, as it would stand still where "
            "calls are left out"
        )
    blocks = max(len(chain.block_refs), 1)
    log = DecisionLog(chain.path or type(chain.owner).__name__, blocks, blocks, on_decision)
    integrations.bind(chain.owner, [], [])
    clock = StepClock(scheduler, chain.name, step_settings)
    decider = decider_for(config)(chain, config, clock, log, integrations, consensus)
    cache = OutputCache(decider, chain.owner, integrations)
    return OutputAttachment(chain, cache, log, target, _held(chain, target), around, waits)


def check_output(chain: Chain, config: DitCacheConfig, target: object, mine: Sequence[nn.Module]) -> None:
    """Raise if a transformer cannot be cached as a whole, before anything is touched; ``mine``: about to be removed.

    Raises:
        WrongType: the transformer is scripted.
        InvalidSetting: nothing holds the transformer, it or its blocks are cached already, another cache is enabled,
            only one of its lists is meant, or a stream to measure is no argument of it.
    """
    name = type(chain.owner).__name__
    if chain.part:
        raise InvalidSetting(
            f"payload='output' leaves the whole transformer out, and {chain.block_lists[0].path} is one of its lists: "
            "name the transformer in overrides, or give the list payload='residual'"
        )
    model = _held(chain, target)
    if isinstance(model, torch.jit.ScriptModule):
        raise WrongType(f"{name} is a scripted module, which takes no stand-in: cache before scripting")
    if is_by_sample(config.when):
        raise InvalidSetting(
            f"reduce='each' decides each sample of a batch between two blocks, and payload='output' leaves {name} out "
            "before that: give reduce='mean' or 'max', or payload='residual'"
        )
    refuse_cached(chain, mine)
    if not places_of(target, [model, *(skip for skip in mine if original_model(skip) is model)]):
        raise InvalidSetting(
            f"payload='output' puts a stand-in where {name} is held, and nothing that was given holds it: give the "
            "pipeline, or the module or object that has it as an attribute and calls it there"
        )
    blocks = [ref for ref in chain.block_refs if is_engaged(ref.block)]
    if other := [ref.path for ref in blocks if not any(ref.block is skip for skip in mine)]:
        raise InvalidSetting(
            f"{other[0]} is cached already: remove that cache first, or use its handle's update(), which changes what "
            "is forecast"
        )
    if True in config.predictor.corrects:
        raise InvalidSetting(
            "payload='output' leaves the transformer out on reused steps, and the predictor has corrections of these: "
            "give corrections of computed steps only"
        )
    if getattr(chain.owner, "is_cache_enabled", False) is True:
        raise InvalidSetting(f"{chain.name} has another cache enabled: call its disable_cache() first")
    names = parameter_names(chain.owner)
    if config.when.metric is not None and (
        unknown := [each for each in config.look_at or () if each.partition(".")[0] not in names]
    ):
        raise InvalidSetting(
            f"look_at: {', '.join(map(repr, unknown))} is no argument of {name}, and with payload='output' a policy "
            f"looks at those: it takes {', '.join(names):.160}"
        )


def refuse_cached(chain: Chain, mine: Sequence[nn.Module]) -> None:
    """Raise if another cache leaves out the calls of a transformer; ``mine``: stand-ins that are about to be removed.

    Raises:
        InvalidSetting: there is one.
    """
    own = [cache_behind(skip) for skip in mine]
    if any(not any(cache is each for each in own) for cache in output_caches_of([chain.owner])):
        raise InvalidSetting(
            f"{chain.name} is cached already: remove that cache first, or use its handle's update(). Where the handle "
            "is lost, dithooks.handle_of(pipeline) finds it, and dithooks.detach(pipeline) takes the cache off"
        )


def unwrapped(chain: Chain) -> Chain:
    """Return a chain whose owner is the transformer, where a stand-in was found in its place."""
    return replace(chain, owner=original_model(chain.owner), rivals=tuple(map(unwrapped, chain.rivals)))


def _held(chain: Chain, target: object) -> nn.Module:
    """Return the transformer as it is held: in the wrapper of ``torch.compile``, where it is in one."""
    target = target.target if isinstance(target, BlockAdapter) else target
    parts = chain.path.split(".") if chain.path else []
    while parts and parts[-1] == WRAPPED:
        parts.pop()
    found = walk(target, ".".join(parts)) if parts or isinstance(target, nn.Module) else chain.owner
    model: nn.Module = original_model(found)
    return model
