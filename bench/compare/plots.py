"""Plots of the comparison, as SVG; their data are the CSV files next to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from bench.compare.curves import Axis, cost, envelope, libraries, measured, psnr_of, useful
from bench.compare.quality import interval
from bench.compare.sweep import Row
from bench.peers.own import LIBRARY, SEARCH
from dithooks.storage.replacement import replacing

COLOURS = {  # Okabe and Ito's, which all can tell apart
    LIBRARY: "#D55E00",
    "cache-dit": "#0072B2",
    "diffusers": "#009E73",
    "msmodelslim": "#CC79A7",
    "no library": "#777777",
}
MARKERS = {
    LIBRARY: "o",
    "cache-dit": "s",
    "diffusers": "^",
    "msmodelslim": "D",
    "no library": "X",
}  # as well as colours
SHOWN = 0.95  # of the uncached run's blocks: what takes more is nothing to compare
GAP = 0.8  # between groups of rows, in rows
AXES: tuple[tuple[Axis, str], ...] = (
    ("fraction", "block executions, of the uncached run's"),
    ("time", "time of one thread, of the uncached run's"),
)


def draw(found: Mapping[str, tuple[dict[str, Any], Sequence[Row]]], folder: Path) -> None:
    """All of them."""
    with plt.style.context("default"), matplotlib.rc_context({"svg.hashsalt": "dithooks", "font.size": 9}):
        for name, (about, rows) in found.items():
            figure = quality(about, rows)
            save(figure, folder / f"compare_{name}.svg")
        save(schedules({name: rows for name, (_, rows) in found.items()}), folder / "schedules.svg")
        save(costs({name: rows for name, (_, rows) in found.items()}), folder / "search_cost.svg")


def save(figure: Any, path: Path) -> None:
    """Without a date, so that the same data give the same file."""
    with replacing(path) as draft:
        figure.savefig(draft, metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)


def quality(about: dict[str, Any], rows: Sequence[Row]) -> Any:
    """Mean PSNR over compute: every setting a mark, each library's best a line."""
    figure, panels = plt.subplots(1, len(AXES), figsize=(8, 4.2), sharey=True, layout="constrained")
    by_library = libraries(row for row in useful(rows) if cost(row, "fraction") <= SHOWN)
    for panel, (axis, label) in zip(panels, AXES, strict=True):
        for name, methods in by_library.items():
            colour, marker = COLOURS[name], MARKERS[name]
            every = [row for each in methods.values() for row in each]
            places = [cost(row, axis) for row in every], [psnr_of(row).mean() for row in every]
            panel.scatter(*places, 9, colour, marker=marker, alpha=0.35, linewidths=0)
            drawn = [methods[SEARCH]] if SEARCH in methods and name == LIBRARY else methods.values()
            best = envelope(drawn, axis)
            line = [cost(row, axis) for row in best], [psnr_of(row).mean() for row in best]
            panel.plot(*line, color=colour, marker=marker, markersize=4.5)
            if name == LIBRARY:
                bounds = [interval(psnr_of(row))[1:] for row in best]
                panel.fill_between(line[0], *zip(*bounds, strict=True), color=colour, alpha=0.2, linewidth=0)
        panel.set_xlabel(label)
        panel.set_xlim(0.15, 1.02)
        panel.grid(alpha=0.25)
        panel.set_title("upper left is better", fontsize=9, color="#555555", loc="left")
    panels[0].set_ylabel("PSNR to the uncached run, dB")
    handles = [
        plt.Line2D([], [], color=COLOURS[name], marker=MARKERS[name], markersize=4.5, label=label_of(name))
        for name in by_library
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(
        f"{about['subject']}: {len(about['cases'])} cases, {about['steps']} steps. A mark is a setting, a line the "
        "best of a library's",
        fontsize=10,
    )
    return figure


def label_of(name: str) -> str:
    """In the legend."""
    return f"{LIBRARY}, {SEARCH} (band: 95 % interval)" if name == LIBRARY else f"{name}, best"


def schedules(found: Mapping[str, Sequence[Row]]) -> Any:
    """The steps that each plan computes, one strip a plan."""
    strips = [
        (name, row)
        for name, rows in found.items()
        for row in measured(rows)
        if row.method == SEARCH and row.title.startswith(LIBRARY)
    ]
    places = places_of([name for name, _ in strips])
    figure, panel = plt.subplots(figsize=(8, 0.22 * -places[-1] + 1))
    for height, (_, row) in zip(places, strips, strict=True):
        strip(panel, height, row)
    panel.set_yticks(places, [f"{name}, {row.value:g}×" for name, row in strips])
    panel.set_xlabel("sampling step: filled squares are computed, empty ones reused")
    panel.set_xlim(-0.7, None)
    panel.set_ylim(places[-1] - 0.8, 0.8)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.tick_params(left=False)
    return figure


def places_of(groups: Sequence[str]) -> list[float]:
    """The heights of rows from 0 downwards, with a gap wherever another group begins."""
    starts = [0, *(now != before for before, now in pairwise(groups))]
    return [-(row + GAP * sum(starts[: row + 1])) for row in range(len(groups))]


def strip(panel: Axes, height: float, row: Row) -> None:
    """One plan's steps, from the marks in its row."""
    marks = [mark == "●" for mark in row.shown.split()[0]]
    for computed, face in ((True, COLOURS[LIBRARY]), (False, "none")):
        places = [step for step, mark in enumerate(marks) if mark is computed]
        panel.scatter(places, [height] * len(places), 34, face, marker="s", edgecolors=COLOURS[LIBRARY], linewidths=0.6)


def costs(found: Mapping[str, Sequence[Row]]) -> Any:
    """What each search took, in run equivalents: a group of bars for each model and library."""
    bars = [
        (name, row.library.rsplit(" ", 1)[0], row)
        for name, rows in found.items()
        for row in measured(rows)
        if row.spent is not None and row.method == "search"
    ]
    bars.sort(key=lambda bar: ([*found].index(bar[0]), bar[1] != LIBRARY, bar[2].value))
    places = places_of([f"{name}, {library}" for name, library, _ in bars])
    figure, panel = plt.subplots(figsize=(8, 0.2 * -places[-1] + 1))
    for height, (_, library, row) in zip(places, bars, strict=True):
        assert row.spent is not None
        took = row.spent.run_equivalents
        hatch = "" if library == LIBRARY else "////"
        panel.barh(height, took, color=COLOURS[library], hatch=hatch, edgecolor="white", linewidth=0)
        panel.text(took + 0.15, height, f"{took:.1f}", va="center", fontsize=8)
    panel.set_yticks(places, [f"{row.value:g}×" for *_, row in bars], fontsize=8)
    groups: dict[tuple[str, str], list[float]] = {}
    for height, (name, library, _) in zip(places, bars, strict=True):
        groups.setdefault((name, library), []).append(height)
    for (name, library), heights in groups.items():
        middle = sum(heights) / len(heights)
        panel.annotate(
            f"{name}\n{library}", (0, middle), (-42, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
            ha="right", va="center",
        )  # fmt: skip
    panel.set_title("shorter is better", fontsize=9, color="#555555", loc="right")
    panel.set_xlabel("what a search takes, in block executions of one uncached run (run equivalents), by target")
    panel.set_ylim(places[-1] - 0.8, 0.8)
    panel.spines[["top", "right"]].set_visible(False)
    return figure
