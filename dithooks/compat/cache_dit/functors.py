"""cache-dit's functors, which rewrite a model before its blocks are cached, and undoing what they did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn


class PatchFunctor:
    """A rewrite of ``forward``, for blocks that fit no pattern; subclasses define ``_apply``.

    Blocks are observed as they are, so hardly any model needs a functor here. (:class:`dithooks.PatchFunctor`, which
    declares how to read a block's streams and rewrites nothing, is accepted as well.)
    """

    def apply(self, transformer: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """Rewrite a transformer in place."""
        return self._apply(transformer, *args, **kwargs)

    def _apply(self, transformer: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        raise NotImplementedError(f"{type(self).__name__} has no _apply(transformer)")


class Unneeded(PatchFunctor):
    """A functor that does nothing, in place of cache-dit's own: these models' blocks are observed as they are."""

    def _apply(self, transformer: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        return transformer


BriaFiboPatchFunctor = ChromaPatchFunctor = DiTPatchFunctor = ErnieImagePatchFunctor = FluxPatchFunctor = Unneeded
GlmImagePatchFunctor = HiDreamPatchFunctor = HunyuanDiTPatchFunctor = LTX2PatchFunctor = WanVACEPatchFunctor = Unneeded
Cosmos3OmniPatchFunctor = QwenImageControlNetPatchFunctor = ZImageControlNetPatchFunctor = Unneeded


def patched(functor: PatchFunctor, transformers: Sequence[nn.Module]) -> Callable[[], None]:
    """Apply a functor.

    Returns:
        A function that undoes every change, except where others have changed the same attribute since.

    Raises:
        Exception: whatever the functor raises; every change is undone first.
    """
    modules = {id(module): module for transformer in transformers for module in transformer.modules()}
    places = [place for module in modules.values() for place in _places(module)]
    before = [(place, dict(place)) for place in places]
    try:
        for transformer in transformers:
            functor.apply(transformer)
        changes = _changes(before)
    except BaseException:
        _take_back(_changes(before), before)
        raise
    return lambda: _take_back(changes, before)


Place = dict[str, Any]  # attributes, submodules, hooks …: what a module keeps by name


class _Nothing:
    """Stands for a missing entry."""


def _places(module: nn.Module) -> list[Place]:
    """Return all mappings of a module: its attributes, and those of its parameters, submodules and hooks."""
    return [vars(module), *(value for value in vars(module).values() if isinstance(value, dict))]


def _changes(before: Sequence[tuple[Place, Place]]) -> list[tuple[Place, str, Any, Any]]:
    """List what differs from before: place, name, former value, present value."""
    return [
        (place, name, former, made)
        for place, values in before
        for name in (*values, *(name for name in place if name not in values))
        if (former := values.get(name, _Nothing)) is not (made := place.get(name, _Nothing))
    ]


def _take_back(changes: Sequence[tuple[Place, str, Any, Any]], before: Sequence[tuple[Place, Place]]) -> None:
    """Undo changes, except where the value is not the functor's any more."""
    for place, name, former, made in changes:
        if place.get(name, _Nothing) is not made:
            continue
        if former is _Nothing:
            del place[name]
        else:
            place[name] = former
    for place, values in before:  # restore the order as well: that of the state dict depends on it
        if list(place) != list(values) and place.keys() == values.keys():
            here = {name: place[name] for name in values}
            place.clear()
            place.update(here)
