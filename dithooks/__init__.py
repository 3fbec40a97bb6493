"""Faster sampling with diffusion transformers, without training: skip what hardly changes from step to step."""

from .clock import timestep_scope
from .config import DitCacheConfig
from .handle import CacheHandle, dit_cache
from .stats import CacheStats

__all__ = ["CacheHandle", "CacheStats", "DitCacheConfig", "__version__", "dit_cache", "timestep_scope"]
__version__ = "0.1.0"
