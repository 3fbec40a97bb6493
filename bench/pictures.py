"""The pictures of the documentation, from runs of the demo: ``python -m bench.pictures`` writes ``docs/pictures/``.

- ``steps_threshold.svg``: one picture of 28 steps with ``Threshold``, decided for each branch by itself.
- ``steps_2x.svg``, ``coefficients_2x.svg``: the plan 2x that ships, as planned.
- ``difference_3x.png``: four captions without the cache and with the plan 3x that ships, the same noise.
- ``frontier.svg``: searches for five targets of block executions from one recording: four captions, 28 steps, the plans
  tried on these four pictures. It shows what a search is like; how good plans are on other pictures is measured in
  ``bench/results``.
- ``predicted.svg``: what the same recording predicts, with one anchor and with two.

Speed-ups are counted in block executions, and one thread draws, so that a second run gives the same files.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dithooks import DitCacheConfig, SearchResult, Threshold, dit_cache, plot, record, search
from dithooks.demo import CALIBRATION, load_pipeline, load_plan
from dithooks.demo.pipeline import EmojiPipeline

CAPTIONS = ("slice of pizza", "tropical fish", "smiling face with sunglasses", "sunflower")
TARGETS = (1.5, 2.0, 2.5, 3.0, 4.0)
SEED = 1000  # of the first calibration caption; the next has the next


def draw(pipe: EmojiPipeline, captions: tuple[str, ...], seed: int, steps: int) -> Tensor:
    """(captions, 3, 32, 32) in 0…1, each from noise of its own."""
    seeds = [torch.Generator().manual_seed(seed + number) for number in range(len(captions))]
    images: Tensor = pipe(captions, num_inference_steps=steps, generator=seeds, output_type="pt").images
    return images


def threshold(pipe: EmojiPipeline, folder: Path, steps: int) -> None:
    config = DitCacheConfig(cache_block_start=1, policy=Threshold(0.12, max_warmup_steps=3))
    with dit_cache(pipe, config) as cache:
        draw(pipe, ("penguin",), 0, steps)
        plot.save(plot.steps(cache), folder / "steps_threshold.svg")


def shipped(folder: Path) -> None:
    plan = load_plan("2x")
    plot.save(plot.steps(plan), folder / "steps_2x.svg")
    plot.save(plot.coefficients(plan), folder / "coefficients_2x.svg")


def difference(pipe: EmojiPipeline, folder: Path) -> None:
    plan = load_plan("3x")
    plain = draw(pipe, CAPTIONS, 0, plan.made.steps)
    with dit_cache(pipe, plan):
        cached = draw(pipe, CAPTIONS, 0, plan.made.steps)
    plot.save(plot.pictures(plain, cached, CAPTIONS), folder / "difference_3x.png")


def searches(pipe: EmojiPipeline, folder: Path, steps: int, captions: tuple[str, ...]) -> None:
    run: Callable[[EmojiPipeline], Tensor] = lambda pipe: draw(pipe, captions, SEED, steps)  # noqa: E731
    recording = record(pipe, run)
    found: list[SearchResult] = []
    for target in TARGETS:
        found.append(search(pipe, run, target, recording=recording, cost="blocks", verbose=False))
        print(f"for {target:g}×:\n{found[-1]}")
    plot.save(plot.frontier(*found), folder / "frontier.svg")
    figure = plot.frontier(recording, cost="blocks", anchors=1, label="1 anchor")
    figure = plot.frontier(recording, cost="blocks", anchors=2, label="2 anchors", ax=figure.axes[0])
    plot.save(figure, folder / "predicted.svg")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.pictures", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"), help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="8 steps and two captions, to see that it works")
    options = parser.parse_args(arguments)
    steps, captions = (8, CALIBRATION[:2]) if options.quick else (28, CALIBRATION)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    threshold(pipe, options.out, steps)
    shipped(options.out)
    difference(pipe, options.out)
    searches(pipe, options.out, steps, captions)
    print(options.out)


if __name__ == "__main__":
    main()
