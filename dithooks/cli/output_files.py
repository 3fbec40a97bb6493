"""The files that a command writes: checked before the work, written after it."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from ..errors import FileError, UsageError
from ..storage.replacement import check_writable, is_special, write_text


def check_results(files: Sequence[Path], given: Sequence[Path] = ()) -> None:
    """Check before the work that its results can be written, without a trace. Files that exist are replaced.

    Args:
        files: the files to be written.
        given: files that the command reads, and which it must not replace.

    Raises:
        UsageError: a file cannot be written, two results would go to one file, or one to a file that was given.
    """
    try:
        for path in files:
            check_writable(path)
    except FileError as error:
        raise UsageError(str(error)) from None
    places = [path.resolve() for path in files if not is_special(path)]
    if len(set(places)) < len(places):
        twice = next(path for path in files if places.count(path.resolve()) > 1)
        raise UsageError(f"two results would go to {twice}: give them other names")
    read = {path.resolve() for path in given}
    if lost := [path for path in files if path.resolve() in read]:
        raise UsageError(f"{lost[0]} would be overwritten, which was given to be read: write the results elsewhere")


def check_folder(path: Path) -> None:
    """Check before the work that files can be written in a folder, which may have to be made.

    Raises:
        UsageError: they cannot.
    """
    try:
        if os.path.lexists(path) and not path.is_dir():
            raise UsageError(f"{path} is a {'file' if path.exists() else 'link to nothing'}: give a folder")
        there = next(each for each in (path, *path.absolute().parents) if each.exists())
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            raise UsageError(f"{path} cannot be made or written into: you may not write in {there}")
        os.rmdir(tempfile.mkdtemp(dir=there))  # some folders, as those of /proc, take none whatever permissions say
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{path} cannot be made or written into: {reason}") from None


def json_file(json_to: str | None) -> Path | None:
    """The file that ``--json`` names; None for stdout (``-``) and where the option is left out."""
    return None if json_to in (None, "-") else Path(json_to or "")


def stdout_kept_for_json(json_to: str | None) -> AbstractContextManager[object]:
    """Send what a factory prints in the block to stderr, if stdout is to hold JSON alone."""
    return redirect_stdout(sys.stderr) if json_to == "-" else nullcontext()


def write_json(path: Path, numbers: Mapping[str, Any]) -> None:
    """Write numbers as JSON.

    Raises:
        FileError: the file cannot be written.
    """
    write_text(path, as_json(numbers) + "\n")


def as_json(numbers: Any) -> str:
    """Numbers as JSON text, without NaN and infinity, which JSON does not have."""
    return json.dumps(numbers, indent=2, allow_nan=False, ensure_ascii=False)
