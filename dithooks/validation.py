"""Checks of what users set: numbers, counts, words and texts."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from numbers import Real
from typing import Any

from .errors import DitHooksError, InvalidSetting, WrongType, shortened

SHOWN, NAME = 80, 200  # characters of a value in a message, and of a text, which may be a path
PRINTED = ("builtins", "pathlib", "enum", "fractions", "decimal", "dithooks.policies", "dithooks.predictors")


class _Brief(reprlib.Repr):
    """Representations of a few characters, of values as large as they come; objects are known by their class."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = SHOWN
        self.maxlevel = 3

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() < 256 else f"an int of {x.bit_length()} bits"  # of more, Python prints none

    def repr_instance(self, x: Any, level: int) -> str:
        kind = type(x)
        if hasattr(x, "shape") and hasattr(x, "dtype"):
            return f"{kind.__name__} {tuple(x.shape)} {x.dtype}"
        if isinstance(x, type):
            return x.__qualname__
        if callable(x) and hasattr(x, "__qualname__"):
            return f"function {x.__qualname__}"
        if kind is object:
            return "an object"
        if kind.__module__ == "torch" or kind.__module__.startswith(PRINTED) or isinstance(x, (Real, str)):
            return super().repr_instance(x, level)
        if isinstance(x, Mapping):
            return self.repr1(dict(list(x.items())[: self.maxdict]), level)
        return f"a {kind.__name__}"


def shown(value: object) -> str:
    """A value for a message: no longer than a line, and of an array, a model or another object its kind alone.

    Example:
        >>> shown("text"), shown(list(range(1000))), shown(object())
        ("'text'", '[0, 1, 2, 3, 4, 5, ...]', 'an object')
    """
    if isinstance(value, str):
        return repr(shortened(value, NAME))
    text = " ".join(_Brief().repr(value).split())
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def brief(value: object) -> str:
    """A value for a message that has more to say: as :func:`shown`, and of a long text the beginning and end.

    Example:
        >>> brief("text"), len(brief("x" * 1000))
        ("'text'", 80)
    """
    return shortened(shown(value), SHOWN)


def named_beside(unknown: Collection[str], known: Collection[str]) -> str:
    """Return unknown names for a message, the first three, and beside them the nearest known one, or all of these.

    Example:
        >>> named_beside(["cache_blok_start"], ["cache_block_start", "policy"])
        'cache_blok_start: did you mean cache_block_start?'
        >>> named_beside(["x"], ["cache_block_start", "policy"])
        'x: known are cache_block_start, policy'
    """
    names = sorted(map(str, unknown))
    near = get_close_matches(names[0], known, 1)
    listed = ", ".join(name if name.isidentifier() and len(name) < 60 else shown(name) for name in names[:3])
    return f"{listed}: did you mean {near[0]}?" if near else f"{listed}: known are {', '.join(known)}"


def set_field(part: object, name: str, value: object) -> None:
    """Set a field of a frozen dataclass, from its ``__post_init__``."""
    object.__setattr__(part, name, value)


def located(where: str, error: Exception) -> DitHooksError:
    """The same error with the place of the value in front of its text.

    Example:
        >>> located("made", InvalidSetting("steps=0"))
        InvalidSetting('made: steps=0')
    """
    kind = WrongType if isinstance(error, TypeError) else InvalidSetting
    return kind(f"{where}: {error}")


def check_bool(name: str, value: object) -> bool:
    """Return a value that is ``True`` or ``False``.

    Raises:
        TypeError: it is neither.
    """
    if not isinstance(value, bool):
        raise WrongType(f"{name} must be True or False, not {shown(value)}")
    return value


def check_text(name: str, value: object, empty: bool = False) -> str:
    """Return a string, unchanged; refuse an empty one unless ``empty``.

    Raises:
        TypeError: not a string.
        ValueError: empty.
    """
    if not isinstance(value, str):
        raise WrongType(f"{name} must be a string, not {shown(value)} ({type(value).__name__})")
    if not value and not empty:
        raise InvalidSetting(f"{name} is an empty string")
    return value


def check_number(name: str, value: object, least: float, *, strictly: bool = False) -> float:
    """Return a finite number not below ``least``, or above it with ``strictly``; NumPy's numbers count as numbers.

    Raises:
        TypeError: not a number.
        ValueError: out of range.
    """
    if isinstance(value, bool) or not isinstance(value, Real):  # NumPy's, too
        raise WrongType(f"{name} must be a number, not {shown(value)} ({type(value).__name__})")
    try:
        number = float(value)
    except OverflowError:  # a whole number that no float comes near
        raise InvalidSetting(f"{name} is out of range: it has too many digits") from None
    if not math.isfinite(number):
        raise InvalidSetting(f"{name}={number:g} is out of range: it must be finite")
    if number < least or (strictly and number == least):
        raise InvalidSetting(
            f"{name}={number:g} is out of range: it must be {'above' if strictly else 'at least'} {least}"
        )
    return number


def check_count(name: str, value: object, least: int) -> int:
    """Return a whole number not below ``least``; NumPy's integers count as such.

    Raises:
        TypeError: not a whole number.
        ValueError: out of range.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise WrongType(f"{name} must be an int, not {shown(value)} ({type(value).__name__})")
    count: int = value.__index__()
    if count.bit_length() > 1024:  # no float comes near, and Python refuses to print it
        raise InvalidSetting(f"{name} is out of range: it has too many digits")
    if count < least:
        raise InvalidSetting(f"{name}={shown(count)} is out of range: it must be at least {least}")
    return count


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    """Return a value that is one of a few words.

    Raises:
        ValueError: it is another value.
    """
    if value not in choices:
        raise InvalidSetting(f"{name}={shown(value)}: there are {', '.join(map(repr, choices))}")
    return str(value)
