"""What ``dithooks generate`` is asked for, and the calls of a pipeline that it comes to."""

from __future__ import annotations

import difflib
import inspect
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.safe_json import strict
from ..errors import TargetError
from .cache_settings import Setting, check_speedup, of_file, of_speedup, spread
from .targets.pipeline_loading import DEMO, Named

OURS = ("prompt", "generator", "output_type", "return_dict")  # arguments that --set has to leave alone


@dataclass(frozen=True)
class GenerateOptions:
    """What ``dithooks generate`` is asked for, each field the argument of that name.

    Raises:
        TargetError: a number out of its range, or arguments that exclude each other.
    """

    model: str
    prompts: tuple[str, ...] = ()
    negative_prompt: str | None = None
    plan: str | None = None
    target: float | None = None
    policy_free: bool = False
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    size: str | None = None
    frames: int | None = None
    fps: float = 16.0
    count: int = 1
    others: tuple[str, ...] = ()
    device: str = "auto"
    dtype: str | None = None
    out: Path | None = None
    json: str | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("seed", 0), ("frames", 1), ("count", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise TargetError(f"--{name} is {value}: it must be {least} or more")
        if self.seed >= 2**62:
            raise TargetError(f"--seed is {self.seed}: it must be below 2**62")
        if not math.isfinite(self.guidance or 0):
            raise TargetError(f"--guidance is {self.guidance}: give a number such as 3.5")
        if not 1 <= self.fps <= 100:
            raise TargetError(f"--fps is {self.fps:g}: it must be from 1 to 100")
        if self.size is not None and not re.fullmatch(r"[1-9]\d{0,5}x[1-9]\d{0,5}", self.size):
            raise TargetError(f"--size is {self.size}: give width and height in pixels, such as 1024x768")
        if self.plan is not None and self.target is not None:
            raise TargetError("--plan goes without --target: a plan says itself which steps are computed")
        if self.policy_free and self.target is None:
            raise TargetError("--policy-free goes with --target: a plan is free of policies by itself")
        if self.target is not None:
            check_speedup(self.target)

    @property
    def pixels(self) -> tuple[int, int] | None:
        """Width and height."""
        width, _, height = (self.size or "").partition("x")
        return (int(width), int(height)) if height else None


@dataclass(frozen=True)
class Task:
    """One run that is to be made, and where its result goes."""

    prompt: str | None
    seed: int
    file: Path


def setting_of(options: GenerateOptions, named: Named) -> Setting | None:
    if options.plan is not None:
        return of_file(options.plan, named.title == DEMO)
    if options.target is None:
        return None
    if not options.policy_free:
        return of_speedup(options.target)
    steps = options.steps or named.takes.get("num_inference_steps")
    if not isinstance(steps, int):
        raise TargetError(
            f"--policy-free has to know the number of steps, which {options.model} does not tell: --steps"
        )
    return spread(options.target, steps)


def call_of(options: GenerateOptions, named: Named, setting: Setting | None) -> tuple[dict[str, Any], list[str]]:
    """The arguments of every run, and those asked for that the pipeline does not take."""
    takes = named.takes
    width, height = options.pixels or (None, None)
    steps = options.steps or (None if setting is None else setting.steps)
    wanted = [
        ("--negative-prompt", "negative_prompt", options.negative_prompt),
        ("--steps", "num_inference_steps", steps),
        ("--guidance", "guidance_scale", options.guidance),
        ("--size", "width", width),
        ("--size", "height", height),
        ("--frames", "video_length" if "video_length" in takes else "num_frames", options.frames),
    ]
    asked = [(option, name, value) for option, name, value in wanted if value is not None]
    call = {name: value for _, name, value in asked if name in takes}
    ignored = [option for option, name, _ in asked if name not in takes]
    ignored += ["--prompt"] if options.prompts and "prompt" not in takes else []
    ignored += ["--seed"] if options.seed and "generator" not in takes else []
    if "output_type" in takes:
        call["output_type"] = "pil"
    for text in options.others:
        name, value = _other(text, named)
        if name in call or name in OURS:
            raise TargetError(f"--set {name} is said already, by another option")
        call[name] = value
    if "prompt" in takes and not options.prompts:
        raise TargetError(f"{named.kind.__name__} draws what a text says: give a --prompt")
    needed = [name for name, default in takes.items() if default is inspect.Parameter.empty]
    if lacking := [name for name in needed if name not in call and name not in OURS]:
        raise TargetError(f"{named.kind.__name__} needs {lacking[0]}, too: give it with --set {lacking[0]}=…")
    return call, list(dict.fromkeys(ignored))


def _other(text: str, named: Named) -> tuple[str, Any]:
    """What ``--set`` says."""
    name, equals, value = text.partition("=")
    if not equals:
        raise TargetError(f"--set is {text}: give NAME=VALUE, such as true_cfg_scale=4.0")
    if name not in named.takes:
        close = difflib.get_close_matches(name, named.takes, n=3)
        hint = f": do you mean {' or '.join(close)}?" if close else f": it takes {', '.join(named.takes)}"
        raise TargetError(f"{named.kind.__name__} takes no {name}{hint}")
    try:
        return name, strict(value)
    except ValueError:
        return name, value


def tasks_of(options: GenerateOptions, named: Named, out: Path) -> list[Task]:
    prompts: list[str | None] = list(options.prompts) if "prompt" in named.takes else []
    each = [prompt for prompt in prompts or [None] for _ in range(options.count)]
    names = [out.with_stem(f"{out.stem}-{n}") for n in range(1, len(each) + 1)] if len(each) > 1 else [out]
    return [Task(prompt, options.seed + n, file) for n, (prompt, file) in enumerate(zip(each, names, strict=True))]
