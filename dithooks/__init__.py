"""Faster sampling with diffusion transformers, without training: skip what hardly changes from step to step.

PyTorch, and with it the rest of the package, is imported when a public name is first used, and not before: the
``dithooks`` command has to answer where PyTorch cannot be imported. ``dithooks.plot``, ``dithooks.ray``,
``dithooks.compat`` and ``dithooks.demo``, which need more than that, are imported one by one.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import plot as plot
    from .public_names import *

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


if not TYPE_CHECKING:  # which would take any name for one of the package

    def __getattr__(name: str) -> Any:
        if name in ROOMS:
            return import_module(f".{name}", __name__)
        if name in __all__:
            names = vars(import_module(".public_names", __name__))
            globals().update({each: names[each] for each in __all__ if each in names and each not in globals()})
            if name in names:  # while it is being imported, not all are there
                return names[name]
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*__all__, *ROOMS])
