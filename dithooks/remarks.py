"""What is to be said of a run in which the cache is of no use, with numbers."""

from __future__ import annotations

import math
from collections import Counter

from .policy.base import Policy, Schedule, Track
from .state import Run


def hopeless(policy: Policy, schedule: Schedule) -> str | None:
    """How the steps of a run are all computed, whatever is seen in them; ``None`` if one may be reused."""
    assert schedule.steps is not None
    reasons: Counter[str] = Counter()
    for step in range(schedule.first, schedule.steps):
        decision = policy.before(step, Track(refreshed=step - 1, computed=step - schedule.first), schedule)
        if step > schedule.first and (decision is None or decision.reuse):
            return None
        reasons["no anchor" if decision is None or decision.reuse else decision.reason] += 1
    return ", ".join(f"{reason}: {count}" for reason, count in reasons.items())


def useless(run: Run, policy: Policy) -> str | None:
    """Of a run that went to its end and reused nothing, why; ``None`` of any other, or if that has been said."""
    cut_short = run.in_flight or (run.schedule.steps is not None and not run.last)
    if cut_short or run.steps < 2 or run.reused or run.judged:
        return None
    run.judged = True
    reasons = ", ".join(f"{reason}: {count}" for reason, count in run.reasons.items() if count)
    message = f"a run of {run.steps} steps reused nothing (calls computed for {reasons})"
    finite = [value for value in run.values if math.isfinite(value)]
    why = policy.verdict(finite) if finite else str(policy)
    return f"{message}: {why}" if why else message
