"""The rival that needs no library: as many fewer steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from bench.compare.subject import Subject
from bench.peers.peer import Attached, Method

TIMES = (1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0)


@contextmanager
def fewer(subject: Subject, times: float) -> Iterator[Attached]:
    """So many times fewer, rounded up: not more than are asked for."""
    steps = -int(-subject.steps // times)
    yield Attached(steps=steps, shown=f"{steps} steps")


def methods() -> list[Method]:
    """The one there is."""
    return [Method("no library", "fewer steps", "times fewer", TIMES, fewer)]
