"""A small UNet on a few emoji: skip connections around its levels, and guidance in one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.compare.subject import Case
from bench.unet import GUIDANCE, STEPS, load
from bench.unet.model import to_pictures
from bench.video.clips import NAMES

SEED, CALIBRATION_SEED = 20_000, 1_000  # of the first; the next has the next
TIMES, EVERY = 2, 2  # every emoji is tested twice, and every second one calibrates, all from other noise


class UNet:
    """32×32 pictures; a latent is the picture itself, in −1…1. What is cached is a ``unet``, not a ``transformer``."""

    name, steps, calls, guidance = "unet", STEPS, 1, GUIDANCE

    def __init__(self) -> None:
        self.pipe = load()
        self.calibration = tuple(Case(name, CALIBRATION_SEED + n) for n, name in enumerate(NAMES[::EVERY]))
        self.test = tuple(Case(name, SEED + n) for n, name in enumerate(NAMES * TIMES))

    def draw(self, cases: Sequence[Case], steps: int | None = None) -> Tensor:
        """Latents (cases, 3, 32, 32), each from noise of its own."""
        made: Tensor = self.pipe(
            [str(case.prompt) for case in cases],
            num_inference_steps=steps or self.steps,
            guidance_scale=self.guidance,
            generator=[torch.Generator().manual_seed(case.seed) for case in cases],
            output_type="latent",
        ).images
        return made

    def pictures(self, latents: Tensor) -> Tensor:
        """(cases, 3, 32, 32) in 0…1."""
        return to_pictures(latents)
