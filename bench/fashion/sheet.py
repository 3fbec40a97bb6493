"""What the model draws, without a cache: six pictures of each class, ``python -m bench.fashion.sheet``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dithooks.storage.replacement import replacing

from . import GUIDANCE, STEPS, WEIGHTS, load
from .data import NAMES, SIZE

ROWS, SCALE, GAP, TEXT = 6, 3, 6, 17  # pictures of a class; pixels for one; pixels between; size of the names


def sheet(pictures: Tensor) -> Image.Image:
    """Pictures (classes · rows, 1, 28, 28) in 0…1, class by class: one column each, its name on top."""
    cell, head = SIZE * SCALE + GAP, TEXT + 2 * GAP
    pixels = (pictures.clamp(0, 1) * 255).round().byte().reshape(len(NAMES), -1, SIZE, SIZE)
    page = Image.new("L", (GAP + len(NAMES) * cell, head + pixels.shape[1] * cell), 255)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(TEXT)
    for column, name in enumerate(NAMES):
        draw.text((GAP + column * cell + SIZE * SCALE / 2, GAP), name, fill=60, font=font, anchor="ma")
        for row, picture in enumerate(pixels[column]):
            large = Image.fromarray(picture.numpy()).resize((SIZE * SCALE, SIZE * SCALE), Image.Resampling.NEAREST)
            page.paste(large, (GAP + column * cell, head + row * cell))
    return page


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.fashion.sheet", description=__doc__)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="a pipeline folder (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="default: %(default)s")
    parser.add_argument("--guidance", type=float, default=GUIDANCE, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="10 steps")
    options = parser.parse_args(arguments)
    labels = [label for label in range(len(NAMES)) for _ in range(ROWS)]
    pictures = load(options.weights)(
        labels,
        num_inference_steps=10 if options.quick else options.steps,
        guidance_scale=options.guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(labels))],
        output_type="pt",
    ).images
    options.out.mkdir(parents=True, exist_ok=True)
    with replacing(options.out / "fashion_sheet.png") as draft:
        sheet(pictures).save(draft)
    print(options.out / "fashion_sheet.png")


if __name__ == "__main__":
    main()
