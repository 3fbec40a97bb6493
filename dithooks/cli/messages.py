"""Errors as one line for the user: by their class. All others keep their traceback."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import DitHooksError, TargetError


@contextmanager
def one_line() -> Iterator[None]:
    """Turn errors that are the user's to read into one line: the library's, a pipeline's own check, too little memory.

    Raises:
        TargetError: in place of such an error. All others pass.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TargetError(f"{_first_line(error)} (smaller pictures, fewer frames or --dtype take less)") from error
    except DitHooksError as error:
        raise TargetError(str(error)) from error
    except (ValueError, TypeError, RuntimeError) as error:
        if not _is_of_a_pipeline(error):
            raise
        raise TargetError(str(error)) from error


def _is_of_a_pipeline(error: Exception) -> bool:
    """Whether a pipeline of diffusers has refused its arguments: these do so in ``check_inputs``."""
    return any(frame.name == "check_inputs" for frame in traceback.extract_tb(error.__traceback__))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
