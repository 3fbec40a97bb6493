"""Standard output and error of a command that goes on where nobody reads them any more: closed, or a pipe that is."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO

from ..errors import UsageError

GONE = (errno.EPIPE, errno.ECONNRESET, errno.ESHUTDOWN, errno.EIO, errno.EBADF)  # EIO: of a terminal that has hung up


class OutlastingFile(io.FileIO):
    """A file descriptor whose reader may go; what is written from then on is dropped.

    Args:
        descriptor: of the file, which stays open.
        name: for the message of another error; ``None``: what cannot be written is dropped, whatever the reason.
    """

    def __init__(self, descriptor: int, name: str | None) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._subject, self._is_read = name, True

    def write(self, data: Any, /) -> int:
        """Write bytes, or drop them.

        Raises:
            UsageError: they cannot be written though somebody may read them: the disk is full, say.
        """
        if self._is_read:
            try:
                return super().write(data)
            except OSError as error:
                self._is_read = False
                if self._subject is not None and error.errno not in GONE:
                    raise UsageError(f"{self._subject} cannot be written: {error.strerror}") from None
        return memoryview(data).nbytes


@contextmanager
def outlasting_streams() -> Iterator[None]:
    """Within the block, drop what is printed to a stdout or stderr that is closed, and go on."""
    made = _outlasting(sys.stdout, sys.__stdout__, "stdout"), _outlasting(sys.stderr, sys.__stderr__, None)
    with redirect_stdout(made[0]), redirect_stderr(made[1]):
        try:
            yield
        finally:
            for stream in made:
                with suppress(OSError, ValueError, UsageError):
                    stream.flush()


def _outlasting(stream: Any, own: Any, name: str | None) -> TextIO:
    """Return what takes the place of a standard stream; one that others have put there stays.

    Args:
        stream: as it is; ``None`` where it was closed before Python started.
        own: as Python has opened it.
        name: as for :class:`OutlastingFile`.
    """
    if stream is None:  # print(file=None) would write to stdout, errors into figures
        return open(os.devnull, "w", encoding="utf-8")
    if stream is not own or not isinstance(stream, io.TextIOWrapper):
        return stream  # type: ignore[no-any-return]
    try:
        stream.flush()
        raw = OutlastingFile(stream.fileno(), name)
    except (OSError, ValueError):  # no file: a notebook's
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        stream.encoding,
        stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
