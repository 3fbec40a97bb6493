"""Files on a local disk or anywhere that pyarrow reaches, written so that what has its name is whole."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow.fs as arrow_fs  # type: ignore[import-untyped]

from ..errors import InvalidSetting, RunMismatch

PART = ".part"


class Folder:
    """A folder on one of pyarrow's filesystems.

    Args:
        place: its path, or a URI such as ``s3://bucket/folder``.
        filesystem: of ``pyarrow.fs``, where ``place`` is a path in it.

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
        """Its path on this machine's disks; ``None``: it is elsewhere."""
        return Path(self.root) if isinstance(self.filesystem, arrow_fs.LocalFileSystem) else None

    def path(self, name: str) -> str:
        """What the filesystem calls a file in it."""
        return f"{self.root}/{name}" if name else self.root

    def make(self, name: str = "") -> None:
        """See that it, or a folder in it, is there.

        Raises:
            ValueError: it is a file.
        """
        if self.filesystem.get_file_info(self.path(name)).type == arrow_fs.FileType.File:
            raise InvalidSetting(f"out={self.place!r} is a file: give a folder")
        self.filesystem.create_dir(self.path(name), recursive=True)

    def names(self, folder: str = "") -> list[str]:
        """Of the files in it, or in a folder of it, sorted."""
        selector = arrow_fs.FileSelector(self.path(folder), allow_not_found=True)
        infos = self.filesystem.get_file_info(selector)
        return sorted(info.base_name for info in infos if info.type == arrow_fs.FileType.File)

    def has(self, name: str) -> bool:
        """Whether a file of that name is there."""
        return bool(self.filesystem.get_file_info(self.path(name)).type == arrow_fs.FileType.File)

    def read(self, name: str) -> bytes | None:
        """A file's bytes; ``None``: there is none."""
        try:
            with self.filesystem.open_input_file(self.path(name)) as file:
                return bytes(file.read())
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Put a file there, in place of one that has the name: at no time is there half of it.

        On a disk it has another name until it is whole; object stores show a file when it is closed.
        """
        if "/" in name:
            self.make(name.rpartition("/")[0])
        if self.local is None:
            with self.filesystem.open_output_stream(self.path(name)) as file:
                file.write(data)
            return
        # A name of its own: a process that Ray took for dead may be writing the same file
        path = Path(self.path(name))
        draft = path.with_name(f"_{uuid.uuid4().hex}{PART}")
        try:
            with draft.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)

    def delete(self, name: str) -> None:
        """Take a file away, if it is there."""
        with suppress(FileNotFoundError):
            self.filesystem.delete_file(self.path(name))

    def tidy(self, folder: str = "") -> None:
        """Take away what a process that was killed has left half written."""
        for name in self.names(folder):
            if name.endswith(PART):
                self.delete(f"{folder}/{name}" if folder else name)


@contextmanager
def locked(folder: Folder, name: str) -> Iterator[None]:
    """Hold a folder on a disk for this process; the system lets it go when the process ends, however that is.

    On filesystems elsewhere, and on systems without such locks, nothing is held.

    Raises:
        RuntimeError: another process holds it.
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
                f"out={folder.place!r}: another process is at work on this job: wait for it, or give another folder"
            ) from None
        except OSError:  # a filesystem without locks
            pass
        yield


@contextmanager
def opened(place: str) -> Iterator[Any]:
    """A file to read, by path or URI.

    Raises:
        FileNotFoundError: there is none.
    """
    filesystem, path = _found(place)
    with filesystem.open_input_file(path) as file:
        yield file


def _found(place: str) -> tuple[Any, str]:
    if "://" in place:
        found: tuple[Any, str] = arrow_fs.FileSystem.from_uri(place)
        return found
    return arrow_fs.LocalFileSystem(), os.path.abspath(place)
