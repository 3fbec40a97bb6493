"""Quality over speed-up: the PSNR of plans that were run, or the predicted error of a recording's Pareto front."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import InvalidSetting, WrongType
from ..planning.costs import Cost
from ..planning.plan import frontier as predicted
from ..recording.recording import Recording
from ..tuning.evaluation import Evaluation
from ..tuning.result import SearchResult
from .style import COLOURS, FONT, GREY, MARKERS, figure_of, new_figure, note_better, plain_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEIGHT = 2.9  # inches
TICKS = (1.0, 1.5, 2.0, 3.0, 5.0)  # of speed-ups, and ten times as much
Point = tuple[float, float, Evaluation]


def frontier(
    *found: SearchResult | Recording,
    cost: Cost = "time",
    anchors: int = 2,
    late_error_weight: float | None = None,
    label: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw quality over speed-up.

    For results of searches, each plan that was run is a mark: its measured PSNR to the uncached run over its measured
    speed-up, with a thin line down to the lowest PSNR of a sample. Colour and shape of a mark stand for the blocks and
    the number of anchors. The plan that a search chose has a ring, and the rings of several searches are joined. Marks
    on the axis are the targets.

    For recordings, the Pareto front of predicted error and predicted speed-up is a line.

    Args:
        found: results of searches, such as those of one model for several targets; or recordings.
        cost: as for :func:`dithooks.frontier`, for recordings only.
        anchors: as for :func:`dithooks.frontier`, for recordings only.
        late_error_weight: as for :func:`dithooks.frontier`, for recordings only.
        label: the label of the line, for recordings only.
        ax: axes to draw on; by default, a new figure is made.

    Returns:
        The figure.

    Raises:
        WrongType: nothing is given, or something else, or results and recordings together.
        InvalidSetting: there is nothing to draw: no plan could be run, or nothing can be reused.
        ModuleNotFoundError: matplotlib is not installed.

    Example:
        >>> import torch
        >>> from dithooks import plot, record
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
        ...     def forward(self, x, timestep):
        ...         for block in self.blocks:
        ...             x = block(x * timestep)
        ...         return x
        >>> @torch.no_grad()
        ... def run(model):
        ...     return [model(torch.ones(1, 4), t) for t in (1.0, 0.8, 0.6, 0.4, 0.2)]
        >>> figure = plot.frontier(record(Model(), run), cost="blocks")
        >>> figure.axes[0].get_ylabel()
        'predicted error'
    """
    results = [each for each in found if isinstance(each, SearchResult)]
    recordings = [each for each in found if isinstance(each, Recording)]
    if not found or found not in (tuple(results), tuple(recordings)):
        raise WrongType(f"frontier takes results of searches, or recordings, one or several, not {_short(found)}")
    points = [_measured(result) for result in results]
    if results and not any(points):
        why = next((each.failure for result in results for each in result.evaluations if each.failure), "no picture")
        raise InvalidSetting(f"there is nothing to show: none of the plans could be run ({why})")
    fronts = [predicted(each, cost=cost, anchors=anchors, late_error_weight=late_error_weight) for each in recordings]
    lines = [[(speedup, error) for speedup, error in front if error] for front in fronts]
    if recordings and not any(lines):
        raise InvalidSetting(
            "there is nothing to show: nothing of these runs can be reused (plan(recording, 2.0) gives the reason)"
        )
    figure = new_figure(HEIGHT) if ax is None else figure_of(ax)
    panel = figure.subplots() if ax is None else ax
    if results:
        _draw_measured(panel, results, points)
    else:
        _draw_predicted(panel, recordings, lines, [label or _named(each, anchors) for each in recordings], cost)
    note_better(panel, "upper right" if results else "lower right")
    panel.grid(alpha=0.25)
    plain_axes(panel)
    return figure


def _measured(result: SearchResult) -> list[Point]:
    """(speed-up, PSNR, evaluation) of each plan that could be run."""
    return [(each.speedup, each.psnr, each) for each in result.evaluations if each.psnr is not None]


def _draw_measured(panel: Axes, results: Sequence[SearchResult], points: Sequence[Sequence[Point]]) -> None:
    every = [point for each in points for point in each]
    finite = [psnr for _, psnr, _ in every if math.isfinite(psnr)]
    top = max(finite, default=100.0) + 5.0  # the place of plans that are identical to the last bit
    kinds = list(dict.fromkeys(kind_of(each) for *_, each in every))
    for number, kind in enumerate(kinds):
        own = [(speed, min(psnr, top), each) for speed, psnr, each in every if kind_of(each) == kind]
        colour = COLOURS[number % len(COLOURS)]
        for speed, psnr, each in own:
            worst = psnr if each.score is None else min(each.score.worst, psnr)
            panel.plot([speed, speed], [worst, psnr], color=colour, linewidth=0.8, alpha=0.6, label="_worst")
        places = [speed for speed, *_ in own], [psnr for _, psnr, _ in own]
        marker = MARKERS[number % len(MARKERS)]
        panel.scatter(*places, s=26, color=colour, marker=marker, label=kind, zorder=3)
    chosen = [
        (speed, min(psnr, top))
        for result, own in zip(results, points, strict=True)
        for speed, psnr, each in own
        if each.plan.pieces == result.plan.pieces
    ]
    chosen.sort()
    panel.plot(
        *zip(*chosen, strict=True), color=GREY, linewidth=1.0 if len(results) > 1 else 0.0, marker="o", markersize=10,
        markerfacecolor="none", markeredgecolor="black", label="chosen", zorder=2,
    )  # fmt: skip
    targets = sorted({result.plan.provenance.target for result in results})
    on_axis = panel.get_xaxis_transform()
    panel.plot(targets, [0.0] * len(targets), "k|", markersize=11, transform=on_axis, clip_on=False, label="target")
    blocks = all(math.isclose(speed * each.blocks, 1.0, rel_tol=1e-9) for speed, _, each in every)
    panel.xaxis.set_major_formatter("{x:g}×")
    panel.set_xlabel("speed-up, times fewer blocks run" if blocks else "speed-up, measured", fontsize=FONT)
    same = "" if len(finite) == len(every) else f" (at {top:.0f}: identical)"
    panel.set_ylabel(f"PSNR to the uncached run, dB{same}", fontsize=FONT)
    panel.legend(fontsize=FONT, borderpad=0.2, handletextpad=0.4, labelspacing=0.3, framealpha=0.85, edgecolor="none")


def kind_of(evaluation: Evaluation) -> str:
    """The blocks that a plan caches, or that it is outputs, and its number of anchors, as a label.

    Example:
        >>> from dithooks import CachePlan
        >>> from dithooks.demo import load_plan
        >>> kind_of(Evaluation(load_plan("2x"), 1.0, 2.0, None, 0.5))
        'output, 3 anchors'
    """
    pieces = evaluation.plan.pieces
    ranges = " and ".join(f"{own.first}–{own.first + own.blocks - 1}" for piece in pieces for own in piece.ranges)
    anchors = max(own.predictor.anchors for piece in pieces for own in piece.ranges)
    where = "output" if pieces[0].payload == "output" else f"blocks {ranges}"
    return f"{where}, {anchors} anchor{'s' * (anchors != 1)}"


def _draw_predicted(
    panel: Axes,
    recordings: Sequence[Recording],
    lines: Sequence[Sequence[tuple[float, float]]],
    labels: Sequence[str],
    cost: Cost,
) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    before = sum(not str(line.get_label()).startswith("_") for line in panel.lines)
    for number, (ways, label) in enumerate(zip(lines, labels, strict=True), before):
        panel.plot(
            *zip(*ways, strict=True), color=COLOURS[number % len(COLOURS)], marker=MARKERS[number % len(MARKERS)],
            markersize=3.5, linewidth=1.0, label=label,
        )  # fmt: skip
    panel.set_yscale("log")
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=TICKS))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter("{x:g}×")
    panel.set_xlabel(f"predicted speed-up, in {'time' if cost == 'time' else 'block executions'}", fontsize=FONT)
    panel.set_ylabel("predicted error", fontsize=FONT)
    panel.legend(frameon=False, fontsize=FONT, borderpad=0.2)


def _named(recording: Recording, anchors: int) -> str:
    return f"{recording.made.model}, {recording.steps} steps, {anchors} anchor{'s' * (anchors != 1)}"


def _short(found: Sequence[object]) -> str:
    return ", ".join(type(each).__name__ for each in found) or "nothing"
