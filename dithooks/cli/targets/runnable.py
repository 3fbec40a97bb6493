"""The subject of ``dithooks compare`` and ``dithooks profile``: the pipeline that ships, or a user's factory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...blocks.adapter import BlockAdapter
from ...blocks.module_paths import denoisers_of
from ...errors import TargetError, UsageError
from ...validation import shown
from ..option_checks import check_guidance, check_least, check_seed
from .pipeline_loading import DEMO, load_shipped

STEPS, GUIDANCE, SEED = 28, 3.0, 0  # of the demo, where the options are left out


@dataclass(frozen=True)
class RunRequest:
    """A model on the command line with its options, which are for the demo only.

    Args:
        model: ``"demo"``, or a factory.
        prompts: captions to draw; empty for the default ones.
        steps: sampling steps.
        seed: the seed of the first caption.
        guidance: the guidance scale.
        fresh: whether the default captions are those that no plan was searched on, as in ``dithooks demo``.

    Raises:
        TargetError: the model is neither.
        UsageError: an option is out of its range, or given along with a factory.
    """

    model: str
    prompts: tuple[str, ...] = ()
    steps: int | None = None
    seed: int | None = None
    guidance: float | None = None
    fresh: bool = False

    def __post_init__(self) -> None:
        options = {"prompt": self.prompts or None, "steps": self.steps, "seed": self.seed, "guidance": self.guidance}
        check_model(self.model, options)
        check_least(self, steps=1)
        check_seed(self.seed)
        check_guidance(self.guidance)


@dataclass(frozen=True)
class Runnable:
    """A target with a function that runs it, as often as needed.

    Args:
        target: as for :func:`~dithooks.dit_cache`.
        run: draws the same each time, without gradients.
        description: the target and its options, fit for JSON.
        captions: the captions of its pictures; empty if they are not known.
    """

    target: Any
    run: Callable[[], Any]
    description: dict[str, Any]
    captions: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        """The device of the target's weights."""
        target = self.target.target if isinstance(self.target, BlockAdapter) else self.target
        modules = [target] if isinstance(target, nn.Module) else denoisers_of(target).values()
        places = [parameter.device for module in modules for parameter in module.parameters()]
        return next(iter(places), torch.device("cpu"))


def check_model(model: str, demo_options: Mapping[str, object]) -> None:
    """Check that a model is the demo or a factory, and that options of the demo are not given along with a factory.

    Raises:
        TargetError: the model is neither.
        UsageError: an option of the demo is given along with a factory.
    """
    if model != DEMO and ":" not in model:
        raise TargetError(f"there is no model {shown(model)}: give {DEMO}, FILE.py:FACTORY or MODULE:FACTORY")
    given = [name for name, value in demo_options.items() if value is not None]
    if model != DEMO and given:
        raise UsageError(f"--{given[0]} goes with the model {DEMO} only: a factory chooses what it draws")


def runnable(request: RunRequest) -> Runnable:
    """Load the target of a request.

    Raises:
        TargetError: there is no such factory, or it returns something else.
        UsageError, InvalidSetting: the demo's pipeline cannot draw a caption, or a package is missing.
    """
    if request.model == DEMO:
        return _demo(request)
    from .user_factory import of_factory

    subject = of_factory(request.model)
    return Runnable(subject.target, _repeated(subject.run), {"model": request.model})


def _demo(request: RunRequest) -> Runnable:
    pipe, prompts = shipped(request.prompts, request.fresh)
    steps, seed = request.steps or STEPS, SEED if request.seed is None else request.seed
    guidance = GUIDANCE if request.guidance is None else request.guidance
    description = {"model": DEMO, "prompts": list(prompts), "steps": steps, "seed": seed, "guidance": guidance}
    return Runnable(pipe, _repeated(drawing_of(pipe, prompts, steps, seed, guidance)), description, prompts)


def shipped(prompts: tuple[str, ...], fresh: bool) -> tuple[Any, tuple[str, ...]]:
    """Load the pipeline that ships, and choose its captions.

    Args:
        prompts: captions, which are checked; empty for the default ones.
        fresh: whether the default captions are those that no plan was searched on, or those of the calibration.

    Raises:
        UsageError: a package is missing, or a caption has no word.
        InvalidSetting: a caption has a word that the pipeline does not know.
    """
    pipe = load_shipped()
    from ...demo import CALIBRATION
    from ...demo.outcome import PROMPTS

    pipe.set_progress_bar_config(disable=True)
    prompts = prompts or (PROMPTS if fresh else CALIBRATION)
    words = pipe.text_encoder.tokenize(list(prompts))
    if not words.any(1).all():
        raise UsageError(f"a --prompt holds no word: give a caption such as {shown(PROMPTS[0])}")
    return pipe, prompts


def drawing_of(pipe: Any, prompts: tuple[str, ...], steps: int, seed: int, guidance: float) -> Callable[[], object]:
    """A run of the pipeline that ships; each caption has a seed of its own, counted up from ``seed``."""

    def run() -> object:
        return pipe(
            prompts,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed + number) for number in range(len(prompts))],
            output_type="pt",
        )

    return run


def _repeated(draw: Callable[[], object]) -> Callable[[], object]:
    """A run that draws the same each time, though it may take its noise from torch's own generator."""
    seed = torch.initial_seed()

    def run() -> object:
        torch.manual_seed(seed)
        with torch.no_grad():
            return draw()

    return run
