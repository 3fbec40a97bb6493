"""cache-dit's functors, which rewrite a model before its blocks are cached, and undoing what they did."""

from __future__ import annotations

from collections.abc import Sequence
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


class Patch:
    """What a functor does to some transformers, to be done and undone.

    Args:
        functor: the functor.
        transformers: what it is applied to.
    """

    def __init__(self, functor: PatchFunctor, transformers: Sequence[nn.Module]) -> None:
        self._functor, self._transformers = functor, transformers
        modules = {id(module): module for transformer in transformers for module in transformer.modules()}
        places = [place for module in modules.values() for place in _places(module)]
        self._before = [(place, dict(place)) for place in places]
        self._changes: list[tuple[Place, str, Any, Any]] | None = None  # unknown: all that there are
        self._emptied: tuple[Place, Place] | None = None  # a place that is being put in order, and what belongs there

    def apply(self) -> None:
        """Apply the functor.

        Raises:
            Exception: whatever the functor raises.
        """
        for transformer in self._transformers:
            self._functor.apply(transformer)
        self._changes = _changes(self._before)

    def undo(self) -> None:
        """Undo every change, from wherever that was broken off; but not where others have changed the same since."""
        self._fill()
        for place, name, former, made in _changes(self._before) if self._changes is None else self._changes:
            if place.get(name, _Nothing) is not made:
                continue
            if former is _Nothing:
                del place[name]
            else:
                place[name] = former
        for place, values in self._before:  # restore the order as well: that of the state dict depends on it
            if list(place) != list(values) and place.keys() == values.keys():
                self._emptied = place, {name: place[name] for name in values}
                self._fill()

    def _fill(self) -> None:
        if self._emptied is not None:
            place, content = self._emptied
            place.clear()
            place.update(content)
            self._emptied = None
