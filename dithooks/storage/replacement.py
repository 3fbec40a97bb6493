"""The replacement of a file: what is written goes to a draft beside it, which takes its place once it is whole."""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import FileError

REMEDIES = {
    errno.ENOSPC: "the disk is full: free some of it, or write elsewhere",
    errno.EDQUOT: "your share of the disk is used up: free some of it, or write elsewhere",
    errno.EACCES: "you may not write there",
    errno.EPERM: "you may not write there",
    errno.EROFS: "the disk can only be read from",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "it is a link that leads to itself",
}
DRAFT = r"\.(.*)\.[0-9a-f]{12}\.part(\.\w*)?"


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the path of a draft to be written; at the end of the block it takes the file's place, whole.

    The draft has the file's ending. It is removed if the block raises, and what was there before is then as it was. A
    link stays a link: the file that it leads to is replaced. Permissions are those of the old file; those of a new one
    follow from the umask. To what is no regular file, such as ``/dev/stdout`` or a pipe, the draft is copied.

    Args:
        path: the file.

    Raises:
        OSError: the file cannot be written; a :class:`.FileError` with the reason.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing(Path(folder, "plan.json")) as draft:
        ...         _ = draft.write_text("whole")
        ...     Path(folder, "plan.json").read_text(), os.listdir(folder)
        ('whole', ['plan.json'])
    """
    try:
        check_writable(path)
        if is_special(path):
            with tempfile.TemporaryDirectory() as folder:
                draft = Path(folder, f"draft{Path(path).suffix}")
                yield draft
                _copy(draft, path)
            return
        file = Path(os.path.realpath(path))
        draft = _new_draft(file)
        try:
            yield draft
            _settle(draft, file)
        finally:
            draft.unlink(missing_ok=True)
    except FileError:
        raise
    except OSError as error:
        raise _refusal(path, error) from error


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write or replace a file, as :func:`replacing` does."""
    with replacing(path) as draft:
        draft.write_bytes(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write or replace a file with a text in UTF-8, as :func:`replacing` does."""
    write_bytes(path, text.encode())


def check_writable(path: str | os.PathLike[str]) -> None:
    """Check that a file can be written or replaced, without a trace.

    Raises:
        OSError: it cannot; a :class:`.FileError` with the reason.
    """
    try:
        if is_special(path):
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return
        file = Path(os.path.realpath(path))
        if file.is_dir():
            raise FileError(f"{os.fspath(path)} cannot be written: {os.fspath(path)} is a folder")
        if not file.parent.is_dir():
            raise FileError(f"{os.fspath(path)} cannot be written: {file.parent} is not a folder: create it first")
        with suppress(FileNotFoundError):
            os.stat(path)  # a name that is too long, or a link that leads to itself
            if not os.access(file, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if not os.access(file.parent, os.W_OK | os.X_OK):
            raise FileError(
                f"{os.fspath(path)} cannot be written: you may not write in {file.parent}, where a draft of it has to "
                "lie first"
            )
    except FileError:
        raise
    except (OSError, ValueError) as error:  # of a name with a NUL
        raise _refusal(path, error) from error


def is_special(path: str | os.PathLike[str]) -> bool:
    """Whether a path leads to what is no regular file and no folder: a device, a pipe, or an open file of a process."""
    if os.path.abspath(path).startswith(("/dev/fd/", "/dev/std", "/proc/")):
        return os.path.exists(path)
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def is_draft(name: str) -> bool:
    """Whether a file's name is that of a draft, which a killed process may have left.

    Example:
        >>> is_draft(".plan.0123456789ab.part.json"), is_draft("plan.json")
        (True, False)
    """
    return re.fullmatch(DRAFT, name) is not None


def _new_draft(file: Path) -> Path:
    """Make an empty draft, whose permissions follow from the umask; names of two processes differ."""
    draft = file.with_name(f".{file.stem[:40]}.{secrets.token_hex(6)}.part{file.suffix[:40]}")
    os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return draft


def _settle(draft: Path, file: Path) -> None:
    """Bring a written draft to the disk, and put it in the file's place."""
    with draft.open("rb+") as written:
        os.fsync(written.fileno())
    with suppress(FileNotFoundError):
        old = file.stat()
        with suppress(OSError, AttributeError):  # only the superuser may, and not on every system
            if (old.st_uid, old.st_gid) != (draft.stat().st_uid, draft.stat().st_gid):
                os.chown(draft, old.st_uid, old.st_gid)
        os.chmod(draft, stat.S_IMODE(old.st_mode))
    os.replace(draft, file)


def _copy(draft: Path, path: str | os.PathLike[str]) -> None:
    """Write a draft to a device or a pipe; what a shell has sent to a file goes on behind what is there."""
    with draft.open("rb") as data, os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND), "wb") as target:
        while part := data.read(2**20):
            target.write(part)


def _refusal(path: str | os.PathLike[str], error: OSError | ValueError) -> FileError:
    number = error.errno if isinstance(error, OSError) else None
    reason = REMEDIES.get(number or 0) or (error.strerror if isinstance(error, OSError) else None) or str(error)
    refusal = FileError(f"{os.fspath(path)} cannot be written: {reason}")
    refusal.errno = number
    return refusal
