"""A map of one run: the blocks that were computed at each step, and those that were reused."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

from ..config.cache_plan import CachePlan
from ..handle import CacheHandle
from .step_maps import Bar, StepMap, maps_of
from .style import COLOURS, FONT, GREY, LIGHT, PALE, SCALE, new_figure, plain_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

FULL, SMALL = 0.9, 0.42  # of a cell: computed and reused differ by size, whatever their colours
ROW, LOWEST, HIGHEST = 0.115, 0.45, 2.4  # inches: of a block; of a panel
LINE = 58  # letters of a title
ROWS, MANY = 30, 1500  # blocks and cells, beyond which blocks of a step that are alike are one bar


def steps(cache: CacheHandle | CachePlan, *, run: int | None = None) -> Figure:
    """Draw a map of sampling steps (x) and blocks (y): large squares were computed, small ones reused.

    If there are many blocks, those of a step that are alike are one bar, wide or narrow.

    Each branch of each range is a panel; ranges of the same blocks have one together. Where a difference decided a
    call, it is the colour of the range's blocks at that step, with a colour bar for its size.

    Args:
        cache: a handle, attached or removed; or a plan.
        run: the number of the sampling run, from 0 on; by default, the last run of each range.

    Raises:
        WrongType: ``cache`` is neither.
        InvalidSetting: the handle has no decisions yet, or there is no such run.
        ModuleNotFoundError: matplotlib is not installed.

    Example:
        >>> import torch
        >>> from dithooks import DitCacheConfig, dit_cache, plot
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
        ...     def forward(self, x, timestep):
        ...         for block in self.blocks:
        ...             x = block(x)
        ...         return x
        >>> model = Model()
        >>> with torch.no_grad(), dit_cache(model, DitCacheConfig(1, 2)) as cache:
        ...     for t in (1.0, 0.8, 0.6, 0.4):
        ...         _ = model(torch.ones(1, 4), t)
        >>> figure = plot.steps(cache)  # figure.savefig("steps.png"), or plot.save(figure, "steps.svg")
        >>> figure.axes[0].get_title(loc="left")
        'blocks: 1 of 4 steps reused'
    """
    maps = maps_of(cache, run)
    heights = [min(max(ROW * each.extent.total, LOWEST), HIGHEST) for each in maps]
    titles = [fill(each.title(LINE), LINE) for each in maps]
    lines = sum(1 + title.count("\n") for title in titles)
    around = 1.25 if any(part.values for each in maps for part in each.parts) else 0.7
    figure = new_figure(sum(heights) + 0.18 * (len(maps) + lines) + around)
    shades = _shades(maps)
    grid = {"height_ratios": heights}
    panels: list[Axes] = figure.subplots(len(maps), squeeze=False, sharex=True, gridspec_kw=grid)[:, 0].tolist()
    for panel, each, title in zip(panels, maps, titles, strict=True):
        draw_map(panel, each, shades)
        panel.set_title(title, fontsize=FONT, loc="left")
    called = [step for each in maps for step in each.reused]
    panels[-1].set_xlim(min(called) - 0.7, max(called) + 0.7)  # of all: they share it
    panels[-1].set_xlabel("sampling step", fontsize=FONT)
    panels[-1].tick_params(labelbottom=True)
    if shades is not None:
        bar = figure.colorbar(shades, ax=panels, location="bottom", aspect=40, pad=0.02)
        bar.set_label("difference that decided", fontsize=FONT)
        bar.ax.tick_params(labelsize=FONT)
    _legend(figure, maps, shades is not None)
    return figure


def draw_map(panel: Axes, drawn: StepMap, shades: ScalarMappable | None) -> None:
    """Draw one map: collections labelled ``computed`` and ``reused``, for blocks with a difference and without one."""
    from matplotlib.collections import PolyCollection
    from matplotlib.ticker import MaxNLocator

    many = drawn.extent.total > ROWS or len(drawn.reused) * drawn.extent.total > MANY
    for reused, size in ((False, FULL), (True, SMALL)):
        bars = drawn.bars(reused, many)
        for valued in (True, False):
            own = [bar for bar in bars if (bar.value is not None) is valued]
            if not own:
                continue
            look: dict[str, Any] = {"facecolors": _plain(reused, shades is not None)}
            if valued and shades is not None:
                look = {"array": [bar.value for bar in own], "cmap": shades.cmap, "norm": shades.norm}
            corners = [_corners(bar, size, 1.0 if many else size) for bar in own]
            label = "reused" if reused else "computed"
            panel.add_collection(PolyCollection(corners, linewidths=0, label=label, **look))
    panel.set_ylim(-0.6, drawn.extent.total - 0.4)
    panel.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    panel.yaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    panel.set_ylabel("block", fontsize=FONT)
    plain_axes(panel)


def _corners(bar: Bar, width: float, height: float) -> list[tuple[float, float]]:
    left, right = bar.step - width / 2, bar.step + width / 2
    low, high = bar.first - height / 2, bar.last + height / 2
    return [(left, low), (left, high), (right, high), (right, low)]


def _plain(reused: bool, shaded: bool) -> str:
    """The colour of blocks without a difference."""
    if shaded:
        return LIGHT if reused else GREY
    return PALE if reused else COLOURS[0]


def _shades(maps: Sequence[StepMap]) -> ScalarMappable | None:
    """The colour scale of all differences, None if there are none."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    values = [value for each in maps for part in each.parts for value in part.values.values()]
    if not values:
        return None
    return ScalarMappable(Normalize(min(0.0, *values), max(values) or 1.0), SCALE)


def _legend(figure: Figure, maps: Sequence[StepMap], shaded: bool) -> None:
    from matplotlib.lines import Line2D

    words = {False: "computed", True: "reused"}
    if shaded:
        bare = any(bar.value is None for each in maps for bar in each.bars(False, True))
        words = {False: "computed (grey: not compared)" if bare else "computed", True: "reused"}
    handles = [
        Line2D(
            [], [], linestyle="", marker="s", markersize=4 if reused else 8, color=_plain(reused, shaded), label=text
        )
        for reused, text in words.items()
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=2, frameon=False, fontsize=FONT, borderpad=0.1)
