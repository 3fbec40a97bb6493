"""What is to be said of a run in which the cache is of no use, with numbers."""

from __future__ import annotations

import math
from collections import Counter

from ..blocks.block_lists import Expected
from ..policies.history import BranchHistory, RunHistory, Schedule
from ..policies.policy import Policy
from ..policies.reason import Reason
from .call import Run


def hopeless(policy: Policy, schedule: Schedule) -> str | None:
    """How the steps of a run are all computed, whatever is seen in them; ``None`` if one may be reused."""
    assert schedule.steps is not None
    reasons: Counter[str] = Counter()
    for step in range(schedule.first, schedule.steps):
        tracks = [BranchHistory(n, step - 1, run=RunHistory(step - schedule.first)) for n in range(policy.distinct)]
        made = [policy.before(step, track, schedule) for track in tracks]
        open_to_it = any(decision is None or decision.reuse for decision in made)
        if step > schedule.first and open_to_it:
            return None
        reasons[Reason.NO_ANCHOR if made[0] is None or made[0].reuse else made[0].reason] += 1
    told = ", ".join(f"{reason}: {count}" for reason, count in reasons.items())
    warm = getattr(policy, "max_warmup_steps", None) if Reason.WARM_UP in reasons else None
    return told if warm is None else f"{told}, max_warmup_steps is {warm}"


def useless(run: Run, policy: Policy) -> str | None:
    """Of a run that went to its end and reused nothing, why; ``None`` of any other, or if that has been said."""
    if _cut_short(run) or run.steps < 2 or run.reused or run.judged:
        return None
    run.judged = True
    reasons = ", ".join(f"{reason}: {count}" for reason, count in run.reasons.items() if count)
    message = f"a run of {run.steps} steps reused nothing (calls computed for {reasons})"
    finite = [value for value in run.values if math.isfinite(value)]
    why = policy.why_nothing_reused(finite, run.reasons) if finite else str(policy)
    return f"{message}: {why}" if why else message


def unexpected(run: Run, expected: Expected | None, over: bool) -> str | None:
    """How a run that went to its end differs from what was expected; ``None`` of any other.

    ``over`` is whether it is known to have ended, where its schedule does not tell: another one has begun.
    """
    if expected is None or _cut_short(run) or run.steps < 2:
        return None
    found, steps = [], expected.num_inference_steps
    if expected.has_separate_cfg and run.most == 1:
        found.append(f"has_separate_cfg=True, but none of {run.steps} steps made more than one call")
    if expected.has_separate_cfg is False and run.most > 1:
        found.append(f"has_separate_cfg=False, but a step made {run.most} calls: they are told apart all the same")
    made = run.schedule.steps or (run.steps if over or run.steps > (steps or 0) else steps)
    if steps is not None and steps not in (made, run.steps):  # its own, where another transformer makes the others
        found.append(f"num_inference_steps={steps}, but the run had {made}: the run counts")
    return "; ".join(found) or None


def _cut_short(run: Run) -> bool:
    return run.in_flight or (run.schedule.steps is not None and not run.last and not run.finished)
