"""Reuse while the residual's magnitude, as a recorded run had it, has changed little."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import InvalidSetting, WrongType
from ..validation import check_count, check_number, set_field, shown
from .history import BranchHistory, Decision, Schedule
from .policy import Policy
from .reason import Reason

LARGEST = 80.0  # log of a ratio: beyond it, float32 has 0 or infinity, which are no ratios


@dataclass(frozen=True)
class MagnitudeRatio(Policy):
    """Reuse while the residual's magnitude is known to have changed little since the last computed step.

    A recorded run (:func:`dithooks.profile`) gives the ratio γ_t = ‖Δ_t‖/‖Δ_{t−1}‖ of each step. After a computed step
    s, step t is reused while Σ_{τ=s+1…t} |1 − Π_{u=s+1…τ} γ_u| < ``threshold``. Nothing is measured in
    the run. In a run with another number of steps, the ratios are those that make the same magnitudes at the same
    share of the steps. After MagCache (Ma et al., arXiv:2506.09045).

    Args:
        ratios: γ for each step of the recorded run, that of step 0 being 1; or such a list for each branch.
        threshold: δ, > 0; 0.06 … 0.24 is common.
        max_continuous_cached_steps: K, reused steps in a row at most, ≥ 1.
        retention_ratio: this share of the run's steps is computed first, 0 … 1; of the recorded run's steps, where the
            number of steps is not known.

    Raises:
        TypeError, ValueError: a value is of the wrong type or out of range.

    Example:
        >>> policy = MagnitudeRatio((1.0, 0.9, 0.9, 0.9), threshold=0.3, retention_ratio=0.0)
        >>> round(policy.error(0, 2, branch=0), 3)  # |1 − 0.9| + |1 − 0.81|
        0.29
        >>> [policy.before(step, BranchHistory(refreshed=0), Schedule()).reuse for step in (1, 2, 3)]
        [True, True, False]
    """

    ratios: tuple[float, ...] | tuple[tuple[float, ...], ...]
    threshold: float = 0.12
    max_continuous_cached_steps: int = 4
    retention_ratio: float = 0.2

    def __post_init__(self) -> None:
        ratios: Any = self.ratios
        given = ratios.tolist() if hasattr(ratios, "tolist") else ratios
        if not isinstance(given, (list, tuple)) or not given:
            raise WrongType(
                f"ratios must be a number for each step, or such a list for each branch, not {shown(given)}"
            )
        nested = all(isinstance(each, (list, tuple)) for each in given)
        checked = tuple(tuple(_ratio(g) for g in each) for each in (given if nested else (given,)))
        if not checked[0] or len({len(each) for each in checked}) > 1:
            raise InvalidSetting("ratios must be one positive number for each step, or such a list for each branch")
        set_field(self, "ratios", checked if nested else checked[0])
        set_field(self, "threshold", check_number("threshold", self.threshold, 0, strictly=True))
        limit = check_count("max_continuous_cached_steps", self.max_continuous_cached_steps, 1)
        set_field(self, "max_continuous_cached_steps", limit)
        share = check_number("retention_ratio", self.retention_ratio, 0)
        if share > 1:
            raise InvalidSetting(f"retention_ratio={share} is out of range: it is a share of the steps, 0 … 1")
        set_field(self, "retention_ratio", share)

    @property
    def distinct(self) -> int:  # type: ignore[override]
        return len(self._lists)

    @property
    def _lists(self) -> tuple[tuple[float, ...], ...]:
        nested: Any = self.ratios if isinstance(self.ratios[0], tuple) else (self.ratios,)
        return tuple(nested)

    def for_run(self, schedule: Schedule) -> MagnitudeRatio:
        if schedule.steps in (None, len(self._lists[0])):
            return self
        assert schedule.steps is not None
        made = tuple(stretched(each, schedule.steps) for each in self._lists)
        return replace(self, ratios=made if isinstance(self.ratios[0], tuple) else made[0])

    def error(self, refreshed: int, step: int, branch: int) -> float:
        """Σ |1 − Πγ| over the steps after ``refreshed``, up to ``step``; of the last branch known, if it is not."""
        ratios = self._lists[min(branch, len(self._lists) - 1)]
        product, total = 1.0, 0.0
        for ratio in ratios[refreshed + 1 : step + 1]:
            product *= ratio
            total += abs(1 - product)
        return total

    def before(self, step: int, branch: BranchHistory, schedule: Schedule) -> Decision:
        known = len(self._lists[0])
        if step < math.ceil(self.retention_ratio * known - 1e-6):  # 0.07 · 100 is 7, not a little more
            return Decision(False, Reason.WARM_UP)
        if step >= known:  # a run longer than the recorded one, whose number of steps was not known
            return Decision(False, Reason.END)
        if branch.streak >= self.max_continuous_cached_steps:
            return Decision(False, Reason.CAP)
        value = 0.0 if branch.refreshed is None else self.error(branch.refreshed, step, branch.number)
        return (
            Decision(True, Reason.REUSE, value) if value < self.threshold else Decision(False, Reason.THRESHOLD, value)
        )

    def warning_at_start(self, schedule: Schedule) -> str | None:
        if schedule.steps is None:
            return (
                f"the number of steps is not known, so the {len(self._lists[0])} ratios are taken as made for this "
                "run; timestep_scope(step, steps=...) gives it"
            )
        return None

    def why_nothing_reused(self, values: list[float], reasons: Mapping[str, int]) -> str | None:
        return f"the smallest change of magnitude was {min(values):.3g}, threshold is {self.threshold:g}"


def stretched(ratios: Sequence[float], steps: int) -> tuple[float, ...]:
    """Ratios for another number of steps: log Πγ as a line between the old steps, read at the new ones' shares.

    Example:
        >>> [round(ratio, 4) for ratio in stretched((1.0, 0.81, 0.81), 5)]
        [1.0, 0.9, 0.9, 0.9, 0.9]
    """
    old = len(ratios)
    logs = np.cumsum(np.log(np.asarray(ratios, dtype=np.float64)), dtype=np.float64).astype(np.float32)
    places = np.linspace(0, old - 1, steps, dtype=np.float32)
    there = np.interp(places, np.arange(old, dtype=np.float32), logs)
    return (1.0, *(float(ratio) for ratio in np.exp(np.clip(np.diff(there), -LARGEST, LARGEST))))


def _ratio(value: object) -> float:
    return check_number("a ratio", value, 0, strictly=True)
