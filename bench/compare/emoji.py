"""The pipeline that ships: a FLUX of 4 + 8 blocks that draws emoji, guidance by two calls a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.compare.subject import Case
from dithooks.demo import CALIBRATION as SHIPPED
from dithooks.demo import load_pipeline
from dithooks.demo.emoji import SIZE
from dithooks.demo.model import PATCH, unpatchify

CALIBRATION = (  # what the plans that ship were found with, and others of the rest that are drawn at random
    *SHIPPED,
    "shocked face with exploding head",
    "hear no evil monkey",
    "popcorn",
    "seedling",
    "brown heart",
    "goat",
    "fog",
    "bell pepper",
    "hot pepper",
    "comet",
    "manual wheelchair",
    "wine glass",
)
TEST = (  # drawn at random from all that the pipeline was trained on but those it is calibrated with
    "anger symbol",
    "bird",
    "bison",
    "boar",
    "bouquet",
    "cat",
    "chopsticks",
    "clinking beer mugs",
    "collision symbol",
    "cricket",
    "croissant",
    "dotted line face",
    "drooling face",
    "falafel",
    "fearful face",
    "fish",
    "fish cake with swirl design",
    "flatbread",
    "fly",
    "flying saucer",
    "fried shrimp",
    "glass of milk",
    "grinning cat face with smiling eyes",
    "grinning face with star eyes",
    "heart on fire",
    "hibiscus",
    "honeybee",
    "hot dog",
    "hugging face",
    "ice cream",
    "ice cube",
    "kiss mark",
    "kiwifruit",
    "left speech bubble",
    "lizard",
    "lotus",
    "love letter",
    "mate drink",
    "melon",
    "motorcycle",
    "nest with eggs",
    "overheated face",
    "palm tree",
    "peacock",
    "pensive face",
    "pineapple",
    "pink heart",
    "raccoon",
    "red apple",
    "rooster",
    "sheep",
    "shooting star",
    "shortcake",
    "smiling face with halo",
    "smiling face with open mouth and tightly closed eyes",
    "sneezing face",
    "sparkling heart",
    "teapot",
    "train",
    "tram car",
    "umbrella with rain drops",
    "vertical traffic light",
    "wilted flower",
    "worried face",
)
SEED, CALIBRATION_SEED = 20_000, 1_000  # of the first; the next has the next


class Emoji:
    """32×32 pictures, or of another ``size``; a latent is a picture's 4×4 patches of pixels."""

    name, steps, calls, guidance, size = "emoji", 28, 2, 3.0, SIZE

    def __init__(self) -> None:
        (pipe := load_pipeline()).set_progress_bar_config(disable=True)
        self.pipe = pipe
        self.calibration = tuple(Case(caption, CALIBRATION_SEED + n) for n, caption in enumerate(CALIBRATION))
        self.test = tuple(Case(caption, SEED + n) for n, caption in enumerate(TEST))

    def draw(self, cases: Sequence[Case], steps: int | None = None) -> Tensor:
        """Latents (cases, 64, 48), each from noise of its own."""
        shape = (1, (self.size // PATCH) ** 2, 3 * PATCH * PATCH)
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(case.seed)) for case in cases]
        made: Tensor = self.pipe(
            [str(case.prompt) for case in cases],
            num_inference_steps=steps or self.steps,
            guidance_scale=self.guidance,
            latents=torch.cat(noise),
            output_type="latent",
        ).images
        return made

    def pictures(self, latents: Tensor) -> Tensor:
        """(cases, 3, 32, 32) in 0…1."""
        return (unpatchify(latents, self.size, self.size) / 2 + 0.5).clamp(0, 1)
