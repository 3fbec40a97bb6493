"""All public names, imported from where they are: what ``dithooks`` hands out when one of them is first asked for."""

from .blocks.adapter import BlockAdapter as BlockAdapter
from .blocks.block_io import PatchFunctor as PatchFunctor
from .blocks.pattern import ForwardPattern as ForwardPattern
from .blocks.registry import BlockAdapterRegistry as BlockAdapterRegistry
from .config.cache_config import DitCacheConfig as DitCacheConfig
from .config.cache_plan import CachePlan as CachePlan
from .config.plan_tiers import PlanTiers as PlanTiers
from .engine.requests import Request as Request
from .engine.row import Row as Row
from .engine.sessions import timestep_scope as timestep_scope
from .engine.steps_loop import steps as steps
from .errors import (
    DitHooksError as DitHooksError,
    DitHooksWarning as DitHooksWarning,
    InvalidSetting as InvalidSetting,
    RankMismatch as RankMismatch,
    RunMismatch as RunMismatch,
    TargetMissed as TargetMissed,
    WiringError as WiringError,
    WrongType as WrongType,
)
from .handle import CacheHandle as CacheHandle, detach as detach, dit_cache as dit_cache, handle_of as handle_of
from .planning.plan import frontier as frontier, plan as plan
from .policies.budget import Budget as Budget
from .policies.easycache import EasyCache as EasyCache
from .policies.history import (
    BranchHistory as BranchHistory,
    Decision as Decision,
    RunHistory as RunHistory,
    Schedule as Schedule,
)
from .policies.interval import Interval as Interval
from .policies.magnitude import MagnitudeRatio as MagnitudeRatio
from .policies.mask import Mask as Mask
from .policies.policy import Policy as Policy
from .policies.reason import Reason as Reason
from .policies.threshold import Threshold as Threshold
from .policies.uncached import Uncached as Uncached
from .predictors.fitted import Fitted as Fitted
from .predictors.polynomial import Linear as Linear, Reuse as Reuse, Taylor as Taylor
from .predictors.predictor import Moment as Moment, Predictor as Predictor
from .profiling.profile import Profile as Profile, profile as profile
from .recording.record import record as record
from .recording.recording import Recording as Recording
from .sharing.push import push_to_hub as push_to_hub
from .stats.types import (
    BranchStats as BranchStats,
    CachedRange as CachedRange,
    CacheStats as CacheStats,
    CallRecord as CallRecord,
    Quantiles as Quantiles,
    RunStats as RunStats,
)
from .tuning.evaluation import Evaluation as Evaluation
from .tuning.promise import promise as promise
from .tuning.result import SearchResult as SearchResult
from .tuning.search import search as search
