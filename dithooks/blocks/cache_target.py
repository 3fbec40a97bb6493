"""The targets of a cache, for type checkers: what holds a diffusion transformer, or is one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from .adapter import BlockAdapter


class HasFromPretrained(Protocol):
    """A pipeline of diffusers, of which mypy sees no more than this: it takes the class's placeholder for the class."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any: ...


class HasComponents(Protocol):
    """A pipeline that lists its parts, as those of diffusers do."""

    @property
    def components(self) -> Mapping[str, Any]: ...


class HasTransformer(Protocol):
    """A pipeline with a transformer."""

    @property
    def transformer(self) -> Any: ...


class HasDit(Protocol):
    """A pipeline that calls its transformer ``dit``."""

    @property
    def dit(self) -> Any: ...


class HasUnet(Protocol):
    """A pipeline with a U-Net."""

    @property
    def unet(self) -> Any: ...


class HasModel(Protocol):
    """A sampler that calls its transformer ``model``."""

    @property
    def model(self) -> Any: ...


CacheTarget = (
    nn.Module | BlockAdapter | HasFromPretrained | HasComponents | HasTransformer | HasDit | HasUnet | HasModel
)
