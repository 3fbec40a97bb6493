"""Warnings that point at the user's line: the nearest one outside of this library and of installed packages."""

from __future__ import annotations

import inspect
import os
import site
import sysconfig
import warnings
from functools import cache
from pathlib import Path
from types import FrameType

from ..errors import DitHooksWarning

_OURS = f"{Path((lambda: 0).__code__.co_filename).parent.parent}{os.sep}"  # of frames, also if compiled elsewhere


def warn_user(message: str) -> None:
    """Issue a :class:`DitHooksWarning` at the user's line, where Python shows each message once.

    The user's line is the nearest caller outside of installed packages. If there is none, it is the nearest outside of
    this library, as in a server that is installed itself, or else the caller of this function, as in some threads.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     warn_user("nothing was reused")
        >>> str(caught[0].message)
        'nothing was reused'
    """
    frame = _caller_outside(_OURS, *_installed()) or _caller_outside(_OURS)
    if frame is None:
        warnings.warn(message, DitHooksWarning, stacklevel=2)
        return
    names = frame.f_globals  # maybe of a subclass that refuses to be written: like Python, write as to a plain dict
    registry = dict.get(names, "__warningregistry__")
    if not isinstance(registry, dict):
        dict.__setitem__(names, "__warningregistry__", registry := {})
    module = str(dict.get(names, "__name__") or "<unknown>")  # without one, nothing would be shown
    at = frame.f_code.co_filename, frame.f_lineno
    warnings.warn_explicit(message, DitHooksWarning, *at, module=module, registry=registry)


@cache
def _installed() -> tuple[str, ...]:
    """Return how the names of files begin that are Python's own or installed."""
    folders = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    sites = [*getattr(site, "getsitepackages", list)(), getattr(site, "getusersitepackages", str)()]
    return (*{f"{folder}{os.sep}" for folder in folders.union(sites) if folder}, "<frozen")


def _caller_outside(*places: str) -> FrameType | None:
    """Return the nearest frame of the stack whose file lies in none of these places."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(places):
        frame = frame.f_back
    return frame
