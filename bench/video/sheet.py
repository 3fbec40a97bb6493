"""What the model draws, without a cache: eight clips, a row of frames each, ``python -m bench.video.sheet``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dithooks.storage.replacement import replacing

from . import GUIDANCE, STEPS, WEIGHTS, load
from .pipeline import to_images

CAPTIONS = (
    "cat face moving left",
    "fire engine moving right",
    "rocket moving up",
    "snowflake moving down",
    "penguin growing",
    "strawberry shrinking",
    "maple leaf turning",
    "hamburger moving right",
)
SCALE, GAP, TEXT, LABEL = 4, 6, 17, 240  # pixels for one; pixels between; size and width of the captions


def sheet(clips: Tensor, captions: Sequence[str]) -> Image.Image:
    """Clips (n, frames, 3, height, width) in 0…1: a row each, its caption on the left.

    Raises:
        ValueError: not as many captions as clips.
    """
    if len(clips) != len(captions):
        raise ValueError(f"{len(clips)} clips need as many captions, not {len(captions)}")
    frames, height, width = clips.shape[1], clips.shape[3] * SCALE, clips.shape[4] * SCALE
    page = Image.new("RGB", (LABEL + frames * (width + GAP) + GAP, GAP + len(clips) * (height + GAP)), "#d8dbe0")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(TEXT)
    for row, (clip, words) in enumerate(zip(clips, captions, strict=True)):
        top = GAP + row * (height + GAP)
        draw.text((2 * GAP, top + height / 2), words, fill="#1f2328", font=font, anchor="lm")
        for column, frame in enumerate(to_images(clip)):
            large = frame.resize((width, height), Image.Resampling.NEAREST)
            page.paste(large, (LABEL + column * (width + GAP), top))
    return page


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.video.sheet", description=__doc__)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="a pipeline folder (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="default: %(default)s")
    parser.add_argument("--guidance", type=float, default=GUIDANCE, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="10 steps")
    options = parser.parse_args(arguments)
    clips = load(options.weights)(
        CAPTIONS,
        num_inference_steps=10 if options.quick else options.steps,
        guidance_scale=options.guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(CAPTIONS))],
        output_type="pt",
    ).frames
    options.out.mkdir(parents=True, exist_ok=True)
    with replacing(options.out / "video_sheet.png") as draft:
        sheet(clips, CAPTIONS).save(draft)
    print(options.out / "video_sheet.png")


if __name__ == "__main__":
    main()
