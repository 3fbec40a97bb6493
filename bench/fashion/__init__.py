"""A class-conditional DiT on Fashion-MNIST, with a classifier that scores what it draws."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

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
    from diffusers.utils import logging

    from .pipeline import FashionPipeline

    if not (Path(folder) / "model_index.json").is_file():
        raise FileNotFoundError(f"{folder} holds no pipeline: train one with `python -m bench.fashion.train`")
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        pipe: FashionPipeline = FashionPipeline.from_pretrained(folder, low_cpu_mem_usage=False, local_files_only=True)
    finally:
        if bars:
            logging.enable_progress_bar()
    pipe.set_progress_bar_config(disable=True)
    return pipe
