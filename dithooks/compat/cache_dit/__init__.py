"""cache-dit's names on this library's engine: ``import dithooks.compat.cache_dit as cache_dit``.

Written for code that used cache-dit (version 1.5.3); only the import changes. What differs is in ``docs/migration.md``.
"""

from ...blocks.pattern import ForwardPattern
from .adapters import BlockAdapter, BlockAdapterRegistry
from .configs import BasicCacheConfig, CacheType, CalibratorConfig, DBCacheConfig, TaylorSeerCalibratorConfig
from .enable import disable_cache, enable_cache, refresh_context
from .functors import PatchFunctor
from .loading import load_cache_config, load_configs
from .masks import steps_mask
from .modifiers import ParamsModifier
from .summary import CacheStats, strify, summary

BlockAdapterRegister = BlockAdapterRegistry
NONE, DBCache = CacheType.NONE, CacheType.DBCache
Pattern_0, Pattern_1, Pattern_2, Pattern_3, Pattern_4, Pattern_5 = ForwardPattern

__all__ = [
    "BasicCacheConfig",
    "BlockAdapter",
    "BlockAdapterRegister",
    "BlockAdapterRegistry",
    "CacheStats",
    "CacheType",
    "CalibratorConfig",
    "DBCacheConfig",
    "ForwardPattern",
    "ParamsModifier",
    "PatchFunctor",
    "TaylorSeerCalibratorConfig",
    "disable_cache",
    "enable_cache",
    "load_cache_config",
    "load_configs",
    "refresh_context",
    "steps_mask",
    "strify",
    "summary",
]
