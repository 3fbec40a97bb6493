"""The plans of a server, and which of them a request is drawn with."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ...blocks.block_lists import fingerprint
from ...config.attachable import from_text
from ...config.cache_config import DitCacheConfig
from ...config.cache_plan import CachePlan
from ...config.plan_tiers import PlanTiers, speed_of
from ...config.safe_json import read_file
from ...engine.payloads import chains_for
from ...errors import InvalidSetting
from ...validation import shown

PLAN, TIER, OFF = "DITHOOKS_PLAN", "DITHOOKS_TIER", "off"  # two variables of the environment, and a word


@dataclass(frozen=True)
class ServedPlans:
    """One configuration, or tiers of plans, and what holds for a request that asks for nothing.

    Requests name tiers, never files: what a server reads is up to whoever has started it.

    Args:
        plans: the tiers, of which one may be all; or a configuration.
        tier: of a request that names none; ``"off"``: such a request is not cached. Left out, the only one there is,
            and ``"off"`` where there are several.

    Raises:
        ValueError: there is no such tier.

    Example:
        >>> plans = ServedPlans(DitCacheConfig(1, 2))
        >>> plans.choose(None) is plans.choose(True) is plans.plans, plans.choose(False)
        (True, None)
    """

    plans: DitCacheConfig | PlanTiers
    tier: str | None = None

    def __post_init__(self) -> None:
        self.choose(None)

    @classmethod
    def from_environment(cls) -> ServedPlans | None:
        """Read the file that ``DITHOOKS_PLAN`` names, and the tier in ``DITHOOKS_TIER``; ``None`` without the former.

        Raises:
            OSError: the file cannot be read.
            TypeError, ValueError: it holds neither plans nor a configuration, or there is no such tier.
        """
        path = os.environ.get(PLAN)
        return cls.load(path, os.environ.get(TIER) or None) if path else None

    @classmethod
    def load(cls, path: str | os.PathLike[str], tier: str | None = None) -> ServedPlans:
        """Read a file with a plan, tiers or a configuration; errors as of :meth:`from_environment`."""
        return cls(read_file(path, _tiers_or_config), tier)

    def choose(self, asked: object) -> DitCacheConfig | CachePlan | None:
        """Return the plan for what a request asks for; ``None``: it is drawn without a cache.

        Args:
            asked: a tier, as for :meth:`PlanTiers.select`, or ``True``: the server's own; ``False`` or ``"off"``: no
                cache; ``None``: nothing is asked for.

        Raises:
            ValueError: there is no such tier, or several and none is the server's own.
            TargetMissed: none promises what is asked for.
        """
        if asked is False or asked == OFF:
            return None
        if isinstance(asked, str):
            return self._named(asked)
        if asked is not None and asked is not True:
            raise InvalidSetting(f"dithooks={shown(asked)}: give a tier, true for the server's own, or false for none")
        if self.tier is not None:
            return None if self.tier == OFF else self._named(self.tier)
        if isinstance(self.plans, DitCacheConfig):
            return self.plans
        if len(self.plans.plans) == 1:
            return next(iter(self.plans.plans.values()))
        if asked is True:
            raise InvalidSetting(f"dithooks=true: there are several tiers, {', '.join(map(shown, self.plans.plans))}")
        return None

    def choose_for_batch(self, asked: Iterable[object]) -> DitCacheConfig | CachePlan | None:
        """Return one plan for several requests, with which none is drawn worse than it asks: of theirs the slowest.

        Raises:
            ValueError, TargetMissed: as :meth:`choose`, for one of them.
        """
        chosen = [self.choose(each) for each in asked]
        plans = [plan for plan in chosen if isinstance(plan, CachePlan)]
        if None in chosen or not chosen:
            return None
        return min(plans, key=speed_of) if plans else chosen[0]

    @property
    def slowest(self) -> DitCacheConfig | CachePlan:
        """The slowest tier, or the configuration."""
        return self.plans if isinstance(self.plans, DitCacheConfig) else next(iter(self.plans.plans.values()))

    def _named(self, tier: str) -> DitCacheConfig | CachePlan:
        if isinstance(self.plans, PlanTiers):
            return self.plans.select(tier)
        raise InvalidSetting(f"there is no tier {shown(tier)}: the server has one configuration, which has no name")


def plan_for(plan: DitCacheConfig | CachePlan, target: object) -> DitCacheConfig | CachePlan:
    """Return a plan that was made in diffusers for a server's own class of the same model; any other as it is.

    Servers rewrite the models, under the names that they have in diffusers and with the same blocks. So a plan is
    taken over where class and number of blocks are the same. It holds for the same weights.
    """
    if not isinstance(plan, CachePlan):
        return plan
    chains = [chain for chain, _ in chains_for(plan, target, None, frozenset())]
    made, here = plan.made, fingerprint(chains)
    model, blocks = (
        "+".join(type(chain.owner).__name__ for chain in chains),
        sum(len(each.block_refs) for each in chains),
    )
    if made.fingerprint == here or (made.model, made.blocks) != (model, blocks):
        return plan
    return replace(plan, made=replace(made, fingerprint=here))


def _tiers_or_config(text: str) -> DitCacheConfig | PlanTiers:
    plans = from_text(text)
    return PlanTiers.from_json(text) if isinstance(plans, CachePlan) else plans
