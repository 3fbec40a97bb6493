"""The options of ``dithooks generate``, and the calls of a pipeline that follow from them."""

from __future__ import annotations

import difflib
import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.safe_json import strict
from ..config.transformer_plan import Payload
from ..errors import UsageError
from .cache_settings import CacheSetting, evenly_spread, for_speedup, from_file
from .option_checks import check_guidance, check_least, check_seed, check_speedup
from .targets.pipeline_loading import DEMO, PipelineSource

OURS = ("prompt", "generator", "output_type", "return_dict")  # arguments that --set has to leave alone


@dataclass(frozen=True)
class GenerateOptions:
    """The options of ``dithooks generate``, each field the argument of that name.

    Raises:
        UsageError: a number out of its range, or arguments that exclude each other.
    """

    model: str
    prompts: tuple[str, ...] = ()
    negative_prompt: str | None = None
    plan: str | None = None
    tier: str | None = None
    target: float | None = None
    policy_free: bool = False
    payload: Payload = "residual"
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    size: str | None = None
    frames: int | None = None
    fps: float = 16.0
    count: int = 1
    tiling: bool = False
    others: tuple[str, ...] = ()
    device: str = "auto"
    dtype: str | None = None
    out: Path | None = None
    json: str | None = None
    quiet: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_least(self, steps=1, frames=1, count=1)
        check_seed(self.seed)
        check_guidance(self.guidance)
        if not 1 <= self.fps <= 100:
            raise UsageError(f"--fps is {self.fps:g}: it must be from 1 to 100")
        if self.size is not None and not re.fullmatch(r"[1-9]\d{0,5}x[1-9]\d{0,5}", self.size):
            raise UsageError(f"--size is {self.size}: give width and height in pixels, such as 1024x768")
        if self.plan is not None and self.target is not None:
            raise UsageError("--plan goes without --target: a plan fixes which steps are computed")
        if self.tier is not None and self.plan is None:
            raise UsageError("--tier goes with --plan: it names one of the tiers in the file")
        if self.policy_free and self.target is None:
            raise UsageError("--policy-free goes with --target: a plan is free of policies by itself")
        if self.payload != "residual" and self.target is None:
            raise UsageError(f"--payload {self.payload} goes with --target: a plan says itself what it forecasts")
        if self.target is not None:
            check_speedup(self.target)

    @property
    def pixels(self) -> tuple[int, int] | None:
        """Width and height."""
        width, _, height = (self.size or "").partition("x")
        return (int(width), int(height)) if height else None


@dataclass(frozen=True)
class DrawTask:
    """One run to be made, and the file for its result."""

    prompt: str | None
    seed: int
    file: Path


def setting_of(options: GenerateOptions, source: PipelineSource) -> CacheSetting | None:
    """The way to cache; None for none.

    Raises:
        UsageError: the plan cannot be read, or the number of steps is not known.
    """
    if options.plan is not None:
        return from_file(options.plan, source.title == DEMO, options.tier)
    if options.target is None:
        return None
    if not options.policy_free:
        return for_speedup(options.target, options.payload)
    steps = options.steps or source.takes.get("num_inference_steps")
    if not isinstance(steps, int):
        raise UsageError(
            f"--policy-free has to know the number of steps, for which {options.model} has no default: give --steps"
        )
    return evenly_spread(options.target, steps, options.payload)


def call_of(
    options: GenerateOptions, source: PipelineSource, setting: CacheSetting | None
) -> tuple[dict[str, Any], list[str]]:
    """The arguments of every run, and the options that the pipeline does not take.

    Raises:
        UsageError: the pipeline does not take an argument of ``--set``, or needs one that is not given.
    """
    takes = source.takes
    width, height = options.pixels or (None, None)
    steps = options.steps or (None if setting is None else setting.steps)
    wanted = [
        ("--negative-prompt", "negative_prompt", options.negative_prompt),
        ("--steps", "num_inference_steps", steps),
        ("--guidance", "guidance_scale", options.guidance),
        ("--size", "width", width),
        ("--size", "height", height),
        ("--frames", source.frames, options.frames),
    ]
    asked = [(option, name, value) for option, name, value in wanted if value is not None]
    call = {name: value for _, name, value in asked if name in takes}
    ignored = [option for option, name, _ in asked if name not in takes]
    ignored += ["--prompt"] if options.prompts and "prompt" not in takes else []
    ignored += ["--seed"] if options.seed and "generator" not in takes else []
    if "output_type" in takes:
        call["output_type"] = "pil"
    for text in options.others:
        name, value = _other(text, source)
        if name in call or name in OURS:
            raise UsageError(f"--set {name} is given already, by another option")
        call[name] = value
    if "prompt" in takes and not options.prompts:
        raise UsageError(f"{source.kind.__name__} draws from a text: give a --prompt")
    needed = [name for name, default in takes.items() if default is inspect.Parameter.empty]
    if lacking := [name for name in needed if name not in call and name not in OURS]:
        raise UsageError(f"{source.kind.__name__} needs {lacking[0]}, too: give it with --set {lacking[0]}=…")
    return call, list(dict.fromkeys(ignored))


def _other(text: str, source: PipelineSource) -> tuple[str, Any]:
    """Name and value of one ``--set``."""
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--set is {text}: give NAME=VALUE, such as true_cfg_scale=4.0")
    if name not in source.takes:
        close = difflib.get_close_matches(name, source.takes, n=3)
        hint = f": do you mean {' or '.join(close)}?" if close else f": it takes {', '.join(source.takes)}"
        raise UsageError(f"{source.kind.__name__} takes no {name}{hint}")
    try:
        return name, strict(value)
    except ValueError:
        return name, value


def tasks_of(options: GenerateOptions, source: PipelineSource, out: Path) -> list[DrawTask]:
    """The runs to be made, with a file and a seed for each."""
    prompts: list[str | None] = list(options.prompts) if "prompt" in source.takes else []
    repeated = [prompt for prompt in prompts or [None] for _ in range(options.count)]
    names = [out.with_stem(f"{out.stem}-{n}") for n in range(1, len(repeated) + 1)] if len(repeated) > 1 else [out]
    return [
        DrawTask(prompt, options.seed + n, file) for n, (prompt, file) in enumerate(zip(repeated, names, strict=True))
    ]
