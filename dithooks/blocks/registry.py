"""Hints by class name, and whose blocks a user means: those of an adapter, named, hinted at or found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from torch import nn

from ..config.cache_config import DitCacheConfig
from ..errors import InvalidSetting, WrongType
from .adapter import BlockAdapter
from .block_lists import Chain
from .discovery import Blocks, find_chains
from .module_paths import denoisers_of

Maker = TypeVar("Maker", bound=Callable[..., BlockAdapter])


class BlockAdapterRegistry:
    """Hints for models whose blocks cannot be found or followed by observation, by class name.

    Few models need one. A hint is looked up when neither ``blocks`` nor an adapter is given: under the names of the
    pipeline's class and those it derives from, then of its transformers'.

    Example:
        >>> @BlockAdapterRegistry.register("TwoHeaded")
        ... def two_headed(model):
        ...     return BlockAdapter(transformer=model, blocks="body.blocks", forward_pattern=1)
        >>> BlockAdapterRegistry.names()
        ('TwoHeaded',)
        >>> BlockAdapterRegistry.unregister("TwoHeaded")
    """

    _HINTS: dict[str, Callable[[Any], BlockAdapter]] = {}  # noqa: RUF012  the one thing here that is the process's

    @classmethod
    def register(cls, name: str) -> Callable[[Maker], Maker]:
        """Decorates a function that makes the adapter of a model or pipeline whose class is called ``name``.

        A name that ends in ``*`` stands for all that begin so, but not for what derives from them; of several, the
        longest counts.

        Raises:
            ValueError: there is one for that name.
        """

        def decorate(make: Maker) -> Maker:
            if name in cls._HINTS:
                raise InvalidSetting(f"{name} has an adapter already: unregister it first")
            cls._HINTS[name] = make
            return make

        return decorate

    @classmethod
    def unregister(cls, name: str) -> None:
        """Take a hint out again.

        Raises:
            KeyError: there is none for that name.
        """
        del cls._HINTS[name]

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The classes that have a hint."""
        return tuple(cls._HINTS)

    @classmethod
    def adapter_for(cls, model: object) -> BlockAdapter | None:
        """The adapter of a model or pipeline, by its class and those it derives from."""
        make = cls.hint_for(model)
        if make is None:
            return None
        adapter, kind = make(model), type(model).__name__
        if not isinstance(adapter, BlockAdapter):
            raise WrongType(f"the hint for {kind} made {adapter!r}, not a BlockAdapter")
        if adapter.target is not model:
            raise InvalidSetting(f"the hint for {kind} made an adapter of another object than it was given")
        return adapter

    @classmethod
    def hint_for(cls, model: object) -> Callable[[Any], BlockAdapter] | None:
        """What was registered for a model or pipeline, by its class and those it derives from."""
        own, *bases = (base.__name__ for base in type(model).__mro__)
        named = own if own in cls._HINTS else _pattern_for(own, cls._HINTS)
        named = named or next((name for name in bases if name in cls._HINTS), None)
        return None if named is None else cls._HINTS[named]


def chains_of(target: object, blocks: Blocks) -> list[tuple[Chain, DitCacheConfig | None]]:
    """The blocks that the user means, as adapter, by name, by a hint or as they are found; configs of their own.

    Raises:
        TypeError, ValueError: as :func:`~dithooks.blocks.discovery.find_chains`.
    """
    if isinstance(target, BlockAdapter):
        if blocks is not None:
            raise InvalidSetting("blocks is given twice: leave it out where target is a BlockAdapter that says it")
        return target.chains()
    if blocks is not None or isinstance(target, type):
        return [(chain, None) for chain in find_chains(target, blocks)]
    adapter = BlockAdapterRegistry.adapter_for(target)
    if adapter is not None:
        return adapter.chains()
    parts: Mapping[str, nn.Module] = {} if isinstance(target, nn.Module) else denoisers_of(target)
    hinted = {name: found for name, module in parts.items() if (found := BlockAdapterRegistry.adapter_for(module))}
    if not hinted:
        return [(chain, None) for chain in find_chains(target, None)]
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
    """The longest of the beginnings with ``*`` that a class's name has."""
    fitting = [hint for hint in hints if hint.endswith("*") and name.startswith(hint[:-1])]
    return max(fitting, key=len, default=None)
