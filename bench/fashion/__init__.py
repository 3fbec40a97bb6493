"""A class-conditional DiT on Fashion-MNIST, with a classifier that scores what it draws."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dithooks.demo import load_quietly

if TYPE_CHECKING:
    from .pipeline import FashionPipeline

WEIGHTS = Path(__file__).parents[1] / "weights" / "fashion"
STEPS = 28  # of the uncached run
GUIDANCE = 2.0


def load(folder: str | Path = WEIGHTS) -> FashionPipeline:
    """Load the trained pipeline, in float32 on the CPU; nothing is downloaded.

    Args:
        folder: a pipeline folder, such as one that ``python -m bench.fashion.train`` wrote.

    Raises:
        FileNotFoundError: there is no pipeline in the folder.
    """
    from .pipeline import FashionPipeline

    otherwise = "train one with `python -m bench.fashion.train`"
    pipe = load_quietly(FashionPipeline, folder, otherwise, low_cpu_mem_usage=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe
