"""Pictures and videos: from the output of a pipeline to files."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import TargetError, UsageError
from ..recording.image_metrics import FIELDS, samples_of
from .required_packages import extra_needed

ENCODED = (".mp4", ".mov", ".mkv", ".webm")  # by ffmpeg
ANIMATED = (".gif", ".webp", ".apng")  # by Pillow
Frames = list[Any]  # pictures of PIL; one of them is a picture, more are a video


def check_suffix(path: Path, video: bool) -> None:
    """Check before the run that a file with this ending can be written.

    Args:
        path: the file.
        video: whether it has to hold more than one frame.

    Raises:
        UsageError: it cannot; the message names an ending that can.
    """
    suffix = path.suffix.lower()
    image = _pillow()
    if video and suffix in ENCODED:
        if lack := _lacking():
            raise UsageError(f"{path} needs {lack} (pip install imageio imageio-ffmpeg); .gif needs nothing more")
        return
    known = image.registered_extensions().get(suffix)
    if video and suffix not in ANIMATED:
        kinds = ", ".join((*ENCODED, *ANIMATED))
        raise UsageError(f"{path} cannot hold a video: give a file that ends in {kinds}, or --frames 1")
    if suffix in ENCODED:
        raise UsageError(f"{path} is of a video, but pictures will be drawn: use .png")
    if known not in image.SAVE:
        raise UsageError(f"{path} has an ending that no picture format knows: use .png")


def default_path(video: bool) -> Path:
    """The file for a result where ``--out`` is left out."""
    return Path("generated.png" if not video else "generated.gif" if _lacking() else "generated.mp4")


def frames_of(result: Any) -> list[Frames]:
    """The output of a pipeline as pictures of PIL: one list for each sample, of one frame or more.

    Raises:
        TargetError: the output holds no pictures.
    """
    image = _pillow()
    output = next((value for name in FIELDS if (value := getattr(result, name, None)) is not None), result)
    output = output[0] if isinstance(output, tuple) and len(output) == 1 else output
    if isinstance(output, list) and output:
        parts = [each if isinstance(each, list) else [each] for each in output]
        if all(isinstance(frame, image.Image) for part in parts for frame in part):
            return parts
    try:
        samples = samples_of(output)
    except (ValueError, TypeError) as error:
        raise TargetError(f"neither pictures nor videos came of it: {error}") from error
    span = span_of(samples)
    drawn = [None if span is None else as_frames(sample, span) for sample in samples]
    if any(each is None for each in drawn):
        raise TargetError(f"neither pictures nor videos came of it, but arrays of shape {samples[0].shape}")
    return [[image.fromarray(each) for each in frames] for frames in drawn if frames is not None]


def span_of(samples: Sequence[NDArray[np.float32]]) -> tuple[float, float] | None:
    """The values of black and white in samples: 0 and 1, −1 and 1, or 0 and 255; None if these are no pictures."""
    least, most = min(float(each.min()) for each in samples), max(float(each.max()) for each in samples)
    near = 1e-3  # a decoder's rounding
    for low, high in ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)):
        if low - near <= least and most <= high + near:
            return low, high
    return None


def as_frames(sample: NDArray[np.float32], span: tuple[float, float]) -> NDArray[np.uint8] | None:
    """A sample as frames of 8 bits, (frames, height, width, 3 or 4); None if it is no picture.

    Args:
        sample: an array with channels first or last.
        span: its values of black and of white.

    Example:
        >>> as_frames(np.ones((3, 4, 8), np.float32), (0.0, 1.0)).shape
        (1, 4, 8, 3)
    """
    if sample.ndim == 2:
        sample = sample[..., None]
    if sample.ndim < 3 or not np.isfinite(sample).all():
        return None
    frames = sample.reshape(-1, *sample.shape[-3:])
    if frames.shape[-1] not in (1, 3, 4):
        if frames.shape[1] not in (1, 3):
            return None
        frames = np.moveaxis(frames, 1, -1)
    if frames.shape[-1] == 1:
        frames = np.repeat(frames, 3, axis=-1)
    low, high = span
    return np.ascontiguousarray(((frames - low) * (255 / (high - low))).clip(0, 255).round().astype(np.uint8))


def write_frames(path: Path, frames: Frames, fps: float) -> None:
    """Write a picture, or a video of several frames.

    Raises:
        OSError: the file cannot be written.
    """
    suffix = path.suffix.lower()
    if suffix in ENCODED:
        _encode(path, frames, fps)
    elif len(frames) == 1:
        flat = suffix in (".jpg", ".jpeg", ".bmp")
        (frames[0].convert("RGB") if flat else frames[0]).save(path)
    else:
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=_durations(len(frames), fps), loop=0)


def _durations(count: int, fps: float) -> list[int]:
    """Milliseconds of each frame, in whole hundredths of a second, as in a GIF; their sum is the video's length."""
    ends = [round(100 * (number + 1) / fps) for number in range(count)]
    return [10 * max(end - begin, 2) for begin, end in zip([0, *ends], ends, strict=False)]


def _encode(path: Path, frames: Frames, fps: float) -> None:
    imageio = importlib.import_module("imageio.v2")
    arrays = [np.asarray(frame.convert("RGB")) for frame in frames]
    height, width = arrays[0].shape[:2]
    even = [np.pad(each, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge") for each in arrays]  # codecs want it
    try:
        with imageio.get_writer(path, fps=fps, macro_block_size=1) as writer:
            for each in even:
                writer.append_data(each)
    except (RuntimeError, ValueError) as error:
        raise OSError(f"ffmpeg: {' '.join(str(error).split())}") from error


def _lacking() -> str:
    """The name of the package that is missing to encode a video; empty if none is."""
    lacking: Sequence[str] = [name for name in ("imageio", "imageio_ffmpeg") if importlib.util.find_spec(name) is None]
    if lacking:
        return " and ".join(lacking).replace("_", "-")
    try:
        importlib.import_module("imageio_ffmpeg").get_ffmpeg_exe()
    except RuntimeError:
        return "ffmpeg"
    return ""


def _pillow() -> Any:
    with extra_needed("pictures need", '"dithooks[demo]"'):
        image: Any = importlib.import_module("PIL.Image")
    image.init()
    return image
