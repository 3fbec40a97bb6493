"""An end that is kept: what does not fit is not begun, and what takes longer than was thought is broken off."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

AGAIN = 5.0  # seconds: where the first was lost, in a destructor or callback that raises to nobody


class OutOfTime(BaseException):
    """The time is up. No ``Exception``: those are caught by whatever is under way, such as a compiler that goes on."""


class Deadline:
    """So many seconds from ``begun`` on; parts of it have earlier ends.

    Args:
        seconds: from then on.
        begun: by ``time.monotonic()``; left out, now.

    Example:
        >>> deadline = Deadline(60)
        >>> deadline.fits(10), deadline.fits(100), deadline.within(5).fits(10)
        (True, False, False)
    """

    def __init__(self, seconds: float, begun: float | None = None) -> None:
        self.begun = time.monotonic() if begun is None else begun
        self.end = self.begun + seconds

    @property
    def left(self) -> float:
        """Seconds, negative once it is over."""
        return self.end - time.monotonic()

    @property
    def spent(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.begun

    def fits(self, seconds: float) -> bool:
        """Whether what takes so long would end in time."""
        return seconds <= self.left

    def within(self, seconds: float) -> Deadline:
        """An end after so many seconds from now, or this one, if that is earlier."""
        now = time.monotonic()
        return Deadline(min(seconds, self.end - now), now)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Break off what is under way when the time is up, where the system has a timer for that.

        Raises:
            OutOfTime: it is.
        """
        if self.left <= 0:
            raise OutOfTime
        if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
            yield
            return

        def up(number: int, frame: FrameType | None) -> None:
            raise OutOfTime

        handler, since = signal.signal(signal.SIGALRM, up), time.monotonic()
        others, _ = signal.setitimer(signal.ITIMER_REAL, max(self.left, 1e-3), AGAIN)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
            if others:  # who has set a timer before gets it back
                signal.setitimer(signal.ITIMER_REAL, max(others - (time.monotonic() - since), 1e-3))
