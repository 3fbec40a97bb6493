"""A sheet of small pictures: a column for every caption, a row for every way of drawing it."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dithooks.demo.draw import to_images

SCALE, GAP, TEXT, LABEL, LINES = 3, 8, 15, 210, 3  # pixels for one, and between; the text's size, room and lines


def sheet(rows: Sequence[Tensor], labels: Sequence[str], captions: Sequence[str]) -> Image.Image:
    """Draw rows of pictures (captions, 3, height, width) in 0…1, with a label on the left of each, captions above.

    Raises:
        ValueError: not as many labels as rows, or captions as pictures in a row.
    """
    if len(labels) != len(rows) or any(len(row) != len(captions) for row in rows):
        raise ValueError(f"{[len(row) for row in rows]} pictures, {len(labels)} labels, {len(captions)} captions")
    height, width, head = rows[0].shape[2] * SCALE, rows[0].shape[3] * SCALE, LINES * (TEXT + 3) + GAP
    size = LABEL + len(captions) * (width + GAP), head + len(rows) * (height + GAP)
    page = Image.new("RGB", size, "#d8dbe0")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(TEXT)
    for column, caption in enumerate(captions):
        place = LABEL + column * (width + GAP) + width / 2, head / 2
        draw.multiline_text(place, wrapped(caption), fill="#1f2328", font=font, anchor="mm", align="center")
    for number, (row, label) in enumerate(zip(rows, labels, strict=True)):
        top = head + number * (height + GAP)
        draw.multiline_text((2 * GAP, top + height / 2), label, fill="#1f2328", font=font, anchor="lm")
        for column, picture in enumerate(to_images(row)):
            large = picture.resize((width, height), Image.Resampling.NEAREST)
            page.paste(large, (LABEL + column * (width + GAP), top))
    return page


def wrapped(caption: str, letters: int = 12) -> str:
    """In lines of so many letters, unless a word is longer."""
    lines = [""]
    for word in caption.split():
        if lines[-1] and len(lines[-1]) + len(word) >= letters:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
