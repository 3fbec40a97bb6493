"""Errors of other libraries that are the user's to read: shown as one line, as this package's own are."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from ..environment.torch_api import OutOfMemoryError
from ..errors import DitHooksError, UsageError


@contextmanager
def one_line() -> Iterator[None]:
    """Turn two errors of a run into one line: too little memory, and a pipeline's own check of its arguments.

    Raises:
        UsageError: in place of such an error. All others pass.
    """
    try:
        yield
    except DitHooksError:
        raise
    except OutOfMemoryError as error:
        raise UsageError(f"{first_line(error)} (smaller pictures, fewer frames or --dtype take less)") from error
    except (ValueError, TypeError, RuntimeError) as error:
        if not _is_of_a_pipeline(error):
            raise
        raise UsageError(str(error)) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text that is not empty; the name of its class if there is none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _is_of_a_pipeline(error: Exception) -> bool:
    """Whether a pipeline of diffusers has refused its arguments: they do so in ``check_inputs``."""
    return any(frame.name == "check_inputs" for frame in traceback.extract_tb(error.__traceback__))
