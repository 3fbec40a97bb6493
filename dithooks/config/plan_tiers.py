"""Tiers: several plans for one model in one file, each with what was measured of it, chosen by name or by promise."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from math import inf
from typing import Any, ClassVar

from ..errors import InvalidSetting, TargetMissed, WrongType
from ..markup import step_squares, table
from ..validation import check_text, set_field, shown
from .cache_plan import CachePlan
from .hub_file import HubFile

MOST = 32  # tiers
NAME = r"\w[\w .+×%-]{0,39}"
ASKED = r"(?i:fastest\s+at\s+(?:(mean|worst)\s+)?(?:≥|>=)\s*(\d{1,6}(?:\.\d{1,9})?)\s*(?:dB)?)"
FORM = "'fastest at ≥ 35 dB' or 'fastest at worst ≥ 30 dB'"


@dataclass(frozen=True, repr=False)
class PlanTiers(HubFile):
    """Several plans for one model and run, such as a fast one, a good one, and one between.

    Each plan's provenance is its promise: how fast it is, and at which PSNR it draws, in the mean and at worst. The
    mean is promised less its standard error, ``plan.provenance.promised``, as it is of the few pictures it was
    measured on.
    ``dit_cache(pipe, plans, tier="high")`` attaches one of them, and ``tier="fastest at ≥ 35 dB"`` the fastest that
    promises so much. ``search(..., targets=(1.5, 2, 3))`` finds the plans from one recorded run.

    Args:
        plans: the plan of each tier, by name; they are kept in the order of their speed, the slowest first.

    Raises:
        TypeError, ValueError: there is no plan, or more than 32; a name is not made of letters, digits and spaces; or
            the plans were made for several models or runs.

    Example:
        >>> from dithooks.demo import load_plan
        >>> plans = PlanTiers({"fast": load_plan("3x"), "high": load_plan("1.5x")})
        >>> list(plans.plans), plans.select("fast") == plans.select("fastest at >= 20 dB") == load_plan("3x")
        (['high', 'fast'], True)
        >>> PlanTiers.from_json(plans.to_json()) == plans
        True
    """

    _schemas: ClassVar[tuple[int, ...]] = (1,)
    _file: ClassVar[str] = "plans.json"

    plans: Mapping[str, CachePlan] = field(hash=False)

    def __post_init__(self) -> None:
        given = self.plans
        if not isinstance(given, Mapping) or not all(isinstance(plan, CachePlan) for plan in given.values()):
            raise WrongType(f"plans must be a mapping of names to plans, each a CachePlan, not {shown(given)}")
        if not 1 <= len(given) <= MOST:
            raise InvalidSetting(f"plans has {len(given)} tiers: give 1 to {MOST}")
        for name in given:
            if not re.fullmatch(NAME, check_text("the name of a tier", name)):
                raise InvalidSetting(
                    f"{shown(name)} cannot name a tier: give at most 40 letters, digits, spaces or . + - × %"
                )
        kept = dict(sorted(given.items(), key=lambda item: speed_of(item[1])))
        (first, one), *others = kept.items()
        for name, plan in others:
            if plan.made != one.made:
                raise InvalidSetting(
                    f"tiers {shown(first)} and {shown(name)} were made for different models or runs "
                    f"({_made(one)}, {_made(plan)}): what they promise cannot be compared. Keep them in two files"
                )
        set_field(self, "plans", kept)

    @classmethod
    def _from_data(cls, data: Any) -> PlanTiers:
        """Read tiers, or a plan by itself, which is one tier, named by its target."""
        if isinstance(data, dict) and data.get("kind") == CachePlan.__name__:
            plan = CachePlan._from_data(data)
            return cls({target_name(plan.provenance.target): plan})
        return super()._from_data(data)

    @property
    def front(self) -> tuple[str, ...]:
        """The tiers that no other beats: none is at least as fast and draws at least as well, and better in one."""
        rated = {name: (speed_of(plan), _promise(plan, "mean")) for name, plan in self.plans.items()}
        return tuple(
            name
            for name, (speed, psnr) in rated.items()
            if not any(s >= speed and p >= psnr and (s, p) != (speed, psnr) for s, p in rated.values())
        )

    def select(self, tier: str) -> CachePlan:
        """Return the plan of a tier.

        Args:
            tier: its name; or ``"fastest at ≥ 35 dB"``, also written with ``>=``: of the tiers that promise such a mean
                PSNR, the fastest: one whose mean is 36 ± 2 dB promises 34. ``"fastest at worst ≥ 30 dB"`` goes by the
                worst picture.

        Raises:
            TypeError, ValueError: there is no such tier.
            TargetMissed: none promises so much; the message names the best there is.
        """
        if check_text("tier", tier) in self.plans:
            return self.plans[tier]
        if (asked := _asked(tier)) is None:
            names = ", ".join(map(shown, self.plans))
            raise InvalidSetting(f"there is no tier {shown(tier)}: give one of {names:.150}, or ask for {FORM}")
        kind, least = asked
        good = [plan for plan in self.plans.values() if _promise(plan, kind) >= least]
        if good:
            return max(good, key=lambda plan: (speed_of(plan), _promise(plan, kind)))
        name, best = max(self.plans.items(), key=lambda item: _promise(item[1], kind))
        if (most := _promise(best, kind)) == -inf:
            raise TargetMissed(f"no tier has a measured PSNR ({kind}), so none is known to draw at ≥ {least:g} dB")
        raise TargetMissed(
            f"no tier promises ≥ {least:g} dB ({kind}): the best is {shown(name)}, {speed_of(best):.2f}× as fast, with "
            f"{most:.1f} dB. Take that one, or run without a cache"
        )

    def __repr__(self) -> str:
        return f"<PlanTiers {', '.join(f'{name} {speed_of(plan):.2f}×' for name, plan in self.plans.items())}>"

    def _repr_html_(self) -> str:
        """Return a table for a notebook."""
        rows = [
            [
                name,
                f"{speed_of(plan):.2f}×",
                *(_level(plan, kind).split(" ", 1)[1] for kind in ("mean", "worst")),
                step_squares(plan.pieces[0].picture),
            ]
            for name, plan in self.plans.items()
        ]
        head = str(next(iter(self.plans.values()))).splitlines()[0].replace("CachePlan", "PlanTiers", 1)
        return f"<b>{escape(head)}</b>{table(['tier', 'as fast', 'mean', 'worst', 'steps'], rows)}"

    def __str__(self) -> str:
        """Print the tiers as a table, with what each promises."""
        front, head = self.front, str(next(iter(self.plans.values()))).splitlines()[0]
        rows = [
            [name, f"{speed_of(plan):.2f}× as fast", *(_level(plan, kind) for kind in ("mean", "worst"))]
            for name, plan in self.plans.items()
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(wide) for cell, wide in zip(row, widths, strict=True)).rstrip() for row in rows]
        beaten = ["" if name in front else "  (beaten by another)" for name in self.plans]
        table = [line + note for line, note in zip(lines, beaten, strict=True)]
        return "\n  ".join([head.replace("CachePlan", "PlanTiers", 1), *table])


def speed_of(plan: CachePlan) -> float:
    """Return how fast a plan promises to be: as measured, or else as predicted."""
    found = plan.provenance
    return found.predicted_speedup if found.measured_speedup is None else found.measured_speedup


def target_name(target: float) -> str:
    """Return the name of a tier that was searched for a speed-up.

    Example:
        >>> target_name(1.5)
        '1.5x'
    """
    return f"{target:g}x"


def _asked(tier: str) -> tuple[str, float] | None:
    """Return which PSNR is asked for, and how much; ``None``: it is a name."""
    found = re.fullmatch(ASKED, tier.strip())
    return None if found is None else ((found[1] or "mean").lower(), float(found[2]))


def _promise(plan: CachePlan, kind: str) -> float:
    """Return the PSNR that a plan promises, in the mean or at worst; −∞: none was measured."""
    value = plan.provenance.promised if kind == "mean" else plan.provenance.worst
    return -inf if value is None else value


def _level(plan: CachePlan, kind: str) -> str:
    found = plan.provenance
    value, error = (found.psnr, found.psnr_error) if kind == "mean" else (found.worst, None)
    return f"{kind} –" if value is None else f"{kind} {value:.1f}{'' if error is None else f' ± {error:.1f}'} dB"


def _made(plan: CachePlan) -> str:
    made = plan.made
    return f"{made.model} {made.fingerprint}, {made.steps} steps, {made.dtype}"[:50]
