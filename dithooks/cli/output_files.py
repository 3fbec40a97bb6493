"""Where results go: looked at before the work, written after it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import TargetError


def check_results(files: Sequence[Path], given: Sequence[Path] = ()) -> None:
    """Find out before the work whether its results can be written. A file that is there already is overwritten.

    Args:
        files: that will be written.
        given: that are read, and have to stay.

    Raises:
        TargetError: one cannot be, two would go to one file, or one to a file that was given.
    """
    for path in files:
        if path.is_dir() or not path.parent.is_dir():
            lack = f"{path} is a folder" if path.is_dir() else f"{path.parent} is not a folder"
            raise TargetError(f"{path} cannot be written: {lack}")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise TargetError(f"{path} cannot be written: you may not write there")
    places = [path.resolve() for path in files]
    if len(set(places)) < len(places):
        twice = next(path for path in files if places.count(path.resolve()) > 1)
        raise TargetError(f"two results would go to {twice}: give them other names")
    read = {path.resolve() for path in given}
    if lost := [path for path in files if path.resolve() in read]:
        raise TargetError(f"{lost[0]} would be overwritten, which was given to be read: write the results elsewhere")


def written(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file.

    Raises:
        TargetError: that fails.
    """
    try:
        write(path)
    except OSError as error:
        raise TargetError(f"{path} cannot be written: {error}") from error


def write_json(path: Path, numbers: Mapping[str, Any]) -> None:
    """Write numbers; errors as :func:`written`."""
    written(path, lambda file: file.write_text(as_json(numbers) + "\n", encoding="utf-8"))


def as_json(numbers: Mapping[str, Any]) -> str:
    """Numbers as text, which holds no NaN and no infinity: JSON has none."""
    return json.dumps(numbers, indent=2, allow_nan=False, ensure_ascii=False)
