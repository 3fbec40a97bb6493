"""The demo's result: a table and a picture."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean, median

from PIL import Image

from ..stats.text_table import text_table
from .draw import comparison, to_images
from .outcome import DemoOptions, DemoResult


def table(result: DemoResult, options: DemoOptions, width: int | None = None) -> str:
    """The result as text of a width: a row without the cache, a row with it, and what the plan has predicted."""
    blocks, same = result.blocks_total, math.isinf(min(result.psnr))
    rows = [
        ("", "seconds", "speed-up", "blocks run", "PSNR mean", "PSNR min", "bytes kept"),
        ("plain", f"{median(result.seconds_plain):.2f}", "1.00x", f"{blocks} of {blocks}", "", "", "0"),
        (
            "cached",
            f"{median(result.seconds_cached):.2f}",
            f"{result.speedup:.2f}x",
            f"{result.blocks_run} of {blocks}",
            "identical" if same else f"{fmean(result.psnr):.1f} dB",
            "identical" if same else f"{min(result.psnr):.1f} dB",
            f"{result.bytes_peak:,}",
        ),
    ]
    lines = [f"speed-up: {result.share:.0%} of the {result.allowed:.2f}x that the blocks left out allow"]
    if options.plan is not None:
        predicted = options.plan.provenance.predicted_speedup
        prediction = f"predicted {predicted:.2f}x, " if options.steps == options.plan.made.steps else ""
        lines += [f"plan {options.plan_name}: {prediction}measured {result.speedup:.2f}x", result.schedule]
    title = f"pictures: {len(options.prompts)}, steps: {options.steps}, runs of each kind: {options.pairs}"
    return "\n".join([title, "", text_table(rows, width, ruled=True), "", *lines])


def draw_comparison(result: DemoResult, options: DemoOptions) -> Image.Image:
    """The result as a picture: plain above, cached below."""
    name = Path(options.plan_name).name.removesuffix(".json")
    plan = [f"plan {name if len(name) < 11 else f'{name[:9]}…'}"] if options.plan is not None else []
    return comparison(
        to_images(result.plain),
        to_images(result.cached),
        options.prompts,
        plain_label=("plain", f"{median(result.seconds_plain):.2f} s"),
        cached_label=("dithooks", f"{median(result.seconds_cached):.2f} s", f"speed-up {result.speedup:.2f}x", *plan),
    )
