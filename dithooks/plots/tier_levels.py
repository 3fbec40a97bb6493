"""Quality over speed-up of tiers: the PSNR that each plan of a file promises, in the mean and at worst."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..config.plan_tiers import PlanTiers, speed_of
from ..errors import InvalidSetting, WrongType
from ..validation import shown
from .style import COLOURS, FONT, GREY, figure_of, new_figure, note_better, plain_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEIGHT = 2.6  # inches
ABOVE = 5.0  # dB, of the best other: the place of plans that draw the same


def tiers(plans: PlanTiers, *, ax: Axes | None = None) -> Figure:
    """Draw what tiers promise: PSNR over speed-up, with a thin line down to the worst picture of each.

    The tiers that no other beats are joined.

    Args:
        plans: the tiers.
        ax: axes to draw on; by default, a new figure is made.

    Returns:
        The figure.

    Raises:
        WrongType: they are none.
        InvalidSetting: no PSNR was measured of any.
        ModuleNotFoundError: matplotlib is not installed.

    Example:
        >>> from dithooks import PlanTiers, plot
        >>> from dithooks.demo import load_plan
        >>> figure = plot.tiers(PlanTiers({name: load_plan(name) for name in ("1.5x", "2x", "3x")}))
        >>> figure.axes[0].get_ylabel()
        'PSNR to the uncached run, dB'
    """
    if not isinstance(plans, PlanTiers):
        raise WrongType(f"tiers takes PlanTiers, not {shown(plans)}")
    known = {name: plan for name, plan in plans.plans.items() if plan.provenance.psnr is not None}
    if not known:
        raise InvalidSetting("there is nothing to show: no PSNR was measured of any of the tiers")
    levels = {name: float(plan.provenance.promised or 0.0) for name, plan in known.items()}
    finite = [each for each in levels.values() if math.isfinite(each)]
    top = max(finite, default=100.0) + ABOVE
    figure = new_figure(HEIGHT) if ax is None else figure_of(ax)
    panel = figure.subplots() if ax is None else ax
    front = [(speed_of(known[name]), min(levels[name], top)) for name in plans.front if name in known]
    panel.plot(*zip(*front, strict=True), color=GREY, linewidth=1.0, zorder=1)
    for name, plan in known.items():
        speed, level, worst = speed_of(plan), min(levels[name], top), plan.provenance.worst
        if worst is not None:
            panel.plot([speed, speed], [min(worst, level), level], color=COLOURS[1], linewidth=1.2, alpha=0.6)
        panel.scatter([speed], [level], s=30, color=COLOURS[1], zorder=3)
        panel.annotate(name, (speed, level), xytext=(5, 4), textcoords="offset points", fontsize=FONT)
    panel.margins(x=0.15, y=0.15)
    panel.xaxis.set_major_formatter("{x:g}×")
    panel.set_xlabel("speed-up", fontsize=FONT)
    same = "" if len(finite) == len(levels) else f" (at {top:.0f}: identical)"
    panel.set_ylabel(f"PSNR to the uncached run, dB{same}", fontsize=FONT)
    note_better(panel, "upper right")
    panel.grid(alpha=0.25)
    plain_axes(panel)
    return figure
