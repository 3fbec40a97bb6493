"""Pictures and videos to compare, converted from any of the usual forms to floats in 0…1."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import InvalidSetting, WrongType

SampleFrames = NDArray[np.float32]  # (frames, height, width, 3)
ROUNDED = 5e-3  # by which floats may exceed 0…1: the rounding of a decoder, or of bfloat16
WANTED = (
    "a batch of pictures is (N, 3, H, W) or (N, H, W, 3), one of videos (N, F, 3, H, W) or (N, F, H, W, 3); a single "
    "one goes into a list"
)


class Sample(NamedTuple):
    """A picture, which is one frame, or the frames ``numbers`` of the ``total`` frames of a video."""

    frames: SampleFrames
    numbers: tuple[int, ...] = (0,)
    total: int = 1


def samples_of(given: Any, name: str, shown: int) -> list[Sample]:
    """Convert pictures or videos to samples; of a video, take frames that are evenly spaced from first to last.

    Args:
        given: a tensor (N, 3, H, W) or (N, F, 3, H, W); an array of these shapes, (N, H, W, 3) or (N, F, H, W, 3); or a
            list of PIL pictures, of such tensors or arrays of one sample, or of lists of frames. Bytes are divided by
            255.
        name: the name of the argument, for messages.
        shown: the number of frames to take of a video.

    Raises:
        WrongType: ``given`` is none of these.
        InvalidSetting: ``given`` is empty, or has other shapes, or values that are not in 0…1.

    Example:
        >>> [each.frames.shape for each in samples_of(torch.rand(2, 3, 8, 6), "reference", 4)]
        [(1, 8, 6, 3), (1, 8, 6, 3)]
        >>> (video,) = samples_of([[np.zeros((8, 6, 3))] * 5], "reference", 3)
        >>> video.frames.shape, video.numbers, video.total
        ((3, 8, 6, 3), (0, 2, 4), 5)
    """
    if isinstance(given, (list, tuple)):
        samples = [_sample(each, f"{name}[{number}]", shown) for number, each in enumerate(given)]
    else:
        if not isinstance(given, (torch.Tensor, np.ndarray)):
            raise WrongType(
                f"{name} must be a tensor, an array, or a list of pictures, not {type(given).__name__}: of a "
                "pipeline's output, give .images or .frames"
            )
        if given.ndim not in (4, 5):
            raise InvalidSetting(f"{name} has shape {tuple(given.shape)}: {WANTED}")
        samples = [_sample(each, name, shown) for each in given]
    if not samples:
        raise InvalidSetting(f"{name} is empty: give one picture or video at least")
    return samples


def check_alike(reference: Sequence[Sample], cached: Sequence[Sample]) -> None:
    """Check that the samples of both are of the same number and sizes.

    Raises:
        InvalidSetting: they are not.
    """
    if len(reference) != len(cached):
        raise InvalidSetting(f"reference has {len(reference)} samples and cached {len(cached)}: give one of each")
    for number, (plain, other) in enumerate(zip(reference, cached, strict=True)):
        if (plain.frames.shape, plain.total) != (other.frames.shape, other.total):
            raise InvalidSetting(
                f"reference[{number}] is {_size(plain)}, and cached[{number}] {_size(other)}: they have to be alike"
            )


def _sample(given: Any, name: str, shown: int) -> Sample:
    """Convert one sample; of a video, only the frames to be shown."""
    if (isinstance(given, (torch.Tensor, np.ndarray)) and given.ndim != 4) or _is_picture(given):
        return Sample(_frame(given, name)[None])
    if not isinstance(given, (list, tuple, torch.Tensor, np.ndarray)):
        raise WrongType(f"{name} must be a picture, a tensor, an array or a list of frames, not {type(given).__name__}")
    if not len(given):
        raise InvalidSetting(f"{name} has no frames: give a whole video")
    numbers = tuple(np.unique(np.linspace(0, len(given) - 1, shown).round().astype(int)).tolist())
    frames = [_frame(given[number], f"{name}, frame {number},") for number in numbers]
    if len({frame.shape for frame in frames}) > 1:
        raise InvalidSetting(f"{name} has frames of several sizes: all frames of a video have one size")
    return Sample(np.stack(frames), numbers, len(given))


def _is_picture(given: object) -> bool:
    pil = sys.modules.get("PIL.Image")  # a picture of PIL can be here only if PIL has been imported
    return pil is not None and isinstance(given, pil.Image)


def _frame(given: Any, name: str) -> NDArray[np.float32]:
    """Convert one frame to floats in 0…1, (height, width, 3)."""
    places = (0, 2) if isinstance(given, torch.Tensor) else (2, 0)  # dimensions that may be the channels
    if isinstance(given, torch.Tensor):
        given = given.detach().cpu()
        given = (given.float() if given.is_floating_point() else given).numpy()  # NumPy has no bfloat16
    elif _is_picture(given):
        given = np.asarray(given.convert("RGB"))
    elif not isinstance(given, np.ndarray):
        raise WrongType(f"{name} must be a picture, a tensor or an array, not {type(given).__name__}")
    place = next((place for place in places if given.ndim == 3 and given.shape[place] in (1, 3)), None)
    if place is None or not given.size:
        raise InvalidSetting(f"{name} has a picture of shape {given.shape}, which has to be (3, H, W) or (H, W, 3)")
    if given.dtype == np.uint8:
        given = given / np.float32(255)
    if given.dtype.kind != "f":
        raise InvalidSetting(f"{name} is of {given.dtype}: give floats in 0…1, or bytes (uint8)")
    low, high = float(given.min()), float(given.max())
    if not (low >= -ROUNDED and high <= 1 + ROUNDED):  # also where they are not finite
        raise InvalidSetting(
            f"{name} has values from {low:.3g} to {high:.3g}: give pictures in 0…1, as output_type='pt' or 'np' does"
        )
    last = np.moveaxis(given.astype(np.float32), place, -1)
    return np.broadcast_to(last, (*last.shape[:2], 3))


def _size(sample: Sample) -> str:
    height, width = sample.frames.shape[1:3]
    return f"{width}×{height}" + (f" with {sample.total} frames" if sample.total > 1 else "")
