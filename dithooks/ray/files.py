"""Files on a disk or on another filesystem of pyarrow, written so that a file of the final name is whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow.fs as arrow_fs  # type: ignore[import-untyped]

from ..errors import InvalidSetting, RunMismatch
from ..storage import replacement
from ..storage.regular_file import opened_regular
from ..validation import shown

PROMPTS_BYTES = 2**31


class Folder:
    """A folder on one of pyarrow's filesystems.

    Args:
        place: path of the folder, or a URI such as ``s3://bucket/folder``.
        filesystem: a filesystem of ``pyarrow.fs`` in which ``place`` is a path; left out, it follows from ``place``.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     folder = Folder(place)
        ...     folder.write("notes/a.txt", b"whole")
        ...     folder.names("notes"), folder.read("notes/a.txt"), folder.read("notes/b.txt")
        (['a.txt'], b'whole', None)
    """

    def __init__(self, place: str, filesystem: Any = None) -> None:
        self.place = place
        if filesystem is None:
            filesystem, place = _found(place)
        self.filesystem, self.root = filesystem, place.rstrip("/") or "/"

    @property
    def local(self) -> Path | None:
        """The folder's path on this machine; ``None``: it is on another filesystem."""
        return Path(self.root) if isinstance(self.filesystem, arrow_fs.LocalFileSystem) else None

    def path(self, name: str) -> str:
        """Return a file's path in the filesystem."""
        return f"{self.root}/{name}" if name else self.root

    def make(self, name: str = "") -> None:
        """Make the folder, or one in it, if it does not exist.

        Raises:
            ValueError: the path is a file.
        """
        if self.filesystem.get_file_info(self.path(name)).type == arrow_fs.FileType.File:
            raise InvalidSetting(f"out={shown(self.place)} is a file: give a folder")
        self.filesystem.create_dir(self.path(name), recursive=True)

    def names(self, folder: str = "") -> list[str]:
        """Return the sorted names of the files in the folder, or in one in it."""
        selector = arrow_fs.FileSelector(self.path(folder), allow_not_found=True)
        infos = self.filesystem.get_file_info(selector)
        return sorted(info.base_name for info in infos if info.type == arrow_fs.FileType.File)

    def has(self, name: str) -> bool:
        """Whether a file exists."""
        return bool(self.filesystem.get_file_info(self.path(name)).type == arrow_fs.FileType.File)

    def read(self, name: str) -> bytes | None:
        """Return a file's bytes; ``None``: it does not exist."""
        try:
            with self.filesystem.open_input_file(self.path(name)) as file:
                return bytes(file.read())
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Write or replace a file; no half of it is ever seen.

        On a disk the file has another name until it is whole; object stores show a file when it is closed.
        """
        if "/" in name:
            self.make(name.rpartition("/")[0])
        if self.local is None:
            with self.filesystem.open_output_stream(self.path(name)) as file:
                file.write(data)
            return
        replacement.write_bytes(self.path(name), data)

    def delete(self, name: str) -> None:
        """Delete a file, if it exists."""
        with suppress(FileNotFoundError):
            self.filesystem.delete_file(self.path(name))

    def tidy(self, folder: str = "") -> None:
        """Delete the half-written files of killed processes."""
        for name in self.names(folder):
            if replacement.is_draft(name):
                self.delete(f"{folder}/{name}" if folder else name)


@contextmanager
def locked(folder: Folder, name: str) -> Iterator[None]:
    """Lock a folder on a disk for this process; the system releases the lock when the process ends.

    On other filesystems, and on systems without such locks, nothing is locked.

    Raises:
        RuntimeError: another process holds the lock.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    if folder.local is None:
        yield
        return
    with (folder.local / name).open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunMismatch(
                f"out={shown(folder.place)}: another process is at work on this job: wait for it, or give "
                "another folder"
            ) from None
        except OSError:  # a filesystem without locks
            pass
        yield


@contextmanager
def opened(place: str) -> Iterator[Any]:
    """Open a file to read, by path or URI; on a disk, a regular one of at most 2 GiB.

    Raises:
        OSError: the file does not exist (:class:`FileNotFoundError`), or cannot be read.
        ValueError: it is too large.
    """
    filesystem, path = _found(place)
    if isinstance(filesystem, arrow_fs.LocalFileSystem):
        with opened_regular(path, PROMPTS_BYTES) as regular:
            yield regular
        return
    with filesystem.open_input_file(path) as file:
        yield file


def _found(place: str) -> tuple[Any, str]:
    if "://" in place:
        found: tuple[Any, str] = arrow_fs.FileSystem.from_uri(place)
        return found
    return arrow_fs.LocalFileSystem(), os.path.abspath(place)
