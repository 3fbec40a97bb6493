"""The demo: the same pictures without and with the cache, timed in pairs and compared pixel by pixel."""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from dithooks import CachePlan, DitCacheConfig, dit_cache
from dithooks.machine import machine

from . import load_pipeline
from .draw import comparison, to_images
from .emoji import clean
from .pipeline import EmojiPipeline

PROMPTS = (
    "slice of pizza",
    "panda face",
    "red apple",
    "smiling face with sunglasses",
    "tropical fish",
    "fire engine",
    "sunflower",
    "rainbow",
)


@dataclass(frozen=True)
class DemoOptions:
    """What the demo draws, with which cache, and how often it is timed.

    A plan, called ``plan_name``, takes the place of the schedule of ``start`` and ``interval``.

    Raises:
        ValueError: a number out of its range, no prompt, or a prompt without a word.
    """

    prompts: tuple[str, ...] = PROMPTS
    steps: int = 28
    seed: int = 0
    guidance: float = 3.0
    start: int = 6
    interval: int = 2
    pairs: int = 3
    plan: CachePlan | None = None
    plan_name: str = "plan"

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("seed", 0), ("start", 0), ("interval", 2), ("pairs", 1)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name} is {value}: it must be {least} or more")
        if self.seed >= 2**63:
            raise ValueError(f"seed is {self.seed}: it must be below 2**63")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance is {self.guidance}: give a number such as 3.0, or 1 for none")
        if not self.prompts:
            raise ValueError("there is no prompt: give at least one caption")
        for prompt in self.prompts:
            if not clean(prompt):
                raise ValueError(f"prompt {prompt!r} holds no word: give a caption such as {PROMPTS[0]!r}")

    def to_dict(self) -> dict[str, Any]:
        """What was asked for, fit for JSON; of ``start`` and ``interval`` and a plan, what is not used is None."""
        plan, unused = self.plan, self.plan is not None
        asked: dict[str, Any] = {"prompts": list(self.prompts), "steps": self.steps, "seed": self.seed}
        asked |= {"start": None if unused else self.start, "interval": None if unused else self.interval, "plan": None}
        if plan is not None:
            asked["plan"] = {
                "name": self.plan_name,
                "target": plan.provenance.target,
                "steps": "+".join(piece.picture for piece in plan.pieces),
                "predicted_speedup": plan.provenance.predicted_speedup,
            }
        return asked


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured; pictures are (prompts, 3, height, width) floats in 0…1, before any rounding.

    ``seconds_plain`` and ``seconds_cached`` hold one run of all prompts each, in the order in which the pairs ran;
    ``bytes_peak`` is the most that the cache kept at a time; ``schedule`` shows the steps of the cached run, ● computed
    and ○ reused; ``remarks`` are what the cache had to say.
    """

    plain: torch.Tensor
    cached: torch.Tensor
    seconds_plain: tuple[float, ...]
    seconds_cached: tuple[float, ...]
    blocks_run: int
    blocks_total: int
    bytes_peak: int
    schedule: str = ""
    remarks: tuple[str, ...] = ()

    @property
    def speedup(self) -> float:
        """Median over the pairs: the two runs of a pair met the same weather on the machine."""
        return median(p / c for p, c in zip(self.seconds_plain, self.seconds_cached, strict=True))

    @property
    def allowed(self) -> float:
        """The speed-up if blocks cost everything and all else nothing."""
        return self.blocks_total / self.blocks_run

    @property
    def share(self) -> float:
        """How much of the allowed speed-up was measured; 1 is all of it."""
        return self.speedup / self.allowed

    @property
    def psnr(self) -> tuple[float, ...]:
        """Decibel per picture; ``inf`` where the cached picture is the very same."""
        return psnr(self.cached, self.plain)

    def to_dict(self) -> dict[str, Any]:
        """The numbers without the pictures, fit for JSON: an infinite PSNR becomes None."""

        def finite(value: float) -> float | None:
            return round(value, 3) if math.isfinite(value) else None

        return {
            "seconds_plain": [round(s, 4) for s in self.seconds_plain],
            "seconds_cached": [round(s, 4) for s in self.seconds_cached],
            "speedup": round(self.speedup, 4),
            "speedup_allowed": round(self.allowed, 4),
            "share_of_allowed": round(self.share, 4),
            "blocks_run": self.blocks_run,
            "blocks_total": self.blocks_total,
            "psnr_mean_db": finite(fmean(self.psnr)),
            "psnr_min_db": finite(min(self.psnr)),
            "psnr_db": [finite(value) for value in self.psnr],
            "bytes_peak": self.bytes_peak,
            "schedule": self.schedule,
            "remarks": list(self.remarks),
        }


class Drawn(NamedTuple):
    """One run: pictures (prompts, 3, height, width), seconds, and the cache if there was one."""

    pictures: torch.Tensor
    seconds: float
    cache: Any = None


def psnr(pictures: torch.Tensor, reference: torch.Tensor) -> tuple[float, ...]:
    """Peak signal-to-noise ratio in dB of every picture (batch, …) in 0…1; ``inf`` for equal ones."""
    errors = (pictures.double() - reference.double()).square().flatten(1).mean(1)
    return tuple(math.inf if e == 0 else -10 * math.log10(e) for e in errors.tolist())


def check_outputs(picture: Path, json_to: str | None = None) -> None:
    """Find out before the work whether its results can be written.

    Raises:
        ValueError: no picture format has this ending, or a folder is not there.
    """
    if Image.registered_extensions().get(picture.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{picture} has an ending that no picture format knows: use .png")
    for path in (picture, *([Path(json_to)] if json_to not in (None, "-") else [])):
        if not path.parent.is_dir():
            raise ValueError(f"{path.parent} is not a folder: create it, or write elsewhere than {path}")
        if path.is_dir():
            raise ValueError(f"{path} is a folder: give the name of a file")


def load_checked(options: DemoOptions) -> EmojiPipeline:
    """The shipped pipeline, once it is certain that it knows every word of the prompts, and that the plan is for it.

    Raises:
        ValueError: a word the pipeline has never seen; the message names close ones. Or a plan of another model.
    """
    pipe = load_pipeline()
    pipe.text_encoder.tokenize(list(options.prompts))
    if options.plan is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what there is to say is said of the run
            dit_cache(pipe, options.plan).remove()
    return pipe


def run_demo(pipe: EmojiPipeline, options: DemoOptions, *, out: Path, json_to: str | None = None) -> DemoResult:
    """Measure, print the table to stdout (or JSON, for ``json_to="-"``) and write the picture to ``out``."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # On stderr, so that stdout holds the result alone; slow, because the demo needs every core.
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=2, transient=True) as progress:
        task = progress.add_task("warm-up", total=None)

        def report(text: str, done: int, total: int) -> None:
            progress.update(task, description=text, completed=done, total=total)

        result = measure(pipe, options, report)
    draw_comparison(result, options).save(out)
    numbers = options.to_dict() | {"machine": machine()} | result.to_dict()
    for remark in result.remarks:
        print(f"dithooks: {' '.join(remark.split())}", file=sys.stderr)
    if json_to == "-":
        print(json.dumps(numbers, indent=2))
    else:
        console = Console()
        console.print(table(result, options))
        console.print(f"plain above, cached below: {out}", highlight=False, soft_wrap=True)
        if json_to is not None:
            Path(json_to).write_text(json.dumps(numbers, indent=2) + "\n")
    return result


def measure(
    pipe: EmojiPipeline, options: DemoOptions, report: Callable[[str, int, int], None] = lambda text, done, total: None
) -> DemoResult:
    """Draw without and with the cache, in pairs of alternating order, after a short warm-up.

    Args:
        report: called after every sampling step with what is running, steps done and steps in all.
    """
    transformer = pipe.transformer
    config = options.plan or DitCacheConfig(
        cache_step_start=options.start,
        cache_step_interval=options.interval,
        cache_block_start=0,
        cache_num_blocks=len(transformer.transformer_blocks) + len(transformer.single_transformer_blocks),
    )
    warmup = min(3, options.steps)
    total, done = warmup + 2 * options.pairs * options.steps, 0
    pipe.set_progress_bar_config(disable=True)

    def draw(text: str, steps: int = options.steps) -> Drawn:
        def on_step(*_: object) -> None:
            nonlocal done
            done += 1
            report(text, done, total)

        begin = time.perf_counter()
        (pictures,) = pipe(
            options.prompts,
            num_inference_steps=steps,
            guidance_scale=options.guidance,
            generator=torch.Generator().manual_seed(options.seed),
            output_type="pt",
            return_dict=False,
            callback_on_step_end=on_step,
        )
        return Drawn(pictures, time.perf_counter() - begin)

    remarks: list[str] = []

    def draw_cached() -> Drawn:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            with dit_cache(pipe, config) as cache:
                drawn = draw("cached")
        for each in caught:
            if issubclass(each.category, UserWarning):
                remarks.append(str(each.message))
            else:
                warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
        return drawn._replace(cache=cache)

    draw("warm-up", warmup)
    plain, cached = [], []
    for number in range(options.pairs):
        if number % 2 == 0:  # each kind goes first in turn: a machine that slows down favours neither
            plain.append(draw("plain"))
            cached.append(draw_cached())
        else:
            cached.append(draw_cached())
            plain.append(draw("plain"))
    stats = cached[0].cache.stats
    reused = {each.step for each in cached[0].cache.decisions if each.reuse}
    return DemoResult(
        plain=plain[0].pictures,
        cached=cached[0].pictures,
        seconds_plain=tuple(run.seconds for run in plain),
        seconds_cached=tuple(run.seconds for run in cached),
        blocks_run=stats.blocks_run,
        blocks_total=stats.blocks_total,
        bytes_peak=stats.bytes_peak,
        schedule="".join("○" if step in reused else "●" for step in range(options.steps)),
        remarks=tuple(dict.fromkeys(remarks)),
    )


def table(result: DemoResult, options: DemoOptions) -> Table:
    """The result as a ``rich`` table, a row without and a row with the cache."""
    lines = [f"speed-up: {result.share:.0%} of the {result.allowed:.2f}x that the blocks left out allow"]
    if options.plan is not None:
        predicted = options.plan.provenance.predicted_speedup
        said = f"predicted {predicted:.2f}x, " if options.steps == options.plan.made.steps else ""
        lines += [f"plan {options.plan_name}: {said}measured {result.speedup:.2f}x", result.schedule]
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
