"""What each block of a transformer costs, measured without waiting for the device in between, where it can do so."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import torch
from torch import nn

from ..environment.machine import synchronize

OTHER, SAMPLING = "other", "sampling"


def caught_up() -> None:
    """Wait until the accelerator, if there is one, has done what it was given."""
    synchronize()


def has_timed_events(device: torch.device) -> bool:
    """Whether a device can tell the time between two events in its stream; not all backends can."""
    if device.type in ("cpu", "meta"):
        return False
    try:
        since, until = (torch.Event(device=device, enable_timing=True) for _ in range(2))
        since.record()
        until.record()
        until.synchronize()
        return bool(since.elapsed_time(until) >= 0)
    except (RuntimeError, NotImplementedError):
        return False


class Stopwatch:
    """Attributes the time from each mark to the next to what was said at the former.

    On the host it is the clock that is read; on an accelerator, events are put into its stream, and read at the end.
    One without such events is waited for at every mark, and the clock is read then.

    Args:
        module: whose device counts.
    """

    def __init__(self, module: nn.Module) -> None:
        tensor = next(iter(module.parameters()), None)
        self._device = torch.device("cpu") if tensor is None else tensor.device
        self._events = has_timed_events(self._device)
        self._marks: list[tuple[Any, int | str | None]] = []
        self._spent: Counter[int | str] = Counter()

    def mark(self, what: int | str | None) -> None:
        """From here on, time counts for a block, by its number, for ``OTHER``, ``SAMPLING``, or, ``None``, nothing."""
        if self._events:
            event = torch.Event(device=self._device, enable_timing=True)
            event.record()
            self._marks.append((event, what))
            return
        synchronize(self._device)
        now = time.perf_counter() * 1e3
        if self._marks:
            since, before = self._marks.pop()
            if before is not None:
                self._spent[before] += now - since
        self._marks.append((now, what))

    def wait(self) -> None:
        """Let the device catch up, and read what it was marked with."""
        if not self._events:
            return
        if self._marks:
            self._marks[-1][0].synchronize()
        for (since, what), (until, _) in zip(self._marks, self._marks[1:], strict=False):
            if what is not None:
                self._spent[what] += since.elapsed_time(until)
        self._marks = self._marks[-1:]

    def spent(self, what: int | str) -> float:
        """Milliseconds that count for it."""
        return float(self._spent[what])
