"""Sheets of pictures: the demo's two rows, and the contact sheet, ``python -m dithooks.demo.draw``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from ..errors import InvalidSetting
from ..storage.replacement import replacing

CAPTIONS = (
    "dog face",
    "panda face",
    "tropical fish",
    "penguin",
    "slice of pizza",
    "red apple",
    "hamburger",
    "strawberry",
    "smiling face with sunglasses",
    "smiling face with heart shaped eyes",
    "fire engine",
    "rocket",
    "sailboat",
    "rainbow",
    "sunflower",
    "snowman",
)

# Pixels. A README shows such a sheet at about half its width, so everything is drawn at twice its size.
CELL = 160
GAP = 14
MARGIN = 28
LABEL_WIDTH = 190
TEXT_SIZE = 25
TITLE_SIZE = 34
LINE = 30

PAGE, CARD, EDGE, INK, MUTED, ACCENT = "#f3f4f6", "#ffffff", "#d8dbe0", "#1f2328", "#59636e", "#0f7b4f"


def to_images(pictures: torch.Tensor) -> list[Image.Image]:
    """Convert (batch, 3, height, width) floats in 0…1 to 8-bit pictures."""
    pixels = pictures.detach().float().cpu().clamp(0, 1).mul(255).round().to(torch.uint8)
    return [Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).numpy()]


def comparison(
    plain: Sequence[Image.Image],
    cached: Sequence[Image.Image],
    captions: Sequence[str],
    *,
    plain_label: Sequence[str],
    cached_label: Sequence[str],
    columns: int = 8,
) -> Image.Image:
    """Draw plain pictures above cached ones, with captions under each column and labels at the left.

    Args:
        plain: the pictures without the cache, one for each caption; square ones look best.
        cached: the pictures with the cache, one for each caption.
        captions: the captions.
        plain_label: lines of text at the left of the plain pictures; the first is the title.
        cached_label: lines of text at the left of the cached pictures; the first is the title.
        columns: the number of pictures side by side.

    Raises:
        InvalidSetting: the three lists are not of one length, or empty.
    """
    _check(len(captions), plain=plain, cached=cached)
    across = min(columns, len(captions))
    wrapped = [_wrap(caption, CELL + GAP - 4) for caption in captions]
    bands = [range(first, min(first + columns, len(captions))) for first in range(0, len(captions), columns)]
    text_heights = [max(len(wrapped[n]) for n in band) * LINE + 8 for band in bands]
    width = 2 * MARGIN + LABEL_WIDTH + across * CELL + (across - 1) * GAP
    height = 2 * MARGIN + sum(2 * CELL + GAP + text for text in text_heights) + (len(bands) - 1) * GAP
    sheet = Image.new("RGB", (width, height), PAGE)
    top = MARGIN
    for band, text_height in zip(bands, text_heights, strict=True):
        for row, (pictures, label) in enumerate(((plain, plain_label), (cached, cached_label))):
            y = top + row * (CELL + GAP)
            _label(sheet, label, y, color=ACCENT if row else INK)
            for column, number in enumerate(band):
                _card(sheet, pictures[number], MARGIN + LABEL_WIDTH + column * (CELL + GAP), y)
        for column, number in enumerate(band):
            _caption(sheet, wrapped[number], MARGIN + LABEL_WIDTH + column * (CELL + GAP), top + 2 * CELL + GAP)
        top += 2 * CELL + GAP + text_height + GAP
    return sheet


def contact_sheet(pictures: Sequence[Image.Image], captions: Sequence[str], columns: int = 8) -> Image.Image:
    """Draw pictures in rows, each with its caption below.

    Raises:
        InvalidSetting: the two lists are not of one length, or empty.
    """
    _check(len(captions), pictures=pictures)
    wrapped = [_wrap(caption, CELL + GAP - 4) for caption in captions]
    rows = [range(first, min(first + columns, len(captions))) for first in range(0, len(captions), columns)]
    heights = [CELL + max(len(wrapped[n]) for n in row) * LINE + 8 for row in rows]
    across = min(columns, len(captions))
    width = 2 * MARGIN + across * CELL + (across - 1) * GAP
    sheet = Image.new("RGB", (width, 2 * MARGIN + sum(heights) + (len(rows) - 1) * GAP), PAGE)
    top = MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, number in enumerate(row):
            left = MARGIN + column * (CELL + GAP)
            _card(sheet, pictures[number], left, top)
            _caption(sheet, wrapped[number], left, top + CELL)
        top += height + GAP
    return sheet


def _check(wanted: int, **lists: Sequence[Image.Image]) -> None:
    if not wanted:
        raise InvalidSetting("there is no caption: give one for every picture")
    for name, pictures in lists.items():
        if len(pictures) != wanted:
            raise InvalidSetting(f"{name} holds {len(pictures)} pictures for {wanted} captions: give one of each")


def _card(sheet: Image.Image, picture: Image.Image, left: int, top: int) -> None:
    draw = ImageDraw.Draw(sheet)
    draw.rounded_rectangle((left, top, left + CELL - 1, top + CELL - 1), radius=12, fill=CARD, outline=EDGE)
    inner = CELL - 2 * 8
    # Whole multiples keep every pixel square and equal.
    factor = max(1, inner // max(picture.size))
    large = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    sheet.paste(large, (left + (CELL - large.width) // 2, top + (CELL - large.height) // 2))


def _caption(sheet: Image.Image, lines: Sequence[str], left: int, top: int) -> None:
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(TEXT_SIZE)
    for number, line in enumerate(lines):
        draw.text((left + CELL / 2, top + 6 + number * LINE), line, fill=MUTED, font=font, anchor="ma")


def _label(sheet: Image.Image, lines: Sequence[str], top: int, *, color: str) -> None:
    draw = ImageDraw.Draw(sheet)
    y = top + (CELL - TITLE_SIZE - (len(lines) - 1) * (LINE + 4)) / 2
    for number, line in enumerate(lines):
        size = TEXT_SIZE if number else TITLE_SIZE
        draw.text((MARGIN, y), line, fill=color, font=ImageFont.load_default(size))
        y += size + 9


def _wrap(text: str, width: int) -> list[str]:
    """Split a text into lines that fit a width in pixels; a word that is too long has a line of its own."""
    font = ImageFont.load_default(TEXT_SIZE)
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Draw the contact sheet of the shipped pipeline."""
    parser = argparse.ArgumentParser(prog="python -m dithooks.demo.draw", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("contact_sheet.png"), help="default: %(default)s")
    parser.add_argument("--weights", type=Path, help="another pipeline folder than the shipped one")
    parser.add_argument("--steps", type=int, default=28, help="default: %(default)s")
    parser.add_argument("--guidance", type=float, default=3.0, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options = parser.parse_args(arguments)
    from . import WEIGHTS, load_pipeline

    (pictures,) = load_pipeline(options.weights or WEIGHTS)(
        CAPTIONS,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        generator=torch.Generator().manual_seed(options.seed),
        output_type="pt",
        return_dict=False,
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(options.out) as draft:
        contact_sheet(to_images(pictures), CAPTIONS).save(draft)
    print(options.out)


if __name__ == "__main__":
    main()
