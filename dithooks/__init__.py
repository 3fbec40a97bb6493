"""Faster sampling with diffusion transformers, without training: skip what hardly changes from step to step."""

from .blocks.adapter import BlockAdapter
from .blocks.pattern import ForwardPattern
from .blocks.ports import PatchFunctor
from .blocks.registry import BlockAdapterRegistry
from .cache_plan import CachePlan
from .config import DitCacheConfig
from .handle import CacheHandle, dit_cache
from .policy.budget import Budget
from .policy.easycache import EasyCache
from .policy.interval import Interval
from .policy.magnitude import MagnitudeRatio
from .policy.mask import Mask
from .policy.threshold import Threshold
from .predictor import Fitted, Linear, Reuse, Taylor
from .report.profile import Profile, profile
from .scope import timestep_scope
from .search.plans import frontier, plan
from .search.record import record
from .search.recording import Recording
from .search.result import SearchResult
from .search.search import search
from .stats import BranchStats, CachedRange, CacheStats, RunStats, Settled, Spread

__all__ = [
    "BlockAdapter",
    "BlockAdapterRegistry",
    "BranchStats",
    "Budget",
    "CacheHandle",
    "CachePlan",
    "CacheStats",
    "CachedRange",
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
    "Recording",
    "Reuse",
    "RunStats",
    "SearchResult",
    "Settled",
    "Spread",
    "Taylor",
    "Threshold",
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
