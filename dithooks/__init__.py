"""Faster sampling with diffusion transformers, without training: skip what hardly changes from step to step.

``dithooks.plot``, ``dithooks.ray``, ``dithooks.compat`` and ``dithooks.demo`` are imported when they are first used.
"""

from importlib import import_module
from types import ModuleType

from .blocks.adapter import BlockAdapter
from .blocks.block_io import PatchFunctor
from .blocks.pattern import ForwardPattern
from .blocks.registry import BlockAdapterRegistry
from .config.cache_config import DitCacheConfig
from .config.cache_plan import CachePlan
from .config.plan_tiers import PlanTiers
from .engine.requests import Request
from .engine.row import Row
from .engine.sessions import timestep_scope
from .engine.steps_loop import steps
from .errors import (
    DitHooksError,
    DitHooksWarning,
    InvalidSetting,
    RankMismatch,
    RunMismatch,
    TargetMissed,
    WiringError,
    WrongType,
)
from .handle import CacheHandle, detach, dit_cache, handle_of
from .planning.plan import frontier, plan
from .policies.budget import Budget
from .policies.easycache import EasyCache
from .policies.history import BranchHistory, Decision, RunHistory, Schedule
from .policies.interval import Interval
from .policies.magnitude import MagnitudeRatio
from .policies.mask import Mask
from .policies.policy import Policy
from .policies.reason import Reason
from .policies.threshold import Threshold
from .policies.uncached import Uncached
from .predictors.fitted import Fitted
from .predictors.polynomial import Linear, Reuse, Taylor
from .predictors.predictor import Moment, Predictor
from .profiling.profile import Profile, profile
from .recording.record import record
from .recording.recording import Recording
from .sharing.push import push_to_hub
from .stats.types import BranchStats, CachedRange, CacheStats, CallRecord, Quantiles, RunStats
from .tuning.evaluation import Evaluation
from .tuning.promise import promise
from .tuning.result import SearchResult
from .tuning.search import search

__all__ = [
    "BlockAdapter",
    "BlockAdapterRegistry",
    "BranchHistory",
    "BranchStats",
    "Budget",
    "CacheHandle",
    "CachePlan",
    "CacheStats",
    "CachedRange",
    "CallRecord",
    "Decision",
    "DitCacheConfig",
    "DitHooksError",
    "DitHooksWarning",
    "EasyCache",
    "Evaluation",
    "Fitted",
    "ForwardPattern",
    "Interval",
    "InvalidSetting",
    "Linear",
    "MagnitudeRatio",
    "Mask",
    "Moment",
    "PatchFunctor",
    "PlanTiers",
    "Policy",
    "Predictor",
    "Profile",
    "Quantiles",
    "RankMismatch",
    "Reason",
    "Recording",
    "Request",
    "Reuse",
    "Row",
    "RunHistory",
    "RunMismatch",
    "RunStats",
    "Schedule",
    "SearchResult",
    "TargetMissed",
    "Taylor",
    "Threshold",
    "Uncached",
    "WiringError",
    "WrongType",
    "__version__",
    "detach",
    "dit_cache",
    "frontier",
    "handle_of",
    "plan",
    "profile",
    "promise",
    "push_to_hub",
    "record",
    "search",
    "steps",
    "timestep_scope",
]
__version__ = "0.1.0"
ROOMS = ("compat", "demo", "plot", "ray")  # that take time, or further packages, to import


def __getattr__(name: str) -> ModuleType:
    if name in ROOMS:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*__all__, *ROOMS])
