"""The demo's result: a table and a picture."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean, median

from PIL import Image
from rich import box
from rich.table import Table
from rich.text import Text

from .draw import comparison, to_images
from .outcome import DemoOptions, DemoResult


def table(result: DemoResult, options: DemoOptions) -> Table:
    """The result as a table of ``rich``: a row without the cache, and a row with it."""
    lines = [f"speed-up: {result.share:.0%} of the {result.allowed:.2f}x that the blocks left out allow"]
    if options.plan is not None:
        predicted = options.plan.provenance.predicted_speedup
        prediction = f"predicted {predicted:.2f}x, " if options.steps == options.plan.made.steps else ""
        lines += [f"plan {options.plan_name}: {prediction}measured {result.speedup:.2f}x", result.schedule]
    grid = Table(
        title=f"pictures: {len(options.prompts)}, steps: {options.steps}, runs of each kind: {options.pairs}",
        caption=Text("\n".join(lines)),
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    for heading in ("", "seconds", "speed-up", "blocks run", "PSNR mean", "PSNR min", "bytes kept"):
        grid.add_column(heading, justify="right" if heading else "left")
    blocks, same = result.blocks_total, math.isinf(min(result.psnr))
    grid.add_row("plain", f"{median(result.seconds_plain):.2f}", "1.00x", f"{blocks} of {blocks}", "", "", "0")
    grid.add_row(
        "cached",
        f"{median(result.seconds_cached):.2f}",
        f"{result.speedup:.2f}x",
        f"{result.blocks_run} of {blocks}",
        "identical" if same else f"{fmean(result.psnr):.1f} dB",
        "identical" if same else f"{min(result.psnr):.1f} dB",
        f"{result.bytes_peak:,}",
    )
    return grid


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
