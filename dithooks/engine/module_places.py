"""The places that hold a module: attributes of a pipeline, and children of the modules around it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..blocks.adapter import BlockAdapter, flat
from ..blocks.module_paths import modules_of


@dataclass(frozen=True, eq=False)
class ModulePlace:
    """One entry of a dict or list.

    Args:
        container: the dict or list.
        key: of the entry.
    """

    container: Any
    key: Any

    def holds(self, module: nn.Module) -> bool:
        """Return whether the entry is this very module now."""
        try:
            return self.container[self.key] is module
        except LookupError:
            return False

    def put(self, module: nn.Module) -> None:
        """Replace the entry by another module."""
        self.container[self.key] = module


def places_of(target: object, modules: Iterable[nn.Module]) -> list[ModulePlace]:
    """Return the places within a target that hold one of some modules.

    Args:
        target: a pipeline, or a module around the modules; or an adapter of either.
        modules: the modules, compared by identity.
    """
    wanted = {id(module) for module in modules}
    found: list[ModulePlace] = []
    for container in _containers(target):
        entries = container.items() if isinstance(container, dict) else enumerate(container)
        found += [ModulePlace(container, key) for key, value in list(entries) if id(value) in wanted]
    return found


def _containers(target: object) -> Iterator[dict[Any, Any] | list[Any]]:
    """Iterate over what may hold a module: each dict or list once."""
    met: set[int] = set()
    for holder in _holders(target):
        tops = [holder] if isinstance(holder, nn.Module) else list(modules_of(holder).values())
        if not isinstance(holder, nn.Module):
            attributes = getattr(holder, "__dict__", {})
            yield from (attributes, *(each for each in attributes.values() if type(each) in (dict, list)))
        for top in tops:
            for module in top.modules():
                if id(module) not in met:
                    met.add(id(module))
                    yield from (each for each in (module._modules, vars(module)) if isinstance(each, dict))


def _holders(target: object) -> list[Any]:
    """Return the objects that the user holds; the namespace that an adapter makes of several models is none."""
    if not isinstance(target, BlockAdapter):
        return [target]
    return [target.pipe] if target.pipe is not None else list(flat(target.transformer))
