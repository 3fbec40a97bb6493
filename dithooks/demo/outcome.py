"""The options of the demo and its results."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import torch

from ..config.cache_plan import CachePlan
from ..errors import InvalidSetting
from ..validation import shown
from .emoji import clean

PROMPTS = (
    "slice of pizza",
    "panda face",
    "red apple",
    "smiling face with sunglasses",
    "tropical fish",
    "fire engine",
    "sunflower",
    "rainbow",
)


@dataclass(frozen=True)
class DemoOptions:
    """The pictures that the demo draws, the cache it draws them with, and the number of timed pairs.

    If ``plan`` is given, ``start`` and ``interval`` are not used; ``plan_name`` is its name in the table.

    Raises:
        InvalidSetting: a number is out of its range, there is no prompt, or a prompt has no word.
    """

    prompts: tuple[str, ...] = PROMPTS
    steps: int = 28
    seed: int = 0
    guidance: float = 3.0
    start: int = 6
    interval: int = 2
    pairs: int = 3
    plan: CachePlan | None = None
    plan_name: str = "plan"

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("seed", 0), ("start", 0), ("interval", 2), ("pairs", 1)):
            if (value := getattr(self, name)) < least:
                raise InvalidSetting(f"{name} is {value}: it must be {least} or more")
        if self.seed >= 2**63:
            raise InvalidSetting(f"seed is {self.seed}: it must be below 2**63")
        if not math.isfinite(self.guidance):
            raise InvalidSetting(f"guidance is {self.guidance}: give a number such as 3.0, or 1 for none")
        if not self.prompts:
            raise InvalidSetting("there is no prompt: give at least one caption")
        for prompt in self.prompts:
            if not clean(prompt):
                raise InvalidSetting(
                    f"prompt {shown(prompt)} holds no word: give a caption such as {shown(PROMPTS[0])}"
                )

    def to_dict(self) -> dict[str, Any]:
        """The options, fit for JSON; those that are not used are None."""
        plan, unused = self.plan, self.plan is not None
        options: dict[str, Any] = {"prompts": list(self.prompts), "steps": self.steps, "seed": self.seed}
        options |= {
            "start": None if unused else self.start,
            "interval": None if unused else self.interval,
            "plan": None,
        }
        if plan is not None:
            options["plan"] = {
                "name": self.plan_name,
                "target": plan.provenance.target,
                "steps": "+".join(piece.picture for piece in plan.pieces),
                "predicted_speedup": plan.provenance.predicted_speedup,
            }
        return options


@dataclass(frozen=True)
class DemoResult:
    """The results of the demo.

    Args:
        plain: the pictures without the cache, (prompts, 3, height, width), floats in 0…1 before any rounding.
        cached: the pictures with the cache, of the same form.
        seconds_plain: the time of each run of all prompts without the cache, in the order of the pairs.
        seconds_cached: the time of each run with the cache.
        blocks_run: the blocks that ran in one run with the cache.
        blocks_total: the blocks that run without the cache.
        bytes_peak: the most bytes that the cache held at a time.
        schedule: the steps of the cached run: ● computed, ○ reused, ◑ computed in the last blocks alone, ◒ in others,
            ◐ in one branch.
        remarks: the warnings of the cache.
    """

    plain: torch.Tensor
    cached: torch.Tensor
    seconds_plain: tuple[float, ...]
    seconds_cached: tuple[float, ...]
    blocks_run: int
    blocks_total: int
    bytes_peak: int
    schedule: str = ""
    remarks: tuple[str, ...] = ()

    @property
    def speedup(self) -> float:
        """The median over the pairs: the two runs of a pair found the machine in the same state."""
        return median(p / c for p, c in zip(self.seconds_plain, self.seconds_cached, strict=True))

    @property
    def allowed(self) -> float:
        """The speed-up if the blocks took all of the time."""
        return self.blocks_total / self.blocks_run

    @property
    def share(self) -> float:
        """The measured speed-up as a share of the allowed one."""
        return self.speedup / self.allowed

    @property
    def psnr(self) -> tuple[float, ...]:
        """The PSNR of each picture in dB; ``inf`` if the cached picture is identical."""
        return psnr(self.cached, self.plain)

    def to_dict(self) -> dict[str, Any]:
        """The numbers without the pictures, fit for JSON: an infinite PSNR becomes None."""

        def finite(value: float) -> float | None:
            return round(value, 3) if math.isfinite(value) else None

        return {
            "seconds_plain": [round(s, 4) for s in self.seconds_plain],
            "seconds_cached": [round(s, 4) for s in self.seconds_cached],
            "speedup": round(self.speedup, 4),
            "speedup_allowed": round(self.allowed, 4),
            "share_of_allowed": round(self.share, 4),
            "blocks_run": self.blocks_run,
            "blocks_total": self.blocks_total,
            "psnr_mean_db": finite(fmean(self.psnr)),
            "psnr_min_db": finite(min(self.psnr)),
            "psnr_db": [finite(value) for value in self.psnr],
            "bytes_peak": self.bytes_peak,
            "schedule": self.schedule,
            "remarks": list(self.remarks),
        }


def psnr(pictures: torch.Tensor, reference: torch.Tensor) -> tuple[float, ...]:
    """Peak signal-to-noise ratio in dB of every picture (batch, …) in 0…1; ``inf`` for equal ones."""
    pictures, reference = (each.cpu().double() for each in (pictures, reference))  # not every device has doubles
    errors = (pictures - reference).square().flatten(1).mean(1)
    return tuple(math.inf if e == 0 else -10 * math.log10(e) for e in errors.tolist())
