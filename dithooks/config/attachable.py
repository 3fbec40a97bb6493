"""What a cache can be attached with: a configuration, a plan, or whatever holds or stands for one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

from ..errors import InvalidSetting, MissingFile, WrongType
from ..policies.policy import Policy
from ..validation import shown
from .cache_config import DitCacheConfig
from .cache_plan import CachePlan
from .codec import arguments_of
from .plan_tiers import FORM, PlanTiers
from .safe_json import parsed, read_file

FILES: Mapping[str, type[DitCacheConfig] | type[CachePlan] | type[PlanTiers]] = {
    kind.__name__: kind for kind in (DitCacheConfig, CachePlan, PlanTiers)
}


@runtime_checkable
class HoldsPlans(Protocol):
    """What has found plans, as the result of a search has."""

    @property
    def plans(self) -> PlanTiers: ...


Attachable: TypeAlias = (
    DitCacheConfig | CachePlan | PlanTiers | Policy | HoldsPlans | Mapping[str, Any] | str | os.PathLike[str]
)


def attachable(given: object) -> DitCacheConfig | CachePlan | PlanTiers:
    """Return the configuration, plan or tiers that something is, holds or stands for.

    Args:
        given: one of these; a file of one; the result of a search, for its plans; a policy, for a configuration of all
            blocks with it; or a mapping: of the fields of a configuration, or with a ``"kind"``, as in a file.

    Raises:
        TypeError, ValueError: it is none of these, or one that is invalid.
        OSError: the file cannot be read.

    Example:
        >>> from dithooks import Interval, Linear
        >>> print(attachable(Interval(2, 3)))
        DitCacheConfig(policy=Interval(start=2, interval=3))
        >>> print(attachable({"cache_step_interval": 3, "predictor": Linear()}))
        DitCacheConfig(cache_step_start=0, cache_step_interval=3, predictor=Linear())
    """
    if isinstance(given, (DitCacheConfig, CachePlan, PlanTiers)):
        return given
    if isinstance(given, Policy):
        return DitCacheConfig(policy=given)
    if isinstance(given, (str, os.PathLike)):
        return _from_file(given)
    if isinstance(given, Mapping):
        return _from_mapping(given)
    if isinstance(given, HoldsPlans) and isinstance(plans := given.plans, PlanTiers):
        return next(iter(plans.plans.values())) if len(plans.plans) == 1 else plans
    raise WrongType(
        f"config must be a DitCacheConfig, a CachePlan, a policy such as Threshold(0.1), what search() returned, or "
        f"the path of a .json file, not {shown(given)} ({type(given).__name__})"
    )


def selected(given: object, tier: str | None) -> DitCacheConfig | CachePlan:
    """Return the settings to attach: of tiers, the one that is asked for.

    Raises:
        TypeError, ValueError: as :func:`attachable`; tiers come without ``tier``, or other settings with one; or as
            :meth:`PlanTiers.select`.
        OSError: as :func:`attachable`.
        TargetMissed: as :meth:`PlanTiers.select`.
    """
    config = attachable(given)
    if isinstance(config, PlanTiers):
        if tier is None:
            names = ", ".join(map(shown, config.plans))
            raise InvalidSetting(f"the plans are tiers, {names:.150}: give tier= with one of these, or with {FORM}")
        return config.select(tier)
    if tier is not None:
        raise InvalidSetting(f"tier={shown(tier)} goes with PlanTiers, not with {type(config).__name__}: leave it out")
    return config


def selected_for_request(
    plan: object, tier: str | None, attached: PlanTiers | None
) -> tuple[DitCacheConfig | CachePlan | None, str]:
    """Return the plan of a request, and what messages call it; ``None``: what the cache was attached with.

    Args:
        plan: a plan, tiers, or what stands for them, of its own; ``None``: none.
        tier: which of the tiers.
        attached: the tiers that the cache was attached with, if it was with some.

    Raises:
        TypeError, ValueError: the plan is none, or ``tier`` is none of the tiers, or comes without any.
        TargetMissed: as :meth:`PlanTiers.select`.
    """
    if plan is None and tier is None:
        return None, ""
    given = attached if plan is None else attachable(plan)
    if given is None:
        raise InvalidSetting(
            f"tier={shown(tier)} names one of several plans, and the cache was attached with one: attach it with "
            "PlanTiers, dit_cache(pipe, plans, tier=...), or give the request some: plan=plans"
        )
    chosen = selected(given, tier)
    if not isinstance(given, PlanTiers):
        return chosen, "the request's plan"
    return chosen, f"tier {shown(next(name for name, each in given.plans.items() if each is chosen))}"


def from_text(text: str) -> DitCacheConfig | CachePlan | PlanTiers:
    """Read a file of any kind; one without a kind is read as a plan, whose error names the expected fields.

    Args:
        text: as ``to_json()`` of a plan, tiers or a configuration writes it.

    Raises:
        TypeError, ValueError: it is none of these.

    Example:
        >>> from_text(DitCacheConfig(2, 3).to_json()).cache_step_interval
        3
    """
    data = parsed(text, "CachePlan")
    kind = data.get("kind") if isinstance(data, dict) else None
    return FILES.get(str(kind), CachePlan).from_json(text)


def _from_file(path: str | os.PathLike[str]) -> DitCacheConfig | CachePlan | PlanTiers:
    try:
        return read_file(path, from_text)
    except FileNotFoundError:
        raise MissingFile(
            f"config={shown(os.fspath(path))} is the path of no file: give that of a plan that a search saved, or a "
            "DitCacheConfig"
        ) from None


def _from_mapping(given: Mapping[str, Any]) -> DitCacheConfig | CachePlan | PlanTiers:
    if "kind" not in given:
        return DitCacheConfig(**arguments_of(DitCacheConfig, given, "config"))
    try:
        text = json.dumps(given)
    except (TypeError, ValueError) as error:
        raise WrongType(f"config is a mapping with a kind, as in a file, and not JSON: {error}") from None
    return from_text(text)
