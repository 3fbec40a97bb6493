"""Fashion-MNIST as the Debian package ``dataset-fashion-mnist`` brings it: four gzipped idx files, read strictly.

An idx file says what it holds in its header: two zero bytes, the type of its numbers (8: bytes), how many dimensions
there are, and the size of each, big-endian. A file that is cut short, too long or of other sizes is refused, since a
training on half of the pictures would look like any other.
"""

from __future__ import annotations

import gzip
import os
import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path("/usr/share/datasets/fashion-mnist")
VARIABLE = "FASHION_MNIST"  # of the environment: another folder
SIZE = 28
NAMES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
PARTS = {"train": ("train", 60_000), "test": ("t10k", 10_000)}
UNSIGNED_BYTE = 0x08


@dataclass(frozen=True)
class Split:
    """Pictures (n, 1, 28, 28) and labels (n,) in 0…9, both as bytes: a batch at a time becomes float."""

    pictures: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def load_fashion(part: str, folder: str | Path | None = None) -> Split:
    """Read the 60,000 pictures of ``"train"`` or the 10,000 of ``"test"``.

    Args:
        part: ``"train"`` or ``"test"``.
        folder: where the files are; left out, the environment's ``FASHION_MNIST``, else where Debian puts them.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not what its name says, or there is no such part.
    """
    if part not in PARTS:
        raise ValueError(f"there is no part {part!r}: {' or '.join(PARTS)}")
    prefix, count = PARTS[part]
    where = Path(folder or os.environ.get(VARIABLE) or FOLDER)
    pictures = read_idx(_file(where, f"{prefix}-images-idx3-ubyte.gz"), (count, SIZE, SIZE))
    labels = read_idx(_file(where, f"{prefix}-labels-idx1-ubyte.gz"), (count,))
    if int(labels.max()) >= len(NAMES):
        raise ValueError(f"{where}: label {int(labels.max())} in {part}; there are {len(NAMES)} classes, from 0 on")
    return Split(pictures.unsqueeze(1), labels)


def read_idx(path: Path, shape: tuple[int, ...]) -> Tensor:
    """The bytes of one gzipped idx file, which has to have this very shape."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from error
    header = 4 + 4 * len(shape)
    magic = bytes((0, 0, UNSIGNED_BYTE, len(shape)))
    if content[:4] != magic:
        raise ValueError(f"{path} begins with {content[:4].hex()}: an idx file of this kind begins with {magic.hex()}")
    if len(content) < header:
        raise ValueError(f"{path} ends within its header")
    said = tuple(int.from_bytes(content[at : at + 4], "big") for at in range(4, header, 4))
    if said != shape:
        raise ValueError(f"{path} says that it holds {said}; Fashion-MNIST has {shape}")
    if len(content) - header != prod(shape):
        raise ValueError(f"{path} holds {len(content) - header} bytes of {shape}, which are {prod(shape)}")
    return torch.frombuffer(bytearray(content[header:]), dtype=torch.uint8).reshape(shape)


def to_unit(pictures: Tensor) -> Tensor:
    """Bytes to floats in 0…1."""
    return pictures.float() / 255


def _file(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise FileNotFoundError(
            f"{name} is not in {folder}: `apt install dataset-fashion-mnist` puts it into {FOLDER}; another folder "
            f"can be given, or named by {VARIABLE} in the environment"
        )
    return folder / name
