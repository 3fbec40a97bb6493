"""The emoji pipeline distilled to few steps, as the turbo models are that people draw with: 4, 6 or 8 calls in all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dithooks.demo import load_quietly

if TYPE_CHECKING:
    from .pipeline import FewStepPipeline

WEIGHTS = Path(__file__).parents[1] / "weights" / "few_steps"
STEPS = (8, 6, 4)  # that it is trained for


def load(folder: str | Path = WEIGHTS) -> FewStepPipeline:
    """Load the distilled pipeline, in float32 on the CPU; nothing is downloaded.

    Args:
        folder: a pipeline folder, such as one that ``python -m bench.few_steps.train`` wrote.

    Raises:
        FileNotFoundError: there is no pipeline in the folder.
    """
    from .pipeline import FewStepPipeline

    pipe = load_quietly(FewStepPipeline, folder, "distil one with `python -m bench.few_steps.train`")
    pipe.set_progress_bar_config(disable=True)
    return pipe
