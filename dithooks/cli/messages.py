"""Errors of other libraries that are the user's to read: shown as one line, as this package's own are."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from ..environment.torch_api import OutOfMemoryError
from ..errors import DitHooksError, UsageError
from ..integrations.diffusers_placeholders import missing_import, module_of


@contextmanager
def one_line() -> Iterator[None]:
    """Turn some errors of a run into one line: too little memory, and what a pipeline lacks or does not take.

    Raises:
        UsageError: in place of such an error. All others pass.
    """
    try:
        yield
    except DitHooksError:
        raise
    except OutOfMemoryError as error:
        raise UsageError(f"{first_line(error)} (smaller pictures, fewer frames or --dtype take less)") from error
    except NameError as error:
        if (lack := missing_import(error)) is None:
            raise
        raise UsageError(lack) from error
    except NotImplementedError as error:  # of a part of a pipeline: its module says what it lacks
        if (module := module_of(error)) is None:
            raise
        raise UsageError(f"{module}: {first_line(error)}") from error
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
