"""The progress bar of a pipeline that is running: how much was reused is written behind it."""

from __future__ import annotations

import sys
import weakref
from typing import Any


class TqdmBar:
    """A bar of tqdm, which is not kept alive.

    Args:
        bar: of tqdm.
    """

    def __init__(self, bar: Any) -> None:
        self._bar = weakref.ref(bar)

    def show(self, reused: int, calls: int) -> None:
        """Write how many calls of the transformer were reused; shown when the bar is next drawn."""
        if (bar := self._bar()) is not None:
            bar.set_postfix_str(f"reused {reused} of {calls}", refresh=False)


def find_bar(steps: int | None, first: int) -> TqdmBar | None:
    """Return the bar that counts the steps of a run, if there is one, and one only: pipelines have a tqdm each.

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
    return TqdmBar(shown[0]) if len(shown) == 1 else None
