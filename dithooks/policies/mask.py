"""Compute at the steps that a mask names, whatever the number of steps it was made for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import log
from typing import Any, ClassVar, Literal

import numpy as np

from ..errors import InvalidSetting, WrongType
from ..validation import check_number, set_field, shown
from .conditional import Conditional, check_conditional
from .history import BranchHistory, Decision, Schedule
from .policy import Policy, steps_are_needed
from .reason import Reason
from .uncached import Unplanned

# Of all steps, how many each preset computes: 1.5×, 2×, 3× and 4× fewer, if the range is the whole stack.
PRESETS = {"slow": 1 / 1.5, "medium": 1 / 2, "fast": 1 / 3, "ultra": 1 / 4}


@dataclass(frozen=True)
class Mask(Policy):
    """Compute where the mask has 1; where it has 0, reuse, or let another policy decide.

    Args:
        steps: a 0 or 1 for each step, the first of them 1; or a preset by its name, ``"slow"``, ``"medium"``,
            ``"fast"`` or ``"ultra"``, which is made for the run's number of steps (:func:`preset`).
        sigmas: the noise levels of the steps that the mask was made for. A run with another number of steps, or other
            noise levels, is given the mask resampled by σ (:func:`resample`), without ``sigmas`` by share of the steps.
        dynamic: decides where the mask has 0; left out, these steps are reused.
        others: masks that were made for other numbers of steps: a run is given the one whose number is nearest.
        conditional: steps of the mask at which one branch of guidance alone is computed. A run that the mask has to be
            resampled for computes them whole.

    Raises:
        TypeError: ``dynamic`` is not a policy that decides by looking, or ``others`` are not masks of 0 and 1.
        ValueError: no such preset, not a mask, or ``conditional`` does not fit it.

    Example:
        >>> policy = Mask("medium").for_run(Schedule(steps=10))
        >>> policy.steps
        (1, 0, 1, 0, 1, 0, 1, 0, 1, 0)
    """

    metric: ClassVar[Literal["change", "rate"] | None] = None
    needs_sigmas: ClassVar[bool] = True

    steps: str | tuple[int, ...]
    sigmas: tuple[float, ...] | None = None
    dynamic: Policy | None = None
    others: tuple[Mask, ...] = field(default=(), repr=False, metadata={"written": "where given"})
    conditional: Conditional | None = field(default=None, repr=False, metadata={"written": "where given"})

    def __post_init__(self) -> None:
        if isinstance(self.steps, str):
            if self.steps not in PRESETS:
                raise InvalidSetting(f"Mask({shown(self.steps)}): there are the presets {', '.join(PRESETS)}")
            if self.sigmas is not None:
                raise InvalidSetting("sigmas belong to a mask of 0 and 1: a preset is made for the steps of the run")
        else:
            steps: Any = self.steps
            if not isinstance(steps, Iterable):
                raise WrongType(f"steps must be a mask of 0 and 1, or a preset by its name, not {shown(self.steps)}")
            bits = tuple(int(bit) if bit in (0, 1) else -1 for bit in _listed(steps))
            if -1 in bits or bits[:1] != (1,):
                raise InvalidSetting(f"Mask({shown(self.steps)}): give a 0 or 1 for each step, the first of them 1")
            set_field(self, "steps", bits)
        if self.sigmas is not None:
            set_field(self, "sigmas", _levels(self.sigmas, len(self.steps)))
        others: Any = self.others
        if not isinstance(others, (tuple, list)) or not all(isinstance(each, Mask) for each in others):
            raise WrongType(f"others must be a tuple of masks, not {shown(self.others)}")
        set_field(self, "others", tuple(others))
        if others and any(
            isinstance(each.steps, str) or each.others or each.dynamic for each in (*others, self._alone)
        ):
            raise InvalidSetting("others are masks of 0 and 1 and their sigmas, and so is the one that has them")
        if self.dynamic is not None and (not isinstance(self.dynamic, Policy) or self.dynamic.metric is None):
            raise WrongType(
                f"dynamic={shown(self.dynamic)} must be a policy that decides by looking, such as Threshold"
            )
        if self.conditional is not None and (isinstance(self.steps, str) or self.dynamic is not None):
            raise InvalidSetting("conditional belongs to a mask of 0 and 1 that decides alone: leave dynamic out")
        if not isinstance(self.steps, str):
            check_conditional(self.conditional, self.steps)
        if self.dynamic is not None:
            for name in ("metric", "separate_branches", "reduce"):
                set_field(self, name, getattr(self.dynamic, name))

    def for_run(self, schedule: Schedule) -> Policy:
        dynamic = None if self.dynamic is None else self.dynamic.for_run(schedule)
        if dynamic is not None and dynamic.never_reuses:  # nor does the mask, where it decides nothing by itself
            return dynamic
        if isinstance(self.steps, str):
            if not schedule.steps:
                return Unplanned(steps_are_needed(f"Mask({self.steps!r})"))
            return Mask(preset(self.steps, schedule.steps), None, dynamic)
        if not schedule.steps:
            return replace(self, dynamic=dynamic)
        if self.others:
            steps = schedule.steps
            nearest = min((self._alone, *self.others), key=lambda mask: abs(log(len(mask.steps) / steps)))
            return nearest.for_run(schedule)
        mask = resample(self.steps, schedule.steps, self.sigmas, schedule.sigmas)
        return Mask(mask, None, dynamic, conditional=self.conditional if mask == self.steps else None)

    @property
    def has_conditional(self) -> bool:
        return any(mask.conditional is not None for mask in (self, *self.others))

    @property
    def _alone(self) -> Mask:
        return self if not self.others else Mask(self.steps, self.sigmas, self.dynamic, conditional=self.conditional)

    def before(self, step: int, branch: BranchHistory, schedule: Schedule) -> Decision | None:
        assert not isinstance(self.steps, str)
        if step >= len(self.steps):
            return Decision(False, Reason.END)
        if self.steps[step]:
            if self.conditional is None or not self.conditional.steps[step]:
                return Decision(False, Reason.MASK)
            return Decision(False, Reason.MISSED_REFRESH if self._missed(step, branch) else Reason.CONDITIONAL)
        if self.dynamic is not None:
            return self.dynamic.before(step, branch, schedule)
        return Decision(False, Reason.MISSED_REFRESH) if self._missed(step, branch) else Decision(True, Reason.REUSE)

    def _missed(self, step: int, branch: BranchHistory) -> bool:
        """Whether the branch was not called at the last refresh."""
        assert not isinstance(self.steps, str)
        return branch.refreshed is not None and any(self.steps[branch.refreshed + 1 : step])

    def judge(self, step: int, branch: BranchHistory, schedule: Schedule, value: float) -> Decision:
        assert self.dynamic is not None
        return self.dynamic.judge(step, branch, schedule, value)

    def outdated(self, step: int, branch: BranchHistory, idle: int, anchors: int) -> bool:
        if self.dynamic is not None or anchors > 1:
            return super().outdated(step, branch, idle, anchors)
        return idle > 1 and self._missed(step, branch)

    def keeps(self, step: int, anchors: int) -> bool:
        if self.dynamic is not None or isinstance(self.steps, str):
            return True
        later = self.steps[step + 1 :]
        return 0 in later and sum(later[: later.index(0)]) < anchors

    def warning_at_start(self, schedule: Schedule) -> str | None:
        remarks = (self._remark(schedule), None if self.dynamic is None else self.dynamic.warning_at_start(schedule))
        return "; ".join(filter(None, remarks)) or None

    def _remark(self, schedule: Schedule) -> str | None:
        if schedule.steps is None:
            return (
                f"the number of steps is not known, so the mask is taken as made for this run: its {len(self.steps)} "
                "steps are followed one by one, and later ones computed; timestep_scope(step, steps=...) gives it"
            )
        made = {len(mask.steps) for mask in (self, *self.others)}
        if self.sigmas is not None and schedule.sigmas is None and schedule.steps not in made:
            return (
                "the noise levels of all steps are not known (a scheduler gives them), so the mask is resampled by "
                "share of the steps, not by σ"
            )
        return None

    def warning_at_end(self, speedup: float) -> str | None:
        return None if self.dynamic is None else self.dynamic.warning_at_end(speedup)

    def why_nothing_reused(self, values: list[float], reasons: Mapping[str, int]) -> str | None:
        return None if self.dynamic is None else self.dynamic.why_nothing_reused(values, reasons)


def preset(name: str, steps: int) -> tuple[int, ...]:
    """The mask of a preset: of T steps K are computed, the first K // 6 of them (at least 1), and the others evenly.

    After w computed steps, the k-th of the other K − w is at step w − 1 + k·(T − w + 1)/(K − w + 1), rounded.

    Args:
        name: ``"slow"`` (K = T/1.5), ``"medium"`` (T/2), ``"fast"`` (T/3) or ``"ultra"`` (T/4), half up, at least 1.
        steps: T, ≥ 1.

    Example:
        >>> preset("ultra", 12)
        (1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0)
        >>> preset("slow", 12)
        (1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 0, 1)
    """
    count = max(1, int(steps * PRESETS[name] + 0.5))
    first = max(1, count // 6)
    gap = (steps - first + 1) / (count - first + 1)
    return _placed([*range(first), *(first - 1 + k * gap for k in range(1, count - first + 1))], steps)


def resample(
    mask: Sequence[int],
    steps: int,
    sigmas: Sequence[float] | None = None,
    new_sigmas: Sequence[float] | None = None,
) -> tuple[int, ...]:
    """A mask for another schedule, with the same share of steps computed, and as dense at the same noise level.

    The k-th of the mask's K refreshes is at step q_k; in between k is a line, k(q), which ends in K at the last step's
    end. The new mask's K' = K·T'/T (rounded) refreshes are where k(q) = j·K/K', j = 0 … K'−1, each rounded to the next
    free step. A new step's place q among the old is that of its noise level, else of its share of the steps.

    Args:
        mask: a 0 or 1 for each of T steps.
        steps: T', ≥ 1.
        sigmas: T noise levels, falling.
        new_sigmas: T' of them.

    Example:
        >>> resample((1, 1, 0, 0, 1, 0, 0, 0), 16)
        (1, 1, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0)
    """
    old = len(mask)
    if sigmas is None or new_sigmas is None or not _falls(new_sigmas[:steps], steps):
        if steps == old:
            return tuple(mask)
        places = np.arange(steps, dtype=np.float32) * (old / steps)
    else:
        falling = np.asarray(new_sigmas[:steps], dtype=np.float32)
        known = np.asarray(sigmas, dtype=np.float32)
        if np.array_equal(falling, known):  # levels closer than float32 resolves would not find their places
            return tuple(mask)
        places = np.interp(-falling, -known, np.arange(old, dtype=np.float32))
        places = np.where(falling < known[-1], old - 1 + np.clip(1 - falling / max(known[-1], 1e-9), 0, 1), places)
    refreshes = [float(q) for q, bit in enumerate(mask) if bit]
    count = min(steps, max(1, int(len(refreshes) * steps / old + 0.5)))
    ranks = [j * len(refreshes) / count for j in range(count)]
    wanted = np.interp(ranks, [*range(len(refreshes)), len(refreshes)], [*refreshes, float(old)])
    nearest = [float(np.interp(q, places, np.arange(steps))) if steps > 1 else 0.0 for q in wanted]
    return _placed(nearest, steps)


def _placed(wanted: Sequence[float], steps: int) -> tuple[int, ...]:
    """A mask with a 1 at each of the places, the first at step 0, two never at the same step."""
    taken: list[int] = []
    for number, place in enumerate(wanted):
        earliest = taken[-1] + 1 if taken else 0
        latest = steps - (len(wanted) - number)  # those to come need a step each
        taken.append(min(max(int(place + 0.5), earliest), latest) if number else 0)
    return tuple(int(step in taken) for step in range(steps))


def _listed(values: Any) -> Any:
    return values.tolist() if hasattr(values, "tolist") else values  # an array or a tensor


def _falls(sigmas: Sequence[float], steps: int) -> bool:
    return len(sigmas) == steps and all(a >= b for a, b in pairwise(sigmas))


def _levels(sigmas: Sequence[float], steps: int) -> tuple[float, ...]:
    listed: Any = _listed(sigmas)
    if not isinstance(listed, Iterable) or isinstance(listed, str):
        raise WrongType(f"sigmas must be a noise level for each step, or None, not {shown(sigmas)}")
    levels = tuple(check_number("a sigma", sigma, 0) for sigma in listed)[:steps]
    if len(levels) < steps or any(not a > b for a, b in pairwise(levels)):
        raise InvalidSetting(f"sigmas must be {steps} falling noise levels, one for each step of the mask")
    return levels
