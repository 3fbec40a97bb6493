"""The emoji pipeline distilled to few steps: one call a step, and a step is all the further from the last."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.compare.emoji import CALIBRATION, CALIBRATION_SEED, SEED, TEST
from bench.compare.subject import Case
from bench.few_steps import STEPS, load
from dithooks.demo.emoji import SIZE
from dithooks.demo.model import unpatchify


class FewSteps:
    """32×32 pictures, of the same captions and the same noise as those of ``Emoji``; a latent is 4×4 patches of pixels.

    Args:
        steps: of the uncached run: 8, 6 or 4.
    """

    calls = 1

    def __init__(self, steps: int = STEPS[0]) -> None:
        self.name, self.steps = f"few{steps}", steps
        self.pipe = load()
        self.calibration = tuple(Case(caption, CALIBRATION_SEED + n) for n, caption in enumerate(CALIBRATION))
        self.test = tuple(Case(caption, SEED + n) for n, caption in enumerate(TEST))

    def draw(self, cases: Sequence[Case], steps: int | None = None) -> Tensor:
        """Latents (cases, 64, 48), each from noise of its own."""
        made: Tensor = self.pipe(
            [str(case.prompt) for case in cases],
            num_inference_steps=steps or self.steps,
            generator=[torch.Generator().manual_seed(case.seed) for case in cases],
            output_type="latent",
        ).images
        return made

    def pictures(self, latents: Tensor) -> Tensor:
        """(cases, 3, 32, 32) in 0…1."""
        return (unpatchify(latents, SIZE, SIZE) / 2 + 0.5).clamp(0, 1)
