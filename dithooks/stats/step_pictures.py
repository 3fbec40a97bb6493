"""The steps of a run, as a sign for each: what was computed, and what was reused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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


def sign_of(computed: Sequence[int]) -> str:
    """Return the sign of a step by which of a transformer's ranges are computed: ◑ is the last alone, ◒ others.

    Example:
        >>> sign_of([True]), sign_of([False, False]), sign_of([False, True]), sign_of([True, False])
        ('●', '○', '◑', '◒')
    """
    if len(set(computed)) == 1:
        return "●" if computed[0] else "○"
    return "◑" if computed[-1] and not any(computed[:-1]) else "◒"


def joined_picture(records: Iterable[CallRecord], steps: int) -> str:
    """Return one picture of the steps of all ranges of a transformer, whose records come range by range.

    A step without a call is ●, as nothing of it is left out.

    Example:
        >>> reused = {"[0:3]": (1, 2), "[3:5]": (1, 3)}
        >>> records = [CallRecord(r, 0, s, 0, s in own, "mask", None) for r, own in reused.items() for s in range(4)]
        >>> joined_picture(records, 4)
        '●○◑◒'
    """
    every = [picture.ljust(steps, "●") for picture in step_pictures(records).values()] or ["●" * steps]
    signs = [[picture[step] for picture in every] for step in range(steps)]
    return "".join("◐" if "◐" in own else sign_of([sign != "○" for sign in own]) for own in signs)
