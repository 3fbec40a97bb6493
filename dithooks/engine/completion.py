"""Work that comes to its end, though Ctrl-C or another exception from outside breaks it off."""

from __future__ import annotations

from collections.abc import Callable

ATTEMPTS = 20  # an error that comes back as often is not from outside


def complete(work: Callable[[], object]) -> None:
    """Do what an exception has broken off, to its end, though others come meanwhile; the caller raises the first one.

    Args:
        work: what can be done again, from wherever it was broken off.

    Raises:
        BaseException: the work cannot be done, however often.
    """
    for _ in range(ATTEMPTS - 1):
        try:
            work()
            return
        except BaseException:
            continue
    work()
