"""HTML pages of ``dithooks search`` and ``dithooks compare``: one file each, with its pictures in it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from importlib import import_module
from io import BytesIO
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..markup import Raw, step_squares, table
from ..recording.image_metrics import Samples
from ..tuning.result import SearchResult
from .compare_output import rows
from .comparison import Comparison
from .media import as_frames, span_of

FACTORS = (1, 2, 5, 10, 20, 50, 100)  # by which a difference is made visible
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222;
       background: #fff }
table { border-collapse: collapse; margin: .6rem 0; display: block; overflow-x: auto }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap }
pre { background: #f4f4f4; padding: .8rem; overflow-x: auto }
.strip { display: flex; gap: .5rem; overflow-x: auto } figure { margin: 0 } figcaption { color: #666; font-size: 13px }
img { width: 150px; image-rendering: pixelated; display: block }
.legend i { display: inline-block; width: .7em; height: .7em; border: 1px solid #bbb }
"""
LEGEND = (
    '<p class="legend"><i style="background:#0072B2"></i> computed &nbsp; <i style="background:#F0B990"></i> reused'
    ' &nbsp; <i style="background:#CC79A7"></i> computed in one branch, reused in another</p>'
)


def comparison_page(comparison: Comparison, captions: Sequence[str], about: Mapping[str, Any]) -> str:
    """Return the page of ``dithooks compare``.

    Args:
        comparison: what was measured.
        captions: of the pictures; empty if they are not known.
        about: what was run, on which machine and when.
    """
    head, *others = rows(comparison)
    parts = [_facts(about), table(head, others), LEGEND]
    for each in comparison.outcomes:
        parts.append(f"<h2>{escape(each.setting.name)}</h2>")
        steps = each.decisions["steps"].items()
        parts.append(table(["range", "steps"], [[name or "model", step_squares(picture)] for name, picture in steps]))
        parts.append(strips(comparison.samples, each.samples, captions))
        parts += [f"<p>{escape(remark)}</p>" for remark in each.remarks]
    seconds = f"{median(comparison.seconds):.2f} s without a cache"
    return page("dithooks compare", [f"<p>{len(comparison.outcomes)} settings; {seconds}, as the median</p>", *parts])


def search_page(
    found: Mapping[str, tuple[SearchResult, Samples]],
    reference: Samples,
    captions: Sequence[str],
    about: Mapping[str, Any],
    pasted: Mapping[str, str],
) -> str:
    """Return the page of ``dithooks search``.

    Args:
        found: for each target by its name, what was found, and what its plan draws.
        reference: the pictures without a cache.
        captions: of the pictures; empty if they are not known.
        about: what was searched, on which machine and when.
        pasted: for each target, the lines that use its plan.
    """
    parts = [_facts(about), LEGEND]
    for name, (result, samples) in found.items():
        made = result.plan.provenance
        figures = [
            ("fewer blocks", f"{result.plan.speedup:.2f}×"),
            ("speed-up, predicted", f"{made.predicted_speedup:.2f}×"),
            ("speed-up, measured", "–" if made.measured_speedup is None else f"{made.measured_speedup:.2f}×"),
        ]
        parts += [
            f"<h2>{escape(name)}</h2>",
            result.plan._repr_html_(),
            table([name for name, _ in figures], [[value for _, value in figures]]),
            strips(reference, samples, captions),
            "<h3>The plans that were run</h3>",
            result._repr_html_(),
            "<h3>To use it</h3>",
            f"<pre>{escape(pasted[name])}</pre>",
        ]
    return page("dithooks search", parts)


def page(title: str, parts: Sequence[str]) -> str:
    """Return a whole HTML document, which needs nothing from elsewhere."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def strips(reference: Samples, samples: Samples, captions: Sequence[str]) -> Raw:
    """Show pictures without a cache, with it, and what differs, in three rows; of a video, its middle frame."""
    span = span_of([*reference, *samples]) if reference and samples else None
    if span is None:
        return Raw("<p>What is drawn does not look like pictures.</p>")
    pairs = []
    for plain, cached in zip(reference, samples, strict=False):
        frames = [as_frames(each, span) for each in (plain, cached)]
        if any(each is None for each in frames):
            return Raw("<p>What is drawn does not look like pictures.</p>")
        pairs.append([each[len(each) // 2, ..., :3] for each in frames if each is not None])
    differences = [np.abs(plain.astype(int) - cached.astype(int)).mean(axis=-1) for plain, cached in pairs]
    most = max(float(each.max()) for each in differences)
    factor = next((each for each in reversed(FACTORS) if each * most <= 255), 1)
    names = [*captions, *(f"sample {number + 1}" for number in range(len(captions), len(pairs)))]
    shown = [
        ("without a cache", [plain for plain, _ in pairs]),
        ("with the plan", [cached for _, cached in pairs]),
        (f"{factor} × the difference", [_grey(each * factor) for each in differences]),
    ]
    made = []
    for title, pictures in shown:
        figures = [_figure(picture, name) for picture, name in zip(pictures, names, strict=False)]
        made.append(f'<h4>{escape(title)}</h4><div class="strip">{"".join(figures)}</div>')
    return Raw("".join(made))


def _facts(about: Mapping[str, Any]) -> str:
    rows = [
        [name, ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)]
        for name, value in about.items()
        if value not in (None, "", [], ())
    ]
    return table(["", ""], rows)


def _figure(picture: NDArray[np.uint8], caption: str) -> str:
    with BytesIO() as file:
        import_module("PIL.Image").fromarray(picture).save(file, "PNG")
        data = base64.b64encode(file.getvalue()).decode()
    image = f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def _grey(levels: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return a picture in which no difference is white."""
    return np.repeat((255 - levels.clip(0, 255)).round().astype(np.uint8)[..., None], 3, axis=-1)
