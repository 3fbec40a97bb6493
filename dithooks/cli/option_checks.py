"""Checks of options that several commands have in common."""

from __future__ import annotations

import argparse
import math
from collections.abc import Collection
from typing import TYPE_CHECKING

from ..errors import DitHooksError, UsageError

if TYPE_CHECKING:
    from ..recording.image_metrics import Metric

SEEDS = 2**62  # seeds count up from the one that is given, and have to fit into 63 bits


def add_metric(parser: argparse.ArgumentParser) -> None:
    """Add the option of a metric beside PSNR and SSIM."""
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        choices=("lpips",),
        dest="metrics",
        help="measure this, too: lpips is a learned distance, shift-tolerant LPIPS, which needs dithooks[lpips]",
    )


def check_installed(metrics: Collection[Metric]) -> None:
    """Check that a metric can be computed here.

    Raises:
        UsageError: a package that it needs is not installed.
    """
    from ..recording.image_metrics import check_metrics

    try:
        check_metrics(metrics)
    except DitHooksError as error:
        raise UsageError(str(error)) from error


def check_least(options: object, **least: int) -> None:
    """Check that options are not below their least values; None is an option that was left out.

    Args:
        options: an object with an attribute for each option.
        least: the smallest value allowed, by name of the option.

    Raises:
        UsageError: an option is smaller.
    """
    for name, smallest in least.items():
        if (value := getattr(options, name)) is not None and value < smallest:
            raise UsageError(f"--{name.replace('_', '-')} is {value}: it must be {smallest} or more")


def check_seed(seed: int | None) -> None:
    """Check that a seed leaves room for those that follow it.

    Raises:
        UsageError: it is negative or too large.
    """
    if seed is not None and seed < 0:
        raise UsageError(f"--seed is {seed}: it must be 0 or more")
    if (seed or 0) >= SEEDS:
        raise UsageError(f"--seed is {seed}: it must be below 2**62")


def check_psnr(options: object, *names: str) -> None:
    """Check that options of PSNR are numbers of dB; None is an option that was left out.

    Args:
        options: an object with an attribute for each option.
        names: of the options.

    Raises:
        UsageError: an option is negative, or not finite.
    """
    for name in names:
        if (value := getattr(options, name)) is not None and not 0 <= value < math.inf:
            raise UsageError(f"--{name.replace('_', '-')} is {value:g}: give a number of dB, such as 40")


def check_guidance(guidance: float | None) -> None:
    """Check that a guidance scale is a finite number.

    Raises:
        UsageError: it is not.
    """
    if not math.isfinite(guidance or 0):
        raise UsageError(f"--guidance is {guidance}: give a number such as 3.0, or 1 for none")


def check_speedup(speedup: float) -> None:
    """Check that a speed-up is one.

    Raises:
        UsageError: it is 1 or less, or infinite.
    """
    if not 1 < speedup < math.inf:
        raise UsageError(f"--target is {speedup:g}: give a number above 1, such as 2 for twice as fast")
