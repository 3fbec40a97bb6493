"""The replacement of a file: a draft is written beside it, which takes its place once it is whole."""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
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
    errno.EBUSY: "it is in use, or mounted by itself: mount its folder instead, or write elsewhere",
}
DRAFT = r"\.(.*)\.[0-9a-f]{12}\.part(\.[^.]*)?"
ABANDONED = 86_400  # seconds after which a draft that was not written to is one of a process that was killed
LOOKED_AT = 1_000  # files of a folder that are looked at for such drafts: a save is not to cost more in a large one


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the path of a draft to be written; at the end of the block it takes the file's place, whole.

    The draft has the file's ending. It is removed if the block raises, and what was there before is then as it was. A
    link stays a link: the file that it leads to is replaced. Permissions are those of the old file; those of a new one
    follow from the umask. To other files, such as ``/dev/stdout`` or a pipe, the draft is copied. Drafts of
    the same file that a killed process left a day ago or earlier are removed.

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
    path = os.fsdecode(path)
    try:
        file = _place(path)
        if file is None:
            with tempfile.TemporaryDirectory() as folder:
                draft = Path(folder, f"draft{Path(path).suffix}")
                yield draft
                _copy(draft, path)
            return
        _tidy(file)
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
    """Check that a file can be written or replaced, by a draft that is removed at once: no trace is left.

    Raises:
        OSError: it cannot; a :class:`.FileError` with the reason.
    """
    path = os.fsdecode(path)
    try:
        if (file := _place(path)) is not None:
            _new_draft(file).unlink()  # some folders, as those of /proc, take no file whatever their permissions say
    except FileError:
        raise
    except OSError as error:
        raise _refusal(path, error) from error


def _place(path: str) -> Path | None:
    """The regular file that a path leads to, there or not yet, or None for a special one; errors if it cannot be."""
    try:
        if is_special(path):
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return None
        file = Path(os.path.realpath(path))
        if file.is_dir():
            raise FileError(f"{path} cannot be written: {path} is a folder")
        if not file.parent.is_dir():
            raise FileError(f"{path} cannot be written: {file.parent} is not a folder: create it first")
        with suppress(FileNotFoundError):
            os.stat(path)  # a name that is too long, or a link that leads to itself
            if not os.access(file, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if not os.access(file.parent, os.W_OK | os.X_OK):
            raise FileError(
                f"{path} cannot be written: you may not write in {file.parent}, where a draft of it has to lie first"
            )
        return file
    except FileError:
        raise
    except (OSError, ValueError) as error:  # of a name with a NUL
        raise _refusal(path, error) from error


def is_special(path: str | os.PathLike[str]) -> bool:
    """Whether a path leads to no regular file and no folder: to a device, a pipe, or an open file of a process."""
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
    """Make an empty draft; names of two processes differ.

    Its permissions follow from the umask, or are the owner's alone until it gets those of the file that it replaces,
    which may be private.
    """
    draft = file.with_name(_draft_name(file, secrets.token_hex(6)))
    os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600 if file.exists() else 0o666))
    return draft


def _draft_name(file: Path, number: str) -> str:
    return f".{file.stem[:40]}.{number}.part{file.suffix[:40]}"


def _tidy(file: Path) -> None:
    """Remove the drafts of a file that are abandoned."""
    before, after = _draft_name(file, "/").split("/")
    with suppress(OSError), os.scandir(file.parent) as found:
        for each in islice(found, LOOKED_AT):
            ours = each.name.startswith(before) and each.name.endswith(after) and is_draft(each.name)
            if ours and each.stat(follow_symlinks=False).st_mtime < time.time() - ABANDONED:
                os.unlink(each.path)


def _settle(draft: Path, file: Path) -> None:
    """Bring a written draft to the disk, and put it in the file's place."""
    with draft.open("rb+") as written:
        os.fsync(written.fileno())
    with suppress(FileNotFoundError):
        old = file.stat()
        with suppress(OSError, AttributeError):  # only the superuser may, and not on every system
            if (old.st_uid, old.st_gid) != (draft.stat().st_uid, draft.stat().st_gid):
                os.chown(draft, old.st_uid, old.st_gid)
        if (mode := stat.S_IMODE(old.st_mode)) != stat.S_IMODE(draft.stat().st_mode):  # not every disk has permissions
            os.chmod(draft, mode)
    os.replace(draft, file)
    with suppress(OSError):  # not every system has folders that can be opened
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # else a power cut may bring the old file back
        finally:
            os.close(folder)


def _copy(draft: Path, path: str) -> None:
    """Write a draft to a device or a pipe; output that a shell sends to a file is appended."""
    with draft.open("rb") as data, os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND), "wb") as target:
        while part := data.read(2**20):
            target.write(part)


def _refusal(path: str, error: OSError | ValueError) -> FileError:
    number = error.errno if isinstance(error, OSError) else None
    reason = REMEDIES.get(number or 0) or (error.strerror if isinstance(error, OSError) else None) or str(error)
    refusal = FileError(f"{path} cannot be written: {reason}")
    refusal.errno = number
    return refusal
