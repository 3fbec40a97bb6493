"""Adapter layers as PEFT has them: which are active, how strong, merged or not."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import repeat
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

_OWN = attrgetter("__dict__")


class PeftAdapters:
    """Watches the strength of a model's adapter layers.

    It runs at every call, over hundreds of layers: hence the instances' dictionaries are compared in C with copies, and
    read one by one only where they differ.
    """

    listing = "peft_config"

    def __init__(self) -> None:
        self._layers: list[weakref.ref[nn.Module]] = []
        self._tensors = False  # whether the strength of one is a tensor, which does not compare by value
        self._copied: list[list[Any]] = []
        self._strengths: list[Any] = []

    def find(self, layers: Sequence[nn.Module]) -> bool:
        """Look for adapters among the layers of a model; return whether there are any."""
        adapters = [layer for layer in layers if "_active_adapter" in vars(layer)]
        strengths = [each for layer in adapters for each in tuple((vars(layer).get("scaling") or {}).values())]
        self._tensors = any(isinstance(each, Tensor) for each in strengths)
        self._layers, self._copied = [weakref.ref(layer) for layer in adapters], []
        return bool(adapters)

    def strengths(self) -> list[Any]:
        """Return what the adapters do, one after another, and ``None`` for each that does nothing.

        Raises:
            AttributeError: a layer is gone.
        """
        owns = list(map(_OWN, map(weakref.ref.__call__, self._layers)))
        now = [
            list(map(dict.get, owns, repeat("_active_adapter"))),
            list(map(dict.get, owns, repeat("scaling"))),
            list(map(dict.get, owns, repeat("merged_adapters"))),
            list(map(dict.get, owns, repeat("_disable_adapters"))),
        ]
        if self._tensors or now != self._copied:
            self._strengths = [each for layer in zip(*now, strict=True) for each in _strength(*layer)]
            self._copied = [[_copy(each) for each in column] for column in now]
        if not self._tensors:
            return self._strengths
        return [(id(each), each._version) if isinstance(each, Tensor) else each for each in self._strengths]


def _strength(active: Any, scaling: Any, merged: Any, disabled: Any) -> list[Any]:
    """Return what one layer does."""
    if disabled and not merged:
        return [None]
    names = (active,) if isinstance(active, str) else active
    return [*names, *(map(scaling.get, names) if scaling else ()), *(merged or ()), disabled]


def _copy(value: Any) -> Any:
    return value.copy() if isinstance(value, (dict, list, set)) else value
