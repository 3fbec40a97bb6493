"""Errors of the user's own code: shown with the frames of that code, and none of this package's."""

from __future__ import annotations

import importlib
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
PACKAGE = f"{Path(__file__).parents[1]}{os.sep}"  # else dithooks_models.py beside it would be of the package, too
HEAD = "Traceback (most recent call last):\n"
FROZEN = "<frozen importlib"  # of an import, whose frames show nothing


def call_user(function: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
    """Call the user's code; what it raises is shown by :func:`user_traceback`."""
    return function(*args, **kwargs)


def user_traceback(error: BaseException) -> str | None:
    """Return an error with the frames of the user's code and of the libraries that it calls.

    Returns:
        The text of a traceback; None if the error was not raised by a :func:`call_user`, or in this package's own code.

    Example:
        >>> def factory():
        ...     return 1 / 0
        >>> try:
        ...     call_user(factory)
        ... except ZeroDivisionError as error:
        ...     print("call_user" in user_traceback(error), "in factory" in user_traceback(error))
        False True
    """
    codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    if call_user.__code__ not in codes:
        return None
    if (
        codes[-1].co_filename.startswith(PACKAGE) and codes[-1] is not call_user.__code__
    ):  # that takes no such arguments
        return None
    shown = traceback.TracebackException.from_exception(error)
    _leave_out(shown, codes.index(call_user.__code__))
    text = "".join(shown.format())
    return text if shown.stack else text.replace(HEAD, "", 1)


def _leave_out(shown: traceback.TracebackException, first: int = 0) -> None:
    """Leave out the first frames, those of this package and of imports; of the errors that led to it, too."""
    ours = (PACKAGE, FROZEN, str(importlib.__file__))
    kept = [each for each in shown.stack[first:] if not each.filename.startswith(ours)]
    shown.stack[:] = kept
    for cause in (shown.__cause__, shown.__context__):
        if cause is not None:
            _leave_out(cause)
