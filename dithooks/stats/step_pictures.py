"""The steps of a run, as a sign for each: what was computed, and what was reused."""

from __future__ import annotations

from collections.abc import Iterable

from ..policies.reason import Reason
from .types import CallRecord

SIGNS = {(False,): "●", (True,): "○", (False, True): "◐"}


def step_pictures(records: Iterable[CallRecord]) -> dict[str, str]:
    """Return a picture of the steps of each range: ● is computed, ○ reused, ◐ both, by branch, · not called.

    Example:
        >>> records = [CallRecord("blocks", 0, step, 0, step > 0, "mask", None) for step in (0, 2)]
        >>> step_pictures(records)
        {'blocks': '●·○'}
    """
    ranges: dict[str, dict[int, set[bool]]] = {}
    for record in records:
        seen = ranges.setdefault(record.range, {}).setdefault(record.step, set())
        seen |= {True, False} if record.reason == Reason.CONDITIONAL else {record.reuse}
    return {
        name: "".join(SIGNS[tuple(sorted(steps[step]))] if step in steps else "·" for step in range(max(steps) + 1))
        for name, steps in ranges.items()
    }
