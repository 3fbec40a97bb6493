"""How far what was drawn is from its uncached twin, and how certain a mean is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dithooks.recording import lpips as learned

SAMPLES = 10_000  # of the bootstrap
EQUAL = 120.0  # dB: what is called equal, so that means stay finite; float32 in 0…1 is equal to some 140


@dataclass(frozen=True)
class Quality:
    """Of each thing that was drawn.

    Args:
        psnr: in dB, peak 1; of a clip, of all its frames together.
        ssim: structural similarity, 1 for equal; of a clip, the mean of its frames.
        latent_l1: Σ|a − b| / Σ|b| of the latents.
        motion_psnr: of clips, PSNR of the differences between neighbouring frames.
        worst_frame: of clips, the least PSNR of a frame.
        lpips: learned distance, 0 for equal; of a clip, the mean of its frames. ``None`` where it was not measured.
    """

    psnr: tuple[float, ...]
    ssim: tuple[float, ...]
    latent_l1: tuple[float, ...]
    motion_psnr: tuple[float, ...] = ()
    worst_frame: tuple[float, ...] = ()
    lpips: tuple[float, ...] | None = None


def compare(latents: Tensor, twins: Tensor, pictures: Tensor, originals: Tensor) -> Quality:
    """Quality of pictures (n, channels, h, w) or clips (n, frames, channels, h, w) in 0…1, and of their latents."""
    given = psnr(pictures, originals), ssim(pictures, originals), relative_l1(latents, twins)
    looks = lpips(pictures, originals)
    if pictures.ndim == 4:
        return Quality(*given, lpips=looks)
    worst = [min(psnr(clip, original)) for clip, original in zip(pictures, originals, strict=True)]
    return Quality(*given, psnr(pictures.diff(dim=1), originals.diff(dim=1)), tuple(worst), looks)


def psnr(made: Tensor, wanted: Tensor) -> tuple[float, ...]:
    """Of each sample, in dB with peak 1; at most :data:`EQUAL`."""
    error = (made.double() - wanted.double()).square().flatten(1).mean(1)
    return tuple((-10 * error.clamp(min=10 ** (-EQUAL / 10)).log10()).tolist())


def ssim(made: Tensor, wanted: Tensor) -> tuple[float, ...]:
    """Of each sample, as Wang et al. 2004 have it: a Gaussian window of σ = 1.5."""
    from skimage.metrics import structural_similarity

    def one(a: Tensor, b: Tensor) -> float:
        if a.ndim == 4:
            return float(np.mean([one(x, y) for x, y in zip(a, b, strict=True)]))
        options = {"data_range": 1.0, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        return float(structural_similarity(a.double().numpy(), b.double().numpy(), channel_axis=0, **options))

    return tuple(one(a, b) for a, b in zip(made, wanted, strict=True))


def lpips(made: Tensor, wanted: Tensor) -> tuple[float, ...] | None:
    """Of each sample, grey ones in three equal channels; ``None`` where what it was learned with is not installed."""
    shape = made.shape[:-3]
    pictures = [each.flatten(0, -4).expand(-1, 3, -1, -1) for each in (made, wanted)]
    try:
        found = learned.lpips(*pictures)
    except ImportError:
        return None
    return tuple(found.reshape(*shape, 1).flatten(1).double().mean(1).tolist())


def relative_l1(made: Tensor, wanted: Tensor) -> tuple[float, ...]:
    """Of each sample."""
    apart = (made.double() - wanted.double()).abs().flatten(1).sum(1)
    return tuple((apart / wanted.double().abs().flatten(1).sum(1)).tolist())


def interval(values: Sequence[float] | NDArray[np.float64]) -> tuple[float, float, float]:
    """Mean, and the bounds of its 95 % bootstrap interval."""
    taken = np.asarray(values, float)
    means = np.random.default_rng(0).choice(taken, (SAMPLES, taken.size)).mean(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(taken.mean()), float(low), float(high)
