"""JSON of unknown origin: read if its size and form are those of a file of this library, else refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ..errors import InvalidSetting, WrongType

DEEPEST, LARGEST = 32, 1_000_000  # levels and values of a file; those of this library stay far below
LONGEST = 250  # characters of a message, which may quote a value as long as the file
T = TypeVar("T")


def parsed(text: str, kind: str) -> Any:
    """Read a JSON text as :func:`strict` does; errors name the kind of object that the text should hold."""
    try:
        return strict(text)
    except ValueError as error:
        raise InvalidSetting(f"not a {kind}: the text is not JSON ({error})") from None


def strict(text: str) -> Any:
    """Read a JSON text; refuse what this library never writes.

    Raises:
        ValueError: the text is not JSON, has a name twice, NaN or infinity, or is nested too deeply or too large.
    """
    try:
        data = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except RecursionError:
        raise InvalidSetting("it is nested too deeply") from None
    bounded(data)
    return data


def bounded(data: Any) -> None:
    """Refuse a value that is nested too deeply or too large, also where it refers to the same part many times.

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
    """Read a file with a function of its text.

    Raises:
        OSError: the file cannot be opened.
        ValueError, TypeError: the text is refused; the message names the file.
    """
    try:
        return read(Path(path).read_text(encoding="utf-8"))
    except (ValueError, TypeError) as error:
        kind = WrongType if isinstance(error, TypeError) else InvalidSetting
        raise kind(f"{os.fspath(path)}: {shortened(error)}") from None


def shortened(error: Exception) -> str:
    """The text of an error; of a long one, its beginning and end."""
    text = str(error)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 103]} … {text[-100:]}"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        names = [name for name, _ in pairs]
        raise InvalidSetting(f"{next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return data


def _no_number(word: str) -> Any:
    raise InvalidSetting(f"{word} is no number of JSON")
