"""cache-dit's names on this library's engine: ``import dithooks.compat.cache_dit as cache_dit``.

Written for code that used cache-dit (version 1.5.3); only the import changes. What differs is in ``docs/migration.md``.
Its submodules, such as ``cache_dit.caching.block_adapters``, are names of this module.
"""

import sys
from logging import getLogger
from typing import Any

from . import functors
from .absent_names import ABSENT_NAMES
from .adapters import BlockAdapter, BlockAdapterRegistry
from .configs import BasicCacheConfig, CacheType, CalibratorConfig, DBCacheConfig, TaylorSeerCalibratorConfig
from .enable import disable_cache, enable_cache, refresh_context
from .forward_pattern import ForwardPattern
from .functors import PatchFunctor
from .loading import load_cache_config, load_configs
from .masks import steps_mask
from .modifiers import ParamsModifier
from .platforms import set_compile_configs
from .summary import CacheStats, strify, summary

__version__ = "1.5.3"  # of cache-dit: for code that asks whether a name is there yet
version_tuple = (1, 5, 3)

BlockAdapterRegister = BlockAdapterRegistry
NONE, DBCache, DBPrune = CacheType
Pattern_0, Pattern_1, Pattern_2, Pattern_3, Pattern_4, Pattern_5 = ForwardPattern
get_adapter, supported_pipelines = BlockAdapterRegistry.get_adapter, BlockAdapterRegistry.supported_pipelines
init_logger, load_options = getLogger, load_configs

_HERE = (
    *("attention", "cache_factory", "caching", "compile", "distributed", "envs", "generate", "kernels", "logger"),
    *("metrics", "offload", "parallelism", "profiler", "quantization"),
    *("caching.block_adapters", "caching.cache_adapters", "caching.cache_adapters.cache_adapter"),
    *("caching.cache_blocks", "caching.cache_blocks.pattern_0_1_2", "caching.cache_blocks.pattern_3_4_5"),
    *("caching.cache_contexts", "caching.cache_contexts.cache_manager", "caching.cache_contexts.calibrators"),
    *("caching.forward_pattern", "caching.load_configs"),
)
_SUBMODULES = dict.fromkeys(_HERE, sys.modules[__name__]) | dict.fromkeys(
    ("cache_factory.patch_functors", "caching.patch_functors"), functors
)
sys.modules.update({f"{__name__}.{path}": module for path, module in _SUBMODULES.items()})

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
    "get_adapter",
    "load_cache_config",
    "load_configs",
    "load_options",
    "refresh_context",
    "set_compile_configs",
    "steps_mask",
    "strify",
    "summary",
    "supported_pipelines",
]


def __getattr__(name: str) -> Any:
    """Return a submodule, or, for a name that is not here, what says what to take instead."""
    if name in ABSENT_NAMES:
        return ABSENT_NAMES[name]
    for path, module in _SUBMODULES.items():
        if path.rpartition(".")[2] == name:
            return module
    raise AttributeError(f"{__name__} has no {name}")
