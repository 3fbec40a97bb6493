"""Functors of cache-dit, which rewrite a model before its blocks are cached: applied, and taken back again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn


class PatchFunctor:
    """Rewrites a transformer's ``forward`` or its blocks', where these fit no pattern; subclasses have ``_apply``.

    Here blocks are followed as they are, so that hardly a model needs one. (:class:`dithooks.PatchFunctor`, which
    says how to read a block's streams and rewrites nothing, is taken as well.)
    """

    def apply(self, transformer: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """Rewrite a transformer, in place."""
        return self._apply(transformer, *args, **kwargs)

    def _apply(self, transformer: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        raise NotImplementedError(f"{type(self).__name__} has no _apply(transformer)")


class Unneeded(PatchFunctor):
    """In place of those that come with cache-dit: these models' blocks are followed as they are."""

    def _apply(self, transformer: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        return transformer


BriaFiboPatchFunctor = ChromaPatchFunctor = DiTPatchFunctor = ErnieImagePatchFunctor = FluxPatchFunctor = Unneeded
GlmImagePatchFunctor = HiDreamPatchFunctor = HunyuanDiTPatchFunctor = LTX2PatchFunctor = WanVACEPatchFunctor = Unneeded
Cosmos3OmniPatchFunctor = QwenImageControlNetPatchFunctor = ZImageControlNetPatchFunctor = Unneeded


def patched(functor: PatchFunctor, transformers: Sequence[nn.Module]) -> Callable[[], None]:
    """Apply a functor; returns what takes back all that it has set on a module, but for what others changed since.

    Raises:
        Exception: whatever the functor raises; then everything is as it was.
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


Place = dict[str, Any]  # what a module keeps by name


class _Nothing:
    """In place of what is not there."""


def _places(module: nn.Module) -> list[Place]:
    """Its attributes; and its parts, hooks and the like, which are in mappings of their own."""
    return [vars(module), *(value for value in vars(module).values() if isinstance(value, dict))]


def _changes(before: Sequence[tuple[Place, Place]]) -> list[tuple[Place, str, Any, Any]]:
    """Where something is another than before: where, under which name, what was there, and what is."""
    return [
        (place, name, former, made)
        for place, values in before
        for name in (*values, *(name for name in place if name not in values))
        if (former := values.get(name, _Nothing)) is not (made := place.get(name, _Nothing))
    ]


def _take_back(changes: Sequence[tuple[Place, str, Any, Any]], before: Sequence[tuple[Place, Place]]) -> None:
    for place, name, former, made in changes:
        if place.get(name, _Nothing) is not made:
            continue  # not the functor's any more
        if former is _Nothing:
            del place[name]
        else:
            place[name] = former
    for place, values in before:  # in the order in which it was: that of a state dict, too
        if list(place) != list(values) and place.keys() == values.keys():
            here = {name: place[name] for name in values}
            place.clear()
            place.update(here)
