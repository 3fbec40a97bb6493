"""The promise of plans: what they draw on pictures that they were not made from."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any, TypeVar

from ..blocks.adapter import BlockAdapter
from ..blocks.cache_target import CacheTarget
from ..blocks.discovery import Blocks
from ..config.cache_plan import CachePlan
from ..config.plan_tiers import PlanTiers
from ..errors import InvalidSetting, RunMismatch, WrongType
from ..handle import dit_cache
from ..recording.image_metrics import Metric, Score, check_metrics, compare, samples_of
from ..recording.rank_broadcast import broadcast_from_rank_0, is_rank_0
from ..user_run import check_run
from ..validation import shown

MEASURES = ("psnr", "psnr_error", "worst", "relative_l1", "ssim", "lpips")
Plans = TypeVar("Plans", CachePlan, PlanTiers)


def promise(
    target: CacheTarget,
    plans: Plans,
    run: Callable[[Any], Any],
    *,
    metrics: Collection[Metric] = ("psnr", "ssim"),
    blocks: Blocks = None,
    scheduler: object = None,
) -> Plans:
    """Measure plans on pictures that they were not made from, and return them with what they promise by that.

    A search has few pictures for it: those of its ``run`` that weights were not fitted on. The mean of eight is good to
    two or three dB, as pictures differ by so much; that of fifty to one. The promise is the mean less its standard
    error, so that more pictures promise more as well. One uncached run is made, and one with each
    plan. How fast the plans are stays what the search has measured.

    Args:
        target: as for :func:`dit_cache`.
        plans: a plan, or tiers.
        run: as for :func:`search`, with other pictures, as many as the promise is to be good for.
        metrics: as for :func:`search`.
        blocks: as for :func:`dit_cache`.
        scheduler: as for :func:`dit_cache`.

    Returns:
        The same plans, with the PSNR, its standard error, relative L1, SSIM and LPIPS of these pictures in their
        provenance.

    Raises:
        TypeError, ValueError: as :func:`dit_cache`; or ``run`` returns nothing that can be compared.
        RuntimeError: a plan draws pictures that are not finite, or ``run`` makes no step of the target.
        ModuleNotFoundError: the package of a metric is not installed.
    """
    measured = check_metrics(metrics)
    if not isinstance(plans, (CachePlan, PlanTiers)):
        raise WrongType(f"plans must be a CachePlan or PlanTiers, not {shown(plans)}")
    run = check_run(run)
    every = plans.plans if isinstance(plans, PlanTiers) else {"": plans}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for plan in every.values():  # before the first run: it may take minutes
            dit_cache(target, plan, blocks=blocks, scheduler=scheduler).remove()
    pipe = target.target if isinstance(target, BlockAdapter) else target
    results = run(pipe)
    reference = samples_of(results) if is_rank_0() else []
    found = {}
    for name, plan in every.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # whoever uses the plan gets its warnings
            with dit_cache(target, plan, blocks=blocks, scheduler=scheduler) as cache:
                results, calls = run(pipe), cache.stats.calls
        if not calls:
            raise InvalidSetting("run made no step of the target: it has to draw with the one that it is given")
        score = broadcast_from_rank_0(compare(samples_of(results), reference, measured) if is_rank_0() else None)
        found[name] = _promised(plan, score, name)
    made: Any = found[""] if isinstance(plans, CachePlan) else PlanTiers(found)
    return made  # type: ignore[no-any-return]


def _promised(plan: CachePlan, score: Score | None, name: str) -> CachePlan:
    assert score is not None
    if score.psnr == -math.inf:
        raise RunMismatch(f"{f'tier {name}' if name else 'the plan'} draws pictures that are not finite")
    given = {each: getattr(score, each) for each in MEASURES}
    return replace(plan, provenance=replace(plan.provenance, **given))
