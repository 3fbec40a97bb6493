"""Hints by class name, and the choice between an adapter's blocks, named, hinted and found ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from torch import nn

from ..config.cache_config import DitCacheConfig
from ..errors import InvalidSetting, WrongType
from ..validation import shown
from .adapter import BlockAdapter
from .block_lists import WRAPPED, Chain
from .discovery import Blocks, find_chains
from .model_kinds import is_unet, why_not_a_trunk
from .module_paths import denoisers_of

AdapterMaker = TypeVar("AdapterMaker", bound=Callable[..., BlockAdapter])


class BlockAdapterRegistry:
    """Hints, by class name, for models whose blocks cannot be found or followed by observation.

    Few models need a hint. Hints are looked up when neither ``blocks`` nor an adapter is given, first by the names of
    the pipeline's class and its bases, then by those of its transformers.

    Example:
        >>> @BlockAdapterRegistry.register("TwoHeaded")
        ... def two_headed(model):
        ...     return BlockAdapter(transformer=model, blocks="body.blocks", forward_pattern=1)
        >>> BlockAdapterRegistry.names()
        ('TwoHeaded',)
        >>> BlockAdapterRegistry.unregister("TwoHeaded")
    """

    _HINTS: dict[str, Callable[[Any], BlockAdapter]] = {}  # noqa: RUF012  global by purpose

    @classmethod
    def register(cls, name: str) -> Callable[[AdapterMaker], AdapterMaker]:
        """Decorate a function that makes the adapter of a model or pipeline whose class is called ``name``.

        A name that ends in ``*`` matches all class names with that beginning, but not those of derived classes; the
        longest match wins.

        Raises:
            ValueError: the name has a hint already.
        """

        def decorate(make: AdapterMaker) -> AdapterMaker:
            if name in cls._HINTS:
                raise InvalidSetting(f"{name} has an adapter already: unregister it first")
            cls._HINTS[name] = make
            return make

        return decorate

    @classmethod
    def unregister(cls, name: str) -> None:
        """Remove a hint.

        Raises:
            KeyError: the name has no hint.
        """
        del cls._HINTS[name]

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the class names that have a hint."""
        return tuple(cls._HINTS)

    @classmethod
    def adapter_for(cls, model: object) -> BlockAdapter | None:
        """Make the adapter of a model or pipeline by the hint for its class or a base; ``None`` without a hint."""
        make = cls.hint_for(model)
        if make is None:
            return None
        adapter, kind = make(model), type(model).__name__
        if not isinstance(adapter, BlockAdapter):
            raise WrongType(f"the hint for {kind} made {shown(adapter)}, not a BlockAdapter")
        if adapter.target is not model:
            raise InvalidSetting(f"the hint for {kind} made an adapter of another object than it was given")
        return adapter

    @classmethod
    def hint_for(cls, model: object) -> Callable[[Any], BlockAdapter] | None:
        """Return the function registered for the class of a model or pipeline, or for a base."""
        own, *bases = (base.__name__ for base in type(model).__mro__)
        named = own if own in cls._HINTS else _pattern_for(own, cls._HINTS)
        named = named or next((name for name in bases if name in cls._HINTS), None)
        return None if named is None else cls._HINTS[named]


def chains_of(
    target: object, blocks: Blocks, chosen: Collection[str] = ()
) -> list[tuple[Chain, DitCacheConfig | None]]:
    """Return the blocks that the user means (by adapter, name, hint, or found), each chain with its own config or not.

    Args:
        target: the model, pipeline or adapter.
        blocks: as for :func:`~dithooks.blocks.discovery.find_chains`.
        chosen: as for :func:`~dithooks.blocks.discovery.owners_of`; only found blocks are chosen from.

    Raises:
        TypeError, ValueError: as :func:`~dithooks.blocks.discovery.find_chains`.
    """
    if isinstance(target, BlockAdapter):
        if blocks is not None:
            raise InvalidSetting("blocks is given twice: leave it out where target is a BlockAdapter that has it")
        return target.chains()
    if blocks is not None or isinstance(target, type):
        return [(chain, None) for chain in find_chains(target, blocks)]
    adapter = BlockAdapterRegistry.adapter_for(target)
    if adapter is not None:
        return adapter.chains()
    parts: Mapping[str, nn.Module] = {} if isinstance(target, nn.Module) else denoisers_of(target)
    hinted = {name: found for name, module in parts.items() if (found := BlockAdapterRegistry.adapter_for(module))}
    if not hinted:
        for module in [target] if isinstance(target, nn.Module) else parts.values():
            if is_unet(getattr(module, WRAPPED, module)):
                raise InvalidSetting(str(why_not_a_trunk(module)))
        return [(chain, None) for chain in find_chains(target, None, chosen)]
    others: list[Chain] = []
    with suppress(ValueError):  # no other part has lists
        others = find_chains(target, None)
    chains: list[tuple[Chain, DitCacheConfig | None]] = []
    for name in parts:
        if name in hinted:
            chains += [(chain.below(name), config) for chain, config in hinted[name].chains()]
        else:
            chains += [(chain, None) for chain in others if chain.path.split(".")[0] == name]
    return chains


def _pattern_for(name: str, hints: Iterable[str]) -> str | None:
    """Return the longest hint with ``*`` that matches a class name."""
    fitting = [hint for hint in hints if hint.endswith("*") and name.startswith(hint[:-1])]
    return max(fitting, key=len, default=None)
