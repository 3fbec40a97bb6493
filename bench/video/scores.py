"""How close clips are to their uncached twins: peak signal-to-noise ratio of frames, and of what changes between them.

The second tells flicker from blur. A cache that moves every frame alike scores well on changes and badly on frames; one
that is off in another way from frame to frame does not.
"""

from __future__ import annotations

import torch


def psnr(mean_square: torch.Tensor, peak: float = 1.0) -> torch.Tensor:
    """Decibels for mean squared errors: infinite where there is none."""
    return 10 * torch.log10(peak**2 / mean_square)


def frame_psnr(clips: torch.Tensor, twins: torch.Tensor) -> torch.Tensor:
    """PSNR of every frame, (n, frames), of clips (n, frames, channels, height, width) in 0…1.

    Raises:
        ValueError: the two differ in shape, or aren't clips.
    """
    _check(clips, twins)
    return psnr((clips.double() - twins.double()).square().mean((2, 3, 4)))


def mean_frame_psnr(clips: torch.Tensor, twins: torch.Tensor) -> torch.Tensor:
    """The mean over a clip's frames, (n,); infinite if any frame is exact."""
    return frame_psnr(clips, twins).mean(1)


def worst_frame_psnr(clips: torch.Tensor, twins: torch.Tensor) -> torch.Tensor:
    """The lowest of a clip's frames, (n,)."""
    return frame_psnr(clips, twins).amin(1)


def change_psnr(clips: torch.Tensor, twins: torch.Tensor) -> torch.Tensor:
    """PSNR of the differences between neighbouring frames, (n, frames - 1), with the same peak of 1.

    Raises:
        ValueError: the two differ in shape, aren't clips, or have a single frame.
    """
    _check(clips, twins)
    if clips.shape[1] < 2:
        raise ValueError("a clip of one frame has no changes: give two frames or more")
    return psnr((clips.double().diff(dim=1) - twins.double().diff(dim=1)).square().mean((2, 3, 4)))


def mean_change_psnr(clips: torch.Tensor, twins: torch.Tensor) -> torch.Tensor:
    """The mean over a clip's changes, (n,)."""
    return change_psnr(clips, twins).mean(1)


def worst_change_psnr(clips: torch.Tensor, twins: torch.Tensor) -> torch.Tensor:
    """The lowest of a clip's changes, (n,)."""
    return change_psnr(clips, twins).amin(1)


def _check(clips: torch.Tensor, twins: torch.Tensor) -> None:
    if clips.shape != twins.shape:
        raise ValueError(f"clips of shape {tuple(clips.shape)} can't be held against {tuple(twins.shape)}")
    if clips.ndim != 5:
        raise ValueError(f"clips have five dimensions (n, frames, channels, height, width), not {clips.ndim}")
