"""What a run is made faster with: a plan or configuration from a file, or a speed-up that is steered to as it runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.cache_config import DitCacheConfig
from ..config.cache_plan import CachePlan
from ..config.safe_json import parsed, read_file
from ..demo import load_plan
from ..errors import TargetError
from ..handle import CacheHandle, dit_cache
from ..policies.budget import Budget
from ..policies.mask import Mask
from ..predictors.polynomial import Linear
from ..stats.types import CallRecord
from ..stats.warning_collector import collect_warnings
from .messages import one_line

KINDS = {"CachePlan": CachePlan, "DitCacheConfig": DitCacheConfig}


@dataclass(frozen=True)
class Setting:
    """One way to cache.

    Args:
        name: what it is called in tables.
        config: as :func:`~dithooks.dit_cache` takes it.
        asked: the speed-up that is aimed at, if one is.
    """

    name: str
    config: DitCacheConfig | CachePlan
    asked: float | None = None

    @property
    def steps(self) -> int | None:
        """That it was made for; ``None``: any number."""
        return self.config.made.steps if isinstance(self.config, CachePlan) else None

    def to_dict(self) -> dict[str, Any]:
        """What it is, fit for JSON."""
        told: dict[str, Any] = {"name": self.name, "target": self.asked}
        if not isinstance(self.config, CachePlan):
            return told | {"policy": str(self.config.when), "predictor": str(self.config.predictor)}
        found = self.config.provenance
        seen = {"steps": "+".join(each.picture for each in self.config.pieces), "date": found.date}
        return told | {"plan": seen | {"predicted_speedup": found.predicted_speedup, "found": found.method}}


def of_file(name: str, shipped: bool = False) -> Setting:
    """A plan or a configuration from a file.

    Args:
        name: its path; with ``shipped``, or the name of a plan that ships for the demo.

    Raises:
        TargetError: there is none.
    """
    try:
        if shipped and not Path(name).is_file():
            config: DitCacheConfig | CachePlan = load_plan(name)
        else:
            config = read_file(name, _read)
    except FileNotFoundError as error:
        raise TargetError(
            str(error) if shipped else f"there is no file {name}: give a plan that a search wrote"
        ) from None
    except (ValueError, TypeError, OSError) as error:
        raise TargetError(str(error)) from error
    target = config.provenance.target if isinstance(config, CachePlan) else None
    return Setting(f"plan {Path(name).name.removesuffix('.json')}", config, target)


def of_speedup(target: float) -> Setting:
    """Steered as it runs, by what changes from step to step.

    Raises:
        TargetError: no speed-up.
    """
    check_speedup(target)
    return Setting(f"live {target:g}x", DitCacheConfig(policy=Budget(target), predictor=Linear()), target)


def spread(target: float, steps: int) -> Setting:
    """Steps that are computed evenly spread, settled before the run: nothing is looked at.

    Raises:
        TargetError: no speed-up.

    Example:
        >>> spread(2.5, 10).config.when.steps
        (1, 0, 0, 1, 0, 1, 0, 0, 1, 0)
    """
    check_speedup(target)
    computed = min(steps, max(1, math.floor(steps / target + 0.5)))
    taken = {math.floor(k * steps / computed + 0.5) for k in range(computed)}
    mask = Mask(tuple(int(step in taken) for step in range(steps)))
    return Setting(f"spread {target:g}x", DitCacheConfig(policy=mask, predictor=Linear()), target)


def check_speedup(target: float) -> None:
    """See that a speed-up is one.

    Raises:
        TargetError: it is not.
    """
    if not 1 < target < math.inf:
        raise TargetError(f"--target is {target:g}: give a number above 1, such as 2 for twice as fast")


@contextmanager
def cached(target: object, setting: Setting, remarks: list[str], verify: bool = True) -> Iterator[CacheHandle]:
    """Attach for as long as the block lasts; what is said meanwhile is kept in ``remarks``.

    Raises:
        TargetError: it is made for another model, or cannot be attached or used for another reason.
    """
    with collect_warnings(remarks), one_line(), dit_cache(target, setting.config, verify=verify) as handle:
        yield handle


def summary(decisions: Sequence[CallRecord], run: int | None = None) -> dict[str, Any]:
    """What was decided, fit for JSON: how often for which reason, and for each range its steps, ● computed, ○ reused.

    A step of which one branch was computed and another reused is ◐.

    Args:
        decisions: of a handle.
        run: only of this one of its runs.
    """
    taken = [each for each in decisions if run is None or each.run == run]
    ranges: dict[str, dict[int, set[bool]]] = {}
    for each in taken:
        ranges.setdefault(each.range, {}).setdefault(each.step, set()).add(each.reuse)
    marks = {(False,): "●", (True,): "○", (False, True): "◐"}
    shown = {
        name: "".join(marks[tuple(sorted(steps[step]))] if step in steps else "·" for step in range(max(steps) + 1))
        for name, steps in ranges.items()
    }
    return {"reasons": dict(Counter(each.reason for each in taken)), "steps": shown}


def _read(text: str) -> DitCacheConfig | CachePlan:
    data = parsed(text, "CachePlan")
    kind = data.get("kind") if isinstance(data, dict) else None
    return KINDS[kind if kind in KINDS else "CachePlan"].from_json(text)  # type: ignore[attr-defined, no-any-return]
