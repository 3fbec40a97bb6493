"""Work that comes to its end, though Ctrl-C or another exception from outside breaks it off."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")
ATTEMPTS = 20  # an error that comes back as often is not from outside


def complete(work: Callable[[], Result]) -> Result:
    """Do some work, again and again until it has ended; then raise what has broken it off first, if anything has.

    Args:
        work: what can be done again, from wherever it was broken off.
    """
    first: BaseException | None = None
    for _ in range(ATTEMPTS):
        try:
            result = work()
            if first is None:
                return result
            break
        except BaseException as error:
            first = first or error
    assert first is not None
    raise first
