"""cache-dit's ``enable_cache``, ``disable_cache`` and ``refresh_context``: a cache handle, found by its hooks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import nn

from ...blocks.adapter import BlockAdapter as Adapter
from ...blocks.block_lists import Chain
from ...blocks.registry import chains_of
from ...config.cache_config import DitCacheConfig
from ...engine.model_lock import MODEL_LOCK
from ...engine.payloads import AnyAttachment
from ...errors import InvalidSetting
from ...handle import CacheHandle, handles_of
from ...integrations.dynamo_lock import DYNAMO_LOCK
from .adapters import BlockAdapter, adapter_of
from .configs import BasicCacheConfig, CacheType, CalibratorConfig, DBCacheConfig, check_names
from .expectation import Expectation
from .functors import Patch, PatchFunctor
from .modifiers import FLAT, ParamsModifier, applied, from_keywords, merged, without_others
from .translate import translate

Model = TypeVar("Model")
KNOWN = ("cache_config", "calibrator_config", "params_modifiers", *FLAT)


@dataclass(frozen=True)
class Settings:
    """The settings of one :func:`enable_cache`: for all lists of blocks, with modifiers for single lists."""

    cache_config: BasicCacheConfig
    calibrator_config: CalibratorConfig | None = None
    modifiers: tuple[ParamsModifier | None, ...] = ()

    def changed(self, given: ParamsModifier, lists: Collection[int] | None = None) -> Settings:
        """Return settings changed by a modifier, for all lists of blocks or for some of them."""
        if lists is None:
            modifiers = (each if each is None else _over(each, given) for each in self.modifiers)
            return Settings(*applied(given, self.cache_config, self.calibrator_config), tuple(modifiers))
        count = max([*lists, len(self.modifiers) - 1]) + 1
        padded = [*self.modifiers, *[None] * (count - len(self.modifiers))]
        return replace(
            self,
            modifiers=tuple(
                (given if each is None else _over(each, given)) if number in lists else each
                for number, each in enumerate(padded)
            ),
        )

    def of(self, number: int) -> tuple[BasicCacheConfig, CalibratorConfig | None]:
        """Return the configurations of one list."""
        modifier = self.modifiers[number] if number < len(self.modifiers) else None
        if modifier is None:
            return self.cache_config, self.calibrator_config
        return applied(modifier, self.cache_config, self.calibrator_config)


class Enabled(CacheHandle):
    """The handle of :func:`enable_cache`: each list of blocks is a range with its own settings."""

    def __init__(self, target: object, settings: Settings) -> None:
        self.adapter, self.settings = adapter_of(target), settings
        super().__init__(self.adapter.plain(), None, None, True)
        self._restore: Callable[[], None] = lambda: None
        self._expectations: dict[nn.ModuleList, Expectation] = {}

    def attach(self) -> None:
        """Apply the functor, if there is one, and attach the cache; an error leaves nothing behind."""
        functor = self.adapter.patch_functor
        try:
            if isinstance(functor, PatchFunctor):
                patch = Patch(functor, self.adapter.transformers())
                self._restore = patch.undo
                patch.apply()
            self.refresh(self.adapter, self.settings)
        except BaseException:
            self.remove()
            raise

    def refresh(self, adapter: BlockAdapter, settings: Settings) -> None:
        """Change adapter and settings; an error leaves the former ones in force."""
        ranges = ranges_of(adapter, settings)
        if ranges is None:  # CacheType.NONE
            self.remove()
            return
        with DYNAMO_LOCK.held(), MODEL_LOCK.lock:
            self._refuse_if_removed()
            before = self._target, self._expectations
            try:
                self._target, self._expectations = ranges
                changed = self._change(ranges[0].params[0])
            except BaseException:
                if self.active:
                    self._target, self._expectations = before
                raise
            self.adapter, self.settings = adapter, settings
        self._report(*changed)

    def owners(self) -> dict[int, nn.Module]:
        """Return the modules that call the blocks, by id."""
        return {id(each.chain.owner): each.chain.owner for each in self._attached}

    def lists(self, target: object = None) -> dict[str, int]:
        """Return the numbers of the lists of blocks by path: all, or only those inside a transformer."""
        listed = [each for chain, _ in chains_of(self.adapter.plain(), None) for each in chain.block_lists]
        parts = {id(module) for module in target.modules()} if isinstance(target, nn.Module) else None
        return {each.path: number for number, each in enumerate(listed) if parts is None or id(each.blocks) in parts}

    def some(self, target: object) -> list[int] | None:
        """Return the numbers of the lists inside a transformer; ``None`` if all lists are."""
        found = list(self.lists(target).values())
        return None if len(found) == len(self.lists()) else found

    def _detach(self) -> list[str]:
        self._restore()  # first: if this is interrupted, the handle can still be found by its hooks
        self._restore, self._expectations = lambda: None, {}
        return super()._detach()

    def _prepare(self, chain: Chain, config: DitCacheConfig) -> AnyAttachment:
        attached = super()._prepare(chain, config)
        expectation = self._expectations.get(chain.block_lists[0].blocks)
        if expectation is not None:
            attached.cache.decider.on_run_end = expectation.difference
        return attached

    def patches_as(self, adapter: BlockAdapter) -> bool:
        """Whether another adapter's functor would make the same changes to the same transformers."""
        ours, theirs = self.adapter.patch_functor, adapter.patch_functor
        if not any(isinstance(functor, PatchFunctor) for functor in (ours, theirs)):
            return True
        alike = type(ours) is type(theirs) and vars(ours) == vars(theirs)
        return alike and self.adapter.transformers() == adapter.transformers()


def enable_cache(
    pipe_or_adapter: Model,
    cache_config: BasicCacheConfig | None = None,
    calibrator_config: CalibratorConfig | None = None,
    params_modifiers: Any = None,
    **keywords: Any,
) -> Model:
    """Cache the blocks of a pipeline or transformer; a second call changes the settings.

    Each list of blocks is a range of its own, as in cache-dit. Of lists that are found rather than named, those too
    short for ``Fn_compute_blocks`` and ``Bn_compute_blocks`` are not cached.

    Args:
        pipe_or_adapter: a pipeline, a transformer, or a :class:`BlockAdapter`.
        cache_config: when and where to cache; left out, ``DBCacheConfig()``.
        calibrator_config: what a reused step adds.
        params_modifiers: settings that differ, per list of blocks; an adapter's own modifiers take precedence.
        **keywords: single fields of a :class:`DBCacheConfig`, and the flat keywords such as ``enable_taylorseer``.

    Returns:
        ``pipe_or_adapter``.

    Raises:
        TypeError, ValueError: as :func:`dithooks.dit_cache`, or a keyword is not known, or a setting is not available
            here. Nothing has changed then.

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
        >>> model = enable_cache(Model(), DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=2))
        >>> with torch.no_grad():
        ...     for t in (1.0, 0.8, 0.6, 0.4):
        ...         _ = model(torch.ones(1, 4), t)
        >>> [handle.stats.reused_calls for handle in enabled(model)]
        [2]
        >>> disable_cache(model)
    """
    keywords = without_others(keywords)
    settings = Settings(DBCacheConfig()).changed(_given(cache_config, calibrator_config, keywords, "enable_cache"))
    adapter = adapter_of(pipe_or_adapter)
    modifiers = adapter.modifiers(params_modifiers, over=adapter is not pipe_or_adapter)
    settings = replace(settings, modifiers=tuple(modifiers))
    owners = {id(chain.owner) for chain, _ in chains_of(adapter.plain(), None)}
    before = [handle for handle in enabled(adapter) if owners & handle.owners().keys()]
    if not before:
        Enabled(adapter, settings).attach()
    elif len(before) > 1 or not before[0].owners().keys() <= owners or not before[0].patches_as(adapter):
        raise InvalidSetting(f"{type(pipe_or_adapter).__name__} is cached already, otherwise: disable_cache() it first")
    else:
        before[0].refresh(adapter, settings)
    return pipe_or_adapter


def disable_cache(pipe_or_adapter: object) -> None:
    """Remove what :func:`enable_cache` attached, in any order; the model is as it was before.

    Given one of several transformers that were enabled together, this disables that one. Without a cache, it does
    nothing.
    """
    for handle in enabled(pipe_or_adapter):
        lists = handle.some(pipe_or_adapter)
        if lists is None:
            handle.remove()
        else:
            off = ParamsModifier(DBCacheConfig().reset(cache_type=CacheType.NONE))
            handle.refresh(handle.adapter, handle.settings.changed(off, lists))


def refresh_context(transformer: object, *, verbose: bool = False, **changes: Any) -> None:
    """Drop the stored residuals, and change settings.

    The end of a run and the number of its steps are observed; they do not need this call.

    Args:
        transformer: a transformer that was enabled, alone or with others (which keep their settings); or a pipeline,
            or an adapter.
        verbose: accepted, without effect.
        **changes: ``cache_config`` and ``calibrator_config``, whose fields that are not ``None`` replace the present
            ones, or single fields. They hold for all lists of blocks and override modifiers of single lists.

    Raises:
        ValueError: no cache is enabled; or as :func:`enable_cache`. Nothing has changed then.
        TypeError: as :func:`enable_cache`.
    """
    handles = enabled(transformer)
    if not handles:
        raise InvalidSetting(f"{type(transformer).__name__} is not cached: enable_cache() it first")
    parts = [changes.pop(name, None) for name in ("cache_config", "calibrator_config")]
    given = _given(parts[0], parts[1], changes, "refresh_context")
    for handle in handles:
        handle.refresh(handle.adapter, handle.settings.changed(given, handle.some(transformer)))


def enabled(target: object) -> list[Enabled]:
    """Return the handles that :func:`enable_cache` attached to a pipeline, a transformer or an adapter's modules."""
    where = target.plain() if isinstance(target, BlockAdapter) else target
    return [handle for handle in handles_of(where) if isinstance(handle, Enabled)]


def ranges_of(adapter: BlockAdapter, settings: Settings) -> tuple[Adapter, dict[nn.ModuleList, Expectation]] | None:
    """Make this library's adapter, in which each list of blocks is a range with its own configuration.

    Returns:
        The adapter, and the expectations of its runs, under the first cached list of each transformer: one warning of
        a run is enough. ``None`` if no list is to be cached.

    Raises:
        TypeError, ValueError: as :func:`translate`, or there are no blocks, or fewer lists than modifiers.
    """
    plain = adapter.plain()
    chains = [chain for chain, _ in chains_of(plain, None)]
    block_lists = [each for chain in chains for each in chain.block_lists]
    if len(settings.modifiers) > len(block_lists):
        raise InvalidSetting(
            f"there are {len(settings.modifiers)} params_modifiers for {len(block_lists)} lists of blocks: "
            f"{[each.path for each in block_lists]}"
        )
    pairs = [settings.of(number) for number in range(len(block_lists))]
    texts = [repr(pair) for pair in pairs]
    distinct = dict(zip(texts, pairs, strict=True))  # each is translated once, so that it warns once
    translated = {text: translate(*pair) for text, pair in distinct.items()}
    configs = [translated[text] for text in texts]
    kept = _long_enough(chains, configs)
    if not kept:
        return None
    expectations = {}
    for chain in chains:
        numbers = [block_lists.index(each) for each in chain.block_lists]
        if cached := [number for number in kept if number in numbers]:
            expectations[block_lists[cached[0]].blocks] = _expectation(adapter, pairs[numbers[0]][0])
    ranges = replace(
        plain,
        blocks=[block_lists[number].blocks for number in kept],
        forward_pattern=[block_lists[number].pattern for number in kept],
        patch_functor=[block_lists[number].functor for number in kept],
        params=[configs[number] for number in kept],
    )
    return ranges, expectations


def _long_enough(chains: Sequence[Chain], configs: Sequence[DitCacheConfig | None]) -> list[int]:
    """Return the numbers of the lists with blocks between the first and last ones that always run.

    Lists without a configuration are left out, and found lists that are too short.

    Raises:
        ValueError: a named list is too short, or all found ones are.
    """
    candidates = [(each, chain.found) for chain in chains for each in chain.block_lists]
    always = {
        number: (config.cache_block_start, config.compute_last)
        for number, config in enumerate(configs)
        if config is not None
    }
    kept = [number for number, ends in always.items() if len(candidates[number][0].blocks) > sum(ends)]
    for number, (first, last) in always.items():
        block_list, found = candidates[number]
        if number not in kept and not (found and kept):
            has = f"{block_list.path} has {len(block_list.blocks)} blocks"
            raise InvalidSetting(
                f"Fn_compute_blocks={first} and Bn_compute_blocks={last} leave none to be cached: {has}"
            )
    return kept


def _expectation(adapter: BlockAdapter, cache_config: BasicCacheConfig) -> Expectation:
    """Return the settings that have no effect here, but are compared with the runs."""
    separate = cache_config.enable_separate_cfg
    return Expectation(adapter.has_separate_cfg if separate is None else separate, cache_config.num_inference_steps)


def _given(
    cache_config: BasicCacheConfig | None,
    calibrator_config: CalibratorConfig | None,
    keywords: dict[str, Any],
    owner: str,
) -> ParamsModifier:
    """Collect arguments as changes; single fields override the configurations."""
    check_names(owner, keywords, KNOWN, "keyword")
    values, forecast = from_keywords(keywords, owner)
    given = ParamsModifier(cache_config, calibrator_config)
    single = DBCacheConfig().reset(**values)
    return ParamsModifier(merged(given.cache_config, single), forecast or given.calibrator_config)


def _over(modifier: ParamsModifier, given: ParamsModifier) -> ParamsModifier:
    """Return a modifier, changed by another."""
    return ParamsModifier(
        merged(modifier.cache_config, given.cache_config), merged(modifier.calibrator_config, given.calibrator_config)
    )
