"""What ``dithooks compare`` and ``dithooks profile`` run: the pipeline that ships, or a factory of the user's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...blocks.adapter import BlockAdapter
from ...blocks.module_paths import denoisers_of
from ...errors import TargetError
from .pipeline_loading import DEMO, load_shipped

STEPS, GUIDANCE, SEED = 28, 3.0, 0  # of the demo, where nothing else is asked for


@dataclass(frozen=True)
class Asked:
    """What is to be run, each field the argument of that name; all but the first are of the demo only.

    Args:
        fresh: where no prompts are given, take those that no plan was searched on, as ``dithooks demo`` does.

    Raises:
        TargetError: there can be no such target, a number is out of its range, or goes with the demo only.
    """

    target: str
    prompts: tuple[str, ...] = ()
    steps: int | None = None
    seed: int | None = None
    guidance: float | None = None
    fresh: bool = False

    def __post_init__(self) -> None:
        own = {"prompt": self.prompts or None, "steps": self.steps, "seed": self.seed, "guidance": self.guidance}
        given = [name for name, value in own.items() if value is not None]
        if self.target != DEMO and ":" not in self.target:
            raise TargetError(f"there is no target {self.target!r}: give {DEMO}, FILE.py:FACTORY or MODULE:FACTORY")
        if self.target != DEMO and given:
            raise TargetError(f"--{given[0]} goes with the target {DEMO} only: a factory says itself what it draws")
        for name, least in (("steps", 1), ("seed", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise TargetError(f"--{name} is {value}: it must be {least} or more")
        if (self.seed or 0) >= 2**62:
            raise TargetError(f"--seed is {self.seed}: it must be below 2**62")
        if not math.isfinite(self.guidance or 0):
            raise TargetError(f"--guidance is {self.guidance}: give a number such as 3.0, or 1 for none")


@dataclass(frozen=True)
class Runnable:
    """Something that can be run as often as one likes.

    Args:
        target: as for :func:`~dithooks.dit_cache`.
        run: draws the same each time, without gradients.
        told: what it is, fit for JSON.
        captions: of what it draws; empty where these are not known.
    """

    target: Any
    run: Callable[[], Any]
    told: dict[str, Any]
    captions: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where the target's weights are."""
        target = self.target.target if isinstance(self.target, BlockAdapter) else self.target
        modules = [target] if isinstance(target, nn.Module) else denoisers_of(target).values()
        places = [parameter.device for module in modules for parameter in module.parameters()]
        return next(iter(places), torch.device("cpu"))


def runnable(asked: Asked) -> Runnable:
    """What was asked for, loaded.

    Raises:
        TargetError: there is no such factory, or it returns something else; a word that the demo has never seen.
    """
    if asked.target == DEMO:
        return _demo(asked)
    from .user_factory import of_factory

    subject = of_factory(asked.target)
    return Runnable(subject.target, _repeated(subject.run), {"target": asked.target})


def _demo(asked: Asked) -> Runnable:
    pipe, prompts = shipped(asked.prompts, asked.fresh)
    steps, seed = asked.steps or STEPS, SEED if asked.seed is None else asked.seed
    guidance = GUIDANCE if asked.guidance is None else asked.guidance
    told = {"target": DEMO, "prompts": list(prompts), "steps": steps, "seed": seed, "guidance": guidance}
    return Runnable(pipe, _repeated(drawing_of(pipe, prompts, steps, seed, guidance)), told, prompts)


def shipped(prompts: tuple[str, ...], fresh: bool) -> tuple[Any, tuple[str, ...]]:
    """The pipeline that ships, and what it is to draw.

    Args:
        prompts: to be checked; none: those that searches are made on, or,
        fresh: those that no plan was searched on.

    Raises:
        TargetError: a package is missing, or a prompt has a word that the pipeline has never seen, or none.
    """
    pipe = load_shipped()
    from ...demo import CALIBRATION
    from ...demo.outcome import PROMPTS

    pipe.set_progress_bar_config(disable=True)
    prompts = prompts or (PROMPTS if fresh else CALIBRATION)
    try:
        words = pipe.text_encoder.tokenize(list(prompts))
    except ValueError as error:
        raise TargetError(str(error)) from error
    if not words.any(1).all():
        raise TargetError(f"a --prompt holds no word: give a caption such as {PROMPTS[0]!r}")
    return pipe, prompts


def drawing_of(pipe: Any, prompts: tuple[str, ...], steps: int, seed: int, guidance: float) -> Callable[[], object]:
    """A run of the pipeline that ships, each caption with a seed of its own, from ``seed`` on."""

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
    """Every run has to draw the same, whichever generator it takes its noise from."""
    seed = torch.initial_seed()

    def run() -> object:
        torch.manual_seed(seed)
        with torch.no_grad():
            return draw()

    return run
