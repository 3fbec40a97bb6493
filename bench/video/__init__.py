"""A small Wan video transformer on clips of moving emoji."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .pipeline import ClipPipeline

WEIGHTS = Path(__file__).parents[1] / "weights" / "video"
STEPS = 30  # of the uncached run
GUIDANCE = 3.0


def load(folder: str | Path = WEIGHTS) -> ClipPipeline:
    """Load the trained pipeline, in float32 on the CPU; nothing is downloaded.

    Args:
        folder: a pipeline folder, such as one that ``python -m bench.video.train`` wrote.

    Raises:
        FileNotFoundError: there is no pipeline in the folder.
    """
    from diffusers.utils import logging

    from .pipeline import ClipPipeline

    if not (Path(folder) / "model_index.json").is_file():
        raise FileNotFoundError(f"{folder} holds no pipeline: train one with `python -m bench.video.train`")
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        pipe: ClipPipeline = ClipPipeline.from_pretrained(folder, local_files_only=True)
    finally:
        if bars:
            logging.enable_progress_bar()
    pipe.set_progress_bar_config(disable=True)
    return pipe
