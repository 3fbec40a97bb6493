"""Which errors are the user's to read in one line, and which are ours and keep their traceback."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..errors import TargetError

PACKAGE = Path(__file__).parent.parent
# Where the library sees to what it was given. What is raised elsewhere may be a fault of its own.
SEES_TO_IT = (
    *(
        "assign.py",
        "attachment.py",
        "blocks/",
        "cache_plan.py",
        "clock.py",
        "config.py",
        "demo/text.py",
        "handle.py",
        "policy/",
    ),
    *("predictor.py", "report/profile.py", "search/score.py"),
)


@contextmanager
def one_line() -> Iterator[None]:
    """Turn what is said of the user's asking into a line: by the library, by a pipeline's own check, or by the memory.

    Raises:
        TargetError: in place of such an error. All others pass.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TargetError(f"{_first_line(error)} (smaller pictures, fewer frames or --dtype take less)") from error
    except (ValueError, TypeError, RuntimeError) as error:
        if not is_told(error):
            raise
        raise TargetError(str(error)) from error


def is_told(error: Exception) -> bool:
    """Whether an error was raised on purpose, of what was given."""
    stack = traceback.extract_tb(error.__traceback__)
    if any(frame.name == "check_inputs" for frame in stack):  # as pipelines of diffusers call it
        return True
    path, line = Path(stack[-1].filename), stack[-1].line or ""
    within = path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else ""
    return within.startswith(SEES_TO_IT) and line.startswith("raise ")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
