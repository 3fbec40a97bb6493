"""HTML and SVG for notebooks and reports: tables, the steps of a plan, points on two axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

COMPUTED, REUSED, RULE, TEXT = "#0072B2", "#F0B990", "#BBBBBB", "#777777"
MEANINGS = {
    "●": ("computed", COMPUTED),
    "○": ("reused", REUSED),
    "◐": ("both", "#CC79A7"),
    "◑": ("only the last blocks computed", "#56B4E9"),
    "◒": ("other blocks computed", "#009E73"),
    "·": ("not called", "none"),
}
SIDE, GAP = 9, 2  # pixels of a step's square, and between two
WIDTH, HEIGHT, MARGIN = 360, 200, 44  # pixels of a diagram


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table; ready-made HTML is :class:`Raw`.

    Example:
        >>> table(["a"], [["<1>"]])
        '<table><thead><tr><th>a</th></tr></thead><tbody><tr><td>&lt;1&gt;</td></tr></tbody></table>'
    """
    header = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{_cell(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table>"


class Raw(str):
    """A part of a table that is HTML already."""


def step_squares(picture: str) -> Raw:
    """Draw the steps of a run as a row of squares, each with its number and state for the mouse.

    Args:
        picture: a sign for each step: ● is computed, ○ reused, ◐ both, by branch, ◑ computed in the last blocks alone,
            ◒ in others alone, · not called. Other signs part the steps of one transformer from those of the next.

    Example:
        >>> step_squares("●○").count("<rect"), "step 1: reused" in step_squares("●○")
        (2, True)
    """
    squares = []
    for step, sign in enumerate(picture):
        if sign not in MEANINGS:
            continue
        meaning, colour = MEANINGS[sign]
        place = f'x="{step * (SIDE + GAP) + 0.5}" y="0.5" width="{SIDE}" height="{SIDE}"'
        title = f"<title>step {step}: {meaning}</title>"
        squares.append(f'<rect {place} fill="{colour}" stroke="{RULE}">{title}</rect>')
    counts = [f"{picture.count(sign)} {meaning}" for sign, (meaning, _) in MEANINGS.items() if sign in picture]
    label = f"{sum(sign in MEANINGS for sign in picture)} steps: {', '.join(counts)}"
    size = f'width="{len(picture) * (SIDE + GAP) + 1}" height="{SIDE + 2}"'
    return Raw(f'<svg {size} role="img" aria-label="{label}">{"".join(squares)}</svg>')


def diagram(points: Mapping[str, tuple[float, float]], axes: tuple[str, str], marked: str = "") -> Raw:
    """Draw named points on two axes, upper left to lower right, as an SVG of 360 × 200 pixels.

    Args:
        points: the place of each, by its name, which the mouse shows.
        axes: the meaning of the horizontal and the vertical axis.
        marked: the name of the one that is filled.
    """
    if not points:
        return Raw("")
    (left, right), (low, high) = (_span([place[axis] for place in points.values()]) for axis in (0, 1))
    dots = []
    for name, (x, y) in points.items():
        across = MARGIN + (x - left) / (right - left) * (WIDTH - MARGIN - 12)
        up = HEIGHT - MARGIN - (y - low) / (high - low) * (HEIGHT - MARGIN - 12)
        fill = COMPUTED if name == marked else "white"
        place = f'cx="{across:.1f}" cy="{up:.1f}" r="4" fill="{fill}" stroke="{COMPUTED}"'
        dots.append(f"<circle {place}><title>{escape(name)}</title></circle>")
    floor, end = HEIGHT - MARGIN, WIDTH - 12
    lines = f'<path d="M{MARGIN} 12V{floor}H{end}" fill="none" stroke="{RULE}"/>'
    texts = [
        (MARGIN, floor + 15, "start", f"{left:.3g}"),
        (end, floor + 15, "end", f"{right:.3g}"),
        ((MARGIN + end) / 2, floor + 31, "middle", axes[0]),
        (MARGIN - 5, floor, "end", f"{low:.3g}"),
        (MARGIN - 5, 20, "end", f"{high:.3g}"),
        (MARGIN + 5, 12, "start", axes[1]),
    ]
    words = "".join(
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="11" fill="{TEXT}">{escape(text)}</text>'
        for x, y, anchor, text in texts
    )
    label = escape(f"{axes[1]} over {axes[0]} of {len(points)} plans")
    size = f'width="{WIDTH}" height="{HEIGHT}"'
    return Raw(f'<svg {size} role="img" aria-label="{label}">{lines}{"".join(dots)}{words}</svg>')


def _cell(cell: object) -> str:
    return cell if isinstance(cell, Raw) else escape(str(cell))


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of an axis; a single value is in its middle."""
    low, high = min(values), max(values)
    return (low, high) if low < high else (low - 1, high + 1)
