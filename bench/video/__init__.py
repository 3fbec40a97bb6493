"""A small Wan video transformer on clips of moving emoji."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dithooks.demo import load_quietly

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
    from .pipeline import ClipPipeline

    pipe = load_quietly(ClipPipeline, folder, "train one with `python -m bench.video.train`")
    pipe.set_progress_bar_config(disable=True)
    return pipe
