"""The files that a command writes: checked before the work, written after it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from ..errors import UsageError


def check_results(files: Sequence[Path], given: Sequence[Path] = ()) -> None:
    """Check before the work that its results can be written. Files that exist are overwritten.

    Args:
        files: the files to be written.
        given: files that the command reads, and which it must not overwrite.

    Raises:
        UsageError: a file cannot be written, two results would go to one file, or one to a file that was given.
    """
    for path in files:
        if path.is_dir() or not path.parent.is_dir():
            lack = f"{path} is a folder" if path.is_dir() else f"{path.parent} is not a folder"
            raise UsageError(f"{path} cannot be written: {lack}")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise UsageError(f"{path} cannot be written: you may not write there")
    places = [path.resolve() for path in files]
    if len(set(places)) < len(places):
        twice = next(path for path in files if places.count(path.resolve()) > 1)
        raise UsageError(f"two results would go to {twice}: give them other names")
    read = {path.resolve() for path in given}
    if lost := [path for path in files if path.resolve() in read]:
        raise UsageError(f"{lost[0]} would be overwritten, which was given to be read: write the results elsewhere")


def written(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file by a function that takes its path.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        write(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error}") from error


def json_file(json_to: str | None) -> Path | None:
    """The file that ``--json`` names; None for stdout (``-``) and where the option is left out."""
    return None if json_to in (None, "-") else Path(json_to or "")


def stdout_kept_for_json(json_to: str | None) -> AbstractContextManager[object]:
    """Send what a factory prints in the block to stderr, if stdout is to hold JSON alone."""
    return redirect_stdout(sys.stderr) if json_to == "-" else nullcontext()


def write_json(path: Path, numbers: Mapping[str, Any]) -> None:
    """Write numbers as JSON; errors as :func:`written`."""
    written(path, lambda file: file.write_text(as_json(numbers) + "\n", encoding="utf-8"))


def as_json(numbers: Any) -> str:
    """Numbers as JSON text, without NaN and infinity, which JSON does not have."""
    return json.dumps(numbers, indent=2, allow_nan=False, ensure_ascii=False)
