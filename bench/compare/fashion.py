"""A class-conditional DiT on Fashion-MNIST: guidance in one batch, and nothing but the timestep tells the step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.compare.subject import Case
from bench.fashion import GUIDANCE, STEPS, load
from bench.fashion.data import NAMES, SIZE

SEED, CALIBRATION_SEED = 20_000, 1_000  # of the first; the next has the next
CALIBRATION, TEST = 20, 80  # two of each class, and eight


class Fashion:
    """28×28 pictures in grey, or of another ``size``; a latent is the picture itself, in −1…1."""

    name, steps, calls, guidance, size = "fashion", STEPS, 1, GUIDANCE, SIZE

    def __init__(self) -> None:
        self.pipe = load()
        self.calibration = tuple(Case(n % len(NAMES), CALIBRATION_SEED + n) for n in range(CALIBRATION))
        self.test = tuple(Case(n % len(NAMES), SEED + n) for n in range(TEST))

    def draw(self, cases: Sequence[Case], steps: int | None = None) -> Tensor:
        """Latents (cases, 1, 28, 28), each from noise of its own."""
        shape = (1, 1, self.size, self.size)
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(case.seed)) for case in cases]
        made: Tensor = self.pipe(
            [int(case.prompt) for case in cases],
            num_inference_steps=steps or self.steps,
            guidance_scale=self.guidance,
            latents=torch.cat(noise),
            output_type="latent",
        ).images
        return made

    def pictures(self, latents: Tensor) -> Tensor:
        """(cases, 1, 28, 28) in 0…1."""
        return (latents / 2 + 0.5).clamp(0, 1)
