"""Faster sampling with diffusion transformers, without training: skip what hardly changes from step to step."""

from .blocks.adapter import BlockAdapter, BlockAdapterRegistry
from .blocks.pattern import ForwardPattern
from .blocks.ports import PatchFunctor
from .clock import timestep_scope
from .config import DitCacheConfig
from .handle import CacheHandle, dit_cache
from .stats import CacheStats

__all__ = [
    "BlockAdapter",
    "BlockAdapterRegistry",
    "CacheHandle",
    "CacheStats",
    "DitCacheConfig",
    "ForwardPattern",
    "PatchFunctor",
    "__version__",
    "dit_cache",
    "timestep_scope",
]
__version__ = "0.1.0"
