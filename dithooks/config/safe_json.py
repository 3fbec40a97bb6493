"""JSON of unknown origin: read if its size and form are those of a file of this library, else refused."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import InvalidSetting
from ..storage.regular_file import read_bytes
from ..validation import located, shown

DEEPEST, LARGEST = 32, 100_000  # levels and values of a file; those of this library stay far below
JSON_BYTES = 2**22  # 4 MiB, of a file: a plan of 1000 steps has 500 kB at most
DIGITS = 400  # of a number: no float has more before its point
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
    if text.count(",") + text.count("[") + text.count("{") > LARGEST:  # before anything is made of it
        raise InvalidSetting(f"it holds more than {LARGEST:,} values")
    try:
        data = json.loads(
            text, object_pairs_hook=_once, parse_constant=_no_number, parse_int=_whole, parse_float=_finite
        )
    except RecursionError:
        raise InvalidSetting("it is nested too deeply") from None
    bounded(data)
    if "\\u" in text:
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise InvalidSetting("a text in it holds one half of a character (\\ud800 … \\udfff)") from None
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


def read_file(path: str | os.PathLike[str], read: Callable[[str], T], most: int = JSON_BYTES) -> T:
    """Read a file with a function of its text.

    Args:
        path: the file.
        read: the function.
        most: the most bytes that the file may have.

    Raises:
        OSError: the file cannot be opened.
        ValueError, TypeError: the file is too large, or its text is refused; the message names the file.
    """
    data = read_bytes(path, most)
    try:
        return read(data.decode("utf-8"))
    except (ValueError, TypeError) as error:
        raise located(os.fspath(path), error) from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise InvalidSetting(f"{shown(name)} stands there twice")
            seen.add(name)
    return data


def _no_number(word: str) -> Any:
    raise InvalidSetting(f"{word} is no number of JSON")


def _whole(digits: str) -> int:
    if len(digits) > DIGITS:
        raise InvalidSetting(f"a number of {len(digits)} digits is none that this library writes")
    return int(digits)


def _finite(digits: str) -> float:
    if math.isinf(number := float(digits)):
        raise InvalidSetting(f"{shown(digits)} is more than a number can be")
    return number
