"""cache-dit's ``enable_cache``, ``disable_cache`` and ``refresh_context``: a handle as ever, found by its hooks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import nn

from ...blocks.adapter import BlockAdapter as Adapter
from ...blocks.block_lists import Chain, Expected
from ...blocks.registry import chains_of
from ...config.cache_config import DitCacheConfig
from ...errors import InvalidSetting
from ...handle import CacheHandle, handles_of
from .adapters import BlockAdapter, adapter_of
from .configs import BasicCacheConfig, CacheType, CalibratorConfig, DBCacheConfig, check_names
from .functors import PatchFunctor, patched
from .modifiers import FLAT, ParamsModifier, applied, from_keywords, merged, without_others
from .translate import translate

Target = TypeVar("Target")
KNOWN = ("cache_config", "calibrator_config", "params_modifiers", *FLAT)


@dataclass(frozen=True)
class Settings:
    """What is asked for: as a whole, and what differs for each list of blocks."""

    cache_config: BasicCacheConfig
    calibrator_config: CalibratorConfig | None = None
    modifiers: tuple[ParamsModifier | None, ...] = ()

    def changed(self, given: ParamsModifier, lists: Collection[int] | None = None) -> Settings:
        """With what is given in place of what was: for all lists of blocks, or for some of them."""
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
        """For one list."""
        modifier = self.modifiers[number] if number < len(self.modifiers) else None
        if modifier is None:
            return self.cache_config, self.calibrator_config
        return applied(modifier, self.cache_config, self.calibrator_config)


class Enabled(CacheHandle):
    """What :func:`enable_cache` attaches: each list of blocks is a range of its own, with settings of its own."""

    def __init__(self, target: object, settings: Settings) -> None:
        self.adapter, self.settings = adapter_of(target), settings
        super().__init__(self.adapter.plain(), None, None, True)
        self._restore: Callable[[], None] = lambda: None

    def attach(self) -> None:
        """Apply the functor, if there is one, and attach; an error leaves nothing behind."""
        functor = self.adapter.patch_functor
        try:
            if isinstance(functor, PatchFunctor):
                self._restore = patched(functor, self.adapter.transformers())
            self.refresh(self.adapter, self.settings)
        except BaseException:
            self.remove()
            raise

    def refresh(self, adapter: BlockAdapter, settings: Settings) -> None:
        """Go on with other settings; an error leaves those before in force."""
        ranges = ranges_of(adapter, settings)
        if ranges is None:  # CacheType.NONE
            self.remove()
            return
        before, self._target = self._target, ranges
        try:
            self.update(ranges.params[0])
        except BaseException:
            self._target = before
            raise
        self.adapter, self.settings = adapter, settings

    def owners(self) -> dict[int, nn.Module]:
        """The modules that call the blocks, by id."""
        return {id(each.chain.owner): each.chain.owner for each in self._attached}

    def lists(self, target: object = None) -> dict[str, int]:
        """Numbers of the lists of blocks by their paths: of all, or of those that are part of a transformer."""
        lanes = [lane for chain, _ in chains_of(self.adapter.plain(), None) for lane in chain.lanes]
        parts = {id(module) for module in target.modules()} if isinstance(target, nn.Module) else None
        return {lane.path: number for number, lane in enumerate(lanes) if parts is None or id(lane.blocks) in parts}

    def some(self, target: object) -> list[int] | None:
        """Numbers of the lists that are part of a transformer; ``None``: all are."""
        found = list(self.lists(target).values())
        return None if len(found) == len(self.lists()) else found

    def remove(self) -> None:
        self._restore()  # first: interrupted, this is found again by its hooks
        super().remove()
        self._restore = lambda: None

    def patches_as(self, adapter: BlockAdapter) -> bool:
        """Whether an adapter's functor would rewrite what was rewritten, in the same way."""
        ours, theirs = self.adapter.patch_functor, adapter.patch_functor
        if not any(isinstance(functor, PatchFunctor) for functor in (ours, theirs)):
            return True
        alike = type(ours) is type(theirs) and vars(ours) == vars(theirs)
        return alike and self.adapter.transformers() == adapter.transformers()


def enable_cache(
    pipe_or_adapter: Target,
    cache_config: BasicCacheConfig | None = None,
    calibrator_config: CalibratorConfig | None = None,
    params_modifiers: Any = None,
    **keywords: Any,
) -> Target:
    """Cache the blocks of a pipeline or transformer; called again, with other settings.

    Each list of blocks is a range of its own, as there. Where lists are found, those too short for
    ``Fn_compute_blocks`` and ``Bn_compute_blocks`` stay as they are.

    Args:
        pipe_or_adapter: a pipeline, a transformer, or a :class:`BlockAdapter` that says more about it.
        cache_config: when and where; left out, ``DBCacheConfig()``.
        calibrator_config: what is added on a reused step.
        params_modifiers: what differs for each list of blocks; those of an adapter that is given go first.
        **keywords: single fields of a :class:`DBCacheConfig`, and ``enable_taylorseer`` and the like.

    Returns:
        What was given.

    Raises:
        TypeError, ValueError: as :func:`dithooks.dit_cache`, or there is no such keyword or field, or what is asked
            for is not available. Nothing has changed then.

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
    """Take off what :func:`enable_cache` has attached, in whatever order; the model is as it was before.

    Of several transformers that were enabled together, one can be given. Where nothing is attached, this does nothing.
    """
    for handle in enabled(pipe_or_adapter):
        lists = handle.some(pipe_or_adapter)
        if lists is None:
            handle.remove()
        else:
            off = ParamsModifier(DBCacheConfig().reset(cache_type=CacheType.NONE))
            handle.refresh(handle.adapter, handle.settings.changed(off, lists))


def refresh_context(transformer: object, *, verbose: bool = False, **changes: Any) -> None:
    """Drop what is cached, and go on with other settings.

    The end of a run and the number of its steps are seen without this.

    Args:
        transformer: that was enabled, by itself or with others, which then go on as they are; a pipeline; an adapter.
        verbose: taken, and changes nothing.
        **changes: ``cache_config`` and ``calibrator_config``, whose fields that are not ``None`` count, or single
            fields; for all lists of blocks, whatever was said of single ones.

    Raises:
        ValueError: nothing is enabled there; or as :func:`enable_cache`, and then nothing has changed.
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
    """What :func:`enable_cache` has attached to a pipeline, a transformer or what an adapter names."""
    where = target.plain() if isinstance(target, BlockAdapter) else target
    return [handle for handle in handles_of(where) if isinstance(handle, Enabled)]


def ranges_of(adapter: BlockAdapter, settings: Settings) -> Adapter | None:
    """An adapter by which each list of blocks is a range of its own, with a configuration of its own.

    ``None``: no list is to be cached.

    Raises:
        TypeError, ValueError: as :func:`translate`, there are no blocks, or fewer lists than modifiers.
    """
    plain = adapter.plain()
    chains = [chain for chain, _ in chains_of(plain, None)]
    lanes = [lane for chain in chains for lane in chain.lanes]
    if len(settings.modifiers) > len(lanes):
        raise InvalidSetting(
            f"there are {len(settings.modifiers)} params_modifiers for {len(lanes)} lists of blocks: "
            f"{[lane.path for lane in lanes]}"
        )
    each = [settings.of(number) for number in range(len(lanes))]
    texts = [repr(one) for one in each]
    known = {text: translate(*one) for text, one in dict(zip(texts, each, strict=True)).items()}  # what is said, once
    configs = [known[text] for text in texts]
    kept = _long_enough(chains, configs)
    if not kept:
        return None
    beliefs = {}
    for chain in chains:
        first = lanes.index(chain.lanes[0])
        if any(lanes.index(lane) in kept for lane in chain.lanes):
            beliefs[chain.path] = _expected(adapter, each[first][0])
    return replace(
        plain,
        blocks=[lanes[number].blocks for number in kept],
        forward_pattern=[lanes[number].pattern for number in kept],
        patch_functor=[lanes[number].functor for number in kept],
        params=[configs[number] for number in kept],
        expected=list(beliefs.values()),
    )


def _long_enough(chains: Sequence[Chain], configs: Sequence[DitCacheConfig | None]) -> list[int]:
    """The lists with blocks between the first and last that always run: all that were named, some that were found.

    Those without a configuration are left out.

    Raises:
        ValueError: one that was named has none, or all that were found.
    """
    lanes = [(lane, chain.found) for chain in chains for lane in chain.lanes]
    always = {
        number: (config.cache_block_start, config.compute_last)
        for number, config in enumerate(configs)
        if config is not None
    }
    kept = [number for number, ends in always.items() if len(lanes[number][0].blocks) > sum(ends)]
    for number, (first, last) in always.items():
        lane, found = lanes[number]
        if number not in kept and not (found and kept):
            has = f"{lane.path} has {len(lane.blocks)} blocks"
            raise InvalidSetting(
                f"Fn_compute_blocks={first} and Bn_compute_blocks={last} leave none to be cached: {has}"
            )
    return kept


def _expected(adapter: BlockAdapter, cache_config: BasicCacheConfig) -> Expected:
    separate = cache_config.enable_separate_cfg
    return Expected(adapter.has_separate_cfg if separate is None else separate, cache_config.num_inference_steps)


def _given(
    cache_config: BasicCacheConfig | None,
    calibrator_config: CalibratorConfig | None,
    keywords: dict[str, Any],
    owner: str,
) -> ParamsModifier:
    """What is given, as changes; single fields go first."""
    check_names(owner, keywords, KNOWN, "keyword")
    values, forecast = from_keywords(keywords, owner)
    given = ParamsModifier(cache_config, calibrator_config)
    single = DBCacheConfig().reset(**values)
    return ParamsModifier(merged(given.cache_config, single), forecast or given.calibrator_config)


def _over(modifier: ParamsModifier, given: ParamsModifier) -> ParamsModifier:
    return ParamsModifier(
        merged(modifier.cache_config, given.cache_config), merged(modifier.calibrator_config, given.calibrator_config)
    )
