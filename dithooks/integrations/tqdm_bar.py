"""The progress bar of a pipeline that is running: how much was reused is written behind it."""

from __future__ import annotations

import sys
import weakref
from typing import Any


def find_bar(steps: int | None, first: int) -> weakref.ref[Any] | None:
    """The bar that counts the steps of a run, if there is one, and one only: diffusers' pipelines have a tqdm each.

    Args:
        steps: of the run's schedule.
        first: the step it begins at; a bar counts from there.
    """
    kind = getattr(sys.modules.get("tqdm"), "tqdm", None)
    if kind is None or steps is None:
        return None
    try:
        bars = [bar for bar in tuple(getattr(kind, "_instances", ())) if bar.total in (steps, steps - first)]
    except (AttributeError, RuntimeError):  # another thread opened or closed one meanwhile
        return None
    shown = [bar for bar in bars if not bar.disable and bar.n < bar.total]
    return weakref.ref(shown[0]) if len(shown) == 1 else None


def write_behind(bar: weakref.ref[Any] | None, reused: int, calls: int) -> None:
    """Say how many calls of the transformer were reused; shown when the bar is next drawn."""
    if bar is not None and (shown := bar()) is not None:
        shown.set_postfix_str(f"reused {reused} of {calls}", refresh=False)
