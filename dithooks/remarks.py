"""What is to be said of a run in which the cache is of no use, with numbers."""

from __future__ import annotations

import math
from collections import Counter

from .policy.base import Account, Policy, Schedule, Track
from .state import Run


def hopeless(policy: Policy, schedule: Schedule) -> str | None:
    """How the steps of a run are all computed, whatever is seen in them; ``None`` if one may be reused."""
    assert schedule.steps is not None
    reasons: Counter[str] = Counter()
    for step in range(schedule.first, schedule.steps):
        tracks = [Track(n, step - 1, account=Account(step - schedule.first)) for n in range(policy.distinct)]
        made = [policy.before(step, track, schedule) for track in tracks]
        open_to_it = any(decision is None or decision.reuse for decision in made)
        if step > schedule.first and open_to_it:
            return None
        reasons["no anchor" if made[0] is None or made[0].reuse else made[0].reason] += 1
    return ", ".join(f"{reason}: {count}" for reason, count in reasons.items())


def useless(run: Run, policy: Policy) -> str | None:
    """Of a run that went to its end and reused nothing, why; ``None`` of any other, or if that has been said."""
    cut_short = run.in_flight or (run.schedule.steps is not None and not run.last and not run.finished)
    if cut_short or run.steps < 2 or run.reused or run.judged:
        return None
    run.judged = True
    reasons = ", ".join(f"{reason}: {count}" for reason, count in run.reasons.items() if count)
    message = f"a run of {run.steps} steps reused nothing (calls computed for {reasons})"
    finite = [value for value in run.values if math.isfinite(value)]
    why = policy.verdict(finite, run.reasons) if finite else str(policy)
    return f"{message}: {why}" if why else message
