"""Functors of cache-dit, which rewrite a model before its blocks are cached: applied, and taken back again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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


def patched(functor: PatchFunctor, transformers: Iterable[nn.Module]) -> Callable[[], None]:
    """Apply a functor; returns what takes back all attributes that it has set on a module.

    Raises:
        Exception: whatever the functor raises; then everything is as it was.
    """
    modules = [module for transformer in transformers for module in transformer.modules()]
    before = [(module, dict(vars(module))) for module in {id(module): module for module in modules}.values()]

    def restore() -> None:
        for module, values in before:
            here = vars(module)
            for name in [name for name in here if name not in values]:
                del here[name]
            here.update(values)

    try:
        for transformer in transformers:
            functor.apply(transformer)
    except BaseException:
        restore()
        raise
    return restore
