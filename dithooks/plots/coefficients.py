"""The weights of a plan: the share of each anchor in the residual of each reused step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..config.cache_plan import CachePlan
from ..config.transformer_plan import TransformerPlan
from ..errors import WrongType
from ..planning.costs import Cost
from ..planning.plan import plan
from ..predictors.fitted import StepWeights
from ..recording.recording import Recording
from ..tuning.result import SearchResult
from ..validation import shown
from .style import COLOURS, FONT, MARKERS, RULE, new_figure, plain_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEIGHT = 2.1  # inches of a panel
ORDINALS = ("newest anchor", "the one before", "third last")
AXES = {"sigma": "noise level σ", "timestep": "timestep", "step": "sampling step"}
WIDE = 50.0  # the ratio of largest to smallest σ from which on the axis is logarithmic


def coefficients(
    found: CachePlan | SearchResult | Recording,
    target_speedup: float = 2.0,
    *,
    cost: Cost = "time",
    anchors: int = 2,
) -> Figure:
    """Draw the weights by which each reused residual or output is made from the anchors, over σ.

    Each transformer is a panel, or each branch of guidance where it has weights of its own. Steps go from left to
    right. Grey lines are computed steps; between two of them, each reused step has a mark for every anchor. Anchors are
    the residuals or outputs of the last computed steps.

    Args:
        found: a plan, the result of a search, whose plan is drawn, or a recording, from which a plan is made.
        target_speedup: as for :func:`dithooks.plan`, for a recording only.
        cost: as for :func:`dithooks.plan`, for a recording only.
        anchors: as for :func:`dithooks.plan`, for a recording only.

    Raises:
        WrongType: ``found`` is none of these.
        DitHooksError: as :func:`dithooks.plan`.
        ModuleNotFoundError: matplotlib is not installed.

    Example:
        >>> from dithooks import plot
        >>> from dithooks.demo import load_plan
        >>> figure = plot.coefficients(load_plan("2x"))
        >>> [line.get_label() for line in figure.axes[0].lines[-3:]]
        ['newest anchor', 'the one before', 'third last']
    """
    if isinstance(found, Recording):
        found = plan(found, target_speedup, cost=cost, anchors=anchors)
    elif isinstance(found, SearchResult):
        found = found.plan
    elif not isinstance(found, CachePlan):
        raise WrongType(f"coefficients takes a CachePlan, a SearchResult or a Recording, not {shown(found)}")
    drawn = [each for piece in found.pieces for own in piece.ranges for each in _weights_of(own)]
    figure = new_figure(HEIGHT * len(drawn) + 0.45)
    panels: list[Axes] = figure.subplots(len(drawn), squeeze=False)[:, 0].tolist()
    for panel, (piece, weights, branch) in zip(panels, drawn, strict=True):
        draw_weights(panel, piece, weights, branch)
    longest = max(panels, key=lambda panel: len(panel.lines))
    handles = [line for line in longest.lines if not str(line.get_label()).startswith("_")]
    figure.legend(handles=handles, loc="outside upper left", ncols=4, frameon=False, fontsize=FONT, columnspacing=1.0,
                  handletextpad=0.3, borderpad=0.1, handlelength=1.4)  # fmt: skip
    return figure


def _weights_of(piece: TransformerPlan) -> list[tuple[TransformerPlan, StepWeights, int | None]]:
    """(transformer, weights, number of the branch) for each branch, or once without a number for all of them."""
    if not piece.branches:
        return [(piece, piece.coefficients, None)]
    return [(piece, each.coefficients, branch) for branch, each in enumerate(piece.branches)]


def draw_weights(panel: Axes, piece: TransformerPlan, weights: StepWeights, branch: int | None) -> None:
    """Draw the weights of one transformer or branch: a line for each anchor, broken where a step is computed."""
    times, axis = (range(len(piece.steps)), "step") if piece.sigmas is None else (piece.sigmas, piece.axis)
    first, end = piece.called or (0, len(piece.steps))
    called = range(first, end)
    computed = [step for step in called if piece.steps[step]]
    panel.axhline(0.0, color="black", linewidth=0.8, label="_zero")
    for step in computed:
        label = "computed" if step == computed[0] else "_computed"
        panel.axvline(times[step], color=RULE, linewidth=2.0, label=label, zorder=0)
    for anchor in range(max((len(each) for each in weights if each), default=0)):
        # One point a step, so that a line never crosses a computed one.
        heights = [_weight(weights[step], anchor) for step in called]
        panel.plot(
            [times[step] for step in called],
            heights,
            color=COLOURS[anchor % len(COLOURS)],
            marker=MARKERS[anchor % len(MARKERS)],
            markersize=4.5,
            linewidth=1.0,
            label=ORDINALS[anchor] if anchor < len(ORDINALS) else f"{anchor + 1}th last",
        )
    shown = [float(times[step]) for step in called]
    if axis == "sigma" and min(shown) > 0 and max(shown) > 1 and max(shown) / min(shown) > WIDE:
        panel.set_xscale("log")
    if shown[-1] < shown[0]:
        panel.invert_xaxis()
    panel.set_xlabel(AXES[axis], fontsize=FONT)
    panel.set_ylabel("weight", fontsize=FONT)
    where = ", ".join(filter(None, [piece.path, "" if branch is None else f"branch {branch}"]))
    blocks = f"blocks {piece.first} … {piece.first + piece.blocks - 1} of {piece.total}"
    payload = "output" if piece.payload == "output" else blocks
    panel.set_title(f"{where}: {payload}" if where else payload, fontsize=FONT, loc="left")
    plain_axes(panel)


def _weight(weights: Sequence[float] | None, anchor: int) -> float:
    return weights[anchor] if weights is not None and anchor < len(weights) else math.nan
