"""A small UNet, built as SDXL's is, on pictures of emoji: guidance in one batch, and another kind of model to cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dithooks.demo import load_quietly

if TYPE_CHECKING:
    from .pipeline import UNetPipeline

WEIGHTS = Path(__file__).parents[1] / "weights" / "unet"
STEPS = 28  # of the uncached run
GUIDANCE = 3.0


def load(folder: str | Path = WEIGHTS) -> UNetPipeline:
    """Load the trained pipeline, in float32 on the CPU; nothing is downloaded.

    Args:
        folder: a pipeline folder, such as one that ``python -m bench.unet.train`` wrote.

    Raises:
        FileNotFoundError: there is no pipeline in the folder.
    """
    from .pipeline import UNetPipeline

    pipe = load_quietly(UNetPipeline, folder, "train one with `python -m bench.unet.train`")
    pipe.set_progress_bar_config(disable=True)
    return pipe
