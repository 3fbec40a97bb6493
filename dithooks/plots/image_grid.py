"""Pictures without the cache and with it, and the difference between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidSetting, WrongType
from ..validation import check_count, check_number, shown
from .inputs import Sample, check_alike, samples_of
from .style import FONT, RULE, SCALE, WIDTH, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FACTORS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)
ROWS = ("uncached", "cached", "difference")
SIDE, LINE, LETTER = 0.82, 0.155, 0.082  # inches: of the labels at the side; of a line of type; of a letter
GAP, LARGEST = 0.06, 1.6  # inches: between two; the width of one picture
WITHIN = 99.0  # per cent of the pixels that lie within the colour scale


class Column(NamedTuple):
    """One picture or frame, without the cache and with it, both (height, width, 3)."""

    caption: str
    plain: NDArray[np.float32]
    cached: NDArray[np.float32]

    @property
    def difference(self) -> NDArray[np.float32]:
        """The mean |difference| of the three channels, (height, width)."""
        found: NDArray[np.float32] = np.abs(self.plain - self.cached).mean(axis=-1)
        return found

    @property
    def psnr(self) -> float:
        """The PSNR in dB; infinite if the two are the same."""
        error = float(np.square(self.plain.astype(np.float64) - self.cached).mean())
        return math.inf if error == 0 else -10 * math.log10(error)


class Band(NamedTuple):
    """Pictures side by side, or a video's frames, which have a title."""

    title: str
    columns: Sequence[Column]


def pictures(
    reference: Any,
    cached: Any,
    captions: Sequence[str] | None = None,
    *,
    factor: float | None = None,
    columns: int = 4,
    frames: int = 4,
) -> Figure:
    """Draw pictures without the cache, those with it below them, and their difference below that.

    The difference is the mean of the channels' |difference|, times a factor that stands beside it. The PSNR to the
    uncached picture stands below each.

    Args:
        reference: pictures drawn without the cache: a tensor (N, 3, H, W) or an array (N, H, W, 3) in 0…1, or a list of
            PIL pictures. Videos are (N, F, 3, H, W), (N, F, H, W, 3), or a list of lists.
        cached: as many pictures of the same sizes, drawn with the cache.
        captions: a caption for each picture or video.
        factor: the factor by which differences are multiplied; by default, the largest of 1, 2, 5, 10, … with which
            99 % of all pixels stay within the colour scale, whose bright end is 1/factor.
        columns: the number of pictures side by side.
        frames: the number of frames shown of a video, evenly spaced, in a row of its own.

    Raises:
        WrongType: an argument is of a wrong type.
        InvalidSetting: shapes or numbers of pictures do not match, or values are not in 0…1.
        ModuleNotFoundError: matplotlib is not installed.

    Example:
        >>> import torch
        >>> from dithooks import plot
        >>> plain = torch.full((2, 3, 8, 8), 0.5)
        >>> figure = plot.pictures(plain, plain + 0.01, ["a cat", "a dog"])
        >>> [panel.get_xlabel() for panel in figure.axes[:-1] if panel.get_xlabel()]
        ['40.0 dB', '40.0 dB']
    """
    across, shown = check_count("columns", columns, 1), check_count("frames", frames, 1)
    plain, other = samples_of(reference, "reference", shown), samples_of(cached, "cached", shown)
    check_alike(plain, other)
    names = [""] * len(plain) if captions is None else _captions(captions, len(plain))
    bands: list[Band] = []
    still: list[Column] = []
    for name, one, two in zip(names, plain, other, strict=True):
        if one.total == 1:
            still.append(Column(name, one.frames[0], two.frames[0]))
        else:
            bands.append(_film(name, one, two))
    bands = [*(Band("", still[start : start + across]) for start in range(0, len(still), across)), *bands]
    if factor is not None:
        return _draw(bands, check_number("factor", factor, 0, strictly=True))
    every = np.concatenate([each.difference.ravel() for band in bands for each in band.columns])
    return _draw(bands, factor_for(float(np.percentile(every, WITHIN))))


def factor_for(largest: float) -> float:
    """The largest of 1, 2, 5, 10, … by which a difference can be multiplied without exceeding 1.

    Example:
        >>> factor_for(0.15), factor_for(0.0)
        (5.0, 1.0)
    """
    fitting = [factor for factor in FACTORS if factor * largest <= 1.0]
    return max(fitting, default=1.0) if largest > 0 else 1.0


def _captions(captions: Sequence[str], number: int) -> list[str]:
    if isinstance(captions, str) or not all(isinstance(each, str) for each in captions):
        raise WrongType(f"captions must be a string for each picture, not {shown(captions)}")
    if len(captions) != number:
        raise InvalidSetting(f"there are {len(captions)} captions for {number} pictures or videos: give one for each")
    return list(captions)


def _film(name: str, plain: Sample, cached: Sample) -> Band:
    frames = zip(plain.numbers, plain.frames, cached.frames, strict=True)
    return Band(name, [Column(f"frame {number}", one, two) for number, one, two in frames])


class GridPlace(NamedTuple):
    """A place on the figure, in inches from the left and from the top."""

    left: float
    top: float
    width: float
    height: float

    def of(self, figure: Figure) -> tuple[float, float, float, float]:
        """The place in the units of matplotlib: from below, in parts of the figure."""
        width, height = figure.get_size_inches()
        return self.left / width, 1 - (self.top + self.height) / height, self.width / width, self.height / height


def _draw(bands: Sequence[Band], factor: float) -> Figure:
    """Draw each picture at a computed place, so that all have the same size, whatever text stands beside them."""
    width = min((WIDTH - SIDE - GAP) / max(len(band.columns) for band in bands), LARGEST)
    laid, top = [], GAP
    for band in bands:
        captions = [fill(each.caption, max(int(width / LETTER), 6)) for each in band.columns]
        top += LINE * (bool(band.title) + max(text.count("\n") + bool(text) for text in captions)) + GAP
        height = (width - GAP) * max(each.plain.shape[0] / each.plain.shape[1] for each in band.columns)
        laid.append((band, captions, top, height))
        top += 3 * (height + GAP) + LINE + 2 * GAP
    figure = new_figure(top + 0.6, None)
    shades: Any = None
    for band, captions, start, height in laid:
        size, whole = width - GAP, figure.get_size_inches()
        for row, text in enumerate((*ROWS[:2], f"{ROWS[2]}\n× {factor:g}")):
            middle = start + row * (height + GAP) + height / 2
            figure.text((SIDE - GAP) / whole[0], 1 - middle / whole[1], text, ha="right", va="center", fontsize=FONT)
        if band.title:
            above = start - GAP - LINE * (1 + max(text.count("\n") + bool(text) for text in captions))
            figure.text(SIDE / whole[0], 1 - above / whole[1], band.title, va="top", fontsize=FONT)
        for number, (each, caption) in enumerate(zip(band.columns, captions, strict=True)):
            places = [GridPlace(SIDE + number * width, start + row * (height + GAP), size, height) for row in range(3)]
            panels = [figure.add_axes(place.of(figure), xticks=[], yticks=[]) for place in places]
            panels[0].imshow(each.plain.clip(0, 1), interpolation="nearest")
            panels[1].imshow(each.cached.clip(0, 1), interpolation="nearest")
            scaled = each.difference * factor
            shades = panels[2].imshow(scaled, cmap=SCALE, vmin=0.0, vmax=1.0, interpolation="nearest")
            for panel in panels:
                panel.spines[:].set(color=RULE, linewidth=0.5)
            panels[0].set_title(caption, fontsize=FONT, pad=3)
            psnr = "identical" if math.isinf(each.psnr) else f"{each.psnr:.1f} dB"
            panels[2].set_xlabel(psnr, fontsize=FONT, labelpad=3)
    scale = figure.add_axes(GridPlace(SIDE, top, WIDTH - SIDE - 2 * GAP, 0.08).of(figure))
    beyond = any(float(each.difference.max()) * factor > 1 for band in bands for each in band.columns)
    ends: Literal["max", "neither"] = "max" if beyond else "neither"
    bar = figure.colorbar(shades, cax=scale, orientation="horizontal", extend=ends, ticks=[0, 0.5, 1])
    scale.set_xticklabels([f"{part / factor:g}" for part in (0, 0.5, 1)], fontsize=FONT)
    bar.set_label("mean |difference| of the channels, in 0 … 1", fontsize=FONT)
    return figure
