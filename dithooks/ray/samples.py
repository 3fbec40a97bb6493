"""The samples of a pipeline's output, one for each prompt, and their bytes."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch

from ..errors import InvalidSetting, WrongType
from ..recording.image_metrics import FIELDS
from ..validation import shown


def samples_in(output: Any) -> list[Any]:
    """Return one sample for each prompt from a pipeline's output.

    Args:
        output: an object with ``images`` or ``frames``; a tuple with these as its first entry; or a list, array or
            tensor whose first dimension counts the samples.

    Raises:
        TypeError: the output is none of these.

    Example:
        >>> [sample.shape for sample in samples_in((torch.zeros(2, 3, 8, 8),))]
        [torch.Size([3, 8, 8]), torch.Size([3, 8, 8])]
    """
    for name in FIELDS:
        if getattr(output, name, None) is not None:
            return samples_in(getattr(output, name))
    if isinstance(output, tuple) and output:
        return samples_in(output[0])
    if isinstance(output, (list, np.ndarray, torch.Tensor)):
        return list(output)
    raise WrongType(
        f"the pipeline returned {type(output).__name__}, which has no {' or '.join(FIELDS)} and is no list of samples: "
        "give a function as draw that returns one"
    )


def encoded(sample: Any) -> tuple[bytes, str]:
    """Encode a sample; return its bytes and their format: ``"png"`` for pictures, ``"npy"`` for all else.

    Pictures are those of PIL, and arrays (height, width, 3) of uint8, or of floats in 0 … 1, which are rounded to
    256 values. Other samples, such as a video's frames or latents, are kept in full as ``numpy.save`` writes arrays;
    bfloat16, which NumPy lacks, becomes float32.

    Raises:
        TypeError: the sample is no picture, array, tensor or list of these.
        ValueError: its parts have different shapes.

    Example:
        >>> data, kind = encoded(np.zeros((8, 8, 3), np.uint8))
        >>> data[1:4], kind
        (b'PNG', 'png')
        >>> encoded(torch.zeros(4, 8, 8))[1]
        'npy'
    """
    from PIL import Image

    if isinstance(sample, Image.Image):
        return _png(sample), "png"
    array = _array(sample)
    if array.ndim == 3 and array.shape[-1] == 3:
        if array.dtype == np.uint8:
            return _png(Image.fromarray(array)), "png"
        if array.dtype.kind == "f" and array.size and array.min() >= 0 and array.max() <= 1:
            return _png(Image.fromarray(np.rint(array * 255).astype(np.uint8))), "png"
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue(), "npy"


def decoded(data: bytes, kind: str) -> Any:
    """Decode the bytes of :func:`encoded` into a picture of PIL, or an array.

    Raises:
        ValueError: the format is another.

    Example:
        >>> decoded(*encoded(np.arange(6.0).reshape(2, 3))).shape
        (2, 3)
    """
    if kind == "png":
        from PIL import Image

        return Image.open(io.BytesIO(data))
    if kind == "npy":
        return np.load(io.BytesIO(data), allow_pickle=False)
    raise InvalidSetting(f"format={shown(kind)} is not one of png, npy: read it with what wrote it")


def _array(sample: Any) -> Any:
    if isinstance(sample, torch.Tensor):
        sample = sample.detach().cpu()
        return (sample.float() if sample.dtype == torch.bfloat16 else sample).numpy()
    if isinstance(sample, (list, tuple)) and sample:
        return np.stack([_array(part) for part in sample])
    if isinstance(sample, (str, bytes)) or not (hasattr(sample, "__array__") or hasattr(sample, "__array_interface__")):
        raise WrongType(
            f"a sample is of type {type(sample).__name__}: pictures, arrays, tensors and lists of these can be kept; "
            "give a function as encode for others"
        )
    array = np.asarray(sample)
    if array.dtype.kind not in "biufc":
        raise WrongType(f"a sample is an array of {array.dtype}: it has to hold numbers")
    return array


def _png(picture: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
