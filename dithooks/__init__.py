"""Faster sampling with diffusion transformers, without training: skip what hardly changes from step to step."""

from .blocks.adapter import BlockAdapter
from .blocks.block_io import PatchFunctor
from .blocks.pattern import ForwardPattern
from .blocks.registry import BlockAdapterRegistry
from .config.cache_config import DitCacheConfig
from .config.cache_plan import CachePlan
from .engine.sessions import timestep_scope
from .handle import CacheHandle, dit_cache
from .planning.plan import frontier, plan
from .policies.budget import Budget
from .policies.easycache import EasyCache
from .policies.interval import Interval
from .policies.magnitude import MagnitudeRatio
from .policies.mask import Mask
from .policies.threshold import Threshold
from .policies.uncached import Uncached
from .predictors.fitted import Fitted
from .predictors.polynomial import Linear, Reuse, Taylor
from .profiling.profile import Profile, profile
from .recording.record import record
from .recording.recording import Recording
from .stats.types import BranchStats, CachedRange, CacheStats, CallRecord, Quantiles, RunStats
from .tuning.result import SearchResult
from .tuning.search import search

__all__ = [
    "BlockAdapter",
    "BlockAdapterRegistry",
    "BranchStats",
    "Budget",
    "CacheHandle",
    "CachePlan",
    "CacheStats",
    "CachedRange",
    "CallRecord",
    "DitCacheConfig",
    "EasyCache",
    "Fitted",
    "ForwardPattern",
    "Interval",
    "Linear",
    "MagnitudeRatio",
    "Mask",
    "PatchFunctor",
    "Profile",
    "Quantiles",
    "Recording",
    "Reuse",
    "RunStats",
    "SearchResult",
    "Taylor",
    "Threshold",
    "Uncached",
    "__version__",
    "dit_cache",
    "frontier",
    "plan",
    "profile",
    "record",
    "search",
    "timestep_scope",
]
__version__ = "0.1.0"
