"""Reuse while little has changed since the last computed step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..validation import check_choice, check_count, check_number, set_field
from .history import BranchHistory, Decision, Schedule
from .policy import Policy, Reduce, check_metric_fields, unknown_end_warning
from .reason import Reason


@dataclass(frozen=True)
class Threshold(Policy):
    """Reuse while the blocks before the range do nearly what they did at the last computed step of the same branch.

    The blocks before the range always run. With r their residual (output of the last of them minus input of the
    first), its relative change since the last computed step s, ``mean|r_t − r_s| / mean|r_s|``, is compared with
    ``residual_diff_threshold``. Where the range begins at block 0, or behind another one
    (``DitCacheConfig.more_ranges``), r is what enters it. Of several streams
    that are looked at (``DitCacheConfig.look_at``), the one that changes most counts. Known as first-block cache
    (ParaAttention) and as DBCache (cache-dit: Fn, the blocks before the range; Bn, those behind it).

    Args:
        residual_diff_threshold: reuse below this change, > 0; 0.05 … 0.25 is common.
        max_warmup_steps: the first so many steps of a run are warm-up; a second expert has a run of its own.
        warmup_interval: in warm-up, every so many steps are computed; the threshold decides the others.
        max_cached_steps: the most reused steps of a run.
        max_continuous_cached_steps: the most reused steps in a row.
        max_accumulated_diff: the most that the changes of reused steps may add up to until the next computed step.
        last_steps_computed: the last so many steps are computed.
        force_refresh_step: this step is computed.
        force_refresh: ``"repeat"``: every ``force_refresh_step`` steps one is computed; ``"once"``: only that one.
        separate_branches: whether each branch (conditional, unconditional, …) decides for itself; ``False``: the first
            that decides at a step decides for all.
        reduce: over a batch, ``"mean"``: the change of the whole batch; ``"max"``: of the sample that changed most;
            ``"each"``: every sample decides for itself, and the blocks run on those to be computed alone.

    Raises:
        TypeError, ValueError: a value is of the wrong type or out of range.

    Example:
        >>> policy = Threshold(0.1, max_warmup_steps=1)
        >>> branch, schedule = BranchHistory(refreshed=0), Schedule(steps=10)
        >>> policy.before(0, branch, schedule)
        Decision(reuse=False, reason='warm-up', value=None)
        >>> policy.judge(1, branch, schedule, 0.05)
        Decision(reuse=True, reason='reuse', value=0.05)
        >>> policy.judge(1, branch, schedule, 0.2)
        Decision(reuse=False, reason='threshold', value=0.2)
    """

    metric: ClassVar[Literal["change", "rate"] | None] = "change"

    residual_diff_threshold: float
    max_warmup_steps: int = 8
    warmup_interval: int = 1
    max_cached_steps: int | None = None
    max_continuous_cached_steps: int | None = None
    max_accumulated_diff: float | None = None
    last_steps_computed: int = 0
    force_refresh_step: int | None = None
    force_refresh: Literal["once", "repeat"] = "once"
    separate_branches: bool = True
    reduce: Reduce = "mean"

    def __post_init__(self) -> None:
        for name in ("residual_diff_threshold", "max_accumulated_diff"):
            if (value := getattr(self, name)) is not None or name == "residual_diff_threshold":
                set_field(self, name, check_number(name, value, 0, strictly=True))
        counts = {
            "max_warmup_steps": 0,
            "warmup_interval": 1,
            "max_cached_steps": 1,
            "max_continuous_cached_steps": 1,
            "last_steps_computed": 0,
            "force_refresh_step": 1,
        }
        for name, least in counts.items():
            optional = name in ("max_cached_steps", "max_continuous_cached_steps", "force_refresh_step")
            if (value := getattr(self, name)) is not None or not optional:
                set_field(self, name, check_count(name, value, least))
        check_choice("force_refresh", self.force_refresh, ("once", "repeat"))
        check_metric_fields(self)

    def before(self, step: int, branch: BranchHistory, schedule: Schedule) -> Decision | None:
        done = schedule.done(step)
        if done < self.max_warmup_steps and done % self.warmup_interval == 0:
            return Decision(False, Reason.WARM_UP)
        forced = self.force_refresh_step
        if forced is not None and (step == forced or (self.force_refresh == "repeat" and step and step % forced == 0)):
            return Decision(False, Reason.FORCED)
        if schedule.steps is not None and step >= schedule.steps - self.last_steps_computed:
            return Decision(False, Reason.END)
        for count, limit in (
            (branch.reused, self.max_cached_steps),
            (branch.streak, self.max_continuous_cached_steps),
        ):
            if limit is not None and count >= limit:
                return Decision(False, Reason.CAP)
        return None

    def judge(self, step: int, branch: BranchHistory, schedule: Schedule, value: float) -> Decision:
        if not math.isfinite(value):
            return Decision(False, Reason.NON_FINITE, value)
        if value >= self.residual_diff_threshold:
            return Decision(False, Reason.THRESHOLD, value)
        if self.max_accumulated_diff is not None and branch.drift + value > self.max_accumulated_diff:
            return Decision(False, Reason.ACCUMULATED, value)
        return Decision(True, Reason.REUSE, value)

    def warning_at_start(self, schedule: Schedule) -> str | None:
        return unknown_end_warning(self.last_steps_computed, schedule)

    def why_nothing_reused(self, values: list[float], reasons: Mapping[str, int]) -> str | None:
        if reasons.get(Reason.ACCUMULATED) and min(values) < self.residual_diff_threshold:
            limit = f"max_accumulated_diff is {self.max_accumulated_diff:g}"
            return f"the smallest difference seen was {min(values):.3g}, {limit}"
        return (
            f"the smallest difference seen was {min(values):.3g}, residual_diff_threshold is "
            f"{self.residual_diff_threshold:g}"
        )
