"""The demo's training pictures: Noto Emoji at 32x32, with their names as captions.

The pictures come from the npm package ``emoji-datasource-google`` (Apache-2.0 artwork by Google),
fetched once with ``npm pack emoji-datasource-google@16.0.0``; nothing here touches the network.
"""

from __future__ import annotations

import json
import re
import tarfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

ARCHIVE = "emoji-datasource-google-16.0.0.tgz"
SHEET = "package/img/google/sheets/32.png"
INDEX = "package/emoji.json"
SIZE = 32
PITCH = SIZE + 2  # a cell carries a border of one pixel all around

# Pictures that stay recognisable at 32 pixels. People (sequences and skin tones) and flags do not.
CATEGORIES = frozenset({"Animals & Nature", "Food & Drink", "Smileys & Emotion"})
SUBCATEGORIES = frozenset({"transport-ground", "transport-air", "transport-water", "sky & weather"})


@dataclass(frozen=True)
class Emoji:
    """One training picture: ``pixels`` is (32, 32, 3) uint8 on white, ``captions[0]`` its full name."""

    captions: tuple[str, ...]
    category: str
    pixels: np.ndarray


def clean(text: str) -> str:
    """Reduce a text to lower-case words and digits with single spaces, the form in which captions are tokenised."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower().replace("'", "").replace("\u2019", "")))


def load_emoji(archive: str | Path = ARCHIVE) -> list[Emoji]:
    """Read the pictures on which the demo is trained.

    Args:
        archive: the npm tarball, or a folder into which it was unpacked.

    Raises:
        FileNotFoundError: there is no archive; the message gives the command that fetches it.
    """
    archive = Path(archive)
    if archive.is_dir():
        index, sheet = (archive / INDEX).read_bytes(), (archive / SHEET).read_bytes()
    elif archive.is_file():
        with tarfile.open(archive) as tar:
            index, sheet = (tar.extractfile(name).read() for name in (INDEX, SHEET))  # type: ignore[union-attr]
    else:
        raise FileNotFoundError(
            f"{archive} is not there: fetch it with `npm pack emoji-datasource-google@16.0.0`, or give its path"
        )
    picture = Image.open(BytesIO(sheet)).convert("RGBA")
    chosen = []
    for entry in json.loads(index):
        wanted = entry["category"] in CATEGORIES or entry["subcategory"] in SUBCATEGORIES
        if not wanted or not entry["has_img_google"] or entry["name"].startswith("Sark"):
            continue  # the sheet's picture for Sark is another flag's
        left, top = entry["sheet_x"] * PITCH + 1, entry["sheet_y"] * PITCH + 1
        cell = picture.crop((left, top, left + SIZE, top + SIZE))
        white = Image.new("RGBA", cell.size, "white")
        captions = [clean(entry["name"]), *(clean(name.replace("_", " ")) for name in entry["short_names"])]
        chosen.append(
            Emoji(
                captions=tuple(dict.fromkeys(c for c in captions if c)),
                category=entry["category"],
                pixels=np.asarray(Image.alpha_composite(white, cell).convert("RGB")),
            )
        )
    return chosen
