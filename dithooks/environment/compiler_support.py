"""Compiled code with a cache, refused in words where the release of PyTorch cannot compile it.

Older compilers misread the stand-ins and end in errors of their own, or run other code than they were given. Nothing
is asked, and nothing costs time, where the release compiles whole models.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any

import torch

from ..errors import InvalidSetting
from .measured_releases import COMPILED_BLOCKS, COMPILED_MODELS, Release, release_of

RELEASE: Release = release_of(torch.__version__) or COMPILED_MODELS
_WRAPPERS = "torch/_dynamo/eval_frame.py"


def refusing_compiled(function: Callable[..., Any], is_compiled: Callable[[], bool]) -> Callable[..., Any]:
    """Return a function that refuses to run for compiled code that this release cannot compile; else the very same.

    Args:
        function: what begins a call of the model; kept out of compiled code.
        is_compiled: returns whether the model or its blocks are known to be compiled.
    """
    if RELEASE >= COMPILED_MODELS:
        return function

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if (RELEASE < COMPILED_BLOCKS and is_compiled()) or _is_called_by_compiled_code():
            raise _refusal()
        return function(*args, **kwargs)

    return checked


def _refusal() -> InvalidSetting:
    models, blocks = (".".join(map(str, release)) for release in (COMPILED_MODELS, COMPILED_BLOCKS))
    return InvalidSetting(
        f"torch {torch.__version__} cannot compile this with a cache: torch {models} compiles models as a whole, "
        f"and torch {blocks} their blocks one by one. Install that, or call the model uncompiled"
    )


def _is_called_by_compiled_code() -> bool:
    """Return whether a caller is compiled code, by the frames that its wrappers leave on the stack of old releases.

    The innermost wrapper that keeps code out of the compiler is this library's own; another one is the user's, under
    which nothing is compiled.
    """
    frame = inspect.currentframe()
    is_own = True
    while frame is not None:
        code = frame.f_code
        if code.co_name == "_fn" and code.co_filename.replace(os.sep, "/").endswith(_WRAPPERS):
            if callable(frame.f_locals.get("callback")):
                return True
            if not is_own:
                return False
            is_own = False
        frame = frame.f_back
    return False
