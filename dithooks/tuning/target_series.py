"""Several targets of one search: each is searched for in turn, from one recorded run."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ..config.cache_plan import CachePlan
from ..config.plan_tiers import MOST, NAME, target_name
from ..errors import InvalidSetting, TargetMissed, WrongType
from ..planning.plan import check_target_speedup
from ..stats.user_warning import warn_user
from ..validation import check_text, shown
from .result import SearchResult
from .trial_driver import PlanRunner


def check_targets(targets: object, target_psnr: float | None) -> dict[str, float] | None:
    """Return the speed-ups that are searched for, by the names of their tiers; ``None``: there is one target.

    Raises:
        TypeError, ValueError: a target is no speed-up, or stands there twice; a name cannot be one; there are none, or
            too many; or a PSNR is asked for, too.

    Example:
        >>> check_targets((3, 1.5), None), check_targets({"high": 1.5}, None)
        ({'3x': 3.0, '1.5x': 1.5}, {'high': 1.5})
    """
    if targets is None:
        return None
    if isinstance(targets, str) or not isinstance(targets, (Mapping, Sequence)):
        raise WrongType(f"targets must be speed-ups such as (1.5, 2, 3), or a mapping to them, not {shown(targets)}")
    if target_psnr is not None:
        raise InvalidSetting("target_psnr goes without targets: it asks for one plan, the fastest that is good enough")
    if not 1 <= len(targets) <= MOST:
        raise InvalidSetting(f"targets has {len(targets)} speed-ups: give 1 to {MOST}")
    if isinstance(targets, Mapping):
        goals = {name: check_target_speedup(goal) for name, goal in targets.items()}
    else:
        goals = {target_name(check_target_speedup(goal)): float(goal) for goal in targets}
        if len(goals) < len(targets):
            raise InvalidSetting(f"targets={shown(list(targets))} has a speed-up twice: give each once")
    for name in goals:
        if not re.fullmatch(NAME, check_text("the name of a target", name)):
            raise InvalidSetting(f"{shown(name)} cannot name a tier: give at most 40 letters, digits, spaces or .+-×%")
    return goals


def tiers_of(
    search: Callable[[float, CachePlan | None], SearchResult],
    goals: Mapping[str, float],
    spent: float,
    runner: PlanRunner,
) -> SearchResult:
    """Search for each target, and return all that was found as one result.

    All plans leave out the same blocks, with the same payload, so that rows of one batch may have any of them. The
    highest speed-up comes first and settles which: what saves enough for it does for all, and where most is reused, the
    choice counts most.

    Args:
        search: the search for one speed-up, from a recording that is there; given a plan, of plans like it.
        goals: speed-ups by name.
        spent: block executions of the uncached runs, over those of one, which each search counts as its own.
        runner: what runs the plans of all of them; what it has run for nothing is counted on and on.

    Raises:
        TargetMissed: no target could be reached at the least PSNR.

    Warns:
        UserWarning: one of several could not; its tier is left out.
    """
    found: dict[str, SearchResult] = {}
    missed: list[TargetMissed] = []
    total, first = spent + runner.unused_run_equivalents, None
    for name, goal in sorted(goals.items(), key=lambda item: -item[1]):
        before = spent + runner.unused_run_equivalents
        try:
            found[name] = search(goal, first)
        except TargetMissed as error:
            missed.append(error)
            if len(missed) == len(goals):
                raise
            warn_user(f"tier {name} is left out: {error}")
            continue
        total += found[name].run_equivalents - before
        first = first or found[name].plan
        if found[name].interrupted:
            break
    found = {name: found[name] for name in goals if name in found}
    results = list(found.values())
    return replace(
        results[0],
        reached=not missed and len(found) == len(goals) and all(each.reached for each in results),
        evaluations=tuple(evaluation for each in results for evaluation in each.evaluations),
        run_equivalents=total,
        reused_runs=sum(each.reused_runs for each in results),
        seconds=max(each.seconds for each in results),
        interrupted=any(each.interrupted for each in results),
        tiers=found,
    )
