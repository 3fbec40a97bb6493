"""The demo: the same pictures without and with the cache, timed in pairs and compared pixel by pixel."""

from __future__ import annotations

import gc
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from ..config.cache_config import DitCacheConfig
from ..environment.machine import machine
from ..errors import InvalidSetting
from ..handle import dit_cache
from ..progress_bars import progress
from ..stats.step_pictures import joined_picture
from ..stats.text_table import output_width
from ..storage.replacement import replacing, write_text
from . import load_pipeline
from .outcome import PROMPTS, DemoOptions, DemoResult, psnr
from .pipeline import EmojiPipeline
from .show import draw_comparison, table

__all__ = ["PROMPTS", "DemoOptions", "DemoResult", "psnr", "run_demo"]


class DemoRun(NamedTuple):
    """One run: its pictures (prompts, 3, height, width), its seconds, and the cache if there was one."""

    pictures: torch.Tensor
    seconds: float
    cache: Any = None


def check_ending(picture: Path) -> None:
    """Check before the work that a picture's name has an ending that can be written.

    Raises:
        InvalidSetting: no picture format has it.
    """
    if Image.registered_extensions().get(picture.suffix.lower()) not in Image.SAVE:
        raise InvalidSetting(f"{picture} has an ending that no picture format knows: use .png")


def load_checked(options: DemoOptions) -> EmojiPipeline:
    """Load the shipped pipeline, and check that it knows every word of the prompts, and that the plan is for it.

    Raises:
        InvalidSetting: the pipeline does not know a word of a prompt, or the plan is for another model.
    """
    pipe = load_pipeline()
    pipe.text_encoder.tokenize(list(options.prompts))
    if options.plan is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the run itself will give the same warnings
            dit_cache(pipe, options.plan).remove()
    return pipe


def run_demo(
    pipe: EmojiPipeline, options: DemoOptions, *, out: Path, json_to: str | None = None, verbose: bool = True
) -> DemoResult:
    """Measure, print the table to stdout (or JSON, for ``json_to="-"``) and write the picture to ``out``.

    Args:
        pipe: the demo's pipeline.
        options: the pictures to draw.
        out: the file of the picture.
        json_to: the file of the figures.
        verbose: show progress on stderr.
    """
    with progress(verbose) as report:
        result = measure(pipe, options, report)
    sheet = draw_comparison(result, options)
    with replacing(out) as draft:
        sheet.save(draft)
    numbers = options.to_dict() | {"machine": machine()} | result.to_dict()
    for remark in result.remarks:
        print(f"dithooks: {' '.join(remark.split())}", file=sys.stderr)
    if json_to == "-":
        print(json.dumps(numbers, indent=2))
    else:
        print(table(result, options, output_width()))
        print(f"plain above, cached below: {out}")
        if json_to is not None:
            write_text(json_to, json.dumps(numbers, indent=2) + "\n")
    return result


def measure(
    pipe: EmojiPipeline, options: DemoOptions, report: Callable[[str, int, int], None] = lambda text, done, total: None
) -> DemoResult:
    """Draw without and with the cache, in pairs of alternating order, after a short warm-up.

    Args:
        pipe: the demo's pipeline.
        options: the prompts and the ways to draw them.
        report: called after each sampling step with the name of the run, the number of steps done and of all.
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

    def draw(text: str, steps: int = options.steps) -> DemoRun:
        def on_step(*_: object) -> None:
            nonlocal done
            done += 1
            report(text, done, total)

        gc.collect()  # else it may fall into one run and not into the other
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
        pictures = pictures.cpu()  # waits for the accelerator, if they are drawn on one
        return DemoRun(pictures, time.perf_counter() - begin)

    remarks: list[str] = []

    def draw_cached() -> DemoRun:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            with dit_cache(pipe, config) as cache:
                drawn = draw("cached")
        for warning in caught:
            if issubclass(warning.category, UserWarning):
                remarks.append(str(warning.message))
            else:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
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
    return DemoResult(
        plain=plain[0].pictures,
        cached=cached[0].pictures,
        seconds_plain=tuple(run.seconds for run in plain),
        seconds_cached=tuple(run.seconds for run in cached),
        blocks_run=stats.blocks_run,
        blocks_total=stats.blocks_total,
        bytes_peak=stats.bytes_peak,
        schedule=joined_picture(cached[0].cache.decisions, options.steps),
        remarks=tuple(dict.fromkeys(remarks)),
    )
