"""The model and run that a plan was made for, and how it was found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any

from ..errors import InvalidSetting, WrongType
from ..validation import check_bool, check_count, check_number, check_text, set_field, shown


@dataclass(frozen=True)
class PlanTarget:
    """The model and the run that a plan was made for.

    Args:
        model: class of the transformer; several are joined by "+".
        fingerprint: fingerprint of all transformers, as in ``handle.config``; attaching to another model is refused.
        blocks: number of blocks of all transformers together.
        dtype: dtype of the weights, such as ``"bfloat16"``.
        steps: number of steps of the run.
        scheduler: class of the scheduler; ``None`` where it is not known.
        size: shape of the latents, without the batch.

    Raises:
        TypeError, ValueError: a field is of the wrong type or out of range.
    """

    model: str
    fingerprint: str
    blocks: int
    dtype: str
    steps: int
    scheduler: str | None
    size: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("model", "fingerprint", "dtype"):
            set_field(self, name, check_text(name, getattr(self, name)))
        set_field(self, "dtype", self.dtype.removeprefix("torch."))
        for name in ("blocks", "steps"):
            set_field(self, name, check_count(name, getattr(self, name), 1))
        if self.scheduler is not None:
            check_text("scheduler", self.scheduler)
        size: Any = self.size
        if not isinstance(size, Iterable) or isinstance(size, str):
            raise WrongType(f"size must be the shape of the latents without the batch, not {shown(size)}")
        set_field(self, "size", tuple(check_count("a length in size", length, 1) for length in size))


@dataclass(frozen=True)
class Elsewhere:
    """How good a plan is at one of the numbers of steps that it was fitted for, on the pictures it was fitted on.

    Args:
        steps: number of steps of the run.
        psnr: PSNR in dB to the uncached run of as many steps, with the weights that were fitted there.
        left_out: the same with weights carried over from the other numbers of steps, as if this one had not been
            fitted; ``None``: there are too few.

    Raises:
        TypeError, ValueError: a field is of the wrong type or out of range.

    Example:
        >>> print(Elsewhere(20, 52.5, 49.0))
        at 20 steps: PSNR 52.50 dB; 49.00 dB with weights of the other numbers of steps
    """

    steps: int
    psnr: float | None = field(metadata={"infinite": True})
    left_out: float | None = field(default=None, metadata={"infinite": True})

    def __post_init__(self) -> None:
        set_field(self, "steps", check_count("steps", self.steps, 1))
        for name in ("psnr", "left_out"):
            if (value := getattr(self, name)) is not None and value != inf:
                set_field(self, name, check_number(name, value, -1e6))

    def __str__(self) -> str:
        psnr = "it cannot be run" if self.psnr is None else f"PSNR {self.psnr:.2f} dB"
        left_out = (
            "" if self.left_out is None else f"; {self.left_out:.2f} dB with weights of the other numbers of steps"
        )
        return f"at {self.steps} steps: {psnr}{left_out}"


@dataclass(frozen=True)
class Provenance:
    """How a plan was found, and what was measured of it. ``None`` stands for a measure that was not taken.

    Args:
        date: date of the search.
        versions: versions of the packages in use, by name.
        machine: name of the machine or its accelerator.
        samples: number of runs that were recorded.
        target: the speed-up that was asked for.
        method: method of the search.
        predicted_speedup: speed-up of a run, predicted from block times.
        predicted_error: error of a run's result, predicted by the search.
        measured_speedup: speed-up of one run, in time, or in block executions where the target is in these.
        psnr: PSNR in dB between the pictures with and without the cache; infinite where they are the same.
        relative_l1: mean |difference| over mean |without the cache|.
        ssim: structural similarity.
        reached: whether the target was reached.
        lpips: shift-tolerant LPIPS, a learned distance that is 0 for equal pictures.
        worst: PSNR in dB of the picture that came out worst.
        elsewhere: how good it is at each number of steps, if it was fitted for several.
        psnr_error: standard error in dB of ``psnr``, as the mean of pictures that differ.

    Raises:
        TypeError, ValueError: a field is of the wrong type or out of range.
    """

    date: str
    versions: Mapping[str, str] = field(hash=False)
    machine: str
    samples: int
    target: float
    method: str
    predicted_speedup: float
    predicted_error: float
    measured_speedup: float | None = None
    psnr: float | None = field(default=None, metadata={"infinite": True})
    relative_l1: float | None = None
    ssim: float | None = None
    reached: bool = True
    lpips: float | None = field(default=None, metadata={"written": "where given"})
    worst: float | None = field(default=None, metadata={"written": "where given", "infinite": True})
    elsewhere: tuple[Elsewhere, ...] = field(default=(), metadata={"written": "where given"})
    psnr_error: float | None = field(default=None, metadata={"written": "where given"})

    def __post_init__(self) -> None:
        for name in ("date", "machine", "method"):
            set_field(self, name, check_text(name, getattr(self, name)))
        items = self.versions.items() if isinstance(self.versions, Mapping) else [(None, None)]
        if not all(isinstance(part, str) for item in items for part in item):
            raise WrongType(f"versions must be a mapping of packages to versions, not {shown(self.versions)}")
        set_field(self, "versions", dict(self.versions))
        set_field(self, "samples", check_count("samples", self.samples, 1))
        for name, least, strictly in _LEAST:
            value = getattr(self, name)
            is_unknown = value is None and name not in ("target", "predicted_speedup", "predicted_error")
            if not is_unknown and not (name in ("psnr", "worst") and value == inf):
                set_field(self, name, check_number(name, value, least, strictly=strictly))
        if self.ssim is not None and self.ssim > 1:
            raise InvalidSetting(f"ssim={self.ssim:g} is out of range: it must be at most 1")
        check_bool("reached", self.reached)
        elsewhere: Any = self.elsewhere
        if not isinstance(elsewhere, (tuple, list)) or not all(isinstance(each, Elsewhere) for each in elsewhere):
            raise WrongType(f"elsewhere must be a tuple of Elsewhere, not {shown(self.elsewhere)}")
        set_field(self, "elsewhere", tuple(elsewhere))

    @property
    def promised(self) -> float | None:
        """The mean PSNR in dB that other pictures are likely to have at least: ``psnr``, less its standard error.

        Example:
            >>> found = Provenance("2025-01-31", {}, "CPU", 16, 3.0, "by hand", 3.1, 0.0, psnr=54.2, psnr_error=2.0)
            >>> found.promised
            52.2
        """
        return None if self.psnr is None else self.psnr - (self.psnr_error or 0.0)


_LEAST = (  # of each number; whether it must be above
    ("target", 0, True),
    ("predicted_speedup", 0, True),
    ("predicted_error", 0, False),
    ("measured_speedup", 0, True),
    ("psnr", -1e6, False),
    ("relative_l1", 0, False),
    ("ssim", -1, False),
    ("lpips", 0, False),
    ("worst", -1e6, False),
    ("psnr_error", 0, False),
)
