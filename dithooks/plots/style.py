"""The common style of all plots: their size, type and colours, and how they are saved."""

from __future__ import annotations

import os
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import InvalidSetting
from ..storage.replacement import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 4.7  # inches: 450 pixels of a page, where type of 9 points is as large as that of the page
FONT = 9.0  # points; nothing is smaller
# Okabe and Ito's colours, which colour-blind readers can distinguish, in the order in which they are used.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # one for each colour, for print without colours
PALE, GREY, LIGHT, RULE = "#F0B990", "#777777", "#BBBBBB", "#D0D0D0"
SCALE = "viridis"  # even to the eye, also of the colour-blind, in print, and without a grey of its own
MISSING = 'plots need matplotlib: pip install "dithooks[plot]"'


def new_figure(height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    """An empty figure of a height in inches. pyplot does not hold it, so that it is freed with its last reference.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(MISSING, name=error.name) from error
    figure = Figure(figsize=(WIDTH, height), layout=layout, facecolor="white")
    vars(figure)["_repr_png_"] = partial(_png, figure)  # notebooks call it, also if pyplot was never imported
    return figure


def figure_of(ax: Axes) -> Figure:
    """The figure of axes, also if these are in a subfigure."""
    part: Any = ax.figure
    if part is None:
        raise InvalidSetting("ax is in no figure any more: give axes of a figure")
    whole: Figure = part.figure
    return whole


def plain_axes(ax: Axes) -> None:
    """Set ticks and labels to the common size, and remove the frame at the top and at the right."""
    ax.tick_params(labelsize=FONT)
    ax.xaxis.label.set_fontsize(FONT)
    ax.yaxis.label.set_fontsize(FONT)
    ax.spines[["top", "right"]].set_visible(False)


def note_better(ax: Axes, where: Literal["upper right", "lower right"]) -> None:
    """Write above the axes in which corner the best points lie."""
    ax.set_title(f"{where} is better", loc="right", fontsize=FONT, color=GREY)


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure to a file: the same bytes for the same figure, without date and version, with constant ids.

    In SVG, text is written as outlines, so that it looks the same on every page.

    Args:
        figure: a figure of this module, or any other.
        path: the file, whose ending is ``.svg``, ``.png``, ``.pdf`` or another one that matplotlib can write.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: matplotlib does not know the ending.

    Example:
        >>> import tempfile
        >>> from dithooks import plot
        >>> from dithooks.demo import load_plan
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("one.svg", "two.svg"):
        ...         plot.save(plot.steps(load_plan("2x")), Path(folder, name))
        ...     Path(folder, "one.svg").read_bytes() == Path(folder, "two.svg").read_bytes()
        True
    """
    try:
        from matplotlib import rc_context
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(MISSING, name=error.name) from error
    nothing = {".svg": ("Date", "Creator"), ".pdf": ("CreationDate", "Creator", "Producer"), ".png": ("Software",)}
    left_out = dict.fromkeys(nothing.get(Path(path).suffix.lower(), ()))
    with rc_context({"svg.hashsalt": "dithooks", "svg.fonttype": "path"}), replacing(path) as draft:
        figure.savefig(draft, metadata=left_out or None, dpi=200)


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=144)
    return buffer.getvalue()
