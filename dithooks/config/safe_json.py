"""Text and JSON of unknown origin: what is read is of a size and form that all code to come can take, or refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ..errors import InvalidSetting, WrongType

DEEPEST, LARGEST = 32, 1_000_000  # of a file: what is written is far from either
LONGEST = 600  # characters of a message: a value that is shown may be as long as the file
T = TypeVar("T")


def parsed(text: str, kind: str) -> Any:
    """:func:`strict`, naming in errors what the text should be."""
    try:
        return strict(text)
    except ValueError as error:
        raise InvalidSetting(f"not a {kind}: the text is not JSON ({error})") from None


def strict(text: str) -> Any:
    """The value that a JSON text holds, of a size and depth that all code to come can take.

    Raises:
        ValueError: not JSON, or none that would be written here: a name twice, NaN, nested without end.
    """
    try:
        data = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except RecursionError:
        raise InvalidSetting("it is nested too deeply") from None
    bounded(data)
    return data


def bounded(data: Any) -> None:
    """See that a value that was read is neither too deep nor too large, however often it refers to parts of itself.

    Raises:
        ValueError: it is.
    """
    level, count = [data], 0
    for _ in range(DEEPEST):
        inner = [each for each in level if isinstance(each, (list, tuple, dict, set))]
        count += sum(map(len, inner))
        if count > LARGEST:
            raise InvalidSetting(f"it holds more than {LARGEST:,} values")
        level = [item for each in inner for item in (each.values() if isinstance(each, dict) else each)]
        if not level:
            return
    raise InvalidSetting(f"it is nested more than {DEEPEST} deep")


def read_file(path: str | os.PathLike[str], read: Callable[[str], T]) -> T:
    """What is made of a file's text.

    Raises:
        OSError: the file cannot be opened.
        ValueError, TypeError: naming the file, what is wrong with its text.
    """
    try:
        return read(Path(path).read_text(encoding="utf-8"))
    except (ValueError, TypeError) as error:
        kind = WrongType if isinstance(error, TypeError) else InvalidSetting
        raise kind(f"{os.fspath(path)}: {shortened(error)}") from None


def shortened(error: Exception) -> str:
    """An error's text, its middle left out where it shows a long value."""
    text = str(error)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 200]} … {text[-150:]}"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise InvalidSetting(f"{next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return found


def _no_number(word: str) -> Any:
    raise InvalidSetting(f"{word} is no number of JSON")
