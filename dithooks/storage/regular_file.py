"""Regular files of bounded size, as all that is read is to be: no devices, no pipes, no folders."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from ..errors import FileError, InvalidSetting, MissingFile, shortened
from ..validation import NAME, shown


@contextmanager
def opened_regular(path: str | os.PathLike[str], most: int) -> Iterator[BinaryIO]:
    """Open a regular file to read, if it is not larger than ``most`` bytes. Nothing is waited for.

    What the block makes of the file's content, and raises, is left as it is.

    Raises:
        OSError: there is no such file (:class:`.MissingFile`), it is none, or cannot be opened (:class:`.FileError`).
        ValueError: it is too large.
    """
    name = os.fsdecode(path)
    try:
        if "\0" in name:
            raise FileError(f"{shown(name)} cannot be read: no name of a file has a NUL")
        _check(name, os.stat(path), most)  # before it is opened: of some devices that alone has effects
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(descriptor, "rb") as file:
            _check(name, os.fstat(descriptor), most)
            yield file
    except FileError:
        raise
    except FileNotFoundError:
        raise MissingFile(f"there is no file {shown(name)}") from None
    except OSError as error:
        raise FileError(f"{shown(name)} cannot be read: {error.strerror or error}") from error


def read_bytes(path: str | os.PathLike[str], most: int) -> bytes:
    """Read a regular file; errors as :func:`opened_regular`.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     read_bytes(file.name, 8)
        b''
    """
    with opened_regular(path, most) as file:
        data = file.read(most + 1)  # it may have grown, and some files of the system say that they are empty
    if len(data) > most:
        raise InvalidSetting(
            f"{shortened(os.fsdecode(path), NAME)} is larger than {most:,} bytes, the most that is read"
        )
    return data


def check_readable(path: str | os.PathLike[str]) -> None:
    """Check that there is a regular file that may be read; errors as :func:`opened_regular`."""
    with opened_regular(path, 2**63):
        pass


def _check(name: str, found: os.stat_result, most: int) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise FileError(f"{shown(name)} cannot be read: it is a folder")
    if not stat.S_ISREG(found.st_mode):
        raise FileError(f"{shown(name)} cannot be read: it is no regular file")
    if found.st_size > most:
        raise InvalidSetting(f"{shortened(name, NAME)} has {found.st_size:,} bytes: at most {most:,} are read")
