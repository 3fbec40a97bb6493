"""Warnings that point at the user's line: the nearest one outside of this library and of those that call it."""

from __future__ import annotations

import inspect
import sys
import warnings
from pathlib import Path

from ..errors import DitHooksWarning

_OURS = Path(__file__).parent.parent
_LIBRARIES = ("torch", "diffusers", "accelerate", "contextlib")


def warn_user(message: str) -> None:
    """Issue a :class:`DitHooksWarning` at the user's line, or at the caller's if there is none, as in some threads.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     warn_user("nothing was reused")
        >>> str(caught[0].message)
        'nothing was reused'
    """
    places = (str(_OURS), *filter(None, map(_place, _LIBRARIES)))
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(places):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, DitHooksWarning, stacklevel=2 if frame is None else level)


def _place(library: str) -> str | None:
    """Return the folder or file of a library that is imported."""
    file = getattr(sys.modules.get(library), "__file__", None)
    return None if file is None else str(Path(file).parent) if file.endswith("__init__.py") else file
