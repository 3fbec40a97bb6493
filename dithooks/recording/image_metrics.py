"""The distance of samples from those of a run without a cache: PSNR, relative L1, SSIM and LPIPS."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from statistics import fmean, stdev
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import InvalidSetting, WrongType
from ..validation import check_choice, shown
from .lpips import lpips, weights_file

CEILING = 120.0  # dB, of a sample, so that an equal one does not make the mean infinite
TOLERANCE = 1e-4  # by which values may exceed a range: a decoder rounds
POWER = 0.1  # of the mean of errors that is between the two others
WINDOW = 7  # pixels, of SSIM
CHUNK = 1 << 22  # numbers in double precision at a time: a video as a whole may not fit
FIELDS = ("images", "frames", "image", "video")  # of the objects that pipelines return
Samples = list[NDArray[np.float32]]
Metric = Literal["psnr", "ssim", "lpips"]
METRICS: tuple[Metric, ...] = ("psnr", "ssim", "lpips")


@dataclass(frozen=True)
class Score:
    """The distance of samples from their reference.

    Args:
        psnr: PSNR in dB, the mean over the samples, of which each counts with at most 120 dB. It is infinite if all
            samples equal the reference, and −∞ if one is not finite.
        worst: the lowest PSNR of a sample, with the same special values.
        relative_l1: Σ |difference| over Σ |reference|, of all samples together; infinite if one is not finite.
        ssim: structural similarity, the mean over samples and over the frames of each; ``None`` where the samples do
            not look like pictures, one is not finite, or scikit-image is not installed.
        soft: in dB, the power mean of the samples' errors, with power 0.1: a little below the mean PSNR, as bad samples
            count more. ``None``: not known.
        lpips: shift-tolerant LPIPS, a learned distance that is 0 for equal pictures, the mean over samples and over the
            frames of each; ``None`` where it was not asked for, or as for ``ssim``.
        psnr_error: standard error of ``psnr`` in dB: s/√n, of n samples whose PSNR has the standard deviation s. The
            mean of other samples differs from this one by about as much. ``None`` of one sample, or where ``psnr`` is
            not finite.
    """

    psnr: float
    worst: float
    relative_l1: float
    ssim: float | None = None
    soft: float | None = None
    lpips: float | None = None
    psnr_error: float | None = None


def samples_of(results: Any) -> Samples:
    """Copy the results of a run into arrays on the host, one for each sample, in their own scale.

    A list or tuple has one sample an entry: an array, a tensor, a PIL image, or a list of these, such as a video's
    frames, which become one array (frames, …). Of a pipeline's output, alone or in a list, ``images``, ``frames``,
    ``image`` or ``video`` are taken, and of a tuple of one, as with ``return_dict=False``, its entry. An array or
    tensor by itself is a batch if it has four dimensions or more; with fewer it is one sample: a picture, or latents
    (batch, tokens, channels), which are then compared as a whole.

    Args:
        results: results of the run.

    Raises:
        TypeError: the results are, or hold, something that cannot be compared.
        ValueError: the results are ``None`` or empty, or one sample has parts of different shapes.

    Example:
        >>> [sample.shape for sample in samples_of(torch.zeros(2, 3, 8, 8))]
        [(3, 8, 8), (3, 8, 8)]
        >>> [sample.shape for sample in samples_of([np.zeros((8, 8, 3), np.uint8), [np.zeros((8, 8, 3))] * 5])]
        [(8, 8, 3), (5, 8, 8, 3)]
    """
    if _is_output(results):
        return samples_of(next(value for name in FIELDS if (value := getattr(results, name, None)) is not None))
    if isinstance(results, tuple) and len(results) == 1:
        return samples_of(results[0])
    if results is None:
        raise InvalidSetting("run returned None: it has to return what it draws, as in: return pipe(prompts).images")
    if not isinstance(results, (list, tuple)):
        array = _array(results)
        return list(array) if array.ndim >= 4 else [array]
    if not results:
        raise InvalidSetting("run returned nothing, an empty list: it has to return what it draws")
    samples: Samples = []
    for part in results:
        samples += samples_of(part) if _is_output(part) else [_array(part)]
    return samples


def check_metrics(metrics: Collection[Metric]) -> tuple[Metric, ...]:
    """Return the metrics that are to be measured.

    Raises:
        TypeError: ``metrics`` is no collection of names.
        ValueError: there is no such metric.
        ModuleNotFoundError: the package that one of them needs is not installed.
    """
    if isinstance(metrics, str) or not isinstance(metrics, Collection):
        raise WrongType(f"metrics must be names of metrics, such as ('psnr', 'lpips'), not {shown(metrics)}")
    for name in metrics:
        check_choice("a metric", name, METRICS)
    if "lpips" in metrics:
        weights_file()
    return tuple(metrics)


def compare(
    found: Sequence[NDArray[Any]], reference: Sequence[NDArray[Any]], metrics: Collection[Metric] = ()
) -> Score:
    """Compare samples with those of the run without a cache, in double precision.

    The peak of PSNR is 1 where all of the reference lies in 0…1, 255 where it is whole numbers in 0…255, and of
    anything else, latents, or pictures in −1…1, what lies between the least and the greatest value of each sample.

    Args:
        found: samples of the cached run.
        reference: samples of the uncached run, of the same number and shapes.
        metrics: what to measure; LPIPS is measured only where it is named here, all others always.

    Raises:
        ValueError: the samples do not match, or the reference is empty or not finite.

    Example:
        >>> reference = [np.full((2, 2), 0.5), np.zeros((2, 2))]
        >>> score = compare([reference[0] + 0.1, reference[1]], reference)
        >>> round(score.worst, 6), round(score.psnr, 6), round(score.relative_l1, 6)
        (20.0, 70.0, 0.2)
    """
    _check(found, reference)
    peak = _peak(reference)
    decibels, difference, magnitude = [], 0.0, 0.0
    for ours, theirs in zip(found, reference, strict=True):
        square, absolute, total = sums(ours, theirs)
        if not math.isfinite(square):
            return Score(-math.inf, -math.inf, math.inf)
        decibels.append(_decibels(square / theirs.size, peak or _spread(theirs)))
        difference, magnitude = difference + absolute, magnitude + total
    pairs = _framed(found, reference, peak)
    ssim = None if pairs is None else _ssim(pairs, peak or 2.0)
    learned = _lpips(pairs, peak) if pairs is not None and "lpips" in metrics else None
    if difference == 0:
        return Score(math.inf, math.inf, 0.0, ssim, math.inf, learned)
    relative = difference / magnitude if magnitude else math.inf
    error = stdev(decibels) / math.sqrt(len(decibels)) if len(decibels) > 1 else None
    return Score(fmean(decibels), min(decibels), relative, ssim, soft_mean(decibels), learned, error)


def soft_mean(decibels: Sequence[float]) -> float:
    """Return the power mean of errors that are given as PSNR, as PSNR.

    Example: of two samples, the worse counts somewhat more.
        >>> round(soft_mean([40.0, 60.0]), 2)
        48.86
    """
    errors = [10.0 ** (-POWER * each / 10.0) for each in decibels]
    return -10.0 / POWER * math.log10(fmean(errors))


# -- what a run returned ----------------------------------------------------------------------------------------


def _is_picture(value: object) -> bool:
    """Whether a value is a PIL image; PIL is imported if it is."""
    pil = sys.modules.get("PIL.Image")
    return pil is not None and isinstance(value, pil.Image)


def _is_output(value: object) -> bool:
    plain = value is None or isinstance(value, (torch.Tensor, np.ndarray, list, tuple)) or _is_picture(value)
    return not plain and any(getattr(value, name, None) is not None for name in FIELDS)


def _array(value: Any) -> NDArray[np.float32]:
    """Copy one sample, or a batch, into an array."""
    if isinstance(value, (list, tuple)):
        parts = [_array(part) for part in value]
        if not parts:
            raise InvalidSetting("run returned an empty list among its samples: leave it out")
        if shapes := sorted({part.shape for part in parts} - {parts[0].shape}):
            raise InvalidSetting(
                f"run returned one sample with parts of shapes {parts[0].shape} and {shapes[0]}: the parts of a "
                "sample, such as a video's frames, need the same shape; give each as a sample of its own"
            )
        return np.stack(parts)
    if isinstance(value, torch.Tensor):
        # NumPy has no bfloat16; converted after the transfer, since uint8 is a quarter of the bytes
        value = value.detach().cpu()
        value = (value if value.is_complex() else value.float()).numpy()
    elif _is_picture(value) and value.mode in ("P", "PA"):  # indices of colours cannot be compared
        value = value.convert("RGBA" if value.mode == "PA" or "transparency" in value.info else "RGB")
    elif isinstance(value, (str, bytes)) or not (hasattr(value, "__array__") or hasattr(value, "__array_interface__")):
        raise WrongType(
            f"run returned {shown(value)} ({type(value).__name__}): it has to return what it draws, a list of "
            "pictures, arrays or tensors, one for each sample"
        )
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise WrongType(
            f"run returned an array of {array.dtype}: its samples have to be real numbers, and where they differ in "
            "shape, a list of one array each"
        )
    if not array.size:
        raise InvalidSetting(f"run returned an empty array, of shape {array.shape}: it has to return what it draws")
    return np.array(array, dtype=np.float32, order="C")


# -- figures ----------------------------------------------------------------------------------------------------


def _check(found: Sequence[NDArray[Any]], reference: Sequence[NDArray[Any]]) -> None:
    if not reference:
        raise InvalidSetting("there is no reference to compare with: run returned no samples without the cache")
    if len(found) != len(reference):
        raise InvalidSetting(
            f"run returned {len(found)} samples with the cache and {len(reference)} without: it has to draw the same"
        )
    for number, (ours, theirs) in enumerate(zip(found, reference, strict=True)):
        if ours.shape != theirs.shape:
            raise InvalidSetting(
                f"sample {number} has shape {ours.shape} with the cache and {theirs.shape} without: run has to draw "
                "the same each time"
            )
        if not all(np.isfinite(piece).all() for (piece,) in _pieces(theirs)):
            raise InvalidSetting(
                f"sample {number} of the run without the cache is not finite: nothing can be compared with it; see to "
                "the model's dtype first"
            )


def _pieces(*arrays: NDArray[Any]) -> Iterator[tuple[NDArray[np.float64], ...]]:
    """Yield parts of arrays of one shape, in double precision."""
    flat = [array.reshape(-1) for array in arrays]
    for start in range(0, flat[0].size, CHUNK):
        yield tuple(each[start : start + CHUNK].astype(np.float64) for each in flat)


def sums(ours: NDArray[Any], theirs: NDArray[Any]) -> tuple[float, float, float]:
    """Return Σ difference², Σ |difference| and Σ |reference|, summed part by part in double precision."""
    square = absolute = total = 0.0
    with np.errstate(invalid="ignore", over="ignore"):  # samples that are not finite are found in the sums
        for a, b in _pieces(ours, theirs):
            difference = np.abs(a - b)
            square += float(np.square(difference).sum())
            absolute += float(difference.sum())
            total += float(np.abs(b).sum())
    return square, absolute, total


def _peak(reference: Sequence[NDArray[Any]]) -> float | None:
    """Return the peak of all samples, so that a dark one counts as the others; ``None``: each has its own."""
    if _within(reference, 0, 1):
        return 1.0
    whole = _within(reference, 0, 255) and all((p == np.rint(p)).all() for each in reference for (p,) in _pieces(each))
    return 255.0 if whole else None


def _within(samples: Sequence[NDArray[Any]], least: float, most: float) -> bool:
    return all(each.min() >= least - TOLERANCE and each.max() <= most + TOLERANCE for each in samples)


def _spread(sample: NDArray[Any]) -> float:
    """Return the range of a sample's values, or the value if there is one only."""
    least, most = float(sample.min()), float(sample.max())
    return most - least or abs(most) or 1.0


def _decibels(error: float, peak: float) -> float:
    return CEILING if error == 0 else min(CEILING, 20 * math.log10(peak) - 10 * math.log10(error))


# -- pictures ---------------------------------------------------------------------------------------------------


def _framed(
    found: Sequence[NDArray[Any]], reference: Sequence[NDArray[Any]], peak: float | None
) -> list[tuple[NDArray[Any], NDArray[Any]]] | None:
    """Return the frames of each sample and of its reference; ``None``: they do not look like pictures."""
    if peak is None and not _within(reference, -1, 1):  # latents are seldom as small as that
        return None
    pairs = []
    for ours, theirs in zip(map(_frames, found), map(_frames, reference), strict=True):
        if ours is None or theirs is None:
            return None
        pairs.append((ours, theirs))
    return pairs


def _ssim(pairs: Sequence[tuple[NDArray[Any], NDArray[Any]]], span: float) -> float | None:
    try:
        metrics = import_module("skimage.metrics")
    except ImportError:
        return None
    values = []
    for ours, theirs in pairs:
        window = min(WINDOW, *theirs.shape[1:3])
        window -= window % 2 == 0
        frames = zip(ours, theirs, strict=True)
        values.append(fmean(_similarity(metrics, a, b, window, span) for a, b in frames))
    return fmean(values)


def _lpips(pairs: Sequence[tuple[NDArray[Any], NDArray[Any]]], peak: float | None) -> float:
    """Measure LPIPS, of grey pictures in three equal channels; a fourth channel, transparency, is left out."""
    values = []
    for pair in pairs:
        scaled = [each / peak if peak else (each + 1.0) / 2.0 for each in pair]
        a, b = (
            torch.from_numpy(np.ascontiguousarray(np.moveaxis(each[..., :3], -1, 1))).expand(-1, 3, -1, -1)
            for each in scaled
        )
        values.append(float(lpips(a, b).double().mean()))
    return fmean(values)


def _similarity(metrics: Any, ours: NDArray[Any], theirs: NDArray[Any], window: int, span: float) -> float:
    pair = (ours.astype(np.float64), theirs.astype(np.float64))
    return float(metrics.structural_similarity(*pair, win_size=window, data_range=span, channel_axis=-1))


def _frames(sample: NDArray[Any]) -> NDArray[Any] | None:
    """Reshape a picture or video to (frames, height, width, channels); ``None``: it is neither, or too small."""
    if sample.ndim == 2:
        sample = sample[..., None]
    if sample.ndim < 3:
        return None
    frames = sample.reshape(-1, *sample.shape[-3:])
    if frames.shape[-1] not in (1, 3, 4):
        if frames.shape[1] not in (1, 3):
            return None
        frames = np.moveaxis(frames, 1, -1)
    return frames if min(frames.shape[1:3]) >= 3 else None
