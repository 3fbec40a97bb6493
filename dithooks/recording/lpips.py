"""A learned distance between pictures: shift-tolerant LPIPS (Ghildyal and Liu, 2022, arXiv 2207.13686).

The weights are those that the package ``stlpips-pytorch`` brings, which is not imported: it asks for libraries that are
of no use here. Its network is built here, an AlexNet whose every stride is a blur behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import InvalidSetting, MissingPackage

SIZE = 64  # pixels a side, of the pictures that the network was made for
BATCH = 2**20  # pixels at a time: the first layer makes 64 numbers of each
PACKAGE, WEIGHTS = "stlpips_pytorch", "weights/vST0.0/alex_shift_tolerant.pth"
LAYERS = ("slice1.0", "slice2.5", "slice3.9", "slice4.11", "slice5.13")  # its convolutions
PADDING = (2, 2, 1, 1, 1)


def lpips(a: Tensor, b: Tensor) -> Tensor:
    """Return how different two pictures look, 0 for equal ones.

    Args:
        a: pictures (n, 3, height, width) in 0…1; smaller ones are scaled up to 64 pixels a side.
        b: as many of the same shape.

    Returns:
        Distances (n,), float32, never below 0.

    Raises:
        ModuleNotFoundError: ``stlpips-pytorch`` is not installed.
        ValueError: the shapes differ, or are not those of coloured pictures.
    """
    if a.shape != b.shape or a.ndim != 4 or a.shape[1] != 3:
        raise InvalidSetting(f"lpips takes two (n, 3, height, width), not {tuple(a.shape)} and {tuple(b.shape)}")
    known = weights()
    batch = max(1, BATCH // (max(SIZE, a.shape[2]) * max(SIZE, a.shape[3])))
    with torch.no_grad():
        pieces = zip(a.split(batch), b.split(batch), strict=True)
        return torch.cat([distance(known, prepared(x), prepared(y)) for x, y in pieces])


def weights_file() -> Path:
    """Return the file of what the package has learned.

    Raises:
        ModuleNotFoundError: ``stlpips-pytorch`` is not installed.
    """
    found = find_spec(PACKAGE)  # which does not import it
    for folder in [] if found is None else found.submodule_search_locations or []:
        if (file := Path(folder) / WEIGHTS).is_file():
            return file
    raise MissingPackage("LPIPS needs stlpips-pytorch, which is not installed: pip install 'dithooks[lpips]'")


def weights() -> dict[str, Tensor]:
    """Return what the package has learned, by the names it has there."""
    found: dict[str, Tensor] = torch.load(weights_file(), map_location="cpu", weights_only=True)
    return found


def prepared(pictures: Tensor) -> Tensor:
    """Return pictures of the least size, and in −1…1."""
    pictures = pictures.float()
    if min(pictures.shape[2:]) < SIZE:
        pictures = functional.interpolate(pictures, (SIZE, SIZE), mode="bilinear", align_corners=False)
    return 2 * pictures - 1


def distance(known: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
    """Add up the weighted squares of the differences in each layer, the mean of all places."""
    total = torch.zeros(len(a))
    for layer, (x, y) in enumerate(zip(features(known, a), features(known, b), strict=True)):
        apart = (functional.normalize(x, eps=1e-10) - functional.normalize(y, eps=1e-10)).square()
        total += functional.conv2d(apart, known[f"lin{layer}.model.1.weight"]).mean((1, 2, 3))
    return total


def features(known: dict[str, Tensor], x: Tensor) -> Iterator[Tensor]:
    """Yield what each of the five layers makes of a picture."""
    x = (x - known["scaling_layer.shift"]) / known["scaling_layer.scale"]
    for layer, (name, padding) in enumerate(zip(LAYERS, PADDING, strict=True)):
        if layer in (1, 2):
            x = blurred(functional.max_pool2d(x, 3, 1))
        x = functional.conv2d(x, known[f"net.{name}.weight"], known[f"net.{name}.bias"], padding=padding)
        x = functional.relu(x if layer else blurred(x))
        yield x


def blurred(x: Tensor) -> Tensor:
    """Return every second place of what a binomial window of three makes of it, borders mirrored."""
    line = torch.tensor([1.0, 2.0, 1.0]) / 4
    window = (line[:, None] * line).expand(x.shape[1], 1, 3, 3)
    return functional.conv2d(functional.pad(x, (2, 2, 2, 2), "reflect"), window, stride=2, groups=x.shape[1])
