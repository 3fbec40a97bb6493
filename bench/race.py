"""The same pictures without a cache and with it, side by side, as fast as they were drawn: ``python -m bench.race``.

It writes ``docs/race.png``, an animation in which both sides are played at the speed that was measured, and
``docs/race.json``, the times of it: of each sampling step the median of several runs, in turns without the cache and
with it. ``--times docs/race.json`` draws with the times of an earlier run, and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont

from dithooks import CachePlan, dit_cache
from dithooks.demo import load_pipeline, load_plan
from dithooks.demo.draw import ACCENT, CARD, EDGE, INK, MUTED, PAGE, to_images
from dithooks.demo.emoji import SIZE
from dithooks.demo.model import unpatchify
from dithooks.demo.outcome import psnr
from dithooks.demo.pipeline import EmojiPipeline
from dithooks.environment.machine import machine
from dithooks.storage.replacement import replacing, write_text

CAPTIONS = ("slice of pizza", "panda face", "tropical fish", "rainbow")
PLAN, SEED, GUIDANCE = "3x", 0, 3.0
BEFORE, AFTER = 0.6, 3.0  # seconds that the first and the last frame stand still
TICK, LEAST = 0.1, 0.02  # seconds: of the clocks; of a frame, as browsers show none for less
# Pixels.
ZOOM, GAP, MARGIN, BETWEEN = 4, 10, 20, 36
GRID = 2 * SIZE * ZOOM + GAP
TITLE, CLOCK, NOTE = 24, 34, 19
TOP = MARGIN + TITLE + 16  # of the pictures
STRIP, FOOT = TOP + GRID + 14, TOP + GRID + 38
WIDTH, HEIGHT = 2 * (MARGIN + GRID) + BETWEEN, FOOT + CLOCK + NOTE + 12 + MARGIN


@dataclass(frozen=True)
class Times:
    """What was measured: seconds from the start of a run to the end of each of its steps.

    Args:
        machine: what it was measured on.
        load: the load of the machine before and after.
        runs: how many of each kind.
        plan: the name of the plan.
        computed: for each step, whether the plan computes it.
        plain: without the cache.
        cached: with it.
        psnr: in dB, of the pictures with the cache to those without.
    """

    machine: str
    load: tuple[float, float]
    runs: int
    plan: str
    computed: tuple[bool, ...]
    plain: tuple[float, ...]
    cached: tuple[float, ...]
    psnr: float

    @property
    def speedup(self) -> float:
        """How many times as fast it is with the cache."""
        return self.plain[-1] / self.cached[-1]


class Drawing(NamedTuple):
    """One run: seconds to the end of each step, and the pictures after each step, those of the noise first."""

    seconds: list[float]
    pictures: list[torch.Tensor]


def draw(pipe: EmojiPipeline, plan: CachePlan | None, steps: int) -> Drawing:
    """Draw once, with a plan or without."""
    seconds: list[float] = []
    states: list[torch.Tensor] = []
    noise = torch.randn((len(CAPTIONS), 64, 48), generator=torch.Generator().manual_seed(SEED))

    def on_step(_: object, step: int, timestep: object, tensors: dict[str, torch.Tensor]) -> None:
        seconds.append(time.perf_counter() - begin)
        states.append(tensors["latents"].clone())

    with nullcontext() if plan is None else dit_cache(pipe, plan):
        begin = time.perf_counter()
        pipe(CAPTIONS, num_inference_steps=steps, guidance_scale=GUIDANCE, latents=noise, callback_on_step_end=on_step)
    pictures = [(unpatchify(each, SIZE, SIZE) / 2 + 0.5).clamp(0, 1) for each in (noise, *states)]
    return Drawing(seconds, pictures)


def measure(pipe: EmojiPipeline, name: str, steps: int, runs: int) -> Times:
    """Draw in turns without the cache and with it, after one run of each that does not count."""
    plan = load_plan(name)
    first = draw(pipe, None, steps), draw(pipe, plan, steps)
    before = os.getloadavg()[0]
    turns = [(draw(pipe, None, steps).seconds, draw(pipe, plan, steps).seconds) for _ in range(runs)]
    plain, cached = (
        tuple(round(median(run[step] for run in kind), 4) for step in range(steps)) for kind in zip(*turns, strict=True)
    )
    ends = psnr(first[1].pictures[-1], first[0].pictures[-1])
    return Times(
        machine=machine(),
        load=(round(before, 2), round(os.getloadavg()[0], 2)),
        runs=runs,
        plan=name,
        computed=tuple(bool(each) for each in plan.pieces[0].steps) if steps == plan.made.steps else (True,) * steps,
        plain=plain,
        cached=cached,
        psnr=round(sum(ends) / len(ends), 1),
    )


def moments(times: Times) -> list[float]:
    """When something changes: the end of a step on either side, or a clock; never two within ``LEAST``."""
    end = times.plain[-1]
    ticks = [TICK * number for number in range(int(end / TICK) + 1)]
    found: list[float] = []
    for moment in sorted({*ticks, *times.plain, *times.cached}):
        if found and moment - found[-1] < LEAST:
            found.pop()  # the later one shows both
        found.append(moment)
    return found


def durations(shown: Sequence[float]) -> list[int]:
    """Milliseconds of each frame, as whole hundredths whose sum is right, with the stands at both ends."""
    ends = [round(100 * each) for each in (*(moment - shown[0] for moment in shown[1:]), shown[-1] - shown[0] + AFTER)]
    frames = [10 * (end - start) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    return [frames[0] + round(1000 * BEFORE), *frames[1:]]


def frame(times: Times, sides: Sequence[Sequence[Sequence[Image.Image]]], now: float) -> Image.Image:
    """The picture at a moment: two panels with pictures, steps and a clock each."""
    sheet = Image.new("RGB", (WIDTH, HEIGHT), PAGE)
    for number, (title, ends, computed) in enumerate(
        (("without a cache", times.plain, None), (f"dithooks, plan {times.plan}", times.cached, times.computed))
    ):
        left, done = MARGIN + number * (GRID + BETWEEN), sum(end <= now for end in ends)
        colour = ACCENT if number else INK
        write(sheet, (left, MARGIN), title, TITLE, colour)
        paste(sheet, sides[number][done], left)
        steps(sheet, left, done, computed or (True,) * len(ends), colour)
        write(sheet, (left, FOOT), f"{min(now, ends[-1]):.1f} s", CLOCK, colour)
        finished = done == len(ends)
        text = f"step {done} of {len(ends)}"
        if finished:
            text = f"{times.speedup:.1f}x as fast, PSNR {times.psnr:.0f} dB" if number else "done"
        write(sheet, (left, FOOT + CLOCK + 10), text, NOTE, colour if finished else MUTED)
    return sheet


def write(sheet: Image.Image, place: tuple[int, int], text: str, size: int, colour: str) -> None:
    ImageDraw.Draw(sheet).text(place, text, fill=colour, font=ImageFont.load_default(size))


def paste(sheet: Image.Image, pictures: Sequence[Image.Image], left: int) -> None:
    """Four pictures in a square, each pixel enlarged."""
    side = SIZE * ZOOM
    for number, picture in enumerate(pictures):
        place = left + number % 2 * (side + GAP), TOP + number // 2 * (side + GAP)
        ImageDraw.Draw(sheet).rectangle((place[0] - 1, place[1] - 1, place[0] + side, place[1] + side), CARD, EDGE)
        sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), place)


def steps(sheet: Image.Image, left: int, done: int, computed: Sequence[bool], colour: str) -> None:
    """A mark for each step: tall if it is computed, short if it is reused, coloured once it is done."""
    width = GRID / len(computed)
    for number, full in enumerate(computed):
        x, top = left + number * width, STRIP if full else STRIP + 9
        ImageDraw.Draw(sheet).rectangle((x, top, x + width - 3, STRIP + 14), colour if number < done else EDGE)


def animate(times: Times, sides: Sequence[Sequence[torch.Tensor]], path: Path) -> None:
    """Write the animation, which repeats for ever."""
    shown = moments(times)
    images = [[to_images(state) for state in side] for side in sides]
    frames = [frame(times, images, now) for now in shown]
    # One palette for all frames, so that what stands still does not flicker.
    sample = Image.new("RGB", (WIDTH, 3 * HEIGHT))
    for number, each in enumerate((frames[0], frames[len(frames) // 3], frames[-1])):
        sample.paste(each, (0, number * HEIGHT))
    palette = sample.quantize(256, Image.Quantize.MEDIANCUT)
    drawn = [each.quantize(palette=palette, dither=Image.Dither.NONE) for each in frames]
    with replacing(path) as draft:
        drawn[0].save(draft, save_all=True, append_images=drawn[1:], duration=durations(shown), loop=0, optimize=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.race", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/race.png"), help="the animation (default: %(default)s)")
    parser.add_argument("--times", type=Path, help="JSON of an earlier run, whose times are used")
    parser.add_argument("--plan", default=PLAN, help="one that ships (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=28, help="sampling steps (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=7, help="of each kind (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    (pipe := load_pipeline()).set_progress_bar_config(disable=True)
    if options.times is None:
        times = measure(pipe, options.plan, options.steps, options.runs)
        text = json.dumps({**asdict(times), "speedup": round(times.speedup, 3)}, indent=1)
        write_text(options.out.with_suffix(".json"), text + "\n")
    else:
        times = read(options.times)
    plan = load_plan(times.plan)
    animate(times, [draw(pipe, each, len(times.plain)).pictures for each in (None, plan)], options.out)
    print(f"{options.out}: {times.plain[-1]:.2f} s and {times.cached[-1]:.2f} s, {options.out.stat().st_size:,} bytes")


def read(path: Path) -> Times:
    """The times of an earlier run."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    del found["speedup"]
    return Times(**{name: tuple(each) if isinstance(each, list) else each for name, each in found.items()})


if __name__ == "__main__":
    main()
