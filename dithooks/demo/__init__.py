"""The small text-to-emoji pipeline that ships with dithooks: needs the extra ``dithooks[demo]``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..config.cache_plan import CachePlan
from ..errors import MissingFile
from ..validation import shown

if TYPE_CHECKING:
    from .pipeline import EmojiPipeline

Pipeline = TypeVar("Pipeline")
WEIGHTS = Path(__file__).parent / "weights" / "pipeline"
PLANS = Path(__file__).parent / "plans"
PLAN = "2x"  # the plan that the demo uses by default
CALIBRATION = ("cat face", "watermelon", "taxi", "grinning face")  # the captions on which its plans were searched


def load_pipeline(folder: str | Path = WEIGHTS) -> EmojiPipeline:
    """Load the pipeline that ships with the package, in float32 on the CPU; nothing is downloaded.

    Args:
        folder: a pipeline folder, such as one that ``python -m dithooks.demo.train`` wrote.

    Raises:
        FileNotFoundError: there is no pipeline in the folder.
        ModuleNotFoundError: diffusers is not installed.
    """
    from .pipeline import EmojiPipeline

    otherwise = "reinstall dithooks, or train one with `python -m dithooks.demo.train`"
    return load_quietly(EmojiPipeline, folder, otherwise, low_cpu_mem_usage=False)


def load_quietly(kind: type[Pipeline], folder: str | Path, otherwise: str, **options: bool) -> Pipeline:
    """Load a pipeline from a folder, in float32 on the CPU, without a progress bar.

    Args:
        kind: the pipeline's class.
        folder: its folder.
        otherwise: the remedy to name if there is no pipeline in the folder.
        options: options of ``from_pretrained``.

    Raises:
        FileNotFoundError: there is no pipeline in the folder.
    """
    from diffusers.utils import logging

    if not (Path(folder) / "model_index.json").is_file():
        raise FileNotFoundError(f"{folder} holds no pipeline: {otherwise}")
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        pipe: Pipeline = kind.from_pretrained(folder, local_files_only=True, **options)  # type: ignore[attr-defined]
    finally:
        if bars:
            logging.enable_progress_bar()
    return pipe


def load_plan(name_or_path: str | Path = PLAN) -> CachePlan:
    """Load a plan that ships for the demo's pipeline, or one from a file.

    Args:
        name_or_path: ``"1.5x"``, ``"2x"`` or ``"3x"``, which ship with the package, or a file that ``plan.save`` wrote.

    Raises:
        FileNotFoundError: there is neither a plan nor a file of that name.
        TypeError, ValueError: the file holds no plan.

    Example:
        >>> load_plan("2x").provenance.target
        2.0
    """
    names = sorted(path.stem for path in PLANS.glob("*.json"))
    if isinstance(name_or_path, str) and name_or_path in names:
        return CachePlan.load(PLANS / f"{name_or_path}.json")
    if not Path(name_or_path).is_file():
        raise MissingFile(
            f"there is no plan {shown(str(name_or_path))}: give a file that a search wrote, or one of those that ship "
            f"with dithooks: {', '.join(names)}"
        )
    return CachePlan.load(name_or_path)
