"""The arrays of an ``.npz`` archive, whose sizes are known to be what they claim before anything is unpacked."""

from __future__ import annotations

import io
import math
import os
import struct
import tokenize
import zipfile
import zlib
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidSetting
from ..validation import shown
from .regular_file import opened_regular

ARCHIVE_BYTES = 2**33  # 8 GiB, of a file and of its arrays: recordings of the largest models stay far below
DIRECTORY_BYTES = 2**20  # of the list of arrays: some ten thousand of them
SMALL = 2**24  # 16 MiB: what any archive may unpack to
PACKED = 20  # times its size: a recording packs to a half at best
PART = 2**20  # bytes that are unpacked at a time
NOT_AN_ARCHIVE = (  # what zipfile, zlib and NumPy raise for a file that is no archive, or no array
    *(ValueError, KeyError, TypeError, EOFError, RuntimeError, NotImplementedError, OverflowError, SyntaxError),
    *(MemoryError, RecursionError, struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error),
)


def read_arrays(path: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
    """Read all arrays of an archive, by name.

    Raises:
        OSError: as :func:`.opened_regular`.
        ValueError: the file is no archive of arrays, is damaged, or claims sizes that it does not have or that no
            machine holds.
    """
    with opened_regular(path, ARCHIVE_BYTES) as file:
        try:
            _check_directory(file)
            with zipfile.ZipFile(file) as archive:
                _check_sizes(archive, os.fstat(file.fileno()).st_size)
                for member in archive.infolist():  # all of them, before the first is unpacked
                    _shape_and_type(archive, member)
                return {member.filename.removesuffix(".npy"): _array(archive, member) for member in archive.infolist()}
        except InvalidSetting:
            raise
        except NOT_AN_ARCHIVE as error:
            raise InvalidSetting(f"it is no archive of arrays, or damaged ({type(error).__name__})") from error


def _check_directory(file: BinaryIO) -> None:
    """Refuse a list of arrays that would itself fill the memory."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 2**16 - 22, 0))
    tail = file.read()
    place = tail.rfind(b"PK\x05\x06")
    if place < 0 or len(tail) < place + 22:
        raise InvalidSetting("it is no archive of arrays, or damaged: its list of arrays is missing")
    length = struct.unpack("<L", tail[place + 12 : place + 16])[0]
    # The longer form of the list, which the other function would believe, is for more than 4 GiB or 65,535 arrays
    if tail[max(place - 20, 0) : place].startswith(b"PK\x06\x07"):
        longer = tail[max(place - 76, 0) : place - 20]
        is_there = size >= 2**32 and longer.startswith(b"PK\x06\x06")
        length = struct.unpack("<Q", longer[40:48])[0] if is_there else size
    if length > DIRECTORY_BYTES:
        raise InvalidSetting("it claims more arrays than any recording has")
    file.seek(0)


def _check_sizes(archive: zipfile.ZipFile, size: int) -> None:
    members = archive.infolist()
    if len({member.filename for member in members}) < len(members):
        raise InvalidSetting("it holds two arrays of one name")
    if any(member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for member in members):
        raise InvalidSetting("it is packed as NumPy packs nothing")  # of these, no part can be unpacked by itself
    unpacked = sum(member.file_size for member in members)
    if unpacked > min(max(PACKED * size, SMALL), ARCHIVE_BYTES):
        raise InvalidSetting(f"it unpacks to {unpacked:,} bytes from {size:,}, which no recording does")


def _shape_and_type(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> tuple[tuple[int, ...], np.dtype[Any], bool]:
    """Read the header of an array, and check that it is as large as its member."""
    name = member.filename[:60]
    if not member.filename.endswith(".npy"):
        raise InvalidSetting(f"it holds {shown(name)}, which is no array")
    with archive.open(member) as file:
        start = io.BytesIO(file.read(2**14))  # the function would believe a length of 4 GiB
    version = np.lib.format.read_magic(start)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise InvalidSetting(f"its array {shown(name)} is of a format that is not read here")
    shape, by_column, kind = read(start)
    if kind.hasobject or kind.kind not in "biufcUS" or not kind.itemsize:  # NumPy would make room for one byte each
        raise InvalidSetting(f"its array {shown(name)} holds neither numbers nor texts: nothing else is read")
    if min(shape, default=0) < 0 or start.tell() + math.prod(shape) * kind.itemsize != member.file_size:
        raise InvalidSetting(f"its array {shown(name)} is not as large as its header says")
    return shape, kind, by_column


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    shape, kind, by_column = _shape_and_type(archive, member)
    size = math.prod(shape) * kind.itemsize
    data = bytearray(size)
    with archive.open(member) as file:
        file.read(member.file_size - size)
        for start in range(0, size, PART):
            data[start : start + PART] = file.read(PART)
        if file.read(1) or len(data) != size:  # at the end the checksum is looked at
            raise InvalidSetting(f"its array {shown(member.filename[:60])} is damaged")
    if not size:
        return np.zeros(shape, kind)
    flat: NDArray[Any] = np.frombuffer(data, kind)
    return flat.reshape(shape[::-1]).T if by_column else flat.reshape(shape)
