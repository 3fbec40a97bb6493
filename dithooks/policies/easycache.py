"""Reuse while the output is expected to have changed little, by the rate at which it follows the input."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..validation import check_count, check_number, set_field
from .history import BranchHistory, Decision, Schedule
from .policy import Policy, Reduce, check_metric_fields, unknown_end_warning
from .reason import Reason


@dataclass(frozen=True)
class EasyCache(Policy):
    """Reuse while the relative change of the range's output, as expected from its input, adds up to little.

    With x the range's input and y its output, the last two computed steps s > r of a branch give the rate
    k = mean|y_s − y_r| / mean|x_s − x_r|. A step t is expected to change the output by
    e_t = k · mean|x_t − x_{t−1}| / mean|y_s|, relative to it. Steps are reused while Σ e since s stays below
    ``threshold``. Nothing has to be measured beforehand. After EasyCache (Zhou et al., arXiv:2507.02860), which takes
    the whole transformer for the range.

    Args:
        threshold: reuse while the expected changes add up to less than this, > 0; 0.02 … 0.2 is common.
        max_warmup_steps: the first so many steps of a run are computed, ≥ 2: the rate is measured over two.
        max_continuous_cached_steps: the most reused steps in a row.
        last_steps_computed: the last so many steps are computed.
        separate_branches: whether each branch decides for itself; ``False``: the first at a step decides for all.
        reduce: over a batch, ``"mean"``: of the batch as a whole; ``"max"``: of the sample expected to change most;
            ``"each"``: every sample decides for itself, as for :class:`Threshold`.

    Raises:
        TypeError, ValueError: a value is of the wrong type or out of range.

    Example:
        >>> policy, branch = EasyCache(0.1), BranchHistory(refreshed=9, drift=0.08)
        >>> policy.judge(12, branch, Schedule(), 0.01).reuse, policy.judge(12, branch, Schedule(), 0.03).reuse
        (True, False)
    """

    metric: ClassVar[Literal["change", "rate"] | None] = "rate"

    threshold: float
    max_warmup_steps: int = 5
    max_continuous_cached_steps: int | None = None
    last_steps_computed: int = 0
    separate_branches: bool = True
    reduce: Reduce = "mean"

    def __post_init__(self) -> None:
        set_field(self, "threshold", check_number("threshold", self.threshold, 0, strictly=True))
        for name, least in (("max_warmup_steps", 2), ("max_continuous_cached_steps", 1), ("last_steps_computed", 0)):
            if (value := getattr(self, name)) is not None or name != "max_continuous_cached_steps":
                set_field(self, name, check_count(name, value, least))
        check_metric_fields(self)

    def before(self, step: int, branch: BranchHistory, schedule: Schedule) -> Decision | None:
        if schedule.done(step) < self.max_warmup_steps:
            return Decision(False, Reason.WARM_UP)
        if schedule.steps is not None and step >= schedule.steps - self.last_steps_computed:
            return Decision(False, Reason.END)
        if self.max_continuous_cached_steps is not None and branch.streak >= self.max_continuous_cached_steps:
            return Decision(False, Reason.CAP)
        return None

    def judge(self, step: int, branch: BranchHistory, schedule: Schedule, value: float) -> Decision:
        if not math.isfinite(value):
            return Decision(False, Reason.NON_FINITE, value)
        reuse = branch.drift + value < self.threshold
        return Decision(reuse, Reason.REUSE if reuse else Reason.THRESHOLD, value)

    def warning_at_start(self, schedule: Schedule) -> str | None:
        return unknown_end_warning(self.last_steps_computed, schedule)

    def why_nothing_reused(self, values: list[float], reasons: Mapping[str, int]) -> str | None:
        return f"the smallest change expected of a step was {min(values):.3g}, threshold is {self.threshold:g}"
