"""A small Wan on clips of moving emoji: guidance by two calls a step, and frames that have to agree with each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.compare.subject import Case
from bench.video import GUIDANCE, STEPS, load
from bench.video.clips import MOTIONS, NAMES, caption
from bench.video.model import to_clips

SEED, CALIBRATION_SEED = 20_000, 1_000  # of the first; the next has the next
SHIFTS = (0, 3)  # every emoji is tested with two motions, and every motion with ten emoji or eleven
OTHER, EVERY = 5, 2  # every second emoji calibrates, with a motion that it is not tested with


class Video:
    """Clips of eight frames of 24×24; a latent is the clip itself, in −1…1, channels before frames."""

    name, steps, calls, guidance = "video", STEPS, 2, GUIDANCE

    def __init__(self) -> None:
        self.pipe = load()
        others = captions((OTHER,))[::EVERY]
        self.calibration = tuple(Case(words, CALIBRATION_SEED + n) for n, words in enumerate(others))
        self.test = tuple(Case(words, SEED + n) for n, words in enumerate(captions()))

    def draw(self, cases: Sequence[Case], steps: int | None = None) -> Tensor:
        """Latents (cases, 3, 8, 24, 24), each from noise of its own."""
        made: Tensor = self.pipe(
            [str(case.prompt) for case in cases],
            num_inference_steps=steps or self.steps,
            guidance_scale=self.guidance,
            generator=[torch.Generator().manual_seed(case.seed) for case in cases],
            output_type="latent",
        ).frames
        return made

    def pictures(self, latents: Tensor) -> Tensor:
        """(cases, frames, 3, 24, 24) in 0…1."""
        return to_clips(latents)


def captions(shifts: Sequence[int] = SHIFTS) -> list[str]:
    """All emoji, each with some of the motions."""
    return [
        caption(name, MOTIONS[(number + shift) % len(MOTIONS)]) for shift in shifts for number, name in enumerate(NAMES)
    ]
