"""What a file of plans may hold: a plan, several tiers, or a configuration."""

from __future__ import annotations

from .cache_config import DitCacheConfig
from .cache_plan import CachePlan
from .plan_tiers import PlanTiers
from .safe_json import parsed

KINDS = {"CachePlan": CachePlan, "DitCacheConfig": DitCacheConfig, "PlanTiers": PlanTiers}


def plan_from_json(text: str) -> DitCacheConfig | CachePlan | PlanTiers:
    """Read a plan, tiers or a configuration from JSON, whichever it is.

    Args:
        text: as their ``to_json()`` writes it.

    Raises:
        TypeError, ValueError: it is none of these.

    Example:
        >>> plan_from_json(DitCacheConfig(2, 3).to_json()).cache_step_interval
        3
    """
    data = parsed(text, "CachePlan")
    kind = data.get("kind") if isinstance(data, dict) else None
    return KINDS[kind if kind in KINDS else "CachePlan"].from_json(text)  # type: ignore[attr-defined, no-any-return]
