"""The small text-to-emoji pipeline that ships with dithooks: needs the extra ``dithooks[demo]``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .pipeline import EmojiPipeline

WEIGHTS = Path(__file__).parent / "weights" / "pipeline"


def load_pipeline(folder: str | Path = WEIGHTS) -> EmojiPipeline:
    """Load the pipeline that ships with the package, in float32 on the CPU; nothing is downloaded.

    Args:
        folder: a pipeline folder, such as one that ``python -m dithooks.demo.train`` wrote.

    Raises:
        FileNotFoundError: there is no pipeline in the folder.
        ModuleNotFoundError: diffusers is not installed.
    """
    from diffusers.utils import logging

    from .pipeline import EmojiPipeline

    if not (Path(folder) / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no pipeline: reinstall dithooks, or train one with `python -m dithooks.demo.train`"
        )
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a bar for a quarter of a second only litters the terminal
    try:
        pipe: EmojiPipeline = EmojiPipeline.from_pretrained(folder, low_cpu_mem_usage=False, local_files_only=True)
    finally:
        if bars:
            logging.enable_progress_bar()
    return pipe
