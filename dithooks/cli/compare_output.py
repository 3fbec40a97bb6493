"""The output of ``dithooks compare``: a table, and a picture with a row for each setting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from statistics import median
from typing import Any

from ..stats.text_table import output_width, text_table
from .comparison import Comparison, Outcome
from .media import as_frames, span_of

HEADS = ("", "seconds", "speed-up", "blocks run", "PSNR mean", "PSNR min", "SSIM", "LPIPS", "relative L1", "bytes kept")
SMALLEST, LARGEST = 160, 360  # pixels, of a picture's longer side


def rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """The rows of the table: its heads, the run without a cache, then one for each setting."""
    blocks = comparison.outcomes[0].stats.blocks_total
    first = ("uncached", f"{median(comparison.seconds):.2f}", "1.00x", f"{blocks} of {blocks}", "", "", "", "", "", "0")
    table = [HEADS, first, *map(_row, comparison.outcomes)]
    if any(each.score.lpips is not None for each in comparison.outcomes):
        return table
    learned = HEADS.index("LPIPS")
    return [row[:learned] + row[learned + 1 :] for row in table]


def show(comparison: Comparison) -> None:
    """Print the table, as wide as the terminal, and the steps of each setting below it."""
    print(text_table(rows(comparison), output_width(), ruled=True))
    print()
    for each in comparison.outcomes:
        for name, steps in each.decisions["steps"].items():
            print(f"{each.setting.name}, {name}: {steps}" if name else f"{each.setting.name}: {steps}")


def draw(comparison: Comparison, captions: Sequence[str]) -> Any:
    """Draw samples side by side, a row without a cache above a row for each setting; of a video, its middle frame.

    Returns:
        A picture of PIL; None if the samples are no pictures.
    """
    span = span_of(comparison.samples)
    if span is None:
        return None
    lines = [[(f"{median(comparison.seconds):.2f} s")], *map(_lines, comparison.outcomes)]
    titles = ["uncached", *(each.setting.name for each in comparison.outcomes)]
    pictures = []
    for samples in (comparison.samples, *(each.samples for each in comparison.outcomes)):
        frames = [as_frames(sample, span) for sample in samples]
        if any(each is None for each in frames):
            return None
        pictures.append(
            [import_module("PIL.Image").fromarray(each[len(each) // 2]) for each in frames if each is not None]
        )
    return _sheet(pictures, titles, lines, captions or [f"sample {n + 1}" for n in range(len(comparison.samples))])


def _row(each: Outcome) -> tuple[str, ...]:
    score, same = each.score, math.isinf(each.score.psnr) and each.score.psnr > 0
    ssim = "" if score.ssim is None else f"{score.ssim:.4f}"
    return (
        each.setting.name,
        f"{median(each.seconds):.2f}",
        f"{each.speedup:.2f}x",
        f"{each.stats.blocks_run} of {each.stats.blocks_total}",
        "identical" if same else f"{score.psnr:.1f} dB",
        "identical" if same else f"{score.worst:.1f} dB",
        ssim,
        "" if score.lpips is None else f"{score.lpips:.4f}",
        f"{score.relative_l1:.3g}",
        f"{each.stats.bytes_peak:,}",
    )


def _lines(each: Outcome) -> list[str]:
    near = "identical" if math.isinf(each.score.psnr) and each.score.psnr > 0 else f"{each.score.psnr:.1f} dB"
    return [f"{median(each.seconds):.2f} s", f"{each.speedup:.2f}x as fast", near]


def _sheet(
    pictures: Sequence[Sequence[Any]], titles: Sequence[str], lines: Sequence[Sequence[str]], captions: Sequence[str]
) -> Any:
    """Draw rows of pictures, with a title and lines of text at the left of each row and captions below the last."""
    image, drawing, fonts = (import_module(f"PIL.{name}") for name in ("Image", "ImageDraw", "ImageFont"))
    from ..demo import draw as look  # colours and measures of the demo's sheets

    title_font, font = fonts.load_default(look.TITLE_SIZE), fonts.load_default(look.TEXT_SIZE)
    scaled = [[_scaled(each) for each in row] for row in pictures]
    width, height = (max(each.size[axis] for row in scaled for each in row) for axis in (0, 1))
    texts = [font.getlength(line) for each in lines for line in each] + [title_font.getlength(each) for each in titles]
    left = look.MARGIN + int(max(texts)) + 2 * look.GAP
    block = look.TITLE_SIZE + max(map(len, lines)) * (look.LINE + 4)
    tall = max(height, block) + look.GAP
    columns = len(scaled[0])
    wrapped = [_wrap(caption, width, font) for caption in captions[:columns]]
    below = max(map(len, wrapped)) * look.LINE + look.GAP
    size = (left + columns * (width + look.GAP) + look.MARGIN - look.GAP, 2 * look.MARGIN + len(scaled) * tall + below)
    sheet = image.new("RGB", size, look.PAGE)
    pen = drawing.Draw(sheet)
    for number, row in enumerate(scaled):
        top = look.MARGIN + number * tall
        y = top + (tall - look.GAP - look.TITLE_SIZE - len(lines[number]) * (look.LINE + 4)) / 2
        pen.text((look.MARGIN, y), titles[number], fill=look.ACCENT if number else look.INK, font=title_font)
        for place, line in enumerate(lines[number]):
            at = y + look.TITLE_SIZE + 10 + place * (look.LINE + 4)
            pen.text((look.MARGIN, at), line, fill=look.ACCENT if number else look.INK, font=font)
        for column, picture in enumerate(row):
            x = left + column * (width + look.GAP) + (width - picture.width) // 2
            sheet.paste(picture, (x, top + (tall - look.GAP - picture.height) // 2))
    for column, text in enumerate(wrapped):
        for number, line in enumerate(text):
            at = (left + column * (width + look.GAP) + width / 2, look.MARGIN + len(scaled) * tall + number * look.LINE)
            pen.text(at, line, fill=look.MUTED, font=font, anchor="ma")
    return sheet


def _scaled(picture: Any) -> Any:
    """Enlarge a small picture by a whole number, which keeps every pixel square; shrink a large one."""
    image = import_module("PIL.Image")
    longer = max(picture.size)
    picture = picture.convert("RGB")
    if longer > LARGEST:
        picture.thumbnail((LARGEST, LARGEST), image.Resampling.LANCZOS)
        return picture
    factor = max(1, SMALLEST // longer)
    return picture.resize((picture.width * factor, picture.height * factor), image.Resampling.NEAREST)


def _wrap(text: str, width: int, font: Any) -> list[str]:
    """Split a text into lines that fit a width in pixels; a word that is too long has a line of its own."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
