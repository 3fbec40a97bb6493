"""The ways to cache that ``dithooks compare`` and ``dithooks generate`` run: a plan from a file, or a speed-up."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..blocks.cache_target import CacheTarget
from ..config.attachable import from_text, selected
from ..config.cache_config import DitCacheConfig
from ..config.cache_plan import CachePlan
from ..config.plan_tiers import PlanTiers
from ..config.safe_json import read_file
from ..config.transformer_plan import Payload
from ..demo import load_plan
from ..errors import DitHooksError, UsageError
from ..handle import CacheHandle, dit_cache
from ..policies.budget import Budget
from ..policies.mask import Mask
from ..predictors.polynomial import Linear
from ..stats.step_pictures import step_pictures
from ..stats.types import CacheStats, CallRecord
from ..stats.warning_collector import collect_warnings
from .messages import one_line
from .option_checks import check_speedup

REACHED = 0.85  # of a speed-up, from where on it counts as reached: a run has whole steps


@dataclass(frozen=True)
class CacheSetting:
    """One way to cache, such as ``for_speedup(2.0)``, which is named "live 2x".

    Args:
        name: its name in tables.
        config: as :func:`~dithooks.dit_cache` takes it.
        speedup: the speed-up that it aims at; None if it aims at none.
    """

    name: str
    config: DitCacheConfig | CachePlan
    speedup: float | None = None

    @property
    def steps(self) -> int | None:
        """The number of steps that it was made for; None if it runs with any number."""
        return self.config.made.steps if isinstance(self.config, CachePlan) else None

    def is_missed_by(self, stats: CacheStats) -> bool:
        """Whether a run has reused less than the speed-up that the setting steers to; a plan fixes what it reuses."""
        if self.speedup is None or isinstance(self.config, CachePlan) or not stats.blocks_run:
            return False
        return stats.blocks_total / stats.blocks_run < self.speedup * REACHED

    def missed(self, stats: CacheStats) -> str:
        """The warning that a run has missed the speed-up."""
        fewer = stats.blocks_total / stats.blocks_run
        return f"target {self.speedup:g}x was not reached: {self.name} ran {fewer:.2f} times fewer blocks"

    def to_dict(self) -> dict[str, Any]:
        """The setting, fit for JSON."""
        numbers: dict[str, Any] = {"name": self.name, "target": self.speedup}
        if not isinstance(self.config, CachePlan):
            numbers |= {"policy": "+".join(str(each.when) for each in self.config.ranges)}
            numbers |= {"predictor": "+".join(str(each.predictor) for each in self.config.ranges)}
            return numbers | {"payload": self.config.payload}
        origin = self.config.provenance
        plan = {"steps": "+".join(piece.picture for piece in self.config.pieces), "date": origin.date}
        plan |= {"payload": "+".join(piece.payload for piece in self.config.pieces)}
        return numbers | {"plan": plan | {"predicted_speedup": origin.predicted_speedup, "found": origin.method}}


def from_file(name: str, shipped: bool = False, tier: str | None = None) -> CacheSetting:
    """A plan or a configuration from a file.

    Args:
        name: the file's path; with ``shipped``, or the name of a plan that ships for the demo.
        shipped: whether it is for the demo's pipeline.
        tier: of several plans in the file, which one, as for :func:`~dithooks.dit_cache`.

    Raises:
        UsageError: the file does not exist, cannot be read, or holds neither a plan nor a configuration; or it holds
            tiers, none of which is asked for, or no such tier.
    """
    found = _found(name, shipped)
    if tier is None and isinstance(found, PlanTiers):
        raise UsageError(f"{name} holds the tiers {', '.join(found.plans)}: give one of them with --tier")
    try:
        config = selected(found, tier)
    except DitHooksError as error:
        raise UsageError(f"{name}: {error}") from error
    return _setting(name, config)


def all_from_file(name: str, shipped: bool = False) -> list[CacheSetting]:
    """The plan or configuration from a file, or each of the tiers in it; arguments and errors as :func:`from_file`."""
    found = _found(name, shipped)
    if not isinstance(found, PlanTiers):
        return [_setting(name, found)]
    return [
        replace(setting, name=f"{setting.name} {tier}")
        for tier, plan in found.plans.items()
        for setting in (_setting(name, plan),)
    ]


def _found(name: str, shipped: bool) -> DitCacheConfig | CachePlan | PlanTiers:
    try:
        if shipped and not Path(name).is_file():
            return load_plan(name)
        return read_file(name, from_text)
    except FileNotFoundError as error:
        raise UsageError(
            str(error) if shipped else f"there is no file {name}: give a plan that a search wrote"
        ) from None
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(str(error)) from error


def _setting(name: str, config: DitCacheConfig | CachePlan) -> CacheSetting:
    speedup = config.provenance.target if isinstance(config, CachePlan) else None
    return CacheSetting(f"plan {Path(name).name.removesuffix('.json')}", config, speedup)


def for_speedup(speedup: float, payload: Payload = "residual") -> CacheSetting:
    """A policy that steers to a speed-up during the run, by the change from step to step.

    Args:
        speedup: the target that is steered to, in blocks that run.
        payload: the tensors to forecast, as for :class:`~dithooks.DitCacheConfig`.

    Raises:
        UsageError: the number is no speed-up.
    """
    check_speedup(speedup)
    config = DitCacheConfig(policy=Budget(speedup), predictor=Linear(), payload=payload)
    return CacheSetting(f"live {speedup:g}x{_named(payload)}", config, speedup)


def evenly_spread(speedup: float, steps: int, payload: Payload = "residual") -> CacheSetting:
    """A fixed mask for a speed-up, whose computed steps are evenly spread over the run.

    Args:
        speedup: times fewer blocks that run.
        steps: of the run.
        payload: the tensors to forecast, as for :class:`~dithooks.DitCacheConfig`.

    Raises:
        UsageError: the number is no speed-up.

    Example:
        >>> evenly_spread(2.5, 10).config.when.steps
        (1, 0, 0, 1, 0, 1, 0, 0, 1, 0)
    """
    check_speedup(speedup)
    computed = min(steps, max(1, math.floor(steps / speedup + 0.5)))
    chosen = {math.floor(k * steps / computed + 0.5) for k in range(computed)}
    mask = Mask(tuple(int(step in chosen) for step in range(steps)))
    config = DitCacheConfig(policy=mask, predictor=Linear(), payload=payload)
    return CacheSetting(f"spread {speedup:g}x{_named(payload)}", config, speedup)


def numbered(settings: Sequence[CacheSetting]) -> list[CacheSetting]:
    """The settings, with a number added to each name that occurs more than once: "plan a #1", "plan a #2"."""
    names = [setting.name for setting in settings]
    return [
        replace(setting, name=f"{setting.name} #{names[: n + 1].count(setting.name)}")
        if names.count(setting.name) > 1
        else setting
        for n, setting in enumerate(settings)
    ]


@contextmanager
def cached(
    target: CacheTarget, setting: CacheSetting, remarks: list[str], verify: bool = True
) -> Iterator[CacheHandle]:
    """Attach a setting for as long as the block lasts, and append the cache's warnings to ``remarks``.

    Raises:
        DitHooksError: as :func:`~dithooks.dit_cache`, such as for a plan that was made for another model.
        UsageError: as :func:`~dithooks.cli.messages.one_line`.
    """
    with collect_warnings(remarks), one_line(), dit_cache(target, setting.config, verify=verify) as handle:
        yield handle


def summary(decisions: Sequence[CallRecord], run: int | None = None) -> dict[str, Any]:
    """Decisions, fit for JSON: how often for which reason, and the steps of each range, ● computed, ○ reused.

    A step of which one branch was computed and another reused is ◐.

    Args:
        decisions: of a handle.
        run: the number of the run to summarise; None for all.
    """
    chosen = [record for record in decisions if run is None or record.run == run]
    return {"reasons": dict(Counter(record.reason for record in chosen)), "steps": step_pictures(chosen)}


def _named(payload: Payload) -> str:
    """The suffix of the name of a setting."""
    return "" if payload == "residual" else f", {payload}"
